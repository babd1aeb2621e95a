"""Sliding-window attention on a GPU: kernels/window.py's whole sequences, forward and backward, and its step.

    s_ij = scale q_i . k_j      p_ij = exp(s_ij) / sum_j exp(s_ij)      o_i = sum_j p_ij v_j      j in [low_i, i]
    dv_j = sum_i p_ij do_i      ds_ij = p_ij (do_i . v_j - do_i . o_i)
    dq_i = scale sum_j ds_ij k_j      dk_j = scale sum_i ds_ij q_i

Letters as in kernels/window.py; N = S + T steps of keys, query t is step i = S + t; low_i = max(i - W + 1, where i's
document starts). No score is stored. A program of the forward pass holds the queries of one tile and one head and goes
over the tiles of keys from its first query's low to its last query, with a running maximum; what it keeps is one number
a row, log2 sum_j exp(s_ij), from which the backward pass makes the probabilities again. Most tiles are seen by every
query and need no mask; those at the two edges of the band are visited first.

Why one head a program, although SW-SKA's heads share a key: as each has values of its own, two heads of 64 queries read
one tile of keys and two of values where one head of 128 queries reads one of each. Programs of the same queries start
together (the head is the fastest index), so a shared key comes from memory once and then from the L2 cache, which on an
H200 holds the windows of 16 heads at once. The step is bound by memory: there a program reads a tile of keys once for
several heads. dk of a shared key is summed in the registers of a program that goes over its heads.

The past is joined to the keys and values by a copy: it is at most a window, and was itself gathered from a ring.
"""

import math

import torch
from torch.autograd.function import once_differentiable

from scrubjay.kernels.recurrence import LOG2_E
from scrubjay.kernels.triton_tools import dot_dtype, jit, launch, precision, tile_side, tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROGRAMS = 264  # for dk and dv at least, where the heads that share a key allow it: two a multiprocessor of an H200
STEP_HEADS = 4  # heads of a program of the step
STEP_TILE = 8192  # numbers in its tile of keys: 128 keys of 64, 64 of 128


def window_fits(q, *others, scale, dropout=0.0):
    """Whether the kernels cover a call on q, keys and values: one dtype of at most 32 bits, heads of at most 256,
    scale > 0, no dropout."""
    one = q.dtype in DTYPES and all(x.dtype == q.dtype for x in others)
    return one and q.shape[-1] <= 256 and scale > 0 and not dropout


def window_triton(q, k, v, window, past, cu_seqlens, scale):
    """`window_attention` of kernels/window.py, for calls that fit."""
    real = starts = ends = None
    if past is not None and past[0].shape[1]:
        k, v, real = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1), past[2].contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(q.device, torch.int32)
        steps = torch.arange(q.shape[1], device=q.device, dtype=torch.int32)
        after = torch.searchsorted(cu_seqlens, steps, right=True)
        starts, ends = cu_seqlens[after - 1], cu_seqlens[after]
    return _WindowAttention.apply(q, k, v, real, starts, ends, min(window, k.shape[1]), scale)


