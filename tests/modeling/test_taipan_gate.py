"""The gate: its bits, its odds, and where its gradients push."""

import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from parity_cases import tokens
from taipan_cases import build
from zoo import relative

from scrubjay.kernels.gate import (
    gate_logit,
    gate_logit_reference,
    gumbel_difference,
    row_norm,
    select,
    straight_through,
    threshold_for,
)
from scrubjay.modeling import selective_layer as selective


def operands(rows, d, hidden=0, dtype=torch.float32, seed=0):
    """h, gate (weight, bias), norm weight, hidden layer or None."""
    random = torch.Generator().manual_seed(seed)
    n = hidden or d

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    layer = (normal(hidden, d) * d**-0.5, normal(hidden)) if hidden else None
    return 3 * normal(rows, d), normal(2, n) * n**-0.5, normal(2), 1 + 0.3 * normal(d), layer


def delta_of(h, weight, bias, norm, hidden):
    return gate_logit(row_norm(h, norm, 1e-5), weight, bias, hidden)


def test_weights_that_come_when_their_module_runs_are_not_read_before(monkeypatch):
    """accelerate keeps them elsewhere. On a GPU norm and gate are else one pass, which reads the weights of both."""
    ids, model = tokens(29, 2, 30), build()
    with torch.no_grad():
        want = model(ids).logits
        monkeypatch.setattr(selective, "in_one_pass", lambda *operands: True)
        assert torch.equal(model(ids).logits, want)
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("hidden", [0, 40], ids=["linear", "network"])
@pytest.mark.parametrize("d", [1, 3, 48, 768, 2047, 2048])
def test_T7_bits_do_not_depend_on_the_batch_or_the_chunk(d, hidden):
    h, *gate = operands(512, d, hidden)
    want = delta_of(h, *gate)
    assert torch.equal(torch.cat([delta_of(row[None], *gate) for row in h]), want)
    assert torch.equal(delta_of(h.view(4, 128, d), *gate).flatten(), want)
    for a, b in ((0, 7), (7, 40), (40, 512)):
        assert torch.equal(delta_of(h[a:b], *gate), want[a:b])
    backwards = delta_of(h.t().contiguous().t().flip(0), *gate)  # another layout in memory
    assert torch.equal(backwards.flip(0), want)


def test_T7_threads_do_not_change_the_bits():
    h, *gate = operands(512, 2048)
    threads, want = torch.get_num_threads(), delta_of(h, *gate)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(delta_of(h, *gate), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("hidden", [0, 40], ids=["linear", "network"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 1e-13)], ids=str)
def test_the_gate_equals_its_reference_gradients_included(dtype, bound, hidden):
    """fp32: the worst of 20 seeds was 4.2e-7."""
    for seed in range(3):
        h, weight, bias, norm, layer = operands(64, 100, hidden, dtype, seed)
        leaves = [h, weight, bias, norm, *(layer or ())]
        wide = [leaf.double().requires_grad_() for leaf in leaves]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        got = delta_of(*leaves[:4], tuple(leaves[4:]) or None)
        want = gate_logit_reference(*wide[:4], 1e-5, tuple(wide[4:]) or None)
        given = torch.randn(64, dtype=torch.float64)
        assert relative(got, want) < bound
        grads = torch.autograd.grad((got * given.to(dtype)).sum(), leaves)
        expected = torch.autograd.grad((want * given).sum(), wide)
        assert max(relative(a, b) for a, b in zip(grads, expected, strict=True)) < bound


def test_low_precision_operands_are_read_as_float32():
    h, weight, bias, norm, _ = operands(16, 48)
    h, norm = h.bfloat16(), norm.bfloat16()
    got = delta_of(h, weight, bias, norm, None)
    assert got.dtype == torch.float32
    assert torch.equal(got, delta_of(h.float(), weight, bias, norm.float(), None))


