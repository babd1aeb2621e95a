"""Parity: the models against recurrences written independently, against transformers, and their initialisation.

`recurrences.py` is the judge, in float64. An error is the largest difference over the root mean square wanted.
"""

import json
import math
import re
from functools import cache

import pytest
import torch
from recurrences import rodimus_logits, ssd_logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

from scrubjay import RodimusConfig, RodimusForCausalLM, SSDConfig, SSDForCausalLM

BOUND = 1e-10  # float64 against the recurrences; the worst of all cases below was 9.2e-13, of all gradients 9.1e-14
HF_BOUND = 1e-4  # float32 against float32; the worst was 4.5e-5, where transformers itself is 4.8e-5 off the recurrence


def error(got, want):
    """Largest difference over the root mean square wanted; NaN and wrong shapes are failures of their own."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    return float((got.double() - want.double()).abs().max() / want.double().square().mean().sqrt())


@torch.no_grad()
def through(model, ids, pieces):
    """Logits of ids given to a cache piece by piece."""
    past, logits = None, []
    for piece in ids.split(pieces, 1):
        out = model(piece, past_key_values=past, use_cache=True)
        past = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


def tokens(vocab, batch, length):
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def shake(model, seed=0):
    """Random weights that make every term matter: no norm, bias, gate or skip is at a neutral value."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        r = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        last = name.rsplit(".", 1)[-1]
        if last == "A_log":
            r = (0.05 + 4 * torch.rand(parameter.shape, generator=random, dtype=torch.float64)).log()
            r[0] = math.log(0.003)  # a memory longer than the longest test
        elif last == "dt_bias":
            r = r - 1.5
            r[-1] = 30.0  # a step so long that nothing older is left
        elif last == "mem_gate_bias":
            selection = torch.tensor([-110.0, -25.0, -6.0, -3.0, -1.0, 0.0, 3.0, 40.0])
            temperature = torch.tensor([-6.0, -4.0, -3.0, -1.0, 0.0, 2.0, -2.0, -5.0])
            n = len(r) // 2
            r = torch.cat([selection[torch.arange(n) % 8], temperature[torch.arange(n) % 8]]) + 0.1 * r
        elif "conv1d" in name:
            r = 0.5 * r
        elif "norm" in name:
            r = 1 + 0.3 * r
        elif last == "bias":
            r = 0.4 * r
        elif parameter.ndim == 2 and "embed" not in name:
            r = r * parameter.shape[1] ** -0.5
        parameter.copy_(r)
    return model.eval()


# ---- SSD ----

SSD = dict(hidden_size=16, head_dim=8, state_size=6, num_hidden_layers=2, vocab_size=29, pad_token_id=None)
LIMITS = {"no limit": None, "finite limit": (0.1, 0.6)}
OTHER_SSD = {
    "three heads, two taps": dict(expand=1.5, conv_kernel=2, use_conv_bias=False, layer_norm_epsilon=1e-2),
    "one tap, tied": dict(conv_kernel=1, tie_word_embeddings=True, num_hidden_layers=3),
    "untied, five taps": dict(conv_kernel=5, tie_word_embeddings=False, head_dim=4, n_groups=2, chunk_size=7),
}


@cache
def ssd_case(batch=2, length=150, **sizes):
    """Model in float64, ids and the recurrence's logits. The recurrence knows no chunks."""
    model = shake(SSDForCausalLM(SSDConfig(**SSD | sizes)).double())
    ids = tokens(model.config.vocab_size, batch, length)
    return model, ids, ssd_logits(model.state_dict(), model.config, ids)


def ssd_with_chunk(chunk, **sizes):
    model, ids, want = ssd_case(**sizes)
    rechunked = SSDForCausalLM(SSDConfig(**SSD | sizes | {"chunk_size": chunk})).double().eval()
    rechunked.load_state_dict(model.state_dict())
    return rechunked, ids, want


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_ssd_equals_its_recurrence(groups, bias, limit, chunk):
    sizes = dict(n_groups=groups, use_bias=bias, use_conv_bias=bias, time_step_limit=LIMITS[limit])
    model, ids, want = ssd_with_chunk(chunk, **sizes)
    errors = {}
    for T in (1, 3, 4, 5, 64, 65, 150):  # below, at and across the taps and the chunks
        with torch.no_grad():
            errors[T] = error(model(ids[:, :T]).logits, want[:, :T])
    assert max(errors.values()) < BOUND, errors


