"""The causal convolution of conv.py, forward and backward, each as one kernel that reads and writes every number once.

    u_t = b + sum_i w_i x_(t - K + 1 + i)    s_t = sigmoid(u_t)    y_t = u_t s_t                     i = 0 .. K - 1
    d_t = dy_t s_t (1 + u_t (1 - s_t))       dx_t = sum_i w_i d_(t + K - 1 - i)
    dw_i = sum_t d_t x_(t - K + 1 + i)       db = sum_t d_t

One program takes a chunk of a document and some channels, a few for each of its threads; it walks over time and holds
the last K - 1 inputs (backward also the last K - 1 of d) in registers. It loads a group of steps before it computes the
first of them, so that many loads are under way. Before a chunk lie the steps of the chunk before it or, at the start of
a document, the initial state; backward, d of the K - 1 steps after a chunk is computed once more. A state is what lies
before a step: further programs write the final states. The sums dw and db of each chunk are one row of a table, which
torch adds up.
"""

import torch
from torch.autograd.function import once_differentiable

from scrubjay.kernels.triton_tools import append, chunk_table, jit, launch, tl, triton

NARROW = (torch.float32, torch.bfloat16, torch.float16)
TAPS = 8  # the most that registers hold
MANY = 2**24  # elements from which on there are chunks enough for a GPU if they are long


def conv_fits(*tensors):
    """Whether the kernels cover x (B, T, C), weight (C, K) and more (None: not there): no float64, at most 8 taps."""
    return all(x is None or x.dtype in NARROW for x in tensors) and tensors[1].shape[1] <= TAPS


def causal_conv_triton(x, weight, bias, initial_state, cu_seqlens, lengths):
    """`causal_conv` on a GPU: the same shapes, dtypes and result. initial_state: None or in x's dtype."""
    return _Convolution.apply(x, weight, bias, initial_state, cu_seqlens, lengths)


class _Convolution(torch.autograd.Function):
    """Keeps its inputs alone."""

    @staticmethod
    def forward(ctx, x, weight, bias, state, cu_seqlens, lengths):
        ctx.set_materialize_grads(False)
        places, chunks, rows, meta = _sizes(x, weight, cu_seqlens)
        places = (*places, lengths)
        ctx.save_for_backward(x, weight, bias, state, *places)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        final = x.new_empty(rows, weight.shape[1] - 1, x.shape[2])
        operands, strides = _operands(x, weight, bias, state)
        grid, meta = _lanes(chunks + rows, x.shape[2], meta, group=8, per_lane=4)
        launch(_forward, grid, *operands, y, final, *places, *strides, *x.shape[1:], rows, **meta)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        x, weight, bias, state, *places = ctx.saved_tensors
        _, chunks, _, meta = _sizes(x, weight, *places[:4])
        (dy,), dy_strides = _operands(torch.zeros_like(x) if dy is None else dy)
        dfinal = None if dfinal is None else dfinal.contiguous()
        dx, dstate = torch.empty(x.shape, dtype=x.dtype, device=x.device), None
        if ctx.needs_input_grad[3]:  # an empty document hands on what comes; the others' is written
            dstate = torch.zeros_like(state) if dfinal is None else dfinal.clone()
        sums = x.new_empty(weight.shape[1] + 1, chunks, x.shape[2], dtype=torch.float32)
        grads, (operands, strides) = (dy, dfinal, dx, dstate, sums), _operands(x, weight, bias, state)
        grid, meta = _lanes(chunks, x.shape[2], meta, group=4, per_lane=4)
        launch(_backward, grid, *operands, *grads, *places, *strides, *dy_strides, *x.shape[1:], **meta)
        sums = sums.sum(1)
        dbias = None if bias is None else sums[-1].to(bias.dtype)
        return dx, sums[:-1].T.to(weight.dtype), dbias, dstate, None, None


def _operands(x, *others):
    """x with its channels side by side, the others contiguous; the strides of x over rows and steps."""
    x = x if x.stride(2) == 1 else x.contiguous()
    return (x, *(None if t is None else t.contiguous() for t in others)), x.stride()[:2]


def _sizes(x, weight, cu_seqlens, *table):
    """Where documents and, unless `table` tells it, their chunks lie; numbers of chunks and of states; constants."""
    B, T, _ = x.shape
    steps = 1 if T == 1 and cu_seqlens is None else 128 if x.numel() >= MANY else 32
    meta = {"K": weight.shape[1], "STEPS": steps}
    if cu_seqlens is None:
        return (None, None, None, None), B * triton.cdiv(T, steps), B, meta
    cu_seqlens = cu_seqlens.to(x.device)
    table = table or chunk_table(cu_seqlens, B, T, steps, x.device)[:3]
    return (cu_seqlens, *table), len(table[0]), len(cu_seqlens) - 1, meta