@pytest.mark.parametrize("tau", [0.3, 1.0, 5.0])
def test_T7_a_token_is_drawn_with_probability_a_whatever_the_temperature(tau):
    """At a temperature the larger of two tempered logits is the larger of the two logits."""
    delta = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0])
    draws = 40_000
    noise = gumbel_difference(delta.expand(draws, -1))
    share = select(delta.expand(draws, -1), noise=noise).double().mean(0)
    a = torch.sigmoid(delta.double())
    assert ((share - a).abs() < 5 * (a * (1 - a) / draws).sqrt()).all()
    soft = torch.sigmoid((delta + noise) / tau)
    assert torch.equal(soft > 0.5, select(delta.expand(draws, -1), noise=noise))


def test_gumbel_differences_are_logistic_and_finite():
    x = gumbel_difference(torch.empty(200_000)).double().sort().values
    n = len(x)
    distance = (torch.sigmoid(x) - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov and Smirnov, once in a thousand seeds
    assert torch.isfinite(x).all()


def test_a_tie_drops_and_padding_is_never_selected():
    delta = torch.tensor([[-1.0, 0.0, 1e-30, 1.0]])
    assert select(delta).tolist() == [[False, False, True, True]]
    assert select(delta, real=torch.tensor([[True, True, True, False]])).tolist() == [[False, False, True, False]]
    at = math.log(0.7 / 0.3)
    around = torch.tensor([at - 1e-3, at + 1e-3])
    assert select(around, 0.7).tolist() == [False, True]
    assert torch.equal(select(around, 0.7), torch.sigmoid(around) > 0.7)


def test_with_a_threshold_a_token_is_drawn_with_the_odds_that_are_left():
    """p / (1 - p) = a / (1 - a) * (1 - t) / t, and the choice without noise where there is none."""
    delta, draws = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0]).double(), 40_000
    noise = gumbel_difference(delta.expand(draws, -1))
    for t in (0.1, 0.5, 0.8):
        odds = delta.exp() * (1 - t) / t
        p = odds / (1 + odds)
        share = select(delta.expand(draws, -1), t, noise).double().mean(0)
        assert ((share - p).abs() < 5 * (p * (1 - p) / draws).sqrt()).all()
        assert torch.equal(select(delta, t, torch.zeros_like(delta)), select(delta, t))
    low = delta.float().expand(draws, -1)
    assert torch.equal(select(low, noise=noise.float()), low + noise.float() > 0)  # the bits of the rule of training


@pytest.mark.parametrize("rate", [0.001, 0.15, 0.5, 0.998])
def test_the_threshold_for_a_rate_selects_that_many(rate):
    delta = 3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert int(select(delta, threshold_for(delta, rate)).sum()) == round(1000 * rate)
    odds = torch.sigmoid(delta.double() - math.log(1 / (1 / threshold_for(delta, rate, sampled=True) - 1)))
    assert float(odds.mean()) == pytest.approx(rate, rel=1e-9)


def test_the_threshold_for_a_rate_takes_none_or_all_and_stays_between_0_and_1():
    delta = torch.tensor([-1000.0, 0.0, 1.0, 1000.0])
    for rate, selected in ((0.1, 0), (0.5, 2), (0.9, 4)):
        threshold = threshold_for(delta[1:3] if selected != 2 else delta, rate)
        assert 0 < threshold < 1
        assert int(select(delta[1:3] if selected != 2 else delta, threshold).sum()) == min(selected, 2)
    assert 0 < threshold_for(delta[:1], 0.9) < threshold_for(delta[3:], 0.1) < 1


def test_the_hard_choice_is_exact_and_has_the_gradient_of_the_soft_one():
    p = torch.rand(10_000).requires_grad_()
    m = torch.rand(10_000) > 0.5
    out = straight_through(m, p)
    assert torch.equal(out, m.float())
    assert not torch.equal((m + p) - p.detach(), m.float())  # the other order of the sum is off by a rounding
    (grad,) = torch.autograd.grad(out.sum(), p)
    assert (grad == 1).all()


