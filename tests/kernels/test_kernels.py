"""Every kernel: its fast path against its reference, in pieces and in steps, and its gradients."""

import sys

import pytest
import torch
from kernel_cases import (
    BF16,
    F32,
    F64,
    KERNELS,
    RECURRENT,
    SEQUENCE,
    VARIANTS,
    all_of,
    around_borders,
    check,
    draw,
    in_pieces,
    perturbed,
    results,
    timed,
    two_borders,
)
from kernel_checks import CLOSED_FORMS, check_closed_form

from scrubjay.kernels import norm as norm_module

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


@pytest.mark.parametrize("kernel", CLOSED_FORMS)
def test_reference_equals_closed_form(kernel):
    check_closed_form(kernel)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize(
    ("kernel", "arguments", "options"),
    VARIANTS,
    ids=lambda x: x if isinstance(x, str) else "-".join(f"{k}={v}" for k, v in x.items()) or "default",
)
def test_fast_path_equals_reference(kernel, arguments, options, dtype):
    for T in KERNELS[kernel].lengths:
        check(kernel, draw(kernel, T, dtype, seed=T, **arguments), **options)


@pytest.mark.parametrize("chunk", [1, 3, 34, 35, 36])
@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_chunk_changes_nothing_beyond_rounding(kernel, chunk):
    check(kernel, draw(kernel, 35, F64), chunk=chunk)


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_gated_rms_norm_tiles_change_nothing_beyond_rounding(rows, monkeypatch):
    monkeypatch.setattr(norm_module, "TILE", rows * 12)
    for skip in (True, False):
        check("gated_rms_norm", draw("gated_rms_norm", 7, F64, skip=skip), groups=2)


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 5, 12)], ids=str)
@pytest.mark.parametrize("kernel", ["gated_rms_norm", "rms_norm"])
def test_norms_take_any_number_of_leading_axes(kernel, shape):
    inputs = {name: torch.randn(shape if name in "xyz" else 12, dtype=F64) for name in draw(kernel, 1)}
    check(kernel, inputs)


@pytest.mark.parametrize("kernel", ["gated_rms_norm", "rms_norm"])
def test_norms_of_zero_and_of_large_rows_are_finite(kernel):
    for scale in (0.0, 1e12):
        inputs = draw(kernel, 5)
        for name in set(inputs) & {"x", "y"}:
            inputs[name] *= scale
        check(kernel, inputs)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("kernel", SEQUENCE)
def test_any_split_in_two_equals_the_whole(kernel, dtype):
    for at in around_borders(kernel):
        inputs = draw(kernel, two_borders(kernel), dtype, seed=at, states=2 if kernel in RECURRENT else 0)
        check(kernel, inputs, in_pieces(kernel, [at]))


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("prefill", [1, 2, 17, 30])
@pytest.mark.parametrize("kernel", SEQUENCE)
def test_prefill_and_steps_equal_one_pass(kernel, prefill, dtype):
    inputs = draw(kernel, 33, dtype, seed=prefill, states=2 if kernel in RECURRENT else 0)
    check(kernel, inputs, in_pieces(kernel, range(prefill, 33)))


@pytest.mark.parametrize("kernel", RECURRENT)
def test_one_token_takes_the_step_path(kernel, monkeypatch):
    module, calls = sys.modules[KERNELS[kernel].fast.__module__], []
    step = getattr(module, f"{kernel}_step")
    monkeypatch.setattr(module, f"{kernel}_step", lambda *args: calls.append(args) or step(*args))
    for whole in ("ChunkedRecurrence", "_convolve"):
        monkeypatch.setattr(module, whole, None, raising=False)
    for states in (0, 2):
        y, state = KERNELS[kernel].fast(**draw(kernel, 1, states=states))
        assert y.shape[1] == 1
        assert len(state) == 2
    assert len(calls) == 2


@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_a_short_sequence_is_not_padded_to_a_chunk(kernel):
    check(kernel, draw(kernel, 3), chunk=10**9)