def _lanes(programs, channels, meta, group, per_lane):
    """The grid, and the constants with the steps of a group and `per_lane` channels for each thread."""
    if meta["K"] > 4:
        group, per_lane = 4, 2
    block = min(64 * per_lane, max(32, triton.next_power_of_2(channels)))
    meta |= {"GROUP": min(group, meta["STEPS"]), "BLOCK": block, "num_warps": max(1, block // (32 * per_lane))}
    return (programs, triton.cdiv(channels, block)), meta


@jit
def _zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """That many tensors."""
    found = ()
    for _ in tl.static_range(COUNT):
        found = append(found, tl.zeros((BLOCK,), tl.float32))
    return found


@jit
def _place(chunk, cu_seqlens, of_chunk, starts, stops, T, STEPS: tl.constexpr):
    """State row of a chunk, the first step and the end of its document, its own first step and end."""
    if cu_seqlens is None:
        per_row = tl.cdiv(T, STEPS)
        row = chunk // per_row
        start = (chunk % per_row) * STEPS
        return row, 0 * chunk, T + 0 * chunk, start, tl.minimum(start + STEPS, T)
    else:
        row = tl.load(of_chunk + chunk)
        first, last = tl.load(cu_seqlens + row).to(tl.int32), tl.load(cu_seqlens + row + 1).to(tl.int32)
        return row, first, last, tl.load(starts + chunk), tl.load(stops + chunk)


@jit
def _document(row, cu_seqlens, T):
    """The first step and the end of the document with this state row."""
    if cu_seqlens is None:
        return 0 * row, T + 0 * row
    else:
        return tl.load(cu_seqlens + row).to(tl.int32), tl.load(cu_seqlens + row + 1).to(tl.int32)


@jit
def _steps(x, t, low, high, stride, c, channels, COUNT: tl.constexpr):
    """Of x the COUNT steps from t on, in float32; 0 before `low` (None: there is nothing before) and from `high` on."""
    found = ()
    at = x + t.to(tl.int64) * stride + c
    for j in tl.static_range(COUNT):
        real = t + j < high
        if low is not None:
            real = real & (t + j >= low)
        read = tl.load(at + j * stride, mask=c < tl.where(real, channels, 0), other=0.0)
        found = append(found, read.to(tl.float32))
    return found


@jit
def _before(x, state, t, row, first, stride, c, channels, K: tl.constexpr):
    """The K - 1 inputs before step t of a document: steps of x and, before its first, of the initial state."""
    found = _steps(x, t - (K - 1), first, t, stride, c, channels, K - 1)
    if state is None:
        return found
    else:
        state += (row.to(tl.int64) * (K - 1) + K - 1 - first) * channels
        initial = _steps(state, t - (K - 1), None, first, channels, c, channels, K - 1)
        both = ()
        for i in tl.static_range(K - 1):
            both = append(both, found[i] + initial[i])
        return both


@jit
def _taps(weight, bias, c, inside, K: tl.constexpr):
    """w_0 .. w_(K - 1) of the channels c, and b."""
    taps = ()
    for i in tl.static_range(K):
        taps = append(taps, tl.load(weight + c * K + i, mask=inside, other=0.0).to(tl.float32))
    if bias is None:
        return taps, 0.0
    else:
        return taps, tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)


@jit
def _sum(taps, b, seen, j, K: tl.constexpr):
    """u of a step, from the inputs seen[j] .. seen[j + K - 1]."""
    u = b + taps[0] * seen[j]
    for i in tl.static_range(1, K):
        u += taps[i] * seen[j + i]
    return u


@jit
def _forward(
    x, weight, bias, state, y, final, cu_seqlens, of_chunk, starts, stops, lengths, x_row, x_step, T, channels, rows,
    K: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, chunks = tl.program_id(0), tl.num_programs(0) - rows
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, first, last, start, stop = _place(
        tl.minimum(program, chunks - 1), cu_seqlens, of_chunk, starts, stops, T, STEPS
    )
    if program >= chunks:  # a state: what is before its last step, and no step
        row = program - chunks
        first, last = _document(row, cu_seqlens, T)
        start = last if lengths is None else first + tl.load(lengths + row).to(tl.int32)
        stop = start
    if cu_seqlens is None:
        x += row.to(tl.int64) * x_row
        y += row.to(tl.int64) * T * channels
    seen = _before(x, state, start, row, first, x_step, c, channels, K)
    if program >= chunks:
        for i in tl.static_range(K - 1):
            at = final + (row.to(tl.int64) * (K - 1) + i) * channels + c
            tl.store(at, seen[i].to(final.dtype.element_ty), mask=c < channels)
    taps, b = _taps(weight, bias, c, c < channels, K)
    for done in range(0, stop - start, GROUP):
        t = start + done
        seen = seen + _steps(x, t, None, stop, x_step, c, channels, GROUP)
        at = y + t.to(tl.int64) * channels + c
        for j in tl.static_range(GROUP):
            u = _sum(taps, b, seen, j, K)
            result = (u / (1 + tl.exp(-u))).to(y.dtype.element_ty)
            tl.store(at + j * channels, result, mask=c < tl.where(t + j < stop, channels, 0))
        seen = seen[GROUP:]


@jit
def _slope(taps, b, seen, j, dy, K: tl.constexpr):
    """d of a step, from the inputs seen[j] .. seen[j + K - 1]."""
    u = _sum(taps, b, seen, j, K)
    s = 1 / (1 + tl.exp(-u))
    return dy * s * (1 + u * (1 - s))


@jit
def _added(dtaps, d, seen, j, K: tl.constexpr):
    """The sums dw_0 .. dw_(K - 1) with a step more, whose inputs are seen[j] .. seen[j + K - 1]."""
    more = ()
    for i in tl.static_range(K):
        more = append(more, dtaps[i] + d * seen[i + j])
    return more


@jit
def _hand_back(taps, slopes, j, p, dfinal, end, dx, dstate, first, start, stop, c, channels, K: tl.constexpr):
    """Store the gradient of the input of step p, from slopes[j] .. slopes[j + K - 1]; dx: where it goes.

    dfinal, dstate: row of the states' gradients. The states are the inputs before steps `end` and `first`.
    """
    g = taps[0] * slopes[j + K - 1]
    for i in tl.static_range(1, K):
        g += taps[i] * slopes[j + K - 1 - i]
    if dfinal is not None:
        i = p - end + K - 1
        real = (i >= 0) & (i < K - 1)
        g += tl.load(dfinal + i * channels + c, mask=c < tl.where(real, channels, 0), other=0.0).to(tl.float32)
    real = (p >= start) & (p < stop)
    tl.store(dx, g.to(dx.dtype.element_ty), mask=c < tl.where(real, channels, 0))
    if dstate is not None:
        at = dstate + (p - first + K - 1) * channels + c
        tl.store(at, g.to(at.dtype.element_ty), mask=c < tl.where(p < first, channels, 0))


@jit
def _backward(
    x, weight, bias, state, dy, dfinal, dx, dstate, sums, cu_seqlens, of_chunk, starts, stops, lengths,
    x_row, x_step, dy_row, dy_step, T, channels,
    K: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, first, last, start, stop = _place(chunk, cu_seqlens, of_chunk, starts, stops, T, STEPS)
    end = last if lengths is None else first + tl.load(lengths + row).to(tl.int32)
    if cu_seqlens is None:
        x += row.to(tl.int64) * x_row
        dy += row.to(tl.int64) * dy_row
        dx += row.to(tl.int64) * T * channels
    if dfinal is not None:
        dfinal += row.to(tl.int64) * (K - 1) * channels
    if dstate is not None:
        dstate += row.to(tl.int64) * (K - 1) * channels
    taps, b = _taps(weight, bias, c, c < channels, K)
    seen = _before(x, state, start, row, first, x_step, c, channels, K)
    slopes = _zeros(K - 1, BLOCK)  # of the steps before the chunk: they are in the gradients of other chunks' inputs
    dtaps, db = _zeros(K, BLOCK), tl.zeros((BLOCK,), tl.float32)
    if start == stop:  # a chunk that does not exist: no input of it is before `first`, it writes no initial state
        first = start - (K - 1)
    groups = tl.cdiv(stop - start, GROUP)
    for group in range(0, groups):
        t = start + group * GROUP
        seen = seen + _steps(x, t, None, stop, x_step, c, channels, GROUP)
        dys = _steps(dy, t, None, stop, dy_step, c, channels, GROUP)
        for j in tl.static_range(GROUP):
            d = _slope(taps, b, seen, j, dys[j], K)
            slopes = append(slopes, d)
            db += d
            dtaps = _added(dtaps, d, seen, j, K)
        p = t - (K - 1)
        to = dx + p.to(tl.int64) * channels + c
        for j in tl.static_range(GROUP):
            _hand_back(
                taps, slopes, j, p + j, dfinal, end, to + j * channels, dstate, first, start, stop, c, channels, K
            )
        seen, slopes = seen[GROUP:], slopes[GROUP:]
    t = start + groups * GROUP  # then the gradients of the last K - 1 inputs, for which steps beyond the chunk count
    seen = seen + _steps(x, t, None, last, x_step, c, channels, K - 1)
    dys = _steps(dy, t, None, last, dy_step, c, channels, K - 1)
    p = t - (K - 1)
    to = dx + p.to(tl.int64) * channels + c
    for j in tl.static_range(K - 1):
        slopes = append(slopes, _slope(taps, b, seen, j, dys[j], K))
        _hand_back(taps, slopes, j, p + j, dfinal, end, to + j * channels, dstate, first, start, stop, c, channels, K)
    at = sums + chunk.to(tl.int64) * channels + c
    between = tl.num_programs(0).to(tl.int64) * channels
    for i in tl.static_range(K):
        tl.store(at + i * between, dtaps[i], mask=c < channels)
    tl.store(at + K * between, db, mask=c < channels)
