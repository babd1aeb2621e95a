"""Calls without rows give results without rows, and calls on the device "meta" shapes: forward and backward."""

import pytest
import torch
from kernel_cases import KERNELS, RECURRENT, draw, results

from scrubjay.kernels.ddts import ddts_change
from scrubjay.kernels.ssd import ssd_change

SHARED = ("weight", "bias", "skip")  # have no axis of rows
CHANGES = {"ssd": ssd_change, "ddts": ddts_change}


def without_rows(inputs):
    return {name: x if name in SHARED else x[:0] for name, x in inputs.items()}


def shapes(found):
    return {name: (tuple(x.shape), x.dtype) for name, x in found.items()}


def called(kernel, inputs):
    return results(KERNELS[kernel].fast, inputs, **KERNELS[kernel].options)[0]


@pytest.mark.parametrize("states", [0, 2])
@pytest.mark.parametrize("T", [1, 5, 140])
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_rows_in_no_rows_out(kernel, T, states):
    inputs = draw(kernel, T, states=states)
    want, got = called(kernel, inputs), called(kernel, without_rows(inputs))
    for name, x in want.items():
        shared = name.removeprefix("d ") in SHARED
        assert got[name].shape == (x.shape if shared else (0, *x.shape[1:])), name
        assert not got[name].any()  # the gradient of what all rows share is a sum of none
    with torch.no_grad():
        outputs = KERNELS[kernel].fast(**without_rows(inputs), **KERNELS[kernel].options)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    assert [y.shape for y in outputs] == [got[name].shape for name in ("y", "state")[: len(outputs)]]


@pytest.mark.parametrize("T", [1, 5, 140])
@pytest.mark.parametrize("kernel", CHANGES)
def test_no_rows_change_no_states(kernel, T):
    inputs = {name: x for name, x in draw(kernel, T, states=0).items() if name != "q"}
    got, want = (results(CHANGES[kernel], x)[0] for x in (without_rows(inputs), inputs))
    assert shapes(got) == {name: ((0, *x.shape[1:]), x.dtype) for name, x in want.items()}


@pytest.mark.parametrize("T", [1, 140])
@pytest.mark.parametrize("kernel", KERNELS)
def test_meta_tensors_have_the_shapes_of_real_ones(kernel, T):
    inputs = draw(kernel, T)
    assert shapes(called(kernel, {name: x.to("meta") for name, x in inputs.items()})) == shapes(called(kernel, inputs))


@pytest.mark.parametrize("kernel", RECURRENT)
def test_a_reference_takes_meta_tensors(kernel):
    inputs = {name: x.to("meta") for name, x in draw(kernel, 5).items()}
    y, state = KERNELS[kernel].reference(**inputs)
    assert (y.device.type, state.device.type) == ("meta", "meta")
