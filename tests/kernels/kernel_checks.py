"""Comparisons of a kernel that tests make, and that the deliberate errors of `test_kernels_mutants.py` have to fail.

Each `check_...` takes the name of a kernel and raises OutOfBoundError.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from kernel_cases import (
    F32,
    F64,
    KERNELS,
    MARGIN,
    RECURRENT,
    against_reference,
    assert_within,
    check,
    cut,
    draw,
    results,
    two_borders,
)

# Lengths of packed documents: none, one step, across two borders of the fast path, none, a few, one, none.
DOCUMENTS = {"ssd": (0, 1, 131, 0, 5, 1, 0), "ddts": (0, 1, 35, 0, 5, 1, 0), "causal_conv": (0, 1, 9, 0, 2, 1, 0)}
DOCUMENTS["window_attention"] = DOCUMENTS["ssd"]


def offsets(kernel):
    return F.pad(torch.tensor(DOCUMENTS[kernel]).cumsum(0), (1, 0))


def draw_packed(kernel, dtype=F64, with_state=True):
    states = len(DOCUMENTS[kernel]) if with_state and kernel in RECURRENT else 0
    return draw(kernel, sum(DOCUMENTS[kernel]), dtype, batch=1, states=states)


def check_borders(kernel, dtype=F32):
    check(kernel, draw(kernel, two_borders(kernel), dtype))


def check_decays(kernel, dtype=F32, scale=1e3):
    inputs = draw(kernel, two_borders(kernel), dtype)
    inputs["a"] *= scale
    # An error that is not finite is out of every bound. In float64 the sums of a chunk reach 1e5, where numbers are
    # 1.5e-11 apart: at scale 1000 the worst gradient of `a` was off by 2.4e-12.
    bound = 1e-11 if dtype == F64 and scale >= 1e3 else None
    assert_within(kernel, *against_reference(kernel, inputs), inputs, bound)


# Where log-decays forget everything, among T steps in chunks of `size`.
FORGETTING = {
    "the first step": lambda size, T: [0],
    "the last step": lambda size, T: [T - 1],
    "a chunk's first step": lambda size, T: [size],
    "a chunk's last step": lambda size, T: [size - 1],
    "inside a chunk": lambda size, T: [size // 2],
    "several of a chunk": lambda size, T: [1, size // 2, size // 2 + 1, size - 2],
    "a whole chunk": lambda size, T: range(size, 2 * size),
    "every step": lambda size, T: range(T),
}


def forgetting(inputs, strength, steps):
    """Weak decays, but `strength` at `steps`, of every second head or channel, and at the first of `steps` of all."""
    inputs["a"] *= 1e-3
    inputs["a"][:, steps, ::2] = strength
    inputs["a"][:, steps[0]] = strength
    return inputs


def check_forgetting(kernel, dtype=F32, strength=-torch.inf, where="several of a chunk"):
    T, size = two_borders(kernel), KERNELS[kernel].lengths[2]
    steps = list(FORGETTING[where](size, T))
    check_forgotten(kernel, forgetting(draw(kernel, T, dtype), strength, steps))


def check_forgotten(kernel, inputs, fast=None):
    """The reference, and no gradient to a decay that forgets everything, not even 1e-17: what such a decay is made of
    may be larger than 1e30."""
    got, want = against_reference(kernel, inputs, fast)
    # In float64 sums of a chunk reach 7e4, where numbers are 1.5e-11 apart: the worst of three seeds was 6.3e-13.
    assert_within(kernel, got, want, inputs, MARGIN * 6.3e-13 if inputs["a"].dtype == F64 else None)
    strong = inputs["a"] == inputs["a"].min()
    assert_within(kernel, {"d a": got["d a"][strong]}, {"d a": torch.zeros(int(strong.sum()))}, inputs, 0.0)


def check_documents(kernel, dtype=F64, with_state=True):
    check(kernel, draw_packed(kernel, dtype, with_state), cu_seqlens=offsets(kernel))


def separately(kernel, cu_seqlens):
    """A path that calls the fast one on each packed document alone; a document without steps keeps its state."""

    def call(initial_state=None, **inputs):
        ys, states = [], []
        for d, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
            document = cut(kernel, inputs, start, stop)
            state = None if initial_state is None else initial_state[d : d + 1]
            if start == stop:
                states.append(state)
            elif kernel == "window_attention":
                ys.append(KERNELS[kernel].fast(**document))
            else:
                y, state = KERNELS[kernel].fast(**document, initial_state=state)
                ys.append(y)
                states.append(state)
        return torch.cat(ys, 1) if kernel == "window_attention" else (torch.cat(ys, 1), torch.cat(states))

    return call


def check_packed(kernel):
    """Packed documents give what each gives alone."""
    inputs, cu_seqlens = draw_packed(kernel), offsets(kernel)
    packed, cotangents = results(KERNELS[kernel].fast, inputs, **KERNELS[kernel].options, cu_seqlens=cu_seqlens)
    alone, _ = results(separately(kernel, cu_seqlens), inputs, cotangents, **KERNELS[kernel].options)
    assert_within(kernel, packed, alone, inputs)


def ssd_closed_form(q, k, v, a, g, initial_state):
    """y_i = sum over j <= i of exp(a_(j+1) + ... + a_i) g_j (q_i . k_j) v_j, and what the initial state adds."""
    T, heads = v.shape[1:3]
    q, k = (x[:, :, [h // (heads // q.shape[2]) for h in range(heads)]] for x in (q, k))
    y, state = torch.zeros_like(v), initial_state * a.sum(1).exp()[..., None, None]
    for i in range(T):
        for j in range(i + 1):
            decay = a[:, j + 1 : i + 1].sum(1).exp()
            y[:, i] += (decay * g[:, j] * (q[:, i] * k[:, j]).sum(-1))[..., None] * v[:, j]
        y[:, i] += a[:, : i + 1].sum(1).exp()[..., None] * torch.einsum("bhn,bhnp->bhp", q[:, i], initial_state)
        decay = a[:, i + 1 :].sum(1).exp()
        state = state + torch.einsum("bh,bhn,bhp->bhnp", decay * g[:, i], k[:, i], v[:, i])
    return y, state


def ddts_closed_form(q, k, v, a, initial_state):
    """As `ssd_closed_form`, with a decay for each key channel."""
    y, state = torch.zeros_like(v), initial_state * a.sum(1).exp()[..., None]
    for i in range(v.shape[1]):
        for j in range(i + 1):
            y[:, i] += (q[:, i] * a[:, j + 1 : i + 1].sum(1).exp() * k[:, j]).sum(-1, keepdim=True) * v[:, j]
        y[:, i] += torch.einsum("bn,bnm->bm", q[:, i] * a[:, : i + 1].sum(1).exp(), initial_state)
        state = state + torch.einsum("bn,bm->bnm", k[:, i] * a[:, i + 1 :].sum(1).exp(), v[:, i])
    return y, state


def causal_conv_closed_form(x, weight, bias, initial_state):
    window = torch.cat([initial_state, x], 1)
    y = F.conv1d(window.mT, weight[:, None], bias, groups=len(weight)).mT
    return y * torch.sigmoid(y), window[:, x.shape[1] :]


def window_attention_closed_form(q, k, v, past_k, past_v, window, real):
    """One row, one head, one query at a time."""
    steps, y = past_k.shape[1], torch.zeros_like(q)
    k, v = torch.cat([past_k, k], 1), torch.cat([past_v, v], 1)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for t in range(q.shape[1]):
                at = steps + t
                seen = [j for j in range(max(0, at - window + 1), at + 1) if j >= steps or real[b, j]]
                keys, values = k[b, seen, h % k.shape[2]], v[b, seen, h % v.shape[2]]
                y[b, t, h] += (keys @ q[b, t, h] / q.shape[3] ** 0.5).softmax(0) @ values
    return y


def gated_rms_norm_closed_form(y, z, weight, x, skip, eps, groups):
    u = (y + skip * x) * z / (1 + (-z).exp())
    parts = [part / (part.square().mean(-1, keepdim=True) + eps).sqrt() for part in u.chunk(groups, -1)]
    return torch.cat(parts, -1) * weight


CLOSED_FORMS = {
    "ssd": (ssd_closed_form, {}, {}),
    "ddts": (ddts_closed_form, {}, {}),
    "causal_conv": (causal_conv_closed_form, {}, {}),
    "gated_rms_norm": (gated_rms_norm_closed_form, {}, {"groups": 3}),
    "window_attention": (
        window_attention_closed_form,
        {"states": 4, "keys": 2, "values": 2},
        {"window": 3, "real": torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]]).bool()},
    ),
}


def check_closed_form(kernel):
    closed_form, arguments, options = CLOSED_FORMS[kernel]
    options = KERNELS[kernel].options | options
    inputs = draw(kernel, 6, F64, **arguments)
    expected, cotangents = results(closed_form, inputs, **options)
    assert_within(kernel, results(KERNELS[kernel].reference, inputs, cotangents, **options)[0], expected, inputs)
