"""The norms' Triton kernels equal their formulas, forward and backward."""

from functools import partial

import pytest
import torch
from kernel_cases import (
    BF16,
    F16,
    F32,
    F64,
    KERNELS,
    VARIANTS,
    all_of,
    assert_within,
    check,
    draw,
    results,
)

NORMS = ("gated_rms_norm", "rms_norm")
FAST = {name: partial(KERNELS[name].fast, backend="triton") for name in NORMS}
GATED, PLAIN = FAST["gated_rms_norm"], FAST["rms_norm"]


@pytest.mark.parametrize("T", [1, 33])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("kernel", "arguments", "options"), [v for v in VARIANTS if v[0] in NORMS])
def test_outputs_and_gradients_equal_the_formula(kernel, arguments, options, dtype, T):
    check(kernel, draw(kernel, T, dtype, **arguments), FAST[kernel], **options)


@pytest.mark.parametrize(
    ("channels", "groups"), [(3, 1), (60, 3), (600, 1), (3000, 3), (4096, 1), (5000, 1), (8192, 1)]
)
def test_groups_of_any_size(channels, groups):
    check("gated_rms_norm", draw("gated_rms_norm", 2, channels=channels), GATED, groups=groups)


@pytest.mark.parametrize("kernel", NORMS)
@pytest.mark.parametrize(("T", "channels"), [(600, 12), (33, 600), (20, 3000)])
def test_programs_that_go_on_to_more_rows(kernel, T, channels):
    check(kernel, draw(kernel, T, channels=channels), FAST[kernel])


def test_more_groups_than_programs():
    check("gated_rms_norm", draw("gated_rms_norm", 33, channels=240), GATED, groups=80)


@pytest.mark.parametrize("kernel", NORMS)
def test_equals_the_torch_path(kernel):
    inputs, options = draw(kernel, 33), KERNELS[kernel].options
    torchs, cotangents = results(KERNELS[kernel].fast, inputs, backend="torch", **options)
    assert_within(kernel, results(FAST[kernel], inputs, cotangents, **options)[0], torchs, inputs)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_float32_in_and_the_weights_dtype_out(dtype):
    inputs = draw("rms_norm", 33, dtype, wide=("x",))
    assert PLAIN(**inputs, eps=1e-5).dtype == dtype
    check("rms_norm", inputs, PLAIN)


def test_float32_weights_of_bfloat16_inputs():
    inputs = draw("gated_rms_norm", 33, BF16, wide=("weight", "skip"))
    assert GATED(**inputs, eps=1e-5).dtype == BF16
    check("gated_rms_norm", inputs, GATED)


def test_slices_of_a_wider_projection():
    inputs = draw("gated_rms_norm", 5)
    wide = torch.randn(2, 5, 40)
    inputs |= {"z": wide[..., 3:15], "x": wide[:, :, 20:32]}
    check("gated_rms_norm", inputs, GATED)


def test_channels_that_do_not_lie_side_by_side():
    inputs = draw("gated_rms_norm", 5)
    inputs |= {name: inputs[name].mT.contiguous().mT for name in "yzx"}
    inputs |= {name: inputs[name].repeat_interleave(2)[::2] for name in ("weight", "skip")}
    check("gated_rms_norm", inputs, GATED)


@pytest.mark.parametrize("kernel", NORMS)
def test_a_gradient_that_is_one_number_everywhere(kernel):
    inputs, options = draw(kernel, 5), KERNELS[kernel].options
    ones = [torch.ones(()).expand(2, 5, 12)]
    got, _ = results(FAST[kernel], inputs, ones, **options)
    assert_within(kernel, got, results(KERNELS[kernel].reference, inputs, ones, **options)[0], inputs)


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 5, 12)])
def test_any_number_of_axes(shape):
    inputs = {name: torch.randn(shape) for name in "yz"} | {"weight": torch.randn(12)}
    check("gated_rms_norm", inputs, GATED)


def test_no_rows():
    found = all_of("gated_rms_norm", draw("gated_rms_norm", 0), backend="triton")
    assert found["y"].shape == found["d z"].shape == (2, 0, 12)
    assert not found["d weight"].any()
    assert not found["d skip"].any()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # numpy's, in the interpreter
def test_gates_far_from_zero():
    """exp(1000) is infinite, silu(1000) is 1000 and silu(-1000) is 0."""
    inputs = draw("gated_rms_norm", 33)
    inputs["z"] *= 1000
    check("gated_rms_norm", inputs, GATED)


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("kernel", NORMS)
def test_no_epsilon(kernel):
    """What pads the last rows of a program is 0 / 0 then, and must not get into the weights' gradients."""
    check(kernel, draw(kernel, 5), FAST[kernel], eps=0.0)


def test_rows_of_zeros():
    inputs = draw("gated_rms_norm", 5)
    inputs |= {name: torch.zeros_like(inputs[name]) for name in "yx"}
    check("gated_rms_norm", inputs, GATED)


@pytest.mark.parametrize("kernel", NORMS)
def test_what_the_kernels_do_not_cover_is_refused(kernel):
    for inputs in (draw(kernel, 2, F64), draw(kernel, 2, channels=8193)):
        with pytest.raises(ValueError, match=f"{kernel} has no Triton kernel for this call"):
            FAST[kernel](**inputs, **KERNELS[kernel].options)
