"""The causal convolution's Triton kernels equal the step-by-step reference: outputs, states, every gradient."""

from functools import partial

import pytest
import torch
from kernel_cases import BF16, F16, F32, F64, VARIANTS, assert_within, check, draw, results
from kernel_checks import draw_packed, offsets

from scrubjay.kernels import conv_triton
from scrubjay.kernels.conv import causal_conv, causal_conv_reference, causal_conv_step

CONV = partial(causal_conv, backend="triton")
CASES = [v[1] for v in VARIANTS if v[0] == "causal_conv"]
CHUNK = 32  # steps, where elements are few


@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_outputs_states_and_gradients_equal_the_reference(arguments):
    check("causal_conv", draw("causal_conv", 9, **arguments), CONV)


@pytest.mark.parametrize("states", [0, 2])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_16_bits(dtype, states):
    check("causal_conv", draw("causal_conv", CHUNK + 3, dtype, states=states), CONV)


@pytest.mark.parametrize("taps", [3, 5, 8])
def test_any_number_of_taps(taps):
    check("causal_conv", draw("causal_conv", CHUNK + 5, batch=1, states=1, taps=taps), CONV)


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 8, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1])
def test_lengths_at_and_across_the_borders_of_groups_and_chunks(T):
    check("causal_conv", draw("causal_conv", T, batch=1, states=1), CONV)


@pytest.mark.parametrize("taps", [4, 8])
def test_long_chunks_of_many_elements(taps, monkeypatch):
    monkeypatch.setattr(conv_triton, "MANY", 0)
    check("causal_conv", draw("causal_conv", 130, batch=1, states=1, taps=taps), CONV)


