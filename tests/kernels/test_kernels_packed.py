"""Several documents in one row, and rows of several lengths."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import BF16, F32, F64, RECURRENT, SEQUENCE, all_of, assert_within, check, draw, perturbed, results
from kernel_checks import DOCUMENTS, check_documents, check_packed, draw_packed, offsets

from scrubjay.kernels.conv import causal_conv
from scrubjay.kernels.ssd import ssd

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("kernel", SEQUENCE)
def test_packed_documents_equal_reference(kernel, with_state, dtype):
    check_documents(kernel, dtype, with_state)


@pytest.mark.parametrize("kernel", SEQUENCE)
def test_packed_documents_equal_separate_calls(kernel):
    check_packed(kernel)


@pytest.mark.parametrize("kernel", SEQUENCE)
def test_a_document_of_one_step_alone_equals_reference(kernel):
    check(kernel, draw(kernel, 1, F64, batch=1, states=int(kernel in RECURRENT)), cu_seqlens=torch.tensor([0, 1]))


@pytest.mark.parametrize("kernel", SEQUENCE)
def test_documents_do_not_leak_into_each_other(kernel):
    """Moving one leaves the outputs, states and gradients of all others as they are, bit for bit."""

    def others(found, d, start, stop):
        found = {name: x for name, x in found.items() if name not in ("d weight", "d bias")}  # sums over all documents
        by_document = ("state", "d initial_state")
        kept = {name: torch.cat([x[:d], x[d + 1 :]]) for name, x in found.items() if name in by_document}
        return kept | {n: torch.cat([x[:, :start], x[:, stop:]], 1) for n, x in found.items() if n not in by_document}

    inputs, cu_seqlens = draw_packed(kernel, F32), offsets(kernel)
    before = all_of(kernel, inputs, cu_seqlens=cu_seqlens)
    for d, length in enumerate(DOCUMENTS[kernel]):
        start, stop = cu_seqlens[d : d + 2].tolist()
        moved = perturbed(kernel, inputs, start, stop)
        if "initial_state" in moved:
            moved["initial_state"][d] += 1
        after = all_of(kernel, moved, cu_seqlens=cu_seqlens)
        assert_within(kernel, others(after, d, start, stop), others(before, d, start, stop), inputs, bound=0.0)
        assert not length or not torch.equal(after["y"][:, start:stop], before["y"][:, start:stop])


@pytest.mark.parametrize("T", [1, 2, 9])
@pytest.mark.parametrize("states", [0, 4])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_causal_conv_state_ends_at_each_rows_length(taps, states, T):
    lengths = torch.tensor([0, 1, min(4, T), T])
    inputs = draw("causal_conv", T, F64, batch=4, states=states, taps=taps)
    real = (torch.arange(T) < lengths[:, None])[..., None]

    def ragged(**inputs):
        y, state = causal_conv(**inputs, lengths=lengths)
        return y * real, state

    def row_by_row(x, initial_state=None, **inputs):
        ys, states = [], []
        for b, n in enumerate(lengths.tolist()):
            state = x.new_zeros(1, taps - 1, x.shape[2]) if initial_state is None else initial_state[b : b + 1]
            y = x[b : b + 1, :0]
            if n:
                y, state = causal_conv(x[b : b + 1, :n], initial_state=state, **inputs)
            ys.append(F.pad(y, (0, 0, 0, T - n)))
            states.append(state)
        return torch.cat(ys), torch.cat(states)

    want, cotangents = results(row_by_row, inputs)
    assert_within("causal_conv", results(ragged, inputs, cotangents)[0], want, inputs)


def test_offsets_that_are_changed_in_place_are_read_again():
    inputs, offsets = draw("ssd", 9, F64, batch=1, states=2), torch.tensor([0, 4, 9])
    first = ssd(**inputs, cu_seqlens=offsets)[1]
    offsets[1] = 7
    moved = ssd(**inputs, cu_seqlens=offsets)[1]
    assert not torch.equal(moved, first)
    assert torch.equal(moved, ssd(**inputs, cu_seqlens=torch.tensor([0, 7, 9]))[1])


@pytest.mark.parametrize("kernel", SEQUENCE)
def test_offsets_that_an_array_lends_are_read_anew(kernel):
    """A loader writes the next batch into the array that a tensor shares memory with."""
    cuts = np.array([0, 3, 9])
    offsets, inputs = torch.from_numpy(cuts), draw(kernel, 9, F64, batch=1, states=2 * (kernel in RECURRENT))
    before = all_of(kernel, inputs, cu_seqlens=offsets)
    cuts[1] = 6
    after, fresh = (all_of(kernel, inputs, cu_seqlens=given) for given in (offsets, torch.tensor([0, 6, 9])))
    assert all(torch.equal(after[name], fresh[name]) for name in fresh)
    assert not torch.equal(after["y"], before["y"])
