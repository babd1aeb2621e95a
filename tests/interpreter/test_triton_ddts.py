"""DDTS and Rodimus' gates as Triton kernels, in the interpreter, against their references in float64.

Chunks have 64 steps in 4 blocks where v has 16 bits, 32 in 2 where it has 32. The interpreter forms products of 16-bit
numbers in float32: what is not itself 16-bit is as exact there as with a float32 v.
"""

from functools import partial

import pytest
import torch
from kernel_cases import BF16, F16, F32, F64, assert_within, draw, results, widened
from kernel_checks import FORGETTING, forgetting
from rodimus_cases import (
    EPS,
    check_ddts,
    check_gates,
    check_products_in_16_bits,
    check_step,
    documents,
    draw_gates,
    drawn,
    fast,
    named,
    step_inputs,
)

from scrubjay.kernels.ddts import ddts, ddts_reference
from scrubjay.kernels.ddts_triton import ddts_step_triton
from scrubjay.kernels.rodimus_gates import rodimus_gates


@pytest.mark.parametrize("T", [1, 15, 16, 17, 32, 33, 70])
def test_float32_equals_the_reference(T):
    check_ddts(drawn(T))


@pytest.mark.parametrize("T", [1, 63, 64, 65, 131])
def test_a_16_bit_value_equals_the_reference(T):
    check_ddts(drawn(T, F16))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_16_bit_inputs_equal_the_reference(dtype):
    check_ddts(draw("ddts", 70, dtype, batch=1, states=1))


def test_products_of_16_bit_numbers_leave_the_state_exact():
    check_products_in_16_bits()


def test_rows_of_a_batch_do_not_mix():
    check_ddts(drawn(35, batch=3, states=3))


def test_without_an_initial_state():
    check_ddts(drawn(35, states=0))


@pytest.mark.parametrize(
    ("T", "size", "width"), [(34, 16, 16), (34, 20, 40), (18, 33, 70), (3, 100, 3), (3, 128, 16), (34, 1, 1)]
)
def test_sizes_that_are_no_powers_of_two(T, size, width):
    check_ddts(drawn(T, size=size, width=width))


def test_a_width_whose_sums_are_taken_in_parts():
    check_ddts(drawn(3, width=250))


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_packed_documents(dtype):
    inputs, options = documents(dtype)
    check_ddts(inputs, **options)


def test_packed_documents_without_states():
    inputs, options = documents(F32)
    del inputs["initial_state"]
    check_ddts(inputs, **options)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_decays_of_any_strength(dtype, scale):
    inputs = drawn(70, dtype)
    inputs["a"] *= scale
    check_ddts(inputs)


def test_one_strong_decay_among_weak_ones_takes_nothing_from_them():
    inputs = drawn(70, F16)
    inputs["a"] *= 1e-2
    inputs["a"][:, 5::7] -= 1e6
    check_ddts(inputs)


@pytest.mark.parametrize("where", FORGETTING)
@pytest.mark.parametrize("strength", [-torch.inf, -1e14], ids=str)
def test_a_decay_of_minus_infinity_forgets_everything(strength, where):
    inputs = forgetting(drawn(70, F16), strength, list(FORGETTING[where](32, 70)))
    found = check_ddts(inputs)
    assert not found["d a"][inputs["a"] == inputs["a"].min()].any()


def test_a_decay_of_minus_infinity_in_packed_documents():
    inputs, options = documents(F32)
    last = inputs["a"].shape[1] - 1
    check_ddts(forgetting(inputs, -torch.inf, [*range(0, last, 4), last]), **options)


def test_a_decay_of_minus_infinity_in_a_single_step():
    q, k, v, a, state = step_inputs()
    a[:, ::2] = -torch.inf
    check_step(q, k, v, a, state)


def test_inputs_that_are_not_contiguous():
    inputs = drawn(35, batch=2, states=2)
    spread = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in inputs.items()}
    spread["v"] = inputs["v"].mT.contiguous().mT
    assert not any(x.is_contiguous() for x in spread.values())
    check_ddts(spread)


