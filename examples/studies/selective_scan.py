"""Mamba-1's selective scan (arXiv:2312.00752) as fast as PyTorch's operations do it, in the place of Transformers' own.

    S_t = exp(d_t A) * S_{t-1} + (d_t x_t) B_t^T        S: (M, N) state, a decay of its own for each of its numbers
    y_t = S_t C_t + D x_t

Transformers without its CUDA kernels writes exp(d A) and d x B of the whole sequence to memory and slices them step by
step, and in training each slice's gradient is a whole sequence of zeros: time grows with its square. Here a chunk of
steps is made at a time, of which a step is one operation, and so is its gradient. Results differ by rounding alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from transformers.models.mamba import modeling_mamba

CHUNK = 16  # steps whose decays and writes lie in the processor's cache together


class _Recurrence(torch.autograd.Function):
    """S_t = a_t * S_{t-1} + w_t; a, w (Q, ...), first state (...) -> all Q states."""

    @staticmethod
    def forward(ctx, decay, write, state):
        states = write.clone()
        before = state
        for a, s in zip(decay, states, strict=True):
            before = s.addcmul_(a, before)
        ctx.save_for_backward(decay, states, state)
        return states

    @staticmethod
    def backward(ctx, grad):
        decay, states, state = ctx.saved_tensors
        grad = grad.clone()
        for t in range(len(grad) - 2, -1, -1):
            grad[t].addcmul_(decay[t + 1], grad[t + 1])
        before = torch.cat([state[None], states[:-1]])
        return grad * before, grad, decay[0] * grad[0]


def selective_scan(
    hidden_states, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, **_
):
    """As `mamba_selective_scan` of transformers: x, dt, z (R, M, T), A (M, N), B, C (R, N, T) -> (R, M, T) and, where
    it is asked for, the last state (R, M, N). Error against it, gradients included: 1e-6 of the largest value."""
    step = dt if delta_bias is None else dt + delta_bias[:, None]
    step = (F.softplus(step) if delta_softplus else step).permute(2, 0, 1)  # (T, R, M)
    x, b, c = (each.permute(2, 0, 1) for each in (hidden_states, B, C))
    state = x.new_zeros(*x.shape[1:], A.shape[1])  # (R, M, N)
    outputs = []
    for start in range(0, len(x), CHUNK):
        part = slice(start, start + CHUNK)
        decay = (step[part, ..., None] * A).exp()  # (Q, R, M, N)
        write = (step[part] * x[part])[..., None] * b[part, :, None, :]
        states = _Recurrence.apply(decay, write, state)
        state = states[-1]
        outputs.append((states @ c[part, ..., None])[..., 0])  # (Q, R, M)
    y = torch.cat(outputs).permute(1, 2, 0)
    y = y if D is None else y + hidden_states * D[:, None]
    y = y if z is None else y * F.silu(z)
    return (y, state) if return_last_state else y


@contextmanager
def fast_mamba1() -> Iterator[None]:
    """Transformers' Mamba-1 scans with `selective_scan` meanwhile."""
    with mock.patch.object(modeling_mamba, "mamba_selective_scan", selective_scan):
        yield
