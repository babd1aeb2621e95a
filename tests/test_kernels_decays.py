"""The decays of the recurrent kernels: as strong and as weak as they come."""

import pytest
import torch
from kernel_cases import BF16, F16, F32, F64, KERNELS, assert_within, check, cut, draw, two_borders
from kernel_checks import check_decays

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


@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_steps_that_add_and_forget_nothing_leave_the_state(kernel):
    inputs = draw(kernel, two_borders(kernel), F64)
    for real in (1, 20, two_borders(kernel) - 1):
        idle = {name: x.clone() for name, x in inputs.items()}
        idle["a"][:, real:] = idle["v"][:, real:] = 0
        state, expected = KERNELS[kernel].fast(**idle)[1], KERNELS[kernel].fast(**cut(kernel, inputs, 0, real))[1]
        assert_within(kernel, {"state": state}, {"state": expected}, inputs)