@pytest.mark.parametrize("kernel", SEQUENCE)
def test_no_output_depends_on_a_later_step(kernel):
    T = two_borders(kernel)
    inputs = draw(kernel, T)
    before = all_of(kernel, inputs)["y"]
    for t in around_borders(kernel):
        now = all_of(kernel, perturbed(kernel, inputs, t, T))["y"]
        assert torch.equal(now[:, :t], before[:, :t])
        assert not torch.equal(now[:, t], before[:, t])


@pytest.mark.parametrize("kernel", SEQUENCE)
def test_no_gradient_reaches_a_later_step(kernel):
    inputs = draw(kernel, two_borders(kernel))
    found = all_of(kernel, inputs)
    for t in around_borders(kernel):
        cotangents = [torch.zeros_like(found[name]) for name in ("y", "state") if name in found]
        cotangents[0][:, :t] = 1
        got, _ = results(KERNELS[kernel].fast, inputs, cotangents, **KERNELS[kernel].options)
        gradients = [got[f"d {name}"] for name in timed(kernel, inputs)]
        assert not any(gradient[:, t:].any() for gradient in gradients)
        assert any(gradient[:, t - 1].any() for gradient in gradients)


TINY = {
    "ssd": ({"heads": 2, "size": 2, "head_dim": 2}, {"chunk": 2}),
    "ddts": ({"size": 2, "width": 2}, {"chunk": 2}),
    "causal_conv": ({"channels": 2, "taps": 3}, {}),
    "window_attention": ({"heads": 2, "head_dim": 2, "values": 2}, {"window": 3}),
    "gated_rms_norm": ({"channels": 4}, {"groups": 2}),
    "rms_norm": ({"channels": 4}, {}),
}


@pytest.mark.parametrize(("kernel", "packed"), [*((k, False) for k in KERNELS), *((k, True) for k in SEQUENCE)])
def test_gradients_equal_finite_differences(kernel, packed):
    arguments, options = TINY[kernel]
    states = {"window_attention": 0 if packed else 2}.get(kernel, 2 if packed else 1)
    if packed:
        options = options | {"cu_seqlens": torch.tensor([0, 2, 5])}
    inputs = draw(kernel, 5, F64, batch=1, states=states, **arguments)
    options = KERNELS[kernel].options | options

    def call(*tensors):
        return KERNELS[kernel].fast(**dict(zip(inputs, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs.values()])


@pytest.mark.parametrize("kernel", ["ssd", "ddts", "gated_rms_norm"])
def test_second_derivatives_are_refused(kernel):
    leaves = {name: x.requires_grad_() for name, x in draw(kernel, 5).items()}
    y = KERNELS[kernel].fast(**leaves, **KERNELS[kernel].options)
    y = y[0] if isinstance(y, tuple) else y
    grads = torch.autograd.grad(y.square().sum(), list(leaves.values()), create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(sum(g.square().sum() for g in grads), list(leaves.values()))


@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_a_state_is_overwritten_only_when_allowed(kernel):
    inputs = draw(kernel, 1, F32)
    state, fast = inputs["initial_state"], KERNELS[kernel].fast
    before = state.clone()
    y, after = fast(**inputs)
    assert torch.equal(state, before)
    y_over, over = fast(**inputs, overwrite=True)
    assert over.data_ptr() == state.data_ptr()
    assert torch.equal(over, after)
    assert torch.equal(y_over, y)


@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_a_state_that_may_not_change_is_not_overwritten(kernel):
    inputs = draw(kernel, 1, F32)
    expected = KERNELS[kernel].fast(**inputs)
    before = inputs["initial_state"].clone()
    with torch.inference_mode():
        locked = before.clone()
    with torch.no_grad():
        for state in (locked, before.clone().requires_grad_()):
            got = KERNELS[kernel].fast(**inputs | {"initial_state": state}, overwrite=True)
            assert torch.equal(state, before)
            assert all(torch.equal(x, want) for x, want in zip(got, expected, strict=True))
