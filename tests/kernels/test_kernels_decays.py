"""The decays of the recurrent kernels: as strong and as weak as they come."""

import sys

import pytest
import torch
from kernel_cases import (
    BF16,
    F16,
    F32,
    F64,
    KERNELS,
    MARGIN,
    assert_within,
    check,
    cut,
    draw,
    error,
    in_pieces,
    two_borders,
)
from kernel_checks import FORGETTING, check_decays, check_forgetting, draw_packed, forgetting, offsets

from scrubjay.kernels.ssd import log_decay

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


@pytest.mark.parametrize("scale", [1e3, 1e-9, 0.0])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_extreme_decays_stay_finite_and_exact(kernel, dtype, scale):
    check_decays(kernel, dtype, scale)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_one_strong_decay_among_weak_ones_forgets_all_that_was_before(kernel, dtype):
    """A factored decay, exp(c_i) exp(-c_j), would overflow here."""
    T = two_borders(kernel)
    t = 2 * T // 3  # inside a chunk
    inputs = draw(kernel, T, dtype)
    inputs["a"] *= 0.01
    inputs["a"][:, t] = -500
    check(kernel, inputs)
    y, state = KERNELS[kernel].fast(**inputs)
    after = cut(kernel, inputs, t, T) | {"initial_state": torch.zeros_like(inputs["initial_state"])}
    fresh_y, fresh_state = KERNELS[kernel].fast(**after)
    assert_within(kernel, {"y": y[:, t:], "state": state}, {"y": fresh_y, "state": fresh_state}, inputs)


@pytest.mark.parametrize("where", FORGETTING)
@pytest.mark.parametrize("strength", [-torch.inf, -1e14, -3e38], ids=str)
@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_decays_that_forget_everything_take_nothing_from_weak_ones(kernel, strength, where):
    """Differences of large sums would: at 1e14 float64 numbers are 0.02 apart, and -inf less -inf is none."""
    check_forgetting(kernel, F32, strength, where)


@pytest.mark.parametrize("strength", [-torch.inf, -1e14], ids=str)
@pytest.mark.parametrize("dtype", [F64, BF16, F16], ids=str)
@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_decays_that_forget_everything_in_other_dtypes(kernel, dtype, strength):
    check_forgetting(kernel, dtype, strength, "several of a chunk")


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_decays_that_forget_everything_in_packed_documents(kernel, with_state):
    inputs = draw_packed(kernel, F32, with_state)
    first, last = 0, inputs["a"].shape[1] - 1
    inputs = forgetting(inputs, -torch.inf, [*range(first, last, 4), last])
    check(kernel, inputs, cu_seqlens=offsets(kernel))


@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_decays_that_forget_everything_in_single_steps(kernel):
    inputs = forgetting(draw(kernel, 9), -torch.inf, [0, 3, 8])
    check(kernel, inputs, in_pieces(kernel, range(1, 9)))
    step = sys.modules[KERNELS[kernel].fast.__module__].__dict__[f"{kernel}_step"]
    one = {name: x[:, 0] for name, x in inputs.items() if name != "initial_state"}
    y, state = step(**one, state=inputs["initial_state"])
    fresh_y, fresh = step(**one, state=torch.zeros_like(inputs["initial_state"]))
    assert torch.equal(y, fresh_y)
    assert torch.equal(state, fresh)


@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_a_decay_that_is_no_number_is_not_taken_for_one_that_forgets(kernel):
    inputs = draw(kernel, two_borders(kernel))
    inputs["a"][:, 3] = torch.nan
    y, state = KERNELS[kernel].fast(**inputs)
    assert bool(y[:, 3:].isnan().all())
    assert bool(state.isnan().all())


@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_steps_that_add_and_forget_nothing_leave_the_state(kernel):
    inputs = draw(kernel, two_borders(kernel), F64)
    for real in (1, 20, two_borders(kernel) - 1):
        idle = {name: x.clone() for name, x in inputs.items()}
        idle["a"][:, real:] = idle["v"][:, real:] = 0
        state, expected = KERNELS[kernel].fast(**idle)[1], KERNELS[kernel].fast(**cut(kernel, inputs, 0, real))[1]
        assert_within(kernel, {"state": state}, {"state": expected}, inputs)


RATES = (-torch.inf, -200.0, 0.0, 3.0, 44.0, 44.5, 60.0, 87.0, 89.0, 100.0, 132.0, 1e3, torch.inf)  # logarithms
SMALL = (0.0, 1e-45, 1e-38, 1e-30, 1e-9, 1e-3, 10.0)


def test_log_decays_of_rates_that_overflow_equal_the_formula():
    """In float32, against float64, where rates up to exp(709) are numbers; and -step * rate, where both are usual."""
    rates, steps = torch.tensor(RATES), torch.tensor(SMALL)[:, None].expand(-1, len(RATES)).contiguous()
    leaves = steps.requires_grad_(), rates.requires_grad_()
    forgotten = log_decay(*leaves).exp()
    exact = steps.detach().double().requires_grad_(), rates.detach().double().clamp(-750, 700).requires_grad_()
    want = (-exact[0] * exact[1].exp()).exp()
    assert error(forgotten.detach(), want.detach()) < MARGIN * 2.7e-8
    weights = torch.rand(want.shape, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad((forgotten * weights).sum(), leaves)
    law = torch.autograd.grad((want * weights).sum(), exact)
    fits = law[0].abs() < torch.finfo(F32).max / 4
    assert error(got[0][fits], law[0][fits]) < MARGIN * 4.2e-8
    assert bool(got[0].isfinite().all())
    assert error(got[1], law[1]) < MARGIN * 1.4e-7
    usual, step = 4 * torch.randn(24), torch.rand(2, 5, 24)
    assert torch.equal(log_decay(step, usual), -step * usual.exp())


def test_gradients_of_log_decays_equal_finite_differences():
    step, rate = torch.rand(2, 3, 4, dtype=F64), torch.randn(4, dtype=F64)
    assert torch.autograd.gradcheck(log_decay, (step.requires_grad_(), rate.requires_grad_()))
    assert torch.autograd.gradcheck(
        lambda step, rate: log_decay(step * 1e-170, rate + 391.0), (step.requires_grad_(), rate.requires_grad_())
    )
