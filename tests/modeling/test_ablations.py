"""Rodimus with parts of it switched off: every way through a model stays the same function.

What each switch computes is held against the recurrence in `test_parity_rodimus.py`; conversion in
`test_conversion_rodimus_refusals.py`, kernels in `test_kernels_rodimus_gates.py` and `tests/interpreter`.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from zoo import VOCAB, Entry, relative, tokens

from scrubjay import RodimusCache, RodimusConfig, RodimusForCausalLM, export_decoding, quantize
from scrubjay.modeling import base
from scrubjay.modeling.bits_layers import FewBits
from scrubjay.modeling.layout import Layout
from scrubjay.modeling.modeling_rodimus import SharedKeyWindow

SIZES = dict(hidden_size=48, num_hidden_layers=2, vocab_size=VOCAB, state_size=16, pad_token_id=None)
SIZES |= dict(num_attention_heads=4, sliding_window=9)
SWITCHES = {
    "no temperature": dict(temperature_gate=False),
    "full input gate": dict(input_gate="full"),
    "no input gate": dict(input_gate="none"),
    "no short convolution": dict(short_conv=False),
    "attention kept in the residual stream": dict(two_hop=False),
    "multi-query": dict(num_value_heads=1),
    "grouped": dict(num_key_heads=2, num_value_heads=2),
    "multi-head": dict(num_key_heads=4),
}
NOTHING = {"nothing left": dict(temperature_gate=False, input_gate="none", short_conv=False, two_hop=False)}
by_switch = pytest.mark.parametrize("name", SWITCHES)
with_nothing = pytest.mark.parametrize("name", [*SWITCHES, *NOTHING])
FLOAT64, FLOAT32 = 1e-12, 3e-6  # five times the worst that was measured, and more


def build(name, dtype=torch.float32, **changes):
    fields = (SWITCHES | NOTHING)[name] | changes
    return Entry(name, lambda: RodimusConfig(**SIZES | fields), RodimusForCausalLM).build(dtype)


@torch.no_grad()
def through(model, ids, pieces, **kwargs):
    cache = RodimusCache(model)
    return torch.cat([model(piece, cache=cache, **kwargs).logits for piece in ids.split(pieces, 1)], 1), cache


@with_nothing
def test_steps_padding_and_packed_documents_equal_one_pass(name):
    model, ids = build(name, torch.float64), tokens(2, 40)
    with torch.no_grad():
        want = model(ids).logits
        assert relative(through(model, ids, [17] + [1] * 23)[0], want) < FLOAT64
        assert relative(through(model, ids, [1, 20, 3, 16])[0], want) < FLOAT64
        padded, mask = F.pad(ids, (6, 3)), F.pad(torch.ones_like(ids), (6, 3))
        assert relative(model(padded, attention_mask=mask).logits[:, 6:-3], want) < FLOAT64
        positions = torch.arange(40).repeat(2)[None]
        packed = model(ids.view(1, -1), position_ids=positions).logits
        assert relative(packed.view_as(want), want) < FLOAT64


@with_nothing
def test_single_tokens_take_the_short_way_and_give_the_same(name, monkeypatch):
    model, ids = build(name), tokens(3, 20)
    short, cache = through(model, ids, [8] + [1] * 12)
    monkeypatch.setattr(base, "one_token", lambda x: False)
    long, other = through(model, ids, [8] + [1] * 12)
    assert relative(short, long) < FLOAT32
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        for tensor, want in zip(mine.tensors().values(), theirs.tensors().values(), strict=True):
            assert tensor.shape == want.shape
            assert not want.numel() or relative(tensor, want) < FLOAT32


@with_nothing
def test_a_saved_model_and_cache_come_back_and_generate(name, tmp_path):
    model, ids = build(name), tokens(2, 12)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    want = model.generate(ids, max_new_tokens=15, do_sample=False, pad_token_id=0, eos_token_id=None)
    _, cache = through(loaded, ids[:, :-1], [4, 7])
    cache.save(tmp_path / "prompt.safetensors")
    held = RodimusCache.load(tmp_path / "prompt.safetensors")
    got = loaded.generate(ids, cache=held, max_new_tokens=15, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(got, want)
    words = [*model.config.ablations.values()]
    assert ", ".join(["# Rodimus+", *words]) in (tmp_path / "README.md").read_text().splitlines()
    assert f"{held.nbytes // 2:,} bytes" in (tmp_path / "README.md").read_text()


@with_nothing
def test_a_cache_has_the_bytes_of_its_docstring(name):
    model = build(name)
    c = model.config
    _, cache = through(model, tokens(2, 30), [30])
    window = c.conv_kernel - 1 if c.short_conv else 0
    ring = c.sliding_window * (c.num_key_heads + c.num_value_heads) * c.head_dim
    assert cache.nbytes == 2 * c.num_hidden_layers * (4 * (window * 96 + 16 * 96 + ring) + 8)


@with_nothing
def test_parameters_are_those_of_the_table(name):
    """modeling/README.md: what a switch costs or saves in each block."""
    d, m, n, r, taps, heads = 48, 96, 16, 16, 4, 4
    cost = {
        "no temperature": -n * (m + 1),
        "full input gate": m * m - 2 * m * r,
        "no input gate": -m * (2 * r + 1),
        "no short convolution": -m * (taps + 1),
        "attention kept in the residual stream": 0,
        "multi-query": -d * (d - d // heads),
        "grouped": d * (d // heads) - d * d // 2,
        "multi-head": d * (d - d // heads),
    }
    cost["nothing left"] = sum(cost[part] for part in [*SWITCHES][:5] if part != "full input gate")
    whole = RodimusForCausalLM(RodimusConfig(**SIZES))
    assert build(name).num_parameters() == whole.num_parameters() + whole.config.num_hidden_layers * cost[name]


@with_nothing
def test_every_parameter_learns_and_gates_start_as_the_authors_do(name):
    torch.manual_seed(0)
    model = RodimusForCausalLM(RodimusConfig(**SIZES | (SWITCHES | NOTHING)[name]))
    bias = model.model.layers[0].mixer.mem_gate_bias.detach()
    assert len(bias) == (32 if model.config.temperature_gate else 16)
    assert (F.softplus(bias[:16]) > 0.00099).all()
    assert (F.softplus(bias[:16]) < 0.101).all()
    assert (model.model.layers[0].mixer.in_proj.weight.std() - 2**-2.5 * (2 / (96 + 32)) ** 0.5).abs() < 1e-3
    model(tokens(2, 20), labels=tokens(2, 20)).loss.backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_a_compiled_model_is_one_graph():
    torch.compiler.reset()
    model, ids = build("nothing left", num_hidden_layers=1), tokens(2, 20)
    with torch.no_grad():
        got = torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=True)
        want = model(ids, use_cache=True)
    assert relative(got.logits, want.logits) < FLOAT32
    torch.compiler.reset()


def test_exported_programs_decode_with_a_window_of_no_steps():
    model = build("nothing left", num_hidden_layers=1)
    prefill, step = (program.module() for program in export_decoding(model))
    ids, mask = tokens(3, 14), torch.ones(3, 14, dtype=torch.long)
    mask[1, :5] = 0
    logits, *state = prefill(ids, mask)
    cache = RodimusCache(model)
    with torch.no_grad():
        assert relative(logits, model(ids, attention_mask=mask, cache=cache).logits[:, -1]) < FLOAT32
        for _ in range(3):
            ids = logits.argmax(-1, keepdim=True)
            logits, *state = step(ids, *state)
            assert relative(logits, model(ids, cache=cache).logits[:, -1]) < FLOAT32


@with_nothing
def test_the_plan_of_tensor_parallelism_names_what_there_is(name):
    model = build(name)
    planned = {key.replace("*", "0") for key in model.config.base_model_tp_plan}
    assert planned <= {key for key, _ in model.model.named_modules()}
    assert ("layers.0.mixer.ch_gate_up" in planned) == (model.config.input_gate == "full")


def test_a_full_input_gate_goes_into_few_bits():
    model = build("full input gate")
    few = quantize(build("full input gate"), bits=8)
    assert isinstance(few.model.layers[0].mixer.ch_gate_up, FewBits)
    with torch.no_grad():
        assert relative(few(tokens(2, 20)).logits, model(tokens(2, 20)).logits) < 0.05


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_heads_of_a_grouped_checkpoint_in_another_order_are_the_authors(groups):
    """Elsewhere query head h reads key h // (H / K), here h mod K: what modeling/README.md says of such checkpoints."""
    torch.manual_seed(0)
    heads, T, d = 4, 20, 48
    config = RodimusConfig(**SIZES | dict(num_key_heads=groups, num_value_heads=groups, rotary_dim=0))
    attention = SharedKeyWindow(config).double()
    x, p = torch.randn(2, T, d, dtype=torch.float64), config.head_dim
    q, k, v = (
        proj(x).unflatten(-1, (-1, p)).transpose(1, 2)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    back = torch.arange(T)[:, None] - torch.arange(T)
    seen = (back >= 0) & (back < config.sliding_window)
    theirs = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
    want = attention.o_proj(theirs.transpose(1, 2).flatten(2))
    order = torch.arange(heads).view(groups, -1).T.flatten()
    with torch.no_grad():
        attention.q_proj.weight.copy_(attention.q_proj.weight.unflatten(0, (heads, p))[order].flatten(0, 1))
        attention.o_proj.weight.copy_(attention.o_proj.weight.unflatten(1, (heads, p))[:, order].flatten(1))
    assert relative(attention(x, Layout(torch.arange(T)[None])), want) < FLOAT64
