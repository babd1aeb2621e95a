"""Half precision, mixed precision, autocast, and the dtypes of results."""

import pytest
import torch
from kernel_cases import BF16, F16, F32, F64, KERNELS, RECURRENT, all_of, assert_within, check, draw
from kernel_checks import draw_packed, offsets

from scrubjay.kernels.window import window_attention_step

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


@pytest.mark.parametrize(
    ("kernel", "wide"),
    [
        ("ssd", ["a", "g"]),
        ("ddts", ["k", "a"]),
        ("ddts", ["v"]),
        ("causal_conv", ["weight", "bias"]),
        ("gated_rms_norm", ["weight", "skip"]),
        ("gated_rms_norm", ["z"]),
        ("rms_norm", ["x"]),
    ],
)
def test_bfloat16_beside_float32_equals_reference(kernel, wide):
    for T in KERNELS[kernel].lengths:
        check(kernel, draw(kernel, T, BF16, seed=T, wide=wide))


@pytest.mark.parametrize("kernel", KERNELS)
def test_float16_equals_reference(kernel):
    check(kernel, draw(kernel, 35, F16))


@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_results_have_the_inputs_dtype_and_states_float32_at_least(kernel, dtype, T):
    inputs = draw(kernel, T, dtype, states=0)
    found = all_of(kernel, inputs)
    states = {"state": torch.promote_types(dtype, F32)} if KERNELS[kernel].states else {"state": dtype}
    wanted = {"y": dtype} | {f"d {name}": x.dtype for name, x in inputs.items()} | states
    assert {name: x.dtype for name, x in found.items()} == {name: wanted[name] for name in found}


@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_a_bfloat16_initial_state_is_continued_in_float32(kernel, T):
    inputs = draw(kernel, T, BF16)
    inputs["initial_state"] = inputs["initial_state"].to(BF16)
    found = all_of(kernel, inputs)
    assert found["state"].dtype == F32
    assert found["d initial_state"].dtype == BF16


def without_and_with_autocast(call):
    """The results of `call`, backward pass included, outside and inside an autocast region."""
    plain = call()
    with torch.autocast("cpu", BF16):
        return plain, call()


@pytest.mark.parametrize("T", [1, 35])
@pytest.mark.parametrize("kernel", ["ssd", "ddts", "gated_rms_norm"])
def test_autocast_lowers_nothing_forward_or_backward(kernel, T):
    inputs = draw(kernel, T)
    plain, inside = without_and_with_autocast(lambda: all_of(kernel, inputs))
    assert_within(kernel, inside, plain, inputs, bound=0.0)


def test_autocast_does_not_lower_packed_documents():
    for kernel in ("ssd", "ddts"):
        inputs = draw_packed(kernel, F32)
        plain, inside = without_and_with_autocast(lambda k=kernel, x=inputs: all_of(k, x, cu_seqlens=offsets(k)))
        assert_within(kernel, inside, plain, inputs, bound=0.0)


def test_autocast_does_not_lower_the_step_of_window_attention():
    q, keys, values = torch.randn(2, 4, 7), torch.randn(2, 1, 9, 7), torch.randn(2, 4, 9, 7)
    held = torch.ones(2, 9, dtype=torch.bool)
    plain, inside = without_and_with_autocast(lambda: window_attention_step(q, keys, values, held))
    assert torch.equal(plain, inside)


@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.parametrize("kernel", RECURRENT)
def test_autocast_leaves_the_dtypes_of_results(kernel, T):
    inputs = draw(kernel, T)
    plain, inside = without_and_with_autocast(lambda: all_of(kernel, inputs))
    assert {name: x.dtype for name, x in inside.items()} == {name: x.dtype for name, x in plain.items()}
