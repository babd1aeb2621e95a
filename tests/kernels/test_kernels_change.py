"""What a sequence does to a recurrent state, S' = exp(A) S + Z, without its outputs; ranks exchange it."""

import sys

import pytest
import torch
from kernel_cases import BF16, F32, F64, MARGIN, OutOfBoundError, draw, error, results, widened
from kernel_checks import forgetting

from scrubjay.kernels import recurrence
from scrubjay.kernels.ddts import ddts, ddts_change, ddts_change_reference
from scrubjay.kernels.ssd import ssd, ssd_change, ssd_change_reference

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")
# name: the fast path, its law, the whole recurrence
CHANGES = {
    "ssd": (ssd_change, ssd_change_reference, ssd),
    "ddts": (ddts_change, ddts_change_reference, ddts),
}
MEASURED = {F64: 1.4e-15, F32: 2.7e-7, BF16: 3.8e-3}  # largest error of a result in that dtype, over 20 seeds
LENGTHS = (1, 15, 16, 17, 33)  # around the borders of blocks of 16


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch):
    monkeypatch.setattr(recurrence, "OUTER_BLOCK", 16)


def inputs_of(kernel, T, dtype, seed=0, **arguments):
    """Without q and an initial state; decays and gains in float32 at least, as models have them."""
    inputs = draw(kernel, T, dtype, seed, wide=("a", "g"), states=0, **arguments)
    return {name: x for name, x in inputs.items() if name != "q"}


def check(kernel, inputs):
    """A ("y"), Z ("state") and every gradient against the law in float64."""
    change, reference, _ = CHANGES[kernel]
    got, cotangents = results(change, inputs)
    for name, want in results(reference, widened(inputs), cotangents)[0].items():
        found, bound = error(got[name], want), MARGIN * MEASURED[got[name].dtype]
        if not found <= bound:
            raise OutOfBoundError(f"{kernel} {name}: error {found:.2e}, bound {bound:.0e}")


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("kernel", CHANGES)
def test_change_equals_the_law_gradients_included(kernel, dtype):
    for T in LENGTHS:
        check(kernel, inputs_of(kernel, T, dtype))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_change_of_heads_in_groups(groups):
    check("ssd", inputs_of("ssd", 33, F64, groups=groups))


@pytest.mark.parametrize("scale", [1e3, 0.0])
@pytest.mark.parametrize("kernel", CHANGES)
def test_change_under_decays_of_any_strength(kernel, scale):
    inputs = inputs_of(kernel, 33, F64)
    inputs["a"] *= scale
    check(kernel, inputs)


@pytest.mark.parametrize("kernel", CHANGES)
def test_a_decay_of_minus_infinity_forgets_all_that_was_before(kernel):
    change = CHANGES[kernel][0]
    inputs = inputs_of(kernel, 20, F64)
    inputs["a"][:, 12] = -torch.inf
    total, state = change(**inputs)
    alone = change(**{name: x[:, 12:] for name, x in inputs.items()})[1]
    assert bool((total == -torch.inf).all())
    assert error(state, alone) < 1e-15


@pytest.mark.parametrize("strength", [-torch.inf, -1e14], ids=str)
@pytest.mark.parametrize("kernel", CHANGES)
def test_change_with_its_gradients_where_decays_forget_everything(kernel, strength):
    def factor(change):
        def call(**inputs):
            total, state = change(**inputs)
            return total.exp(), state

        return call

    change, reference, _ = CHANGES[kernel]
    inputs = forgetting(inputs_of(kernel, 33, F32), strength, [0, 15, 16, 20, 32])
    got, cotangents = results(factor(change), inputs)
    for name, want in results(factor(reference), widened(inputs), cotangents)[0].items():
        assert error(got[name], want) < MARGIN * MEASURED[F32], name
    assert not got["d a"][inputs["a"] == inputs["a"].min()].any()


@pytest.mark.parametrize("kernel", CHANGES)
def test_change_gives_the_final_state_of_the_whole_recurrence(kernel):
    change, _, whole = CHANGES[kernel]
    inputs = draw(kernel, 33, F64)
    start = inputs.pop("initial_state")
    decay, new = change(**{name: x for name, x in inputs.items() if name != "q"})
    decay = decay.exp().view(*decay.shape, *[1] * (start.ndim - decay.ndim))
    assert error(decay * start + new, whole(**inputs, initial_state=start)[1]) < 1e-14


@pytest.mark.parametrize("kernel", CHANGES)
def test_gradients_of_change_agree_with_finite_differences(kernel):
    inputs = inputs_of(kernel, 5, F64, batch=1)
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *xs: CHANGES[kernel][0](**dict(zip(inputs, xs, strict=True))), leaves)


@pytest.mark.parametrize("kernel", CHANGES)
def test_16_bit_inputs_make_a_state_in_float32(kernel):
    total, state = CHANGES[kernel][0](**inputs_of(kernel, 5, BF16))
    assert total.dtype == state.dtype == F32


@pytest.mark.parametrize("kernel", CHANGES)
def test_what_does_not_fit_is_refused(kernel):
    inputs = inputs_of(kernel, 5, F32)
    with pytest.raises(ValueError, match="needs q, k"):
        CHANGES[kernel][0](**inputs | {"v": inputs["v"][:, :4]})
    with pytest.raises(ValueError, match="length 0"):
        CHANGES[kernel][0](**{name: x[:, :0] for name, x in inputs.items()})


def a_step_late(a):
    total, later = recurrence.decay_to_end(a)
    return total, later + a


def total_without_the_first_step(a):
    later = recurrence.decay_to_end(a)[1]
    return later[:, 0], later


MUTANTS = {"a step's own decay counts": a_step_late, "the first step decays nothing": total_without_the_first_step}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("kernel", CHANGES)
def test_a_deliberate_error_is_found(kernel, mutant, monkeypatch):
    change = CHANGES[kernel][0]
    monkeypatch.setattr(sys.modules[change.__module__], "decay_to_end", MUTANTS[mutant])
    with pytest.raises(OutOfBoundError):
        check(kernel, inputs_of(kernel, 17, F64))
