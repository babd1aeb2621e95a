"""Causal depthwise convolution over time, with SiLU, as Mamba-2 and Rodimus put in front of their recurrence.

    y_t = silu(b + sum_i w_i * x_(t - K + 1 + i))        i = 0 .. K - 1, tap K - 1 multiplies the current step

`activate=False` leaves the SiLU out, as the attention layers of a hybrid do.

B batch, T time, C channels, K taps. x: (B, T, C)   weight: (C, K)   bias: (C,)   state: (B, K - 1, C) in x's dtype, the
last K - 1 inputs (before the convolution), oldest first.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from scrubjay.kernels.conv_triton import causal_conv_triton, conv_fits
from scrubjay.kernels.dispatch import choose, compiled, exported, without_autocast
from scrubjay.kernels.linear import product_dtype
from scrubjay.kernels.operators import Operator
from scrubjay.kernels.recurrence import by_steps, chunks, documents, num_states, wants_gradient

TILE = 2**17  # elements that the backward pass works on at a time on a CPU: they stay in cache
MIN_ROWS = 64  # of a tile: fewer and the calls cost more than the work


def causal_conv_step(x, weight, bias, state, activate=True):
    """One token. x (B, C), state (B, K - 1, C) -> y (B, C), new state."""
    window = torch.cat([state, x[:, None]], 1)
    y = (window * weight.T).sum(1)
    y = y if bias is None else y + bias
    return (F.silu(y) if activate else y).to(x.dtype), window[:, 1:]


def causal_conv_reference(x, weight, bias=None, initial_state=None, cu_seqlens=None, activate=True):
    """One step at a time. Slow; the law for the other path."""

    def step(x_t, state):
        return causal_conv_step(x_t, weight, bias, state, activate)

    return by_steps(step, _initial(x, weight, initial_state, cu_seqlens), cu_seqlens, x)


@without_autocast
def causal_conv(
    x, weight, bias=None, initial_state=None, cu_seqlens=None, *, lengths=None, activate=True, backend=None
):
    """Convolve whole sequences.

    Args:
        initial_state: (B, K - 1, C), or (D, K - 1, C) with D packed documents; None is zero.
        cu_seqlens: (D + 1,) offsets of the documents packed into the one row of the batch; no tap crosses them.
        lengths: (B,) steps of each row that are real, the first ones; the returned state ends there.
        activate: whether SiLU follows; the Triton kernels know no other case.
        backend: None chooses by device; "torch" and "triton" are obeyed or refused.

    Returns:
        y (B, T, C) in x's dtype, and the state after the last real step, (B or D, K - 1, C).

    Raises:
        ValueError: shapes that do not fit each other, a sequence of length 0, a backend that cannot run.
    """
    _check(x, weight, bias)
    if lengths is not None and cu_seqlens is not None:
        raise ValueError("causal_conv takes lengths of rows or packed documents (cu_seqlens), not both.")
    fused = partial(conv_fits, x, weight, bias, initial_state) if activate else False
    if choose(backend, "causal_conv", x, weight, fused=fused) == "triton":
        return causal_conv_triton(x, weight, bias, _given(x, weight, initial_state, cu_seqlens), cu_seqlens, lengths)
    state = _initial(x, weight, initial_state, cu_seqlens)
    single = x.shape[1] == 1 and cu_seqlens is None and lengths is None
    if compiled() and not single:
        return _OPERATOR([x, weight, bias, state, cu_seqlens, lengths], [int(activate)])
    if single:
        y, state = causal_conv_step(x[:, 0], weight, bias, state, activate)
        return y[:, None], state
    if cu_seqlens is not None:
        return _packed(x, weight, bias, state, cu_seqlens, activate)
    y = _convolved(activate, weight, bias, state, x)
    if lengths is None:
        return y, _end(state, x)
    ends = lengths[:, None] + torch.arange(state.shape[1], device=x.device)  # step t of x is step t + K - 1 there
    return y, torch.cat([state, x], 1).gather(1, ends[..., None].expand(-1, -1, x.shape[2]))


def _run(tensors, integers, floats):
    *operands, lengths = tensors
    return causal_conv(*operands, lengths=lengths, activate=bool(integers[0]), backend="torch")


def _shapes(tensors, integers):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (tensors[0], tensors[3])]


_OPERATOR = Operator("causal_conv", _run, _shapes)


def _convolved(activate, weight, bias, *parts):
    """Convolution and, where asked for, SiLU over parts (B, ..., C) laid end to end, the first K - 1 steps of which are
    history: (B, T, C)."""
    if wants_gradient(weight, bias, *parts):
        return _Convolution.apply(activate, weight, bias, *parts)
    return _activated(activate, weight, bias, *parts)


def _activated(activate, weight, bias, *parts):
    window = torch.cat(parts, 1)
    y = _convolve(window.to(product_dtype(window)), weight, bias)
    return (F.silu(y, inplace=True) if activate else y).to(window.dtype)


class _Convolution(torch.autograd.Function):
    """`_convolved` with a gradient. Keeps its inputs alone; the backward pass computes what SiLU was applied to again,
    tile by tile."""

    @staticmethod
    def forward(ctx, activate, weight, bias, *parts):
        ctx.save_for_backward(weight, bias, *parts)
        ctx.activate = activate
        return _activated(activate, weight, bias, *parts)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        weight, bias, *parts = ctx.saved_tensors
        history, x = parts if len(parts) == 2 else (None, torch.cat(parts, 1))
        (B, T, C), (_, K), dtype = dy.shape, weight.shape, x.dtype
        wide = torch.promote_types(dtype, torch.float32)
        by_tap, dwindow = weight.T.to(wide).contiguous(), dy.new_zeros(B, T + K - 1, C, dtype=wide)
        dweight, dbias = torch.zeros_like(by_tap), by_tap.new_zeros(C)
        start = by_tap.new_zeros(C) if bias is None else bias.to(wide)
        rows = max(MIN_ROWS, TILE // max(1, B * C)) if dy.device.type == "cpu" else T
        for tile in chunks(0, T, rows):
            seen = _window(history, x, tile, K).to(wide)
            taps = [seen[:, i : i + tile.stop - tile.start] for i in range(K)]
            d = dy[:, tile].to(wide)
            if ctx.activate:
                u = torch.addcmul(start, taps[0], by_tap[0])
                for i in range(1, K):
                    u.addcmul_(taps[i], by_tap[i])
                d = torch.ops.aten.silu_backward(d, u)
            dbias += d.sum((0, 1))
            for i in range(K):
                dweight[i] += torch.linalg.vecdot(d, taps[i], dim=1).sum(0)
                dwindow[:, tile.start + i : tile.stop + i].addcmul_(d, by_tap[i])
        dparts = dwindow.to(dtype).split([part.shape[1] for part in parts], 1)
        return None, dweight.T.to(weight.dtype), None if bias is None else dbias.to(bias.dtype), *dparts


def _window(history, x, tile, K):
    """The steps (B, K - 1 + n, C) that a tile of n outputs reads. history: (B, K - 1, C); None: x starts with it."""
    if history is None:
        return x[:, tile.start : tile.stop + K - 1]
    if tile.start >= K - 1:
        return x[:, tile.start - K + 1 : tile.stop]
    return torch.cat([history[:, tile.start :], x[:, : tile.stop]], 1)


def _convolve(window, weight, bias):
    """(B, K - 1 + T, C) -> (B, T, C), as a convolution over an image of height 1 whose channels are the fastest axis:
    the layout that x has already, and many times faster on a CPU than the same call on (B, C, T)."""
    image = window.transpose(1, 2).unsqueeze(2)
    bias = None if bias is None else bias.to(image.dtype)
    y = F.conv2d(image, weight[:, None, None].to(image.dtype), bias, groups=weight.shape[0])
    return y.squeeze(2).transpose(1, 2)


def _packed(x, weight, bias, state, cu_seqlens, activate):
    """Each document gets its own K - 1 steps of history in front; the outputs at those steps are dropped."""
    taps, cuts = weight.shape[1] - 1, documents(cu_seqlens, *x.shape[:2])
    parts = [part for rows, start, stop in cuts for part in (state[rows], x[:, start:stop])]
    y = _convolved(activate, weight, bias, *parts)
    starts = [start + taps * d for d, (_, start, _) in enumerate(cuts)]
    lengths = [stop - start for _, start, stop in cuts]
    y = torch.cat([y[:, at : at + n] for at, n in zip(starts, lengths, strict=True)], 1)
    return y, torch.cat([_end(*document) for document in zip(parts[::2], parts[1::2], strict=True)])


def _end(state, x):
    """The last K - 1 steps of [state, x]."""
    taps = state.shape[1]
    if exported():  # x may be of any length
        return torch.cat([state, x], 1)[:, x.shape[1] :]
    window = torch.cat([state, x[:, max(0, x.shape[1] - taps) :]], 1)
    return window[:, window.shape[1] - taps :]


def _initial(x, weight, state, cu_seqlens):
    state = _given(x, weight, state, cu_seqlens)
    return x.new_zeros(_state_shape(x, weight, cu_seqlens)) if state is None else state


def _given(x, weight, state, cu_seqlens):
    """The initial state in x's dtype, or None."""
    shape = _state_shape(x, weight, cu_seqlens)
    if state is not None and tuple(state.shape) != shape:
        raise ValueError(f"causal_conv: initial_state must have shape {shape}; got {tuple(state.shape)}.")
    return None if state is None else state.to(x.dtype)


def _state_shape(x, weight, cu_seqlens):
    return num_states(cu_seqlens, *x.shape[:2]), weight.shape[1] - 1, x.shape[2]


def _check(x, weight, bias):
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(
            f"causal_conv needs x (B, T, C) and weight (C, K); got {tuple(x.shape)} and {tuple(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"causal_conv needs bias ({weight.shape[0]},); got {tuple(bias.shape)}.")
    if x.shape[1] == 0:
        raise ValueError("causal_conv needs at least one step; got a sequence of length 0.")