PIECES = {"steps": [1] * 70, "prefill 65": [65] + [1] * 5, "prefill 2": [2, 1, 1, 3, 1, 4, 5, 1, 1, 50, 1]}


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_ssd_prefill_and_steps_equal_its_recurrence(groups, bias, limit, pieces):
    sizes = dict(n_groups=groups, use_bias=bias, use_conv_bias=bias, time_step_limit=LIMITS[limit])
    model, ids, want = ssd_case(**sizes)
    assert error(through(model, ids[:, :70], PIECES[pieces]), want[:, :70]) < BOUND


@pytest.mark.parametrize("name", OTHER_SSD)
def test_other_ssd_sizes_equal_their_recurrence(name):
    model, ids, want = ssd_case(length=40, **OTHER_SSD[name])
    with torch.no_grad():
        assert error(model(ids).logits, want) < BOUND
    assert error(through(model, ids, [9] + [1] * 28 + [3]), want) < BOUND


def test_long_ssd_prompt_equals_its_recurrence():
    model, ids, want = ssd_case(batch=1, length=700, n_groups=2)
    for grad in (False, True):  # without gradients a long prompt is taken in segments
        with torch.set_grad_enabled(grad):
            assert error(model(ids).logits.detach(), want) < BOUND


SSD_MISTAKES = {
    "A_log taken for the rate": {},
    "B and C exchanged": {},
    "B and C not convolved": {},
    "clamp before softplus": {"time_step_limit": (0.1, 0.6)},
    "clamp ignored": {"time_step_limit": (0.1, 0.6)},
    "decay not applied": {},
    "dt_bias after softplus": {},
    "gate without its activation": {},
    "gated norm over all channels": {"n_groups": 2},
    "gated norm without eps": {},
    "groups tiled": {"n_groups": 2},
    "input not times dt": {},
    "no activation after the convolution": {},
    "no final norm": {},
    "norm before gate": {},
    "residual after the norm": {},
    "skip of dt times x": {},
    "skip of x before the convolution": {},
    "state read before its update": {},
    "taps reversed": {},
    "z and x exchanged": {},
}


@pytest.mark.parametrize("wrong", SSD_MISTAKES)
def test_a_wrong_ssd_recurrence_is_found(wrong):
    model, ids, _ = ssd_case(**SSD_MISTAKES[wrong])
    mistaken = ssd_logits(model.state_dict(), model.config, ids[:, :20], wrong)
    with torch.no_grad():
        whole = model(ids[:, :20]).logits
    assert min(error(got, mistaken) for got in (whole, through(model, ids[:, :20], [12] + [1] * 8))) > 100 * BOUND


# ---- SSD and transformers' Mamba-2 ----

HF = dict(
    hidden_size=64, num_heads=8, head_dim=16, state_size=16, num_hidden_layers=2, vocab_size=61, initializer_range=0.1
)
LENGTHS = (1, 3, 4, 5, 255, 256, 257, 1000)  # around the taps and the chunk, and past one segment


@cache
def mamba2(**sizes):
    """transformers' model, ids, and its logits for each length."""
    torch.manual_seed(0)
    model = shake(Mamba2ForCausalLM(Mamba2Config(**HF | sizes)))
    ids = tokens(61, 1, max(LENGTHS))
    with torch.no_grad():
        return model, ids, {T: model(ids[:, :T]).logits for T in LENGTHS}


def grouped(model):
    """Whether this transformers normalises each group, as the authors' kernel does; older ones take all channels."""
    return hasattr(model.backbone.layers[0].mixer.norm, "group_size")


def needs_grouped_norm(model):
    if model.config.n_groups > 1 and not grouped(model):
        pytest.skip("this transformers has no grouped norm in Mamba-2 and gives other logits where n_groups > 1")


def loads_whole(folder):
    model, info = SSDForCausalLM.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(kind), (kind, info[kind])
    return model.eval()