def window_step_triton(q, keys, values, held, scale):
    """`window_attention_step` of kernels/window.py, for calls that fit and want no gradient."""
    keys, values = _by_rows(keys), _by_rows(values)
    q, held = q.contiguous(), held.contiguous()
    (B, H, P), K, V, W = q.shape, keys.shape[1], values.shape[1], keys.shape[2]
    constants = {name: value for name, value in _constants(q).items() if name in ("P", "BP")}
    BN = STEP_TILE // constants["BP"]
    splits = -(-W // BN)
    o = torch.empty_like(q)
    # A split's sum of weighted values, the sum of its weights, and its largest score, to which they are relative.
    acc, sums, tops = (q.new_empty((B, H, splits, n), dtype=torch.float32) for n in (P, 1, 1))
    launch(
        _step,
        (splits * K * -(-H // K // STEP_HEADS), B),
        *(q, keys, values, held, acc, sums, tops, scale * LOG2_E, W, splits, H, K, V),
        *(*keys.stride()[:3], *values.stride()[:3]),
        **constants | {"BN": BN, "HEADS": min(STEP_HEADS, H // K), "num_warps": 4},
    )
    launch(_step_combine, (B * H,), acc, sums, tops, o, splits, **constants | {"BN": 32, "num_warps": 4})
    return o


class _WindowAttention(torch.autograd.Function):
    """real: (B, S) bool or None. starts, ends: (T,) int32, where the document of each step starts and ends, or None."""

    @staticmethod
    def forward(ctx, q, k, v, real, starts, ends, window, scale):
        q, k, v = (_by_rows(x) for x in (q, k, v))
        (B, T, H, P), N = q.shape, k.shape[1]
        o = torch.empty((B, T, H, P), dtype=q.dtype, device=q.device)
        sums = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
        sizes, options = forward_tiles(P, q.dtype)
        launch(
            _forward,
            (H * -(-T // sizes["BT"]), B),
            *(q, k, v, o, sums, real, starts, scale * LOG2_E, T, N - T, window, H, k.shape[2], v.shape[2]),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            **_constants(q) | sizes | options,
        )
        ctx.save_for_backward(q, k, v, o, sums, real, starts, ends)
        ctx.window, ctx.scale = window, scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, o, sums, real, starts, ends = ctx.saved_tensors
        do = _by_rows(do)
        dots = torch.empty_like(sums)  # do . o, which the kernel of dq makes for that of dk and dv
        dq = _gradient_of_queries(do, q, k, v, o, sums, dots, real, starts, ctx.window, ctx.scale)
        dk, dv = _gradients_of_keys(do, q, k, v, sums, dots, real, ends, ctx.window, ctx.scale)
        return dq, dk, dv, None, None, None, None, None


def _gradient_of_queries(do, q, k, v, o, sums, dots, real, starts, window, scale):
    (B, T, H, P), N = q.shape, k.shape[1]
    dq = torch.empty_like(o)
    sizes, options = query_gradient_tiles(P, q.dtype)
    launch(
        _backward_queries,
        (H * -(-T // sizes["BT"]), B),
        *(q, k, v, o, do, sums, dots, dq, real, starts, scale, scale * LOG2_E, T, N - T, window),
        *(H, k.shape[2], v.shape[2], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3]),
        **_constants(q) | sizes | options,
    )
    return dq


def _gradients_of_keys(do, q, k, v, sums, dots, real, ends, window, scale):
    """dk and dv. Heads that share both key and value, those equal mod lcm(K, V), are one class; a program goes over as
    many classes of one key head as leave PROGRAMS programs. What several programs add to is summed here, in order."""
    (B, T, H, P), (N, K), V = q.shape, k.shape[1:3], v.shape[2]
    sizes, options = key_gradient_tiles(P, q.dtype)
    tiles, classes = -(-N // sizes["BN"]), math.lcm(K, V)
    wanted = -(-PROGRAMS // max(1, B * tiles * K))
    parts = next(n for n in range(1, classes // K + 1) if classes // K % n == 0 and (n >= wanted or n == classes // K))
    dk = _shares(k, parts)
    dv = _shares(v, classes // V)
    launch(
        _backward_keys,
        (parts * K * tiles, B),
        *(q, k, v, do, sums, dots, dk, dv, real, ends, scale, scale * LOG2_E, T, N - T, window, H, K, V),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3]),
        **_constants(q) | {"CLASSES": classes, "PARTS": parts} | sizes | options,
    )
    return (x[0] if len(x) == 1 else x.sum(0).to(k.dtype) for x in (dk, dv))


def _shares(x, number):
    """Memory for what `number` programs add to the gradient of x: in float32, unless it is the gradient."""
    return torch.empty((number, *x.shape), dtype=x.dtype if number == 1 else torch.float32, device=x.device)


def _by_rows(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def _constants(q):
    P = q.shape[-1]
    return {"P": P, "BP": tile_side(P), "DOT": dot_dtype(q), "PRECISION": precision()}


# Tiles of BT queries and BN keys, warps and stages, by head size and dtype. Chosen by what the compiler says of them,
# not measured: next to nothing is spilled, except in float32 with heads above 128, and sm_86 and sm_89 have the shared
# memory, too.


def forward_tiles(P, dtype):
    if dtype == torch.float32:
        return _tiles(*((64, 32, 4, 2) if P <= 64 else (32, 16, 4, 2) if P <= 128 else (32, 32, 8, 1)))
    return _tiles(*((128, 64, 4, 3) if P <= 64 else (128, 64, 8, 3) if P <= 128 else (64, 32, 4, 2)))


def query_gradient_tiles(P, dtype):
    if dtype == torch.float32:
        return _tiles(*((32, 32, 4, 2) if P <= 64 else (32, 32, 8, 1) if P <= 128 else (16, 16, 4, 1)))
    return _tiles(*((128, 64, 8, 2) if P <= 128 else (64, 32, 4, 1)))


def key_gradient_tiles(P, dtype):
    if dtype == torch.float32:
        return _tiles(*((32, 16, 4, 2) if P <= 64 else (32, 16, 4, 1) if P <= 128 else (16, 16, 8, 1)))
    return _tiles(*((64, 128, 8, 2) if P <= 64 else (32, 128, 8, 2) if P <= 128 else (32, 32, 8, 2)))


def _tiles(BT, BN, warps, stages):
    return {"BT": BT, "BN": BN}, {"num_warps": warps, "num_stages": stages}


# fmt: off


@jit
def _load(
    base, first, stop, stride: tl.constexpr, SIZE: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(SIZE, BP), an operand of products: the steps [first, first + SIZE) of the head at `base`. MASKED: zeros from
    `stop` on; else all are before it. Strides of time are constants: the rows' offsets then need no registers."""
    row, column = tl.arange(0, SIZE), tl.arange(0, BP)
    at = base + (tl.full((), 0, tl.int64) + first) * stride + row[:, None] * stride + column[None, :]
    if MASKED:
        return tl.load(at, mask=(first + row < stop)[:, None] & (column < P)[None, :], other=0.0).to(DOT)
    if BP != P:
        return tl.load(at, mask=(column < P)[None, :], other=0.0).to(DOT)
    return tl.load(at).to(DOT)


@jit
def _store(base, x, rows, stride: tl.constexpr, SIZE: tl.constexpr, P: tl.constexpr, BP: tl.constexpr):
    """The first `rows` of a (SIZE, BP) tile, to `base`: an address that no load uses keeps no registers until here."""
    row, column = tl.arange(0, SIZE), tl.arange(0, BP)
    at = base + row[:, None] * stride + column[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=(row < rows)[:, None] & (column < P)[None, :])

@jit
def _low(starts, t, S, window):
    """The first key that each of the queries t sees."""
    low = tl.maximum(S + t - window + 1, 0)
    if starts is not None:
        low = tl.maximum(low, tl.load(starts + t))
    return low


@jit
def _high(ends, j, S, N, window):
    """The last query, as a step of the keys, that sees each of the keys j."""
    high = tl.minimum(j + window, N)
    if ends is not None:  # of packed documents, which have no past
        high = tl.minimum(high, tl.load(ends + tl.minimum(j, N - 1)))
    return high - 1


@jit
def _band(left, lo, hi, right, SIZE: tl.constexpr):
    """[left, right) in tiles: those in [lo, hi), here rounded inwards, need no mask.

    Returns: lo, hi, how many tiles there are from `left` to lo and how many out of [lo, hi) in all.
    """
    before = tl.cdiv(tl.maximum(tl.minimum(lo, right) - left, 0), SIZE)
    lo = left + before * SIZE
    hi = lo + tl.maximum(hi - lo, 0) // SIZE * SIZE
    return lo, hi, before, before + tl.cdiv(tl.maximum(right - hi, 0), SIZE)


@jit
def _band_of_keys(starts, real, first, last, S, window, BN: tl.constexpr):
    """The band of the queries [first, last]: (left, lo, hi, tiles before lo, tiles with a mask)."""
    left, lo = _low(starts, first, S, window), _low(starts, last, S, window)
    if real is not None:
        lo = tl.maximum(lo, S)  # a step of the past may not be real
    lo, hi, before, masked = _band(left, lo, S + first + 1, S + last + 1, BN)
    return left, lo, hi, before, masked


@jit
def _visible(i, low, j, real, S):
    """(queries, keys) bool."""
    seen = (j[None, :] <= i[:, None]) & (j[None, :] >= low[:, None])
    if real is not None:
        seen = seen & tl.load(real + j, mask=j < S, other=True)[None, :]
    return seen


@jit
def _attend(
    q, k, v, acc, top, total, i, low, start, real, S, N, scale, skt: tl.constexpr, svt: tl.constexpr,
    BN: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys, from `start`. top: the largest score so far, times log2 e; total: of exp2(score - top)."""
    keys = _load(k, start, N, skt, BN, P, BP, DOT, MASKED)
    s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    if MASKED:
        s = tl.where(_visible(i, low, start + tl.arange(0, BN), real, S), s, -float("inf"))
    new = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new[:, None])
    kept = tl.exp2(top - new)
    values = _load(v, start, N, svt, BN, P, BP, DOT, MASKED)
    acc = tl.dot(p.to(DOT), values, acc * kept[:, None], input_precision=PRECISION)
    return acc, new, total * kept + tl.sum(p, 1)


@jit
def _forward(
    q, k, v, o, sums, real, starts, scale, T, S, window, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    sqb, sqt: tl.constexpr, sqh, skb, skt: tl.constexpr, skh, svb, svt: tl.constexpr, svh,
    P: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):
    """Program (tile of queries and head, batch row): o and sums, log2 sum_j exp(s_ij). scale includes log2 e."""
    pid, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h = (pid % H).to(tl.int64)
    first = (tl.num_programs(0) // H - 1 - pid // H) * BT  # the last queries see the most keys: they start first
    last = tl.minimum(first + BT, T) - 1
    k += b * skb + h % K * skh
    v += b * svb + h % V * svh
    if real is not None:
        real += b * S
    queries = _load(q + b * sqb + h * sqh, first, T, sqt, BT, P, BP, DOT, True)
    t = tl.minimum(first + tl.arange(0, BT), last)
    i, low = S + t, _low(starts, t, S, window)
    left, lo, hi, before, masked = _band_of_keys(starts, real, first, last, S, window, BN)
    acc = tl.zeros((BT, BP), tl.float32)
    top, total = tl.full((BT,), -1e30, tl.float32), tl.zeros((BT,), tl.float32)  # finite: a row may see none of a tile
    for n in tl.range(masked):
        start = tl.where(n < before, left + n * BN, hi + (n - before) * BN)
        acc, top, total = _attend(
            queries, k, v, acc, top, total, i, low, start, real, S, S + T, scale, skt, svt,
            BN, P, BP, DOT, PRECISION, True,
        )
    for start in tl.range(lo, hi, BN):
        acc, top, total = _attend(
            queries, k, v, acc, top, total, i, low, start, real, S, S + T, scale, skt, svt,
            BN, P, BP, DOT, PRECISION, False,
        )
    _store(o + ((b * T + first) * H + h) * P, acc / total[:, None], last + 1 - first, H * P, BT, P, BP)
    row = first + tl.arange(0, BT)
    tl.store(sums + (b * H + h) * T + row, top + tl.log2(total), mask=row <= last)


@jit
def _query_step(
    q, do, dq, sums, dots, k, v, i, low, start, real, S, N, scale, skt: tl.constexpr, svt: tl.constexpr,
    BN: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dq / scale with what the tile of keys from `start` adds."""
    keys = _load(k, start, N, skt, BN, P, BP, DOT, MASKED)
    values = _load(v, start, N, svt, BN, P, BP, DOT, MASKED)
    s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    if MASKED:
        s = tl.where(_visible(i, low, start + tl.arange(0, BN), real, S), s, -float("inf"))
    p = tl.exp2(s * scale - sums[:, None])
    ds = p * (tl.dot(do, tl.trans(values), input_precision=PRECISION) - dots[:, None])
    return tl.dot(ds.to(DOT), keys, dq, input_precision=PRECISION)


@jit
def _backward_queries(
    q, k, v, o, do, sums, dots, dq, real, starts, scale, log_scale, T, S, window,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    sqb, sqt: tl.constexpr, sqh, skb, skt: tl.constexpr, skh, svb, svt: tl.constexpr, svh,
    sdb, sdt: tl.constexpr, sdh,
    P: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):
    """Programs as in `_forward`: dq, and dots, do_i . o_i. log_scale is scale times log2 e."""
    pid, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h = (pid % H).to(tl.int64)
    first = (tl.num_programs(0) // H - 1 - pid // H) * BT
    last = tl.minimum(first + BT, T) - 1
    k += b * skb + h % K * skh
    v += b * svb + h % V * svh
    rows = (b * H + h) * T
    if real is not None:
        real += b * S
    queries = _load(q + b * sqb + h * sqh, first, T, sqt, BT, P, BP, DOT, True)
    cotangent = _load(do + b * sdb + h * sdh, first, T, sdt, BT, P, BP, DOT, True)
    row = first + tl.arange(0, BT)
    outputs = _load(o + (b * T * H + h) * P, first, T, H * P, BT, P, BP, DOT, True)
    dot = tl.sum(cotangent.to(tl.float32) * outputs.to(tl.float32), 1)
    tl.store(dots + rows + row, dot, mask=row <= last)
    total = tl.load(sums + rows + row, mask=row < T, other=0.0)
    t = tl.minimum(row, last)
    i, low = S + t, _low(starts, t, S, window)
    left, lo, hi, before, masked = _band_of_keys(starts, real, first, last, S, window, BN)
    acc = tl.zeros((BT, BP), tl.float32)
    for n in tl.range(masked):
        start = tl.where(n < before, left + n * BN, hi + (n - before) * BN)
        acc = _query_step(
            queries, cotangent, acc, total, dot, k, v, i, low, start, real, S, S + T, log_scale, skt, svt,
            BN, P, BP, DOT, PRECISION, True,
        )
    for start in tl.range(lo, hi, BN):
        acc = _query_step(
            queries, cotangent, acc, total, dot, k, v, i, low, start, real, S, S + T, log_scale, skt, svt,
            BN, P, BP, DOT, PRECISION, False,
        )
    _store(dq + ((b * T + first) * H + h) * P, acc * scale, last + 1 - first, H * P, BT, P, BP)


@jit
def _key_step(
    keys, values, dk, dv, q, do, sums, dots, j, high, start, T, S, scale, sqt: tl.constexpr, sdt: tl.constexpr,
    BT: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dk / scale and dv with what the tile of queries from `start` adds. Scores here are (keys, queries)."""
    t = start + tl.arange(0, BT)
    queries = _load(q, start, T, sqt, BT, P, BP, DOT, MASKED)
    cotangent = _load(do, start, T, sdt, BT, P, BP, DOT, MASKED)
    s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
    if MASKED:
        total = tl.load(sums + t, mask=t < T, other=0.0)
        dot = tl.load(dots + t, mask=t < T, other=0.0)
        i = S + t[None, :]
        s = tl.where((i >= j[:, None]) & (i <= high[:, None]), s, -float("inf"))
    else:
        total = tl.load(sums + t)
        dot = tl.load(dots + t)
    p = tl.exp2(s * scale - total[None, :])
    dv = tl.dot(p.to(DOT), cotangent, dv, input_precision=PRECISION)
    ds = p * (tl.dot(values, tl.trans(cotangent), input_precision=PRECISION) - dot[None, :])
    return tl.dot(ds.to(DOT), queries, dk, input_precision=PRECISION), dv


@jit
def _backward_keys(
    q, k, v, do, sums, dots, dk, dv, real, ends, scale, log_scale, T, S, window,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    sqb, sqt: tl.constexpr, sqh, skb, skt: tl.constexpr, skh, svb, svt: tl.constexpr, svh,
    sdb, sdt: tl.constexpr, sdh,
    P: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, CLASSES: tl.constexpr,
    PARTS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):
    """Program (tile of keys, key head and part of the classes that share it; batch row).

    dk: (PARTS, B, N, K, P). dv: (CLASSES / V, B, N, V, P).
    """
    pid, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    one, first = pid % (PARTS * K), pid // (PARTS * K) * BN  # the first keys are seen by the most queries
    key, part, N = one % K, one // K, S + T
    last = tl.minimum(first + BN, N) - 1
    share = CLASSES // K // PARTS
    j = first + tl.arange(0, BN)
    high = _high(ends, j, S, N, window)
    left, right = tl.maximum(first - S, 0), _high(ends, last, S, N, window) - S + 1
    hi = _high(ends, first, S, N, window) - S + 1
    if real is not None:
        high = tl.where(tl.load(real + b * S + j, mask=j < S, other=True), high, -1)
        hi = tl.where(first < S, 0, hi)
    lo, hi, before, masked = _band(left, first + BN - 1 - S, hi, right, BT)
    keys = _load(k + b * skb + key.to(tl.int64) * skh, first, N, skt, BN, P, BP, DOT, True)
    key_acc = tl.zeros((BN, BP), tl.float32)
    for c in tl.range(part * share, (part + 1) * share, disable_licm=True):
        same = key + K * c  # heads of this class: same, same + CLASSES, ...
        value, slot = (same % V).to(tl.int64), same // V
        values = _load(v + b * svb + value * svh, first, N, svt, BN, P, BP, DOT, True)
        value_acc = tl.zeros((BN, BP), tl.float32)
        for h in tl.range(same, H, CLASSES, disable_licm=True):
            head = tl.full((), 0, tl.int64) + h
            qh, dh, rows = q + b * sqb + head * sqh, do + b * sdb + head * sdh, (b * H + head) * T
            for n in tl.range(masked):
                start = tl.where(n < before, left + n * BT, hi + (n - before) * BT)
                key_acc, value_acc = _key_step(
                    keys, values, key_acc, value_acc, qh, dh, sums + rows, dots + rows, j, high, start, T, S,
                    log_scale, sqt, sdt, BT, P, BP, DOT, PRECISION, True,
                )
            for start in tl.range(lo, hi, BT):
                key_acc, value_acc = _key_step(
                    keys, values, key_acc, value_acc, qh, dh, sums + rows, dots + rows, j, high, start, T, S,
                    log_scale, sqt, sdt, BT, P, BP, DOT, PRECISION, False,
                )
        at = (((slot * tl.num_programs(1) + b) * N + first) * V + value) * P
        _store(dv + at, value_acc, last + 1 - first, V * P, BN, P, BP)
    at = (((part * tl.num_programs(1) + b) * N + first) * K + key) * P
    _store(dk + at, key_acc * scale, last + 1 - first, K * P, BN, P, BP)


@jit
def _step(
    q, keys, values, held, acc, sums, tops, scale, W, splits, H, K, V, skb, skh, skw, svb, svh, svw,
    P: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HEADS: tl.constexpr,
):
    """Program (split of W, key head and HEADS of the heads that share it; batch row). Entries not held are not read."""
    pid, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    split, key, group = pid % splits, pid // splits % K, pid // splits // K
    entry, column = split * BN + tl.arange(0, BN), tl.arange(0, BP)
    seen = tl.load(held + b * W + entry, mask=entry < W, other=False)
    mask = seen[:, None] & (column < P)[None, :]
    rows = entry.to(tl.int64)[:, None]
    tile = tl.load(keys + b * skb + key.to(tl.int64) * skh + rows * skw + column[None, :], mask=mask, other=0.0)
    tile = tile.to(tl.float32)
    for n in tl.static_range(HEADS):
        head = key + K * (group * HEADS + n)
        if head < H:
            at = b * H + head
            query = tl.load(q + at * P + column, mask=column < P, other=0.0).to(tl.float32)
            s = tl.where(seen, tl.sum(tile * query[None, :], 1) * scale, -float("inf"))
            top = tl.maximum(tl.max(s, 0), -1e30)  # finite: a split may hold nothing
            p = tl.exp2(s - top)
            value = values + b * svb + (head % V).to(tl.int64) * svh
            weighted = tl.load(value + rows * svw + column[None, :], mask=mask, other=0.0)
            at = at * splits + split
            tl.store(acc + at * P + column, tl.sum(p[:, None] * weighted.to(tl.float32), 0), mask=column < P)
            tl.store(sums + at, tl.sum(p, 0))
            tl.store(tops + at, top)


@jit
def _step_combine(acc, sums, tops, o, splits, P: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
    """Program (batch row and head): the splits' sums relative to one largest score."""
    at = tl.program_id(0).to(tl.int64)
    column, row = tl.arange(0, BP), tl.arange(0, BN)
    largest = tl.full((BN,), -1e30, tl.float32)
    for start in tl.range(0, splits, BN):
        largest = tl.maximum(largest, tl.load(tops + at * splits + start + row, mask=start + row < splits, other=-1e30))
    top = tl.max(largest, 0)
    out, total = tl.zeros((BP,), tl.float32), 0.0
    for start in tl.range(0, splits, BN):
        split = at * splits + start + row
        exists = start + row < splits
        weight = tl.exp2(tl.load(tops + split, mask=exists, other=-float("inf")) - top)
        total += tl.sum(weight * tl.load(sums + split, mask=exists, other=0.0), 0)
        mask = exists[:, None] & (column < P)[None, :]
        out += tl.sum(weight[:, None] * tl.load(acc + split[:, None] * P + column[None, :], mask=mask, other=0.0), 0)
    tl.store(o + at * P + column, (out / total).to(o.dtype.element_ty), mask=column < P)
# fmt: on
