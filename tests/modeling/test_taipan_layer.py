"""The selective layer alone: its extremes, its training forms against the formulas, and its margin from ties."""

import math

import parity_cases
import pytest
import torch
import torch.nn.functional as F
from parity_cases import BOUND, tokens
from taipan_cases import CASES, build, gates, margin, recorded
from zoo import ZOO, relative
from zoo import tokens as zoo_tokens

from scrubjay.kernels.gate import gumbel_difference, select
from scrubjay.modeling import selective_layer as selective
from scrubjay.modeling.layout import Layout
from scrubjay.modeling.modeling_taipan import SelectiveBlock


def error(got, want):
    return parity_cases.error(got.detach(), want.detach())


def layer_of(name="defaults", **changes):
    """A selective block in float64, and (2, 40, 24) hidden states for it."""
    model = build(name, **changes)
    block = next(module for module in model.modules() if isinstance(module, SelectiveBlock))
    return block, 2 * torch.randn(2, 40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def plain(B=2, T=40):
    return Layout(torch.arange(T).expand(B, T))


def move_gate(block, by):
    with torch.no_grad():
        block.attn.gate.bias[1] += by


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", ["defaults", "selected keys"])
def test_T5_with_nothing_selected_the_layer_is_its_feed_forward_network_bit_for_bit(name, training):
    block, h = layer_of(name)
    move_gate(block, -1e4)
    block.train(training)
    got, _ = block(h, plain())
    assert torch.equal(got, h + block.ffn(block.ffn_norm(h)))


def sdpa(attn, h, mask):
    """(attention, a) of every token with torch's own kernel, by the formulas."""
    x = F.rms_norm(h, h.shape[-1:], attn.norm.weight, attn.norm.eps)
    q, k, v = (p(x).unflatten(-1, (-1, 6)).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    o = attn.o_proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
    s = F.linear(x, attn.gate.weight, attn.gate.bias)
    return o, s.softmax(-1)[..., 1, None]


def test_T5_with_everything_selected_and_a_long_window_it_is_causal_attention_and_equation_5():
    block, h = layer_of(sliding_window=64)
    o, a = sdpa(block.attn, h, torch.ones(40, 40, dtype=torch.bool).tril())
    mixed = (1 - a) * h + a * o
    assert error(block(h, plain(), threshold=1e-9)[0], mixed + block.ffn(block.ffn_norm(mixed))) < BOUND


@pytest.mark.parametrize("w", [1, 5, 8])
def test_T5_a_query_reaches_exactly_w_positions(w):
    block, h = layer_of(sliding_window=w)
    h.requires_grad_()
    with gates(block) as found:
        out, _ = block(h, plain())
    selected = found[0][1] > 0
    for i in (0, 3, 20, 39):
        (grad,) = torch.autograd.grad(out[0, i].sum(), h, retain_graph=True)
        reached = grad[0].abs().sum(-1).nonzero().flatten().tolist()
        assert reached == (list(range(max(0, i - w + 1), i + 1)) if selected[0, i] else [i])
        assert not grad[1].any()


def test_T6_the_contract_tests_in_float32_stay_clear_of_ties():
    """Of the zoo's model on the inputs with which float32 paths are compared; rounding of delta is below 2e-6."""
    entry = next(entry for entry in ZOO if entry.name == "taipan")
    model = entry.build()
    exact = entry.build().double()
    for ids in (zoo_tokens(3, 150), zoo_tokens(3, 40), zoo_tokens(2, 30), zoo_tokens(2, 80)):
        found, wide = recorded(model, ids)[1], recorded(exact, ids)[1]
        rounding = max(float((a - b).abs().max()) for (_, a), (_, b) in zip(found, wide, strict=True))
        assert rounding < 2e-6
        assert margin(found) > 20 * rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_T6_given_the_same_input_a_layer_selects_the_same_tokens_whole_or_step_by_step(dtype):
    """Teacher-forced: the mask in bits, the output as far as the dtype rounds."""
    block, h = layer_of()
    block = block.to(dtype)
    block.attn.gate.float()
    h = h.float()
    cache = build(dtype=dtype).cache_class(build().config)
    with torch.no_grad(), gates(block) as found:
        whole, _ = block(h, plain())
        steps = []
        for t in range(40):
            steps.append(block(h[:, t : t + 1], Layout(torch.full((2, 1), t)), state=cache.layers[1])[0])
            cache.count(1, 1, None)
    (_, first), *rest = found
    assert torch.equal(torch.cat([delta for _, delta in rest], 1), first)
    # bfloat16 keeps 8 bits
    assert relative(torch.cat(steps, 1), whole) < (2e-6 if dtype == torch.float32 else 3e-2)


def test_T6_share_of_choices_that_bfloat16_changes(record_property):
    """From end to end choices near a tie may fall either way; their share is reported, and small."""
    entry = next(entry for entry in ZOO if entry.name == "taipan")
    ids = zoo_tokens(4, 200)
    low = entry.build().to(torch.bfloat16)
    for module in low.modules():
        if isinstance(module, selective.Gate):
            module.float()
    with torch.no_grad():
        (_, a), (_, b) = recorded(entry.build(), ids)[1][0], recorded(low, ids)[1][0]
    share = float(((a > 0) != (b > 0)).double().mean())
    record_property("flips", share)
    assert share < 0.05


def test_training_leaves_unselected_tokens_as_they_are_bit_for_bit():
    attn = build(dtype=torch.float32).train().model.layers[1].attn
    h = 2 * torch.randn(2, 400, 24)
    torch.manual_seed(0)
    out, _ = attn(h, plain(2, 400))
    torch.manual_seed(0)
    m = select(attn.gate(attn.norm(h)), noise=gumbel_difference(h[..., 0]))
    assert 200 < m.sum() < 600
    assert torch.equal(out[~m], h[~m])
    assert (out[m] != h[m]).any(-1).all()


def formula(attn, h, m, p1, o, a, surrogate, attention):
    """Section 3 of the header in kernels/gate.py, written out: forward value and surrogate gradient."""
    hard = m.double()[..., None]
    if surrogate == "chosen":
        c = torch.where(m, p1, 1 - p1)[..., None]
        return (h + hard * a * (o - h)) * (1 + c - c.detach())
    soft = hard + (p1 - p1.detach())[..., None]
    strength = soft * a if attention == "dense" else torch.where(m[..., None], soft * a, 0.0)
    return h + strength * (o - h)


@pytest.mark.parametrize("gate", ["sample", "argmax"])
@pytest.mark.parametrize("scope", ["all", "selected"])
@pytest.mark.parametrize(
    ("surrogate", "attention"), [("p1", "dense"), ("p1", "compact"), ("chosen", "dense"), ("chosen", "compact")]
)
def test_training_equals_the_formulas_gradients_included(surrogate, attention, scope, gate, monkeypatch):
    """The threshold is one of evaluation, which training by argmax follows and drawing does not."""
    changes = dict(st_surrogate=surrogate, train_attention=attention, kv_scope=scope, gumbel_tau=0.7)
    block, h = layer_of(**changes, train_gate=gate)
    attn, noise = block.train().attn, 2 * torch.randn(2, 40, dtype=torch.float64)
    monkeypatch.setattr(selective, "gumbel_difference", lambda like: noise)
    h.requires_grad_()
    i, j = torch.arange(40)[:, None], torch.arange(40)
    x = F.rms_norm(h, h.shape[-1:], attn.norm.weight, attn.norm.eps)
    s = F.linear(x, attn.gate.weight, attn.gate.bias)
    delta = s[..., 1] - s[..., 0]
    score = delta + noise if gate == "sample" else delta - math.log(0.6 / 0.4)
    m, p1 = score > 0, torch.sigmoid(score / 0.7)
    seen = ((j <= i) & (i - j < 8)).expand(2, -1, -1)
    if scope == "selected":
        seen = seen & (m[:, None] | (i == j))
    o, a = sdpa(attn, h, seen[:, None])
    want = formula(attn, h, m, p1, o, a, surrogate, attention)
    got, sums = attn(h, plain(), threshold=0.6)
    assert error(got, want) < BOUND
    assert torch.equal(sums[:, 0].round(), m.sum(1).double())
    given = torch.randn_like(h)
    leaves = [h, *(p for name, p in attn.named_parameters())]
    grads = torch.autograd.grad((got * given).sum(), leaves)
    expected = torch.autograd.grad((want * given).sum(), leaves)
    assert max(error(g, e) for g, e in zip(grads, expected, strict=True)) < BOUND


@pytest.mark.parametrize("name", CASES)
def test_dense_and_compact_training_have_the_same_value(name):
    ids, losses = tokens(29, 2, 40), []
    for attention in ("dense", "compact"):
        model = build(name, train_attention=attention).train()
        torch.manual_seed(2)
        losses.append(model(ids, labels=ids).loss)
    assert error(losses[0][None], losses[1][None]) < BOUND


@pytest.mark.parametrize("attention", ["dense", "compact"])
@pytest.mark.parametrize("name", ["defaults", "selected keys", "selected keys by rank, cap of 3", "rope"])
def test_training_mode_through_a_cache_equals_one_pass(name, attention, monkeypatch):
    """Where nothing is left to chance."""
    model, ids = build(name, train_attention=attention).train(), tokens(29, 2, 40)
    monkeypatch.setattr(selective, "gumbel_difference", torch.zeros_like)
    want, cache = model(ids).logits, None
    logits = []
    for piece in ids.split([13, 1, 8, 18], 1):
        out = model(piece, cache=cache, use_cache=True)
        cache = out.cache
        logits.append(out.logits)
    assert error(torch.cat(logits, 1), want) < BOUND
