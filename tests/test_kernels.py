"""The kernels: each fast path against its reference, and what a caller may rely on."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    BF16,
    F16,
    F32,
    F64,
    KERNELS,
    RECURRENT,
    SEQUENCE,
    VARIANTS,
    LargestTensor,
    OutOfBoundError,
    against_reference,
    assert_within,
    check,
    check_packed,
    cut,
    draw,
    flat_past,
    in_pieces,
    results,
    timed,
)

from scrubjay.kernels import conv as conv_module
from scrubjay.kernels import ddts as ddts_module
from scrubjay.kernels import norm as norm_module
from scrubjay.kernels import recurrence as recurrence_module
from scrubjay.kernels import ssd as ssd_module
from scrubjay.kernels import window as window_module
from scrubjay.kernels.conv import causal_conv
from scrubjay.kernels.ddts import ddts
from scrubjay.kernels.dispatch import choose
from scrubjay.kernels.norm import gated_rms_norm, rms_norm
from scrubjay.kernels.ssd import ssd
from scrubjay.kernels.window import window_attention, window_attention_reference, window_attention_step

# Lengths of packed documents: none, one step, across two borders of the fast path, none, a few, one, none.
DOCUMENTS = {"ssd": (0, 1, 131, 0, 5, 1, 0), "ddts": (0, 1, 35, 0, 5, 1, 0), "causal_conv": (0, 1, 9, 0, 2, 1, 0)}
DOCUMENTS["window_attention"] = DOCUMENTS["ssd"]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """torch fills what `torch.empty` and its kin return with NaN, so that a result which is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def offsets(kernel):
    return F.pad(torch.tensor(DOCUMENTS[kernel]).cumsum(0), (1, 0))


def draw_packed(kernel, dtype=F64, with_state=True):
    states = len(DOCUMENTS[kernel]) if with_state and kernel in RECURRENT else 0
    return draw(kernel, sum(DOCUMENTS[kernel]), dtype, batch=1, states=states)


def outputs_of(kernel, inputs, **options):
    """The fast path's y and final state (None for a kernel without)."""
    y = KERNELS[kernel].fast(**inputs, **KERNELS[kernel].options, **options)
    return y if isinstance(y, tuple) else (y, None)


def perturbed(kernel, inputs, start, stop):
    """The inputs with everything at the steps [start, stop) moved; a log-decay stays one."""
    moved = {name: x.clone() for name, x in inputs.items()}
    for name in timed(kernel, inputs):
        moved[name][:, start:stop] += -1 if name == "a" else 1
    return moved


def between_lengths(kernel):
    """2 chunks and 3 steps: two borders inside."""
    return KERNELS[kernel].lengths[4]


# The references


def ssd_closed_form(q, k, v, a, initial_state):
    """y_i = sum_j<=i exp(a_j+1 + ... + a_i) (q_i . k_j) v_j + exp(a_1 + ... + a_i) S_0^T q_i, written out."""
    q, k = (x.repeat_interleave(v.shape[2] // q.shape[2], 2) for x in (q, k))
    sums = a.cumsum(1)
    decays = (sums[:, :, None] - sums[:, None]).exp().tril_transposed() if False else None
    decays = torch.einsum("bijh->bhij", sums[:, :, None] - sums[:, None]).tril().exp().tril()
    y = torch.einsum("bhij,bihn,bjhn,bjhp->bihp", decays, q, k, v)
    y = y + torch.einsum("bih,bihn,bhnp->bihp", sums.exp(), q, initial_state)
    state = torch.einsum("bhj,bjhn,bjhp->bhnp", decays[:, :, -1], k, v)
    return y, state + initial_state * sums[:, -1].exp()[..., None, None]
