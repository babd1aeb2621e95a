"""The attention layer of a hybrid SSD model against a loop over its tokens, in float64; what its cache costs."""

import cmath
import math

import pytest
import torch
import torch.nn.functional as F
from parity_cases import BOUND, error, gradient_errors, shake, through, tokens, whole
from torch.utils._python_dispatch import TorchDispatchMode

from scrubjay import SSDCache, SSDConfig, SSDForCausalLM
from scrubjay.modeling.caches.attention_layer import room

VOCAB = 29
HEADS = dict(num_heads=4, num_heads_kv=2, head_dim=6, rotary_emb_dim=4)
SIZES = {
    "grouped": HEADS,
    "one key head": HEADS | dict(num_heads_kv=1),
    "as many key heads": HEADS | dict(num_heads_kv=4),
    "all turned": HEADS | dict(rotary_emb_dim=6),
    "nothing turned": HEADS | dict(rotary_emb_dim=0),
    "interleaved": HEADS | dict(rotary_emb_interleaved=True, rotary_emb_base=50.0),
    "no convolution": HEADS | dict(d_conv=0),
    "one tap": HEADS | dict(d_conv=1),
    "two taps": HEADS | dict(d_conv=2),
    "biases": HEADS | dict(qkv_proj_bias=True, out_proj_bias=True),
    "another scale": HEADS | dict(softmax_scale=1.3),
    "a network beside": HEADS | dict(mlp_dim=5),
    "derived": {},
}
PIECES = {"steps": [1] * 40, "prefill and steps": [35] + [1] * 5, "pieces": [2, 1, 1, 3, 1, 4, 5, 1, 1, 20, 1]}


def build(attn_cfg=HEADS, **more):
    sizes = dict(hidden_size=16, num_hidden_layers=1, attn_layer_idx=[0], vocab_size=VOCAB, state_size=6, head_dim=8)
    config = SSDConfig(**sizes | {"attn_cfg": attn_cfg, "pad_token_id": None} | more)
    return shake(SSDForCausalLM(config).double())


def norm(x, weight, eps):
    return x / (x.square().mean() + eps).sqrt() * weight


