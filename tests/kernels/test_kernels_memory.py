"""Inputs of any memory layout are read, none is written to, and no result shares memory with one."""

import pytest
import torch
from kernel_cases import F64, KERNELS, SEQUENCE, assert_within, check, draw, results

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


def reversed_axes(x):
    """The same numbers, the first axis the fastest."""
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def every_other(x):
    """The same numbers, every second one of a larger tensor."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), 1e9)
    wide[..., ::2] = x
    return wide[..., ::2]


def expanded(x):
    """The first entry of the first axis, again and again without memory of its own."""
    return x[:1].expand_as(x)


LAYOUTS = (reversed_axes, every_other, expanded)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("T", [1, 35])
@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_layout_of_inputs_does_not_matter(kernel, T, layout):
    inputs = {name: layout(x) for name, x in draw(kernel, T, F64, states=2 if kernel in SEQUENCE else 0).items()}
    assert not all(x.is_contiguous() for x in inputs.values())
    check(kernel, inputs)


@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_layout_of_output_gradients_does_not_matter(kernel):
    inputs = draw(kernel, 35, F64)
    cotangents = results(KERNELS[kernel].fast, inputs, **KERNELS[kernel].options)[1]
    for layout in LAYOUTS:
        laid_out = [layout(x) for x in cotangents]
        plain = [x.contiguous() for x in laid_out]
        got, want = (results(KERNELS[kernel].fast, inputs, c, **KERNELS[kernel].options)[0] for c in (laid_out, plain))
        assert_within(kernel, got, want, inputs)


@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.parametrize("kernel", KERNELS)
def test_inputs_are_left_as_they_are_and_results_own_their_memory(kernel, T):
    """No input is written to, no result is a view of one, and a second backward pass gives what the first gave."""
    inputs = draw(kernel, T, states=2 if kernel in SEQUENCE else 0)
    copies = {name: x.clone() for name, x in inputs.items()}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    outputs = KERNELS[kernel].fast(**leaves, **KERNELS[kernel].options)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    cotangents = [torch.ones_like(y) for y in outputs]
    first, second = (
        torch.autograd.grad(outputs, list(leaves.values()), cotangents, retain_graph=True, materialize_grads=True)
        for _ in range(2)
    )
    assert all(torch.equal(inputs[name], copies[name]) for name in copies)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(bool((c == 1).all()) for c in cotangents)
    taken = {x.untyped_storage().data_ptr() for x in inputs.values()}
    assert not taken & {x.untyped_storage().data_ptr() for x in (*outputs, *first)}


@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_a_recurrence_from_nothing_keeps_its_inputs_and_one_number(kernel):
    """And the decays once more, of which none is stronger than what forgets everything."""
    inputs, seen = draw(kernel, 40, states=0), {}

    def see(x):
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(see, lambda x: x):
        outputs = KERNELS[kernel].fast(**leaves, **KERNELS[kernel].options)
    assert sum(seen.values()) == sum(x.nbytes for x in inputs.values()) + inputs["a"].nbytes + 4
    del outputs