def test_the_result_is_that_of_the_torch_path():
    inputs = drawn(70)
    got, cotangents = results(fast, inputs)
    assert_within("ddts", got, results(ddts, inputs, cotangents, backend="torch")[0], inputs, 1e-6)


def test_a_call_gives_the_same_bits_twice():
    inputs = drawn(70, width=40)
    first, cotangents = results(fast, inputs)
    again, _ = results(fast, inputs, cotangents)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(("size", "dtype"), [(5, F64), (129, F32)])
def test_what_the_kernels_do_not_cover_is_refused(size, dtype):
    with pytest.raises(ValueError, match="no Triton kernel"):
        fast(**drawn(3, dtype, size=size))


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize(("size", "width"), [(20, 70), (64, 32), (5, 7)])
def test_a_step_equals_the_reference(dtype, size, width):
    check_step(*step_inputs(dtype, size=size, width=width))


def test_a_step_takes_a_state_that_is_not_contiguous():
    *operands, state = step_inputs()
    check_step(*operands, state.mT.contiguous().mT)


def test_a_step_overwrites_the_state_only_if_it_may():
    *operands, state = step_inputs()
    kept = state.clone()
    _, new = ddts_step_triton(*operands, state)
    assert torch.equal(state, kept)
    _, same = ddts_step_triton(*operands, state, overwrite=True)
    assert same is state
    assert torch.equal(same, new)
    locked = kept.clone().requires_grad_()
    with torch.no_grad():
        assert ddts_step_triton(*operands, locked, overwrite=True)[1] is not locked


def test_one_token_without_gradient_takes_the_step(monkeypatch):
    inputs = drawn(1)
    expected = ddts_reference(**inputs)
    monkeypatch.setattr("scrubjay.kernels.ddts.ddts_triton", None)
    y, state = fast(**inputs)
    assert_within("ddts", {"y": y, "state": state}, dict(zip(("y", "state"), expected, strict=True)), inputs, 1e-6)


tempered_or_not = pytest.mark.parametrize("tempered", [True, False], ids=["", "no temperature"])


@tempered_or_not
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize(("T", "size"), [(9, 6), (5, 64), (70, 33), (1, 1)])
def test_gates_equal_the_formula(T, size, dtype, tempered):
    check_gates(draw_gates(T, size, dtype, tempered=tempered), backend="triton")


@tempered_or_not
def test_gates_of_keys_shorter_than_eps(tempered):
    inputs = draw_gates(tempered=tempered)
    inputs["qk"][0] *= 2e-6  # some just shorter than eps
    check_gates(inputs, backend="triton")


@tempered_or_not
def test_gates_whose_softplus_underflows_or_is_large(tempered):
    inputs = draw_gates(T=40, tempered=tempered)
    inputs["gates"][..., :6] = torch.linspace(-110, 60, 80).view(2, 40, 1)
    with torch.no_grad():
        inputs["bias"] *= 0.01
    fused, cotangents = results(named(partial(rodimus_gates, backend="triton")), inputs)
    exact, _ = results(named(rodimus_gates), widened(inputs), cotangents)
    assert_within("rodimus_gates", fused, exact, inputs, 2e-6)


@tempered_or_not
@pytest.mark.parametrize("selection", [-60.0, -15.5, -14.5, -7.0, -1.0, 3.0])
def test_a_small_gate_is_exact_relative_to_itself(selection, tempered):
    """Decays near 0 are what remembers: an error of 1e-7 of 1 would be one of 1e-4 of a decay of 1e-3."""
    inputs = draw_gates(T=3, tempered=tempered)
    inputs["gates"][..., :6], inputs["bias"][:6] = selection, 0.0
    _, k, a = rodimus_gates(**inputs, eps=EPS, backend="triton")
    _, key, decay = rodimus_gates(**widened(inputs), eps=EPS)
    assert ((a - decay) / decay).abs().max() < 5e-6
    assert ((k - key) / key).abs().max() < 5e-6


@tempered_or_not
def test_gates_that_are_not_contiguous(tempered):
    spread = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in draw_gates(tempered=tempered).items()}
    check_gates(spread, backend="triton")