def official_names(folder, tied):
    """Give a folder of transformers' Mamba-2 the key names of the authors' code, which stores a tied head too."""
    weights = load_file(folder / "model.safetensors")
    weights["backbone.embedding.weight"] = weights.pop("backbone.embeddings.weight")
    if tied:
        weights["lm_head.weight"] = weights["backbone.embedding.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("names", ["transformers", "official"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("chunk", [64, 256])
@pytest.mark.parametrize("groups", [1, 8])
def test_a_mamba2_folder_loads_and_gives_its_logits(tmp_path, groups, chunk, tied, names):
    theirs, ids, want = mamba2(n_groups=groups, chunk_size=chunk, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    if names == "official":
        official_names(tmp_path, tied)
    model = loads_whole(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    needs_grouped_norm(theirs)
    with torch.no_grad():
        errors = {T: error(model(ids[:, :T]).logits, want[T]) for T in LENGTHS}
    assert max(errors.values()) < HF_BOUND, errors


@pytest.mark.parametrize("more", [{"use_bias": True, "use_conv_bias": False}, {"time_step_limit": (0.1, 0.6)}], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_mamba2_folder_with_biases_or_limits_gives_its_logits(tmp_path, groups, more):
    theirs, ids, want = mamba2(n_groups=groups, chunk_size=64, **more)
    theirs.save_pretrained(tmp_path)
    model = loads_whole(tmp_path)
    needs_grouped_norm(theirs)
    with torch.no_grad():
        assert error(model(ids).logits, want[1000]) < HF_BOUND
    assert error(through(model, ids[:, :257], [240] + [1] * 17), want[257]) < HF_BOUND


def test_the_recurrence_is_transformers_too():
    theirs, ids, want = mamba2(n_groups=2, chunk_size=64, time_step_limit=(0.1, 0.6))
    names = {
        "backbone.embeddings.": "model.embed_tokens.",
        "backbone.layers.": "model.layers.",
        "backbone.norm_f.": "model.norm.",
    }
    weights = {}
    for name, weight in theirs.state_dict().items():
        old = next((prefix for prefix in names if name.startswith(prefix)), "")
        weights[names.get(old, "") + name.removeprefix(old)] = weight
    wrong = None if grouped(theirs) else "gated norm over all channels"
    assert error(ssd_logits(weights, theirs.config, ids[:, :257], wrong), want[257]) < HF_BOUND


def test_the_mamba2_configuration_arrives(tmp_path):
    sizes = HF | dict(n_groups=2, conv_kernel=3, use_bias=True, chunk_size=32, layer_norm_epsilon=1e-3)
    Mamba2Config(**sizes, tie_word_embeddings=False, bos_token_id=5, eos_token_id=7, pad_token_id=9).save_pretrained(
        tmp_path
    )
    assert SSDConfig.from_pretrained(tmp_path, chunk_size=16).chunk_size == 16
    config = SSDConfig.from_pretrained(tmp_path)
    sizes["chunk_size"] = SSDConfig().chunk_size  # theirs suits other kernels, and no result depends on it
    for name, value in sizes.items():
        assert getattr(config, name) == value, name
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (5, 7, 9)
    assert not config.tie_word_embeddings
    assert config.model_type == "scrubjay_ssd"


def test_defaults_of_the_mamba2_configuration_arrive(tmp_path):
    theirs = Mamba2Config()
    theirs.save_pretrained(tmp_path)
    ours, fresh = SSDConfig.from_pretrained(tmp_path), SSDConfig()
    elsewhere = ("model_type", "transformers_version", "chunk_size")
    shared = [name for name in theirs.to_dict() if name in fresh.to_dict() and name not in elsewhere]
    assert {"n_groups", "num_heads", "tie_word_embeddings", "eos_token_id", "time_step_limit"} < set(shared)
    for name in shared:
        want = getattr(theirs, name)
        assert getattr(ours, name) == (list(want) if isinstance(want, tuple) else want), name


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("[0.0, Infinity]", (0.0, math.inf)),
        ('[0.0, {"__float__": "Infinity"}]', (0.0, math.inf)),
        ("[0.001, 0.1]", (0.001, 0.1)),
    ],
)
def test_step_limits_as_published_files_write_them(tmp_path, written, read):
    Mamba2Config(**HF).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["time_step_limit"] = "LIMIT"
    (tmp_path / "config.json").write_text(json.dumps(stored).replace('"LIMIT"', written))
    assert tuple(SSDConfig.from_pretrained(tmp_path).time_step_limit) == read


# ---- Rodimus and Rodimus+ ----

RODIMUS = dict(hidden_size=24, state_size=8, num_hidden_layers=2, vocab_size=31, block_type="rodimus", chunk_size=16)
PLUS = RODIMUS | dict(block_type="rodimus_plus", num_attention_heads=4, sliding_window=5)
RODIMUS_CASES = {
    "rodimus": RODIMUS,
    "rodimus, rounded width, gate of rank 3": RODIMUS | dict(expand=1.45, input_gate_rank=3, chunk_size=4),
    "rodimus, three taps, untied, state of 5": RODIMUS
    | dict(conv_kernel=3, tie_word_embeddings=False, state_size=5, chunk_size=1, rms_norm_eps=1e-2),
    "rodimus, small keys": RODIMUS | dict(k_norm_eps=1e-5),
    "rodimus, scaled embedding": RODIMUS | dict(scale_embedding=True, chunk_size=64),
    "plus": PLUS,
    "plus, window 1": PLUS | dict(sliding_window=1),
    "plus, window 2": PLUS | dict(sliding_window=2, rope_theta=100.0),
    "plus, window 100": PLUS | dict(sliding_window=100),
    "plus, no positions": PLUS | dict(rotary_dim=0),
    "plus, some channels turned": PLUS | dict(rotary_dim=4),
    "plus, neighbours turned": PLUS | dict(rope_interleaved=True),
    "plus, some neighbours turned": PLUS | dict(rope_interleaved=True, rotary_dim=2, sliding_window=13),
    "plus, 2 key heads": PLUS | dict(num_key_heads=2),
    "plus, 2 value heads": PLUS | dict(num_value_heads=2),
    "plus, 2 key heads, 1 value head": PLUS | dict(num_key_heads=2, num_value_heads=1),
    "plus, as many key heads as heads": PLUS | dict(num_key_heads=4),
    "plus, 6 heads, 3 and 2 shared": PLUS | dict(num_attention_heads=6, num_key_heads=3, num_value_heads=2),
    "plus, one head": PLUS | dict(num_attention_heads=1),
    "plus, normalised embedding": PLUS | dict(norm_embedding=True),
    "plus, scaled and normalised embedding": PLUS
    | dict(norm_embedding=True, scale_embedding=True, tie_word_embeddings=False, rms_norm_eps=1e-1),
    "plus, small keys, narrow ffn": PLUS | dict(k_norm_eps=1e-5, intermediate_size=10, num_hidden_layers=3),
}


@cache
def rodimus_case(name, batch=2, length=60):
    """Model in float64, ids and the recurrence's logits."""
    config = RodimusConfig(**RODIMUS_CASES[name])
    model = shake(RodimusForCausalLM(config).double())
    if config.k_norm_eps > 1e-6:  # keys on either side of the smallest norm by which they are divided
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mixer.in_proj.weight[config.state_size :] *= config.k_norm_eps
    ids = tokens(config.vocab_size, batch, length)
    return model, ids, rodimus_logits(model.state_dict(), config, ids)


@pytest.mark.parametrize("name", RODIMUS_CASES)
def test_rodimus_equals_its_recurrence(name):
    model, ids, want = rodimus_case(name)
    errors = {}
    for T in (1, 2, 5, 17, 60):
        with torch.no_grad():
            errors[T] = error(model(ids[:, :T]).logits, want[:, :T])
    assert max(errors.values()) < BOUND, errors


@pytest.mark.parametrize(
    "pieces", [[1] * 60, [17] + [1] * 43, [3, 1, 1, 2, 5, 1, 6, 30, 1, 10]], ids=["steps", "prefill", "pieces"]
)
@pytest.mark.parametrize("name", RODIMUS_CASES)
def test_rodimus_prefill_and_steps_equal_its_recurrence(name, pieces):
    model, ids, want = rodimus_case(name)
    assert error(through(model, ids, pieces), want) < BOUND


@pytest.mark.parametrize("name", ["rodimus", "plus", "plus, window 100"])
def test_long_rodimus_prompt_equals_its_recurrence(name):
    model, ids, want = rodimus_case(name, batch=1, length=530)
    for grad in (False, True):  # without gradients a long prompt is taken in segments
        with torch.set_grad_enabled(grad):
            assert error(model(ids).logits.detach(), want) < BOUND
    assert error(through(model, ids, [520] + [1] * 10), want) < BOUND


RODIMUS_MISTAKES = [
    ("all channels turned", "plus, some channels turned"),
    ("attention kept in the stream", "plus"),
    ("attention kept in the stream", "plus, normalised embedding"),
    ("attention replaces the stream", "plus"),
    ("decay not applied", "rodimus"),
    ("decay without temperature", "rodimus"),
    ("embedding not normalised", "plus, normalised embedding"),
    ("embedding not scaled", "rodimus, scaled embedding"),
    ("embedding times sqrt(hidden_size)", "rodimus, scaled embedding"),
    ("eps added to the norm", "plus, small keys, narrow ffn"),
    ("eps added to the norm", "rodimus, small keys"),
    ("feed-through of x before the convolution", "rodimus"),
    ("gate without its activation", "rodimus"),
    ("gated norm without eps", "rodimus"),
    ("input gate of the convolved stream", "rodimus"),
    ("k not normalised", "rodimus"),
    ("key and value heads grouped", "plus, 2 key heads"),
    ("key and value heads grouped", "plus, 2 value heads"),
    ("no activation after the convolution", "rodimus"),
    ("no positions", "plus"),
    ("norm before gate", "rodimus"),
    ("other pairs turned", "plus"),
    ("q and k exchanged", "rodimus"),
    ("q normalised", "rodimus"),
    ("q not scaled", "rodimus"),
    ("scores not scaled", "plus"),
    ("selection and temperature exchanged", "rodimus"),
    ("selection without temperature", "rodimus"),
    ("state read before its update", "rodimus"),
    ("taps reversed", "rodimus"),
    ("turned backwards", "plus"),
    ("up and gate exchanged", "plus"),
    ("v of the convolved stream", "rodimus"),
    ("window one key long", "plus"),
    ("window one key short", "plus"),
    ("window one key short", "plus, window 2"),
    ("x and z exchanged", "rodimus"),
]


@pytest.mark.parametrize(("wrong", "name"), RODIMUS_MISTAKES)
def test_a_wrong_rodimus_recurrence_is_found(wrong, name):
    model, ids, _ = rodimus_case(name)
    mistaken = rodimus_logits(model.state_dict(), model.config, ids[:, :20], wrong)
    with torch.no_grad():
        whole = model(ids[:, :20]).logits
    assert min(error(got, mistaken) for got in (whole, through(model, ids[:, :20], [12] + [1] * 8))) > 100 * BOUND


# ---- gradients ----


def gradient_errors(model, recurrence, ids):
    """Error of the gradient of each parameter, for a random weighting of the logits."""
    given = torch.randn(
        *ids.shape, model.config.vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    whole = weights | ({} if "lm_head.weight" in weights else {"lm_head.weight": weights["model.embed_tokens.weight"]})
    want = torch.autograd.grad((recurrence(whole, model.config, ids) * given).sum(), list(weights.values()))
    got = torch.autograd.grad((model(ids).logits * given).sum(), list(model.parameters()))
    return {name: error(g, w) for name, g, w in zip(weights, got, want, strict=True)}


@pytest.mark.parametrize(
    "sizes", [{}, {"n_groups": 2, "time_step_limit": (0.1, 0.6), "use_bias": True, "chunk_size": 4}], ids=str
)
def test_ssd_gradients_equal_those_of_its_recurrence(sizes):
    model, ids, _ = ssd_case(**sizes)
    errors = gradient_errors(model, ssd_logits, ids[:, :40])
    assert max(errors.values()) < BOUND, errors


def test_the_padding_token_of_ssd_learns_like_any_other():
    """Published models pad with the token that ends documents; the authors and transformers exempt it from nothing."""
    model, ids, _ = ssd_case(pad_token_id=0)
    assert (ids[:, :40] == 0).any()
    errors = gradient_errors(model, ssd_logits, ids[:, :40])
    assert max(errors.values()) < BOUND, errors


@pytest.mark.parametrize(
    "name", ["rodimus, small keys", "plus", "plus, 6 heads, 3 and 2 shared", "plus, normalised embedding"]
)
def test_rodimus_gradients_equal_those_of_its_recurrence(name):
    model, ids, _ = rodimus_case(name)
    errors = gradient_errors(model, rodimus_logits, ids[:, :40])
    assert max(errors.values()) < BOUND, errors


def test_float32_gradients_survive_gates_that_are_all_but_closed():
    """softplus(-110) is no float32 number, its logarithm and the gradient of that are."""
    model, ids, _ = rodimus_case("rodimus")
    narrow = RodimusForCausalLM(model.config)
    narrow.load_state_dict(model.state_dict())
    ids, name = ids[:, :40], "model.layers.0.mixer.mem_gate_bias"
    weights = model.state_dict() | {name: model.state_dict()[name].clone().requires_grad_()}
    (want,) = torch.autograd.grad(rodimus_logits(weights, model.config, ids).logsumexp(-1).sum(), weights[name])
    narrow(ids).logits.logsumexp(-1).sum().backward()
    got = narrow.get_parameter(name).grad
    assert want[0].abs() > 1e-3 * want.abs().max()  # the gate at -110 matters
    assert error(got, want) < 1e-4


# ---- sizes ----


def test_ssd_parameters_have_the_authors_shapes():
    d, inner, H, G, N, K, V = 24, 48, 6, 3, 5, 4, 31
    config = SSDConfig(hidden_size=d, head_dim=8, n_groups=G, state_size=N, num_hidden_layers=1, vocab_size=V)
    mixer = {
        "in_proj.weight": (2 * inner + 2 * G * N + H, d),
        "conv1d.weight": (inner + 2 * G * N, 1, K),
        "conv1d.bias": (inner + 2 * G * N,),
        "dt_bias": (H,),
        "A_log": (H,),
        "D": (H,),
        "norm.weight": (inner,),
        "out_proj.weight": (d, inner),
    }
    want = {f"model.layers.0.mixer.{name}": shape for name, shape in mixer.items()}
    want |= {"model.embed_tokens.weight": (V, d), "model.layers.0.norm.weight": (d,), "model.norm.weight": (d,)}
    assert shapes(SSDForCausalLM(config)) == want


@pytest.mark.parametrize(("expand", "m"), [(2, 80), (1.5, 64), (1.6, 64), (1.61, 64), (1.65, 72)])
def test_rodimus_parameters_have_the_authors_shapes(expand, m):
    d, n, K, V, H = 40, 6, 4, 31, 5
    r, f, p = 16, 56, 8  # max(40 // 64, 16); int(40 * 4 / 3) = 53, up to a multiple of 8; 40 / 5
    config = RodimusConfig(
        hidden_size=d,
        expand=expand,
        state_size=n,
        num_hidden_layers=1,
        vocab_size=V,
        num_attention_heads=H,
        norm_embedding=True,
    )
    block = {
        "mixer_norm.weight": (d,),
        "mixer.fc.weight": (2 * m, d),
        "mixer.conv1d.weight": (m, 1, K),
        "mixer.conv1d.bias": (m,),
        "mixer.in_proj.weight": (2 * n, m),
        "mixer.mem_gate_proj.weight": (2 * n, m),
        "mixer.mem_gate_bias": (2 * n,),
        "mixer.ch_gate_down.weight": (r, m),
        "mixer.ch_gate_up.weight": (m, r),
        "mixer.ch_gate_up.bias": (m,),
        "mixer.residual_weight": (m,),
        "mixer.act_norm.weight": (m,),
        "mixer.out_proj.weight": (d, m),
        "attn_norm.weight": (d,),
        "attn.q_proj.weight": (d, d),
        "attn.k_proj.weight": (p, d),
        "attn.v_proj.weight": (d, d),
        "attn.o_proj.weight": (d, d),
        "ffn_norm.weight": (d,),
        "ffn.fc.weight": (2 * f, d),
        "ffn.out_proj.weight": (d, f),
    }
    want = {f"model.layers.0.{name}": shape for name, shape in block.items()}
    want |= {"model.embed_tokens.weight": (V, d), "model.embed_norm.weight": (d,), "model.norm.weight": (d,)}
    assert shapes(RodimusForCausalLM(config)) == want


def shapes(model):
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


PUBLISHED = {
    "mamba2-130m": (SSDConfig(hidden_size=768, num_hidden_layers=24), 128_989_632),
    "mamba2-370m": (SSDConfig(hidden_size=1024, num_hidden_layers=48), 368_346_624),
    "mamba2-780m": (SSDConfig(hidden_size=1536, num_hidden_layers=48), 780_161_280),
    "mamba2-1.3b": (SSDConfig(hidden_size=2048, num_hidden_layers=48), 1_343_757_312),
    "mamba2-2.7b": (SSDConfig(hidden_size=2560, num_hidden_layers=64), 2_702_599_680),
    "codestral-7b": (
        SSDConfig(hidden_size=4096, num_hidden_layers=64, n_groups=8, vocab_size=32768, tie_word_embeddings=False),
        7_285_403_648,
    ),
    "rodimus-1.4b": (RodimusConfig(block_type="rodimus", num_hidden_layers=48), 1_531_551_744),
    "rodimus-plus-1.6b": (RodimusConfig(num_attention_heads=16), 1_607_095_296),
    "rodimus-plus-1.6b, with a head": (RodimusConfig(num_attention_heads=16, tie_word_embeddings=False), 1_866_093_568),
    "rodimus-plus-4b": (
        RodimusConfig(hidden_size=3072, num_hidden_layers=32, num_attention_heads=24, tie_word_embeddings=False),
        4_786_527_232,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_their_number_of_parameters(name):
    config, count = PUBLISHED[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) == count


# ---- initialisation ----


def directly(config, folder):
    return (SSDForCausalLM if isinstance(config, SSDConfig) else RodimusForCausalLM)(config)


def by_auto_class(config, folder):
    return AutoModelForCausalLM.from_config(config)


def after_meta(config, folder):
    """Built without memory, given memory full of NaN, then initialised."""
    with torch.device("meta"):
        model = directly(config, folder)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.init_weights()
    return model


def from_a_checkpoint_without_them(config, folder):
    """from_pretrained where the file holds one tensor, so that all others have to be initialised."""
    config.save_pretrained(folder)
    save_file(
        {"model.norm.weight": torch.ones(config.hidden_size)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    return type(directly(config, folder)).from_pretrained(folder)


WAYS = [directly, by_auto_class, after_meta, from_a_checkpoint_without_them]


def gather(model, pattern):
    """All numbers of the parameters whose whole name matches, float64; at least one must."""
    found = [
        parameter.detach().double().flatten()
        for name, parameter in model.named_parameters()
        if re.fullmatch(pattern, name)
    ]
    assert found, pattern
    return torch.cat(found)


def distributed(values, cdf):
    """Kolmogorov and Smirnov's test of independent values; true draws fail it once in a thousand seeds."""
    x = values.sort().values
    n, p = len(x), cdf(x)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = float(torch.maximum(steps[1:] - p, p - steps[:-1]).max())
    assert distance < 1.95 / math.sqrt(n), f"distance {distance:.4f} of {n} values, limit {1.95 / math.sqrt(n):.4f}"


def uniform(low, high):
    return lambda x: ((x - low) / (high - low)).clip(0, 1)


def normal(std):
    return lambda x: 0.5 * (1 + torch.erf(x / (std * math.sqrt(2))))


def softplus(x):
    return torch.log1p(torch.exp(x))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "not rescaled"])
def test_ssd_starts_as_the_authors_do(tmp_path, way, rescale):
    d, inner, layers = 128, 256, 4
    torch.manual_seed(0)
    config = SSDConfig(
        hidden_size=d,
        head_dim=1,  # many heads, many draws
        state_size=16,
        num_hidden_layers=layers,
        vocab_size=311,
        use_bias=True,
        rescale_prenorm_residual=rescale,
    )
    model = way(config, tmp_path)
    mixer = r"model\.layers\.\d\.mixer\."
    distributed(gather(model, mixer + "A_log").exp(), uniform(1, 16))
    steps = softplus(gather(model, mixer + "dt_bias"))
    distributed(steps.log(), uniform(math.log(0.001), math.log(0.1)))
    assert 0.000999 < steps.min() < 0.00105
    assert 0.095 < steps.max() < 0.1001
    distributed(gather(model, mixer + r"conv1d\.(weight|bias)"), uniform(-0.5, 0.5))  # fan-in 4
    distributed(gather(model, mixer + r"conv1d\.bias"), uniform(-0.5, 0.5))
    distributed(gather(model, mixer + r"in_proj\.weight"), uniform(-(d**-0.5), d**-0.5))
    bound = inner**-0.5 / (math.sqrt(layers) if rescale else 1)
    distributed(gather(model, mixer + r"out_proj\.weight"), uniform(-bound, bound))
    distributed(gather(model, r"model\.embed_tokens\.weight"), normal(0.02))
    assert (gather(model, r"model\.(norm|layers\.\d\.norm|layers\.\d\.mixer\.norm)\.weight|.*\.D") == 1).all()
    assert (gather(model, r".*_proj\.bias") == 0).all()


def test_step_sizes_of_ssd_start_at_their_floor():
    torch.manual_seed(0)
    config = SSDConfig(
        hidden_size=256, head_dim=1, num_hidden_layers=1, vocab_size=7, time_step_min=1e-6, time_step_floor=1e-4
    )
    steps = softplus(gather(SSDForCausalLM(config), ".*dt_bias"))
    at_floor = (steps < 1.0001e-4).double().mean()
    assert steps.min() > 0.9999e-4
    assert 0.3 < at_floor < 0.5  # ln 100 / ln 100000 = 0.4


@pytest.mark.parametrize(("vocab_size", "name", "bound"), [(296, "in_proj", 64**-0.5), (64, "out_proj", 128**-0.5)])
def test_ssd_starts_the_same_whatever_the_vocabulary(vocab_size, name, bound):
    """A projection may have as many rows as the vocabulary: bytes and 256 channels, say."""
    torch.manual_seed(0)
    config = SSDConfig(
        hidden_size=64,
        head_dim=16,
        state_size=16,
        num_hidden_layers=2,
        vocab_size=vocab_size,
        rescale_prenorm_residual=False,
    )
    distributed(gather(SSDForCausalLM(config), rf".*{name}\.weight"), uniform(-bound, bound))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "not rescaled"])
@pytest.mark.parametrize(("block_type", "hops"), [("rodimus", 1), ("rodimus_plus", 3)])
def test_rodimus_starts_as_the_authors_do(tmp_path, block_type, hops, rescale, way):
    d, m, n, r, layers, pad = 64, 128, 200, 16, 5, 3
    torch.manual_seed(0)
    config = RodimusConfig(
        block_type=block_type,
        hidden_size=d,
        state_size=n,
        num_hidden_layers=layers,
        vocab_size=311,
        num_attention_heads=4,
        rescale_prenorm_residual=rescale,
        tie_word_embeddings=False,
        norm_embedding=True,
        pad_token_id=pad,
    )
    model = way(config, tmp_path)
    layer = r"model\.layers\.\d\."

    def xavier(fan_in, fan_out):
        bound = 2**-2.5 * math.sqrt(6 / (fan_in + fan_out))
        return uniform(-bound, bound)

    distributed(gather(model, layer + r"mixer\.(in_proj|mem_gate_proj)\.weight"), xavier(m, 2 * n))
    distributed(gather(model, layer + r"mixer\.mem_gate_proj\.weight"), xavier(m, 2 * n))
    distributed(gather(model, layer + r"mixer\.ch_gate_(down|up)\.weight"), xavier(m, r))
    biases = gather(model, layer + r"mixer\.mem_gate_bias").view(layers, 2, n)
    distributed(softplus(biases[:, 0]).log().flatten(), uniform(math.log(0.001), math.log(0.1)))
    distributed(torch.sigmoid(biases[:, 1]).flatten(), uniform(1 / 16, 0.9))
    distributed(gather(model, layer + r"mixer\.conv1d\.weight"), uniform(-0.5, 0.5))
    distributed(gather(model, layer + r"mixer\.conv1d\.bias"), uniform(-0.5, 0.5))
    distributed(gather(model, layer + r"mixer\.fc\.weight"), normal(0.02))
    distributed(gather(model, r"lm_head\.weight"), normal(0.02))
    rows = gather(model, r"model\.embed_tokens\.weight").view(-1, d)
    assert (rows[pad] == 0).all()
    distributed(torch.cat([rows[:pad], rows[pad + 1 :]]).flatten(), normal(0.02))
    out = 0.02 / (math.sqrt(hops * layers) if rescale else 1)
    distributed(gather(model, layer + r"mixer\.out_proj\.weight"), normal(out))
    if block_type == "rodimus_plus":
        distributed(gather(model, layer + r"(attn\.[qkv]_proj|ffn\.fc)\.weight"), normal(0.02))
        distributed(gather(model, layer + r"attn\.o_proj\.weight"), normal(out))
        distributed(gather(model, layer + r"ffn\.out_proj\.weight"), normal(out))
    assert (gather(model, r".*norm\.weight|.*residual_weight") == 1).all()
    assert (gather(model, r".*ch_gate_up\.bias") == 0).all()


@pytest.mark.parametrize(
    "config", [SSDConfig(**SSD | {"use_bias": True}), RodimusConfig(**PLUS)], ids=lambda c: c.model_type
)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_checkpoint_without_every_second_tensor_keeps_the_others(tmp_path, config, lost):
    model = shake(directly(config, tmp_path))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = set(sorted(weights)[lost::2])
    kept = {name: weight for name, weight in weights.items() if name not in missing}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) - {"lm_head.weight"} == missing
    for name, weight in loaded.named_parameters():
        assert torch.isfinite(weight).all()
        assert torch.equal(weight, weights[name]) == (name in kept), name


# ---- weight decay ----


def without_decay(model):
    """Names in the group of no decay, after a check that every parameter is in one group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, kept = model.weight_decay_groups(0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert sorted(names[p] for p in decayed["params"] + kept["params"]) == sorted(names.values())
    return {names[p] for p in kept["params"]}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_ssd_decays_all_but_biases_norms_and_the_recurrence(tied):
    sizes = dict(use_bias=True, num_hidden_layers=1, tie_word_embeddings=tied)
    mixer = ("A_log", "D", "dt_bias", "norm.weight", "conv1d.bias", "in_proj.bias", "out_proj.bias")
    want = {"model.norm.weight", "model.layers.0.norm.weight"} | {f"model.layers.0.mixer.{name}" for name in mixer}
    assert without_decay(SSDForCausalLM(SSDConfig(**SSD | sizes))) == want


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rodimus_decays_all_but_biases_norms_and_the_feed_through(tied):
    """An embedding that is no head too does not decay, as the authors' code has it by default."""
    sizes = dict(norm_embedding=True, num_hidden_layers=1, tie_word_embeddings=tied)
    mixer = ("mem_gate_bias", "ch_gate_up.bias", "conv1d.bias", "residual_weight", "act_norm.weight")
    want = {"model.norm.weight", "model.embed_norm.weight"}
    want |= {f"model.layers.0.{name}_norm.weight" for name in ("mixer", "attn", "ffn")}
    want |= {f"model.layers.0.mixer.{name}" for name in mixer}
    want |= set() if tied else {"model.embed_tokens.weight"}
    assert without_decay(RodimusForCausalLM(RodimusConfig(**PLUS | sizes))) == want