def turned(x, position, sizes):
    """Pairs of channels as complex numbers, each turned by its angle."""
    R, out = sizes["rotary_emb_dim"], list(x)
    for i in range(R // 2):
        a, b = (2 * i, 2 * i + 1) if sizes["rotary_emb_interleaved"] else (i, i + R // 2)
        angle = cmath.exp(1j * position * sizes["rotary_emb_base"] ** (-2 * i / R))
        out[a], out[b] = x[a] * angle.real - x[b] * angle.imag, x[a] * angle.imag + x[b] * angle.real
    return torch.stack(out)


def attention(w, sizes, xs, at="model.layers.0.mixer."):
    """xs: the inputs of a row, one after the other."""
    H, K, P = sizes["num_heads"], sizes["num_heads_kv"], sizes["head_dim"]
    packed = [F.linear(x, w[f"{at}in_proj.weight"], w.get(f"{at}in_proj.bias")) for x in xs]
    C, keys, values, outs = (H + 2 * K) * P, [], [], []
    for t, inputs in enumerate(packed):
        qkv = inputs[:C]
        if sizes["d_conv"]:
            taps = w[f"{at}conv1d.weight"][:, 0]
            qkv = w[f"{at}conv1d.bias"] + sum(
                taps[:, -1 - i] * packed[t - i][:C] for i in range(min(sizes["d_conv"], t + 1))
            )
        heads = [qkv[i * P : (i + 1) * P] for i in range(H + 2 * K)]
        keys.append([turned(k, t, sizes) for k in heads[H : H + K]])
        values.append(heads[H + K :])
        found = []
        for h in range(H):
            q, group = turned(heads[h], t, sizes), h // (H // K)
            scale = P**-0.5 if sizes["softmax_scale"] is None else sizes["softmax_scale"]
            scores = torch.stack([scale * (q * k[group]).sum() for k in keys]).softmax(0)
            found.append(sum(score * v[group] for score, v in zip(scores, values, strict=True)))
        if sizes["mlp_dim"]:
            up, gate = inputs[C:].chunk(2)
            found.append(up * gate * torch.sigmoid(gate))
        outs.append(F.linear(torch.cat(found), w[f"{at}out_proj.weight"], w.get(f"{at}out_proj.bias")))
    return outs


def logits_of(w, config, ids, wrong=""):
    """(B, T, V) of a model with one block, of attention."""
    rows, eps = [], config.layer_norm_epsilon
    for row in ids.tolist():
        xs = [w["model.embed_tokens.weight"][token] for token in row]
        found = attention(w, config.attn_cfg, [norm(x, w["model.layers.0.norm.weight"], eps) for x in xs])
        xs = [x + y for x, y in zip(xs, found, strict=True)]
        if config.mlp_size:
            halves = [
                F.linear(norm(x, w["model.layers.0.norm2.weight"], eps), w["model.layers.0.mlp.fc1.weight"]) for x in xs
            ]
            gated = [up * gate * torch.sigmoid(gate) for up, gate in (h.chunk(2) for h in halves)]
            xs = [x + F.linear(y, w["model.layers.0.mlp.fc2.weight"]) for x, y in zip(xs, gated, strict=True)]
        rows.append(torch.stack([norm(x, w["model.norm.weight"], eps) for x in xs]))
    return F.linear(torch.stack(rows), w.get("lm_head.weight", w["model.embed_tokens.weight"]))


@pytest.mark.parametrize("name", SIZES)
def test_attention_equals_a_loop_over_tokens(name):
    model, ids = build(SIZES[name]), tokens(VOCAB, 2, 40)
    want = logits_of(model.state_dict(), model.config, ids)
    assert error(whole(model, ids), want) < BOUND
    for pieces in PIECES.values():
        assert error(through(model, ids, pieces), want) < BOUND


def test_an_mlp_after_attention_equals_a_loop_over_tokens():
    model, ids = build(intermediate_size=100), tokens(VOCAB, 2, 12)
    assert model.model.layers[0].mlp.fc1.weight.shape == (256, 16)
    assert error(whole(model, ids), logits_of(model.state_dict(), model.config, ids)) < BOUND


@pytest.mark.parametrize("name", ["grouped", "biases", "a network beside", "interleaved", "no convolution"])
def test_gradients_of_attention_equal_those_of_a_loop(name):
    model = build(SIZES[name])
    errors = gradient_errors(model, logits_of, tokens(VOCAB, 2, 12))
    assert max(errors.values()) < BOUND, errors


@torch.no_grad()
@pytest.mark.parametrize("name", ["grouped", "two taps", "no convolution"])
def test_a_second_turn_beside_padding_of_every_kind_is_what_each_row_gives_alone(name):
    """Two pieces, each with its own padding, then steps: a row's tokens lie at the slots of their numbers."""
    model, ids = build(SIZES[name]), tokens(VOCAB, 3, 45)
    mask = torch.rand(3, 45, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[:, [12, 33]] = True
    mask[:, 40:] = True
    found = through_with(model, ids, mask, [25, 15, 1, 1, 1, 1, 1])
    for row in range(3):
        want = logits_of(model.state_dict(), model.config, ids[row][mask[row]][None])
        assert error(found[row][mask[row]], want[0]) < BOUND


def through_with(model, ids, mask, pieces):
    cache, found, stop = SSDCache(model), [], 0
    for piece in ids.split(pieces, 1):
        stop += piece.shape[1]
        found.append(model(piece, attention_mask=mask[:, :stop].long(), cache=cache).logits)
    assert torch.equal(cache.layers[0].counts, mask.sum(1))
    for held in (cache.layers[0].keys, cache.layers[0].values):
        beyond = torch.arange(held.shape[2]) >= mask.sum(1)[:, None]
        assert not held.transpose(1, 2)[beyond].any()
    return torch.cat(found, 1)


def test_a_prompt_in_segments_equals_one_pass():
    """Without gradients a long one is taken in segments, which go on from one cache."""
    model, ids = build(num_hidden_layers=2, intermediate_size=20), tokens(VOCAB, 2, 4500)
    with torch.no_grad():
        got = whole(model, ids)
        mask = torch.ones_like(ids)
        mask[0, 100:1000] = 0
        padded = model(ids, attention_mask=mask).logits[0][mask[0].bool()]
        alone = whole(model, ids[:1, mask[0].bool()])[0]
    assert error(got, model(ids).logits.detach()) < BOUND
    assert error(padded, alone) < BOUND


@torch.no_grad()
def test_long_pieces_beside_a_past_are_solved_in_blocks_of_queries():
    model, ids = build(), tokens(VOCAB, 1, 1500)
    want = whole(model, ids)
    for pieces in ([700, 800], [1, 1499], [1499, 1]):
        assert error(through(model, ids, pieces), want) < BOUND


def test_room_is_enough_grows_and_wastes_an_eighth_at_most():
    sizes = [room(n) for n in range(1, 20_000)]
    assert sizes == sorted(sizes)
    assert all(n <= slots <= max(n * 9 / 8, n + 63) for n, slots in enumerate(sizes, 1))
    assert room(10**9) <= 10**9 * 9 / 8
    assert len(set(sizes)) < 80  # so often is a cache of 20,000 tokens copied
    for n in (1, 64, 65, 512, 513, 5000):
        assert room(room(n)) == room(n)


@torch.no_grad()
def test_bytes_are_those_of_the_docstring():
    model = SSDForCausalLM(
        SSDConfig(hidden_size=32, num_hidden_layers=3, vocab_size=VOCAB, attn_layer_idx=[1], attn_cfg=HEADS)
    ).eval()
    c = model.config
    ssd = 3 * (c.inner_size + 2 * c.n_groups * c.state_size) * 4 + c.num_heads * c.state_size * c.head_dim * 4 + 8
    attention = 3 * (4 + 2 * 2) * 6 * 4 + 8
    each = 2 * 2 * 6 * 4
    assert SSDCache.row_bytes(c, torch.float32) == (2 * ssd + attention, each)
    for batch, length in ((1, 1), (2, 64), (3, 65), (1, 300)):
        cache = model(tokens(VOCAB, batch, length), use_cache=True).cache
        assert cache.nbytes == batch * (2 * ssd + attention + room(length) * each)
        assert sum(x.nbytes for x in cache.layers[1].tensors().values()) == batch * (attention + length * each)


class Largest(TorchDispatchMode):
    """Notes the largest memory that an operation inside it makes."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return out


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_copies_no_keys(dtype):
    model, ids = build(HEADS | dict(head_dim=64)).to(dtype), tokens(VOCAB, 1, 1000)
    cache = SSDCache(model)
    model(ids, cache=cache, logits_to_keep=1)
    layer = cache.layers[0]
    at = layer.keys.data_ptr(), layer.values.data_ptr()
    with Largest() as largest:
        model(ids[:, :1], cache=cache)
    assert at == (layer.keys.data_ptr(), layer.values.data_ptr())
    assert largest.nbytes < layer.keys.nbytes // 4
    steps = {layer.keys.data_ptr()}
    for step in range(200):
        model(ids[:, step : step + 1], cache=cache)
        steps.add(layer.keys.data_ptr())
    assert len(steps) <= 4


@torch.no_grad()
def test_a_whole_text_takes_no_memory_of_its_square():
    model, ids = build(), tokens(VOCAB, 1, 4000)
    with Largest() as largest:
        model(ids, logits_to_keep=1)
    assert largest.nbytes < 4000 * 4000 * 8 // 4


@torch.no_grad()
def test_the_convolution_goes_on_from_its_inputs():
    """The authors' prefill keeps its outputs, and the three tokens after it come out wrong."""
    model, ids = build(), tokens(VOCAB, 1, 20)
    cache = SSDCache(model)
    model(ids, cache=cache)
    kept = model.model.layers[0]
    x = kept.norm(model.model.embed_tokens(ids[:, -3:]))
    assert torch.allclose(cache.layers[0].conv, kept.mixer.in_proj(x), atol=1e-12)


@torch.no_grad()
def test_positions_far_into_a_text_are_turned_exactly():
    """The angle at a million tokens, in float64; what lies before them is not read."""
    from scrubjay.kernels.rotary import rotary_table

    cos, sin = rotary_table(torch.tensor([[10**6]]), 64, 1e4, torch.float64)
    for i in (0, 7, 31):
        angle = math.fmod(10**6 * 1e4 ** (-2 * i / 64), 2 * math.pi)
        assert abs(float(cos[0, 0, i]) - math.cos(angle)) < 1e-9
        assert abs(float(sin[0, 0, i]) - math.sin(angle)) < 1e-9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_layer_idx": [4]}, "0 to 3 of num_hidden_layers = 4; got 4"),
        ({"attn_layer_idx": [-1, 2]}, "got -1"),
        ({"attn_layer_idx": [2, 1]}, "must rise, each place once"),
        ({"attn_layer_idx": [1, 1]}, "must rise, each place once"),
        ({"attn_layer_idx": ["1"]}, "got '1'"),
        ({"attn_layer_idx": [1.0]}, "got 1.0"),
        ({"attn_cfg": {"heads": 2}}, "unknown meaning: heads. Known are"),
        ({"attn_layer_idx": [], "attn_cfg": {"heads": 2}}, "unknown meaning: heads"),
        ({"attn_cfg": {"num_heads": 5}}, "must divide hidden_size = 48"),
        ({"attn_cfg": {"num_heads": 0}}, "attn_cfg.num_heads must be a whole number of at least 1; got 0"),
        ({"attn_cfg": {"num_heads": 4, "num_heads_kv": 3}}, "must divide attn_cfg.num_heads = 4; got 3"),
        ({"attn_cfg": {"head_dim": 0}}, "attn_cfg.head_dim must be a whole number of at least 1"),
        ({"attn_cfg": {"head_dim": 8, "rotary_emb_dim": 3}}, "even and at most head_dim = 8; got 3"),
        ({"attn_cfg": {"head_dim": 8, "rotary_emb_dim": 10}}, "even and at most head_dim = 8; got 10"),
        ({"attn_cfg": {"causal": False}}, "reads from left to right"),
        ({"attn_cfg": {"d_conv": -1}}, "attn_cfg.d_conv must be a whole number of at least 0"),
        ({"attn_cfg": {"softmax_scale": 0}}, "attn_cfg.softmax_scale must be positive"),
        ({"attn_cfg": {"rotary_emb_base": -1.0}}, "attn_cfg.rotary_emb_base must be positive"),
        ({"attn_cfg": {"qkv_proj_bias": 1}}, "attn_cfg.qkv_proj_bias must be true or false; got 1"),
        ({"intermediate_size": -1}, "intermediate_size must be at least 0"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(Exception, match=message):
        SSDConfig(**dict(hidden_size=48, num_hidden_layers=4, vocab_size=VOCAB, attn_layer_idx=[1]) | changes)


@pytest.mark.parametrize(
    ("width", "given", "derived"),
    [
        (2560, {}, (30, 30, 128, 64)),  # mamba2attn-2.7b
        (768, {}, (9, 9, 128, 64)),
        (256, {"num_heads_kv": 2}, (6, 2, 64, 32)),
        (64, {}, (6, 6, 16, 8)),
        (48, {"num_heads": 4}, (4, 4, 12, 6)),
        (48, {"head_dim": 16}, (4, 4, 16, 8)),
        (3, {}, (2, 2, 2, 0)),
        (1, {}, (1, 1, 2, 0)),
    ],
    ids=str,
)
def test_sizes_that_are_left_out_follow_from_the_width(width, given, derived):
    config = SSDConfig(hidden_size=width, num_hidden_layers=2, vocab_size=VOCAB, attn_layer_idx=[0], attn_cfg=given)
    names = ("num_heads", "num_heads_kv", "head_dim", "rotary_emb_dim")
    assert tuple(config.attn_cfg[name] for name in names) == derived
    assert config.attn_cfg["d_conv"] == 4
    assert not config.attn_cfg["qkv_proj_bias"]


def test_the_authors_name_of_the_mlps_width_is_taken_and_widths_are_rounded_as_theirs():
    config = SSDConfig(d_intermediate=1000)
    assert (config.intermediate_size, config.d_intermediate, config.mlp_size) == (1000, 1000, 1024)
    assert SSDConfig.from_dict(config.to_dict()).intermediate_size == 1000


@torch.no_grad()
def test_last_projections_start_as_the_authors_do():
    """Uniform, as every projection, over the root of the number of blocks."""
    sizes = dict(hidden_size=128, num_hidden_layers=4, vocab_size=VOCAB, attn_layer_idx=[1], intermediate_size=256)
    model = SSDForCausalLM(SSDConfig(**sizes))
    for block in model.model.layers:
        for projection, branches in ((block.mixer.out_proj, 4), (block.mlp.fc2, 4), (block.mlp.fc1, 1)):
            bound = (projection.in_features * branches) ** -0.5
            assert 0.95 * bound < projection.weight.abs().max() <= bound
    conv = model.model.layers[1].mixer.conv1d
    assert 0.95 * 0.5 < conv.weight.abs().max() <= 0.5
    assert 0.9 * 0.5 < conv.bias.abs().max() <= 0.5