def with_deltas(model, ids, scalar, **kwargs):
    """(outputs, [(delta, gradient of scalar(outputs) by delta)]) of every gate."""
    found = []
    modules = [module for module in model.modules() if isinstance(module, selective.Gate)]
    hooks = [module.register_forward_hook(lambda module, args, out: found.append(out)) for module in modules]
    out = model(ids, **kwargs)
    for hook in hooks:
        hook.remove()
    return out, list(zip(found, torch.autograd.grad(scalar(out), found, allow_unused=True), strict=True))


@pytest.mark.parametrize(("capacity", "sign"), [(0.05, 1), (0.95, -1)])
@pytest.mark.parametrize("surrogate", ["p1", "chosen"])
def test_T7_the_budget_pushes_every_token_the_same_way(capacity, sign, surrogate):
    """Selected or not: down where more than C are selected, up where fewer are."""
    model = build(capacity=capacity, st_surrogate=surrogate).train()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :9] = 0
    out, pairs = with_deltas(model, tokens(29, 2, 40), lambda out: out.budget_loss, attention_mask=mask)
    assert ((out.selection[:, 0] - capacity) * sign > 0).all()
    own = [i for i, (_, grad) in enumerate(pairs) if grad is not None]
    assert own == list(range(len(pairs)))
    last = pairs[-1][1]  # no later layer's budget reaches it
    real = torch.stack([torch.arange(40) < 31, torch.arange(40) < 40])  # the blocks' order: real tokens first
    assert (sign * last[real] > 0).all()
    assert (last[~real] == 0).all()


def test_the_literal_surrogate_would_push_unselected_tokens_up(monkeypatch):
    """Why the budget takes p1: with equation 3 only what was selected is pushed down."""
    model = build(capacity=0.05).train()

    def literal(m, p):
        return m.to(p.dtype) + torch.where(m, p - p.detach(), (1 - p) - (1 - p).detach())

    monkeypatch.setattr(selective, "straight_through", literal)
    out, pairs = with_deltas(model, tokens(29, 2, 40), lambda out: out.budget_loss)
    down = (pairs[-1][1] > 0).double().mean(1)  # of each row, which has a budget of its own
    assert 0.05 < out.selection[-1, 0] < 0.9
    assert torch.allclose(down.mean(), out.selection[-1, 0].double())


@pytest.mark.parametrize(("attention", "reached"), [("dense", 1.0), ("compact", None)])
def test_T7_dense_training_teaches_the_gate_of_every_token(attention, reached):
    """The language model's own loss, without a budget."""
    model = build(train_attention=attention, num_hidden_layers=2).train()
    ids = tokens(29, 2, 40)
    out, ((delta, grad),) = with_deltas(
        model, ids, lambda out: F.cross_entropy(out.logits.flatten(0, 1), ids.flatten())
    )
    share = (grad != 0).double().mean()
    assert share == (out.selection[0, 0].double() if reached is None else reached)
    assert delta.shape == grad.shape


def test_an_annealed_temperature_changes_the_gradient_and_not_the_choice():
    model, ids = build().train(), tokens(29, 2, 40)
    grads, logits = [], []
    for tau in (1.0, 0.5):
        model.config.gumbel_tau = tau
        torch.manual_seed(5)
        out, pairs = with_deltas(model, ids, lambda out: out.budget_loss)
        grads.append(pairs[-1][1])
        logits.append(out.logits)
    assert torch.equal(*logits)
    assert not torch.allclose(*grads)


def test_wrong_shapes_and_backends_are_named():
    h, weight, bias, *_ = operands(4, 8)
    with pytest.raises(ValueError, match=r"weight \(2, D\).*got.*\(3, 8\)"):
        gate_logit(h, torch.zeros(3, 8), bias)
    with pytest.raises(ValueError, match=r"weight \(2, n\)"):
        gate_logit(h, weight, bias, (torch.zeros(5, 8), torch.zeros(5)))
    with pytest.raises(ValueError, match=r"needs (cuda|Triton)"):
        gate_logit(h, weight, bias, backend="triton")