@pytest.mark.parametrize("channels", [1, 33, 300])
def test_any_number_of_channels(channels):
    check("causal_conv", draw("causal_conv", 5, channels=channels), CONV)


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_packed_documents(dtype, with_state):
    """Of lengths 0, 1 and more, each with its states."""
    check("causal_conv", draw_packed("causal_conv", dtype, with_state), CONV, cu_seqlens=offsets("causal_conv"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_packed_documents_of_several_chunks(dtype):
    """Some fill their groups of steps or their chunks, some do not."""
    lengths = torch.tensor([3, CHUNK, 0, 8, CHUNK + 5])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(dtype)
    inputs = draw("causal_conv", int(lengths.sum()), batch=1, states=5, taps=3)
    check("causal_conv", inputs, CONV, cu_seqlens=cu_seqlens)


def test_packed_documents_without_a_step_hand_their_states_on():
    inputs = draw("causal_conv", 1, batch=1, states=3)
    _, state = CONV(**inputs, cu_seqlens=torch.tensor([0, 0, 1, 1]))
    assert torch.equal(state[[0, 2]], inputs["initial_state"][[0, 2]])


@pytest.mark.parametrize("states", [3, 0])
def test_the_state_is_the_one_at_each_rows_length(states):
    lengths = torch.tensor([0, 2, 9])
    inputs = draw("causal_conv", 9, batch=3, states=states)

    def row_by_row(x, weight, bias, initial_state=None):
        y, _ = causal_conv_reference(x, weight, bias, initial_state)
        before = x.new_zeros(3, 3, 12) if initial_state is None else initial_state
        seen = torch.cat([before, x], 1)
        return y, torch.stack([row[n : n + 3] for row, n in zip(seen, lengths.tolist(), strict=True)])

    got, cotangents = results(CONV, inputs, lengths=lengths)
    assert_within("causal_conv", got, results(row_by_row, inputs, cotangents)[0], inputs)


@pytest.mark.parametrize("options", [{}, {"cu_seqlens": [0, 1, 1, 9]}, {"lengths": [4]}], ids=str)
def test_equals_the_torch_path(options):
    options = {name: torch.tensor(numbers) for name, numbers in options.items()}
    inputs = draw("causal_conv", 9, batch=1, states=3 if "cu_seqlens" in options else 1)
    torchs, cotangents = results(partial(causal_conv, backend="torch"), inputs, **options)
    assert_within("causal_conv", results(CONV, inputs, cotangents, **options)[0], torchs, inputs)


def test_one_step_equals_the_step():
    inputs = draw("causal_conv", 1)
    before = inputs["initial_state"].clone()
    y, state = CONV(**inputs)
    step_y, step_state = causal_conv_step(inputs["x"][:, 0], inputs["weight"], inputs["bias"], before)
    assert_within("causal_conv", {"y": y[:, 0], "state": state}, {"y": step_y, "state": step_state}, inputs)
    assert torch.equal(inputs["initial_state"], before)


def test_steps_continue_a_sequence():
    inputs = draw("causal_conv", 7)
    whole, state = CONV(**inputs)
    x, ys = inputs.pop("x"), []
    for t in range(7):
        y, inputs["initial_state"] = CONV(x[:, t : t + 1], **inputs)
        ys.append(y)
    assert_within("causal_conv", {"y": torch.cat(ys, 1)}, {"y": whole}, inputs)
    assert torch.equal(inputs["initial_state"], state)


def test_a_slice_of_a_wider_projection():
    inputs = draw("causal_conv", 9)
    inputs["x"] = torch.randn(2, 9, 40)[..., 3:15]
    check("causal_conv", inputs, CONV)


def test_operands_in_any_order():
    inputs = draw("causal_conv", 9)
    inputs = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in inputs.items()}
    inputs["bias"] = inputs["bias"].repeat_interleave(2)[::2]
    check("causal_conv", inputs, CONV)


def test_a_gradient_that_is_one_number_everywhere():
    inputs = draw("causal_conv", 9)
    ones = [torch.ones(()).expand(2, 9, 12), torch.ones(()).expand(2, 3, 12)]
    got, _ = results(CONV, inputs, ones)
    assert_within("causal_conv", got, results(causal_conv_reference, inputs, ones)[0], inputs)


@pytest.mark.parametrize("output", [0, 1], ids=["y", "state"])
def test_a_gradient_of_one_output_alone(output):
    inputs = draw("causal_conv", 9)

    def alone(op):
        return lambda **inputs: op(**inputs)[output]

    got, cotangents = results(alone(CONV), inputs)
    assert_within("causal_conv", got, results(alone(causal_conv_reference), inputs, cotangents)[0], inputs)


def test_a_state_that_wants_no_gradient():
    inputs = draw("causal_conv", 9)
    state = inputs.pop("initial_state")
    got, cotangents = results(CONV, inputs, initial_state=state)
    assert_within(
        "causal_conv", got, results(causal_conv_reference, inputs, cotangents, initial_state=state)[0], inputs
    )


@pytest.mark.parametrize("wide", [("weight", "bias"), ("initial_state",)], ids=str)
def test_float32_beside_bfloat16(wide):
    inputs = draw("causal_conv", 9, BF16, wide=wide)
    assert {found.dtype for found in CONV(**inputs)} == {BF16}
    check("causal_conv", inputs, CONV)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # numpy's, in the interpreter
def test_sums_far_from_zero():
    """exp(1000) is infinite, silu(1000) is 1000 and silu(-1000) is 0."""
    inputs = draw("causal_conv", 9)
    inputs["weight"] *= 1000
    check("causal_conv", inputs, CONV)


def test_what_the_kernels_do_not_cover_is_refused():
    for inputs in (draw("causal_conv", 2, F64), draw("causal_conv", 2, taps=9)):
        with pytest.raises(ValueError, match="causal_conv has no Triton kernel for this call"):
            CONV(**inputs)


def test_a_state_of_another_shape_is_refused():
    inputs = draw("causal_conv", 2, states=3)
    with pytest.raises(ValueError, match=r"initial_state must have shape \(2, 3, 12\); got \(3, 3, 12\)"):
        CONV(**inputs)
