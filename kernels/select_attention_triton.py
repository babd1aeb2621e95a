"""Selective window attention on a GPU: whole sequences of kernels/select_attention.py and their gradients, and a step.

    s_ij = scale q_i . k_j      p_ij = exp(s_ij) / sum_j exp(s_ij)      o_i = sum_j p_ij v_j      j seen by i
    dv_j = sum_i p_ij do_i      ds_ij = p_ij (do_i . v_j - do_i . o_i)
    dq_i = scale sum_j ds_ij k_j      dk_j = scale sum_i ds_ij q_i

Letters as in kernels/select_attention.py; i counts the n queries row after row, N = S + T columns. at_i is the column
of a query, low_i the first one that it may see by window and `before`; a limit (c, r) becomes a floor_i = c[at_i] - r
that c_j has to exceed. No score is stored, no number is read on the host.

A program of the forward pass holds BM consecutive queries of one row and one head, and visits the columns from the
lowest that any of them sees to its last query with a running maximum. Queries are spread: at a share C of selected
columns BM of them span BM / C columns, so that 1 + BM / (C w) columns are visited for each that is needed. In the
middle of the band every query sees every column, and no mask is made. What is kept is one number a query and head,
log2 sum_j exp(s_ij), from which the backward pass makes the probabilities again: one kernel for dq by queries, one for
dk and dv by columns, over the queries that may see them. Nothing is added atomically.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from scrubjay.kernels.recurrence import LOG2_E
from scrubjay.kernels.triton_tools import Chunks, chunk_table, dot_dtype, jit, launch, precision, tile_side, tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PART = 256  # slots of a ring that one program of the step reads: a number, so that no row's bits depend on the batch


def select_attention_fits(q, k, v, limits=()):
    """Whether the kernels cover a call: one dtype of at most 32 bits, two limits at most, heads of at most 256, or 128
    in float32, whose larger ones would spill their registers."""
    widest = 128 if q.dtype == torch.float32 else 256
    return q.dtype in DTYPES and q.dtype == k.dtype == v.dtype and q.shape[-1] <= widest and len(limits) <= 2


def select_attention_triton(q, k, v, packed, before, window, limits, readable, scale):
    """`select_attention` of kernels/select_attention.py, for calls that fit and have a query."""
    index, order = packed.index, None
    if packed.tiled:
        index, order = index.sort()
        q = q[order]
    size = tiles("forward", q, False)[0]["BM"]
    sight = _sight(index, packed.shape, k.shape[1], before, window, limits, readable, size)
    o = _SelectAttention.apply(q, k, v, sight, scale)
    return o if order is None else torch.empty_like(o).index_copy(0, order, o)


class Sight(NamedTuple):
    """What queries see, on the device.

    row, at, low: (n,) int64, int32, int32, see the header. blocks: at most `size` queries of one row each. readable:
    (B, N) uint8 or None. c0, c1: (B, N) int64 or None; floor0, floor1: (n,) int64.
    """

    row: torch.Tensor
    at: torch.Tensor
    low: torch.Tensor
    blocks: Chunks
    readable: torch.Tensor | None
    c0: torch.Tensor | None
    floor0: torch.Tensor | None
    c1: torch.Tensor | None
    floor1: torch.Tensor | None

    @property
    def limited(self):
        return self.readable is not None or self.c0 is not None


def _sight(index, shape, N, before, window, limits, readable, size):
    (B, T), device = shape, index.device
    row, column = index // T, index % T
    at = column + (N - T)
    low = (at - before[row, column].clamp(max=window - 1)).clamp(min=0)
    first = torch.searchsorted(index, torch.arange(B + 1, device=device) * T)
    blocks = chunk_table(first, B, len(index), size, device)
    floors = [(c.contiguous(), c[row, at] - reach) for c, reach in limits] + [(None, None)] * (2 - len(limits))
    readable = None if readable is None else readable.contiguous().view(torch.uint8)
    return Sight(row, at.int(), low.int(), blocks, readable, *floors[0], *floors[1])


def _watchers(sight, B, N, size):
    """(first, last), (B, tiles) int32: the queries [first, last) may see something of a tile of `size` columns.

    low_i rises where `before` is what it is meant to be; where it does not, the lowest of the later ones stands for it.
    """
    starts = torch.arange(0, N, size, device=sight.at.device)
    rows = torch.arange(B, device=sight.at.device)[:, None] * N
    lowest = (sight.row * N + sight.low).flip(0).cummin(0).values.flip(0)
    first = torch.searchsorted(sight.row * N + sight.at, rows + starts)
    return first.int(), torch.searchsorted(lowest, rows + (starts + size).clamp(max=N)).int()


class _SelectAttention(torch.autograd.Function):
    """q (n, H, P), rows in order, k, v (B, N, K, P) -> (n, H, P)."""

    @staticmethod
    def forward(ctx, q, k, v, sight, scale):
        q, k, v = q.contiguous(), _by_rows(k), _by_rows(v)
        n, H, _ = q.shape
        o = torch.empty_like(q)
        sums = torch.empty((H, n), dtype=torch.float32, device=q.device)
        sizes, options = tiles("forward", q, sight.limited)
        launch(
            _forward,
            (len(sight.blocks.row), H),
            *(q, k, v, o, sums, *_seen_by(sight), scale * LOG2_E, n, k.shape[1], H),
            *(*k.stride()[:3], *v.stride()[:3]),
            **_constants(q, k) | sizes | options,
        )
        ctx.save_for_backward(q, k, v, o, sums)
        ctx.sight, ctx.scale = sight, scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, o, sums = ctx.saved_tensors
        do = do.contiguous()
        dots = torch.empty_like(sums)  # do . o, which the kernel of dq makes for that of dk and dv
        dq = _gradient_of_queries(do, q, k, v, o, sums, dots, ctx.sight, ctx.scale)
        dk, dv = _gradients_of_keys(do, q, k, v, sums, dots, ctx.sight, ctx.scale)
        return dq, dk, dv, None, None


def _gradient_of_queries(do, q, k, v, o, sums, dots, sight, scale):
    n, H, _ = q.shape
    dq = torch.empty_like(q)
    sizes, options = tiles("queries", q, sight.limited)
    launch(
        _backward_queries,
        (len(sight.blocks.row), H),
        *(q, k, v, o, do, sums, dots, dq, *_seen_by(sight), scale, scale * LOG2_E, n, k.shape[1], H),
        *(*k.stride()[:3], *v.stride()[:3]),
        **_constants(q, k) | sizes | options,
    )
    return dq


def _gradients_of_keys(do, q, k, v, sums, dots, sight, scale):
    (n, H, _), (B, N, K) = q.shape, k.shape[:3]
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    sizes, options = tiles("keys", q, sight.limited)
    launch(
        _backward_keys,
        (-(-N // sizes["BN"]), K, B),
        *(q, k, v, do, sums, dots, dk, dv, *_watchers(sight, B, N, sizes["BN"]), sight.at, sight.low),
        *(sight.readable, sight.c0, sight.floor0, sight.c1, sight.floor1, scale, scale * LOG2_E, n, N, H),
        *(*k.stride()[:3], *v.stride()[:3]),
        **_constants(q, k) | sizes | options,
    )
    return dk, dv


def select_attention_step_triton(q, keys, values, seen, rows, scale):
    """`select_attention_step` of kernels/select_attention.py, for calls that fit and want no gradient.

    A program reads PART slots of one row and key head for all query heads of it; a second kernel joins the parts.
    """
    (n, H, P), (K, W) = q.shape, keys.shape[1:3]
    q, keys, values, seen = q.contiguous(), _by_rows(keys), _by_rows(values), seen.contiguous().view(torch.uint8)
    rows = None if rows is None else rows.contiguous().view(torch.uint8)
    o = torch.zeros_like(q) if rows is not None else torch.empty_like(q)
    parts, constants = -(-W // PART), _constants(q, keys)
    found, peak, mass = o, None, None
    if parts > 1:
        found = torch.empty((n, H, parts, P), dtype=torch.float32, device=q.device)
        peak, mass = (torch.empty((n, H, parts), dtype=torch.float32, device=q.device) for _ in "pm")
    launch(
        _step,
        (n, K, parts),
        *(q, keys, values, seen, rows, found, peak, mass, scale * LOG2_E, W, parts),
        *(*keys.stride()[:3], *values.stride()[:3]),
        **constants | {"GROUP": H // K, "BG": tile_side(H // K), "BN": 64 if P <= 128 else 32, "PART": PART},
        num_warps=4,
        num_stages=3 if q.dtype != torch.float32 else 2,
    )
    if parts > 1:
        size = {"P": P, "BP": tile_side(P, 1), "PARTS": tile_side(parts, 1)}
        launch(_join, (n, H), found, peak, mass, rows, o, parts, **size, num_warps=1, num_stages=1)
    return o


def _seen_by(sight):
    """The arguments of a kernel whose program is a block of queries."""
    row, start, stop, _ = sight.blocks
    return row, start, stop, sight.at, sight.low, sight.readable, sight.c0, sight.floor0, sight.c1, sight.floor1


def _by_rows(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def _constants(q, k):
    P = q.shape[-1]
    heads = {"GROUP": q.shape[1] // k.shape[2]} if k.ndim == 4 else {}
    return heads | {"P": P, "BP": tile_side(P), "DOT": dot_dtype(q), "PRECISION": precision()}


# (queries BM, columns BN, warps, stages) for heads of at most 64, 128 and 256 channels. On sm_80 and sm_90 those of low
# precision spill nothing, those of float32 and the limited ones of 256 at most 100 bytes a thread.
LOW_PRECISION = {
    "forward": ((64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 8, 2)),
    "queries": ((64, 64, 4, 3), (64, 64, 8, 2), (64, 16, 8, 2)),
    "keys": ((64, 128, 8, 2), (64, 64, 8, 2), (16, 64, 8, 1)),
}
SINGLE_PRECISION = {
    "forward": ((32, 32, 4, 2), (32, 32, 8, 1)),
    "queries": ((32, 32, 4, 1), (32, 32, 8, 1)),
    "keys": ((32, 32, 4, 2), (32, 32, 8, 1)),
}


def tiles(kernel, q, limited):
    """Sizes and launch options. "forward" and "queries" have the same BM: their blocks are the same.

    Where a call is `limited` to some of the columns, what says so takes registers too, and a tile has half of them.
    """
    P = q.shape[-1]
    table = SINGLE_PRECISION if q.dtype == torch.float32 else LOW_PRECISION
    BM, BN, warps, stages = table[kernel][0 if P <= 64 else 1 if P <= 128 else 2]
    return {"BM": BM, "BN": max(16, BN // 2) if limited else BN}, {"num_warps": warps, "num_stages": stages}


@jit
def _load(at, inside, P: tl.constexpr, BP: tl.constexpr, MASKED: tl.constexpr):
    """(SIZE, BP) of the rows that start at the pointers `at` (SIZE,). MASKED: zeros where not `inside`."""
    d = tl.arange(0, BP)
    if MASKED:
        return tl.load(at[:, None] + d[None, :], mask=inside[:, None] & (d < P)[None, :], other=0.0)
    if BP != P:
        return tl.load(at[:, None] + d[None, :], mask=(d < P)[None, :], other=0.0)
    return tl.load(at[:, None] + d[None, :])


@jit
def _store(at, x, inside, P: tl.constexpr, BP: tl.constexpr):
    d = tl.arange(0, BP)
    tl.store(at[:, None] + d[None, :], x.to(at.dtype.element_ty), mask=inside[:, None] & (d < P)[None, :])


@jit
def _sees(at, low, j, N, base, readable, c0, floor0, c1, floor1):
    """Which of the columns j each query sees; queries and columns on axes of their own. base: row * N."""
    seen = (j <= at) & (j >= low)
    if readable is not None:
        seen = seen & ((tl.load(readable + base + j, mask=j < N, other=0) != 0) | (j == at))
    if c0 is not None:
        seen = seen & (tl.load(c0 + base + j, mask=j < N, other=0) > floor0)
    if c1 is not None:
        seen = seen & (tl.load(c1 + base + j, mask=j < N, other=0) > floor1)
    return seen


@jit
def _floor(floor, i, live):
    return tl.load(floor + i, mask=live, other=0) if floor is not None else 0


@jit
def _band(at, low, live, N, BN: tl.constexpr, MASKED: tl.constexpr):
    """(start, left, middle, stop): columns that some query sees start and stop there, and every query sees those of the
    whole tiles in [left, middle), none where MASKED."""
    start, stop = tl.min(tl.where(live, low, N)), tl.max(tl.where(live, at, -1)) + 1
    left = start + tl.cdiv(tl.max(tl.where(live, low, 0)) - start, BN) * BN
    middle = left + tl.maximum(tl.min(tl.where(live, at, N)) + 1 - left, 0) // BN * BN
    if MASKED:
        left, middle = start, start
    return start, left, middle, stop


@jit
def _edge(t, start, left, middle, BN: tl.constexpr):
    """The first column of the t-th tile of those before `left` and from `middle` on."""
    before = (left - start) // BN
    return tl.where(t < before, start + t * BN, middle + (t - before) * BN)


@jit
def _attend(
    q, peak, mass, o, first, at, low, N, base, readable, c0, floor0, c1, floor1,
    k, v, stride_k, stride_v, scale,
    P: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """What a tile of columns adds to the running maximum, the sum and the values of a block of queries."""
    j = first + tl.arange(0, BN)
    keys = _load(k + first.to(tl.int64) * stride_k + tl.arange(0, BN) * stride_k, j < N, P, BP, MASKED)
    s = tl.dot(q, tl.trans(keys.to(DOT)), input_precision=PRECISION) * scale
    if MASKED:
        seen = _sees(at[:, None], low[:, None], j[None, :], N, base, readable, c0, floor0, c1, floor1)
        s = tl.where(seen, s, float("-inf"))
    higher = tl.maximum(peak, tl.max(s, 1))
    level = tl.where(higher == float("-inf"), 0.0, higher)  # of a query that has seen nothing yet
    p = tl.exp2(s - level[:, None])
    factor = tl.exp2(peak - level)
    values = _load(v + first.to(tl.int64) * stride_v + tl.arange(0, BN) * stride_v, j < N, P, BP, MASKED)
    o = tl.dot(p.to(DOT), values.to(DOT), o * factor[:, None], input_precision=PRECISION)
    return higher, mass * factor + tl.sum(p, 1), o


@jit
def _forward(
    q, k, v, out, sums, row, start, stop, at, low, readable, c0, floor0, c1, floor1,
    scale, n, N, H,
    stride_kb, stride_k, stride_kh, stride_vb, stride_v, stride_vh,
    GROUP: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(start + block), tl.load(stop + block)
    if first >= end:  # the number of blocks is an upper bound
        return
    i = first + tl.arange(0, BM)
    live = i < end
    row = tl.load(row + block).to(tl.int64)
    at, low = tl.load(at + i, mask=live, other=-1), tl.load(low + i, mask=live, other=0)
    floor0, floor1 = _floor(floor0, i, live), _floor(floor1, i, live)
    if c0 is not None:
        floor0 = floor0[:, None]
    if c1 is not None:
        floor1 = floor1[:, None]
    k += row * stride_kb + (head // GROUP) * stride_kh
    v += row * stride_vb + (head // GROUP) * stride_vh
    own = (i.to(tl.int64) * H + head) * P
    queries = _load(q + own, live, P, BP, True).to(DOT)
    peak, mass = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    o = tl.zeros((BM, BP), tl.float32)
    LIMITED: tl.constexpr = readable is not None or c0 is not None
    begin, left, middle, finish = _band(at, low, live, N, BN, LIMITED)
    for t in range((left - begin) // BN + tl.cdiv(finish - middle, BN)):
        peak, mass, o = _attend(
            queries, peak, mass, o, _edge(t, begin, left, middle, BN),
            at, low, N, row * N, readable, c0, floor0, c1, floor1,
            k, v, stride_k, stride_v, scale, P, BP, BN, DOT, PRECISION, True,
        )  # fmt: skip
    for t in range((middle - left) // BN):
        peak, mass, o = _attend(
            queries, peak, mass, o, left + t * BN,
            at, low, N, row * N, readable, c0, floor0, c1, floor1,
            k, v, stride_k, stride_v, scale, P, BP, BN, DOT, PRECISION, False,
        )  # fmt: skip
    mass = tl.where(live, mass, 1.0)
    _store(out + own, o / mass[:, None], live, P, BP)
    tl.store(sums + head.to(tl.int64) * n + i, peak + tl.log2(mass), mask=live)


@jit
def _gradient_of_scores(
    q, do, total, dot, dq, first, at, low, N, base, readable, c0, floor0, c1, floor1,
    k, v, stride_k, stride_v, scale,
    P: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """dq / scale, with what a tile of columns adds to it."""
    j = first + tl.arange(0, BN)
    keys = _load(k + first.to(tl.int64) * stride_k + tl.arange(0, BN) * stride_k, j < N, P, BP, MASKED).to(DOT)
    s = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale - total[:, None]
    if MASKED:
        seen = _sees(at[:, None], low[:, None], j[None, :], N, base, readable, c0, floor0, c1, floor1)
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s)
    values = _load(v + first.to(tl.int64) * stride_v + tl.arange(0, BN) * stride_v, j < N, P, BP, MASKED).to(DOT)
    ds = p * (tl.dot(do, tl.trans(values), input_precision=PRECISION) - dot[:, None])
    return tl.dot(ds.to(DOT), keys, dq, input_precision=PRECISION)


@jit
def _backward_queries(
    q, k, v, o, do, sums, dots, dq, row, start, stop, at, low, readable, c0, floor0, c1, floor1,
    factor, scale, n, N, H,
    stride_kb, stride_k, stride_kh, stride_vb, stride_v, stride_vh,
    GROUP: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(start + block), tl.load(stop + block)
    if first >= end:
        return
    i = first + tl.arange(0, BM)
    live = i < end
    row = tl.load(row + block).to(tl.int64)
    at, low = tl.load(at + i, mask=live, other=-1), tl.load(low + i, mask=live, other=0)
    floor0, floor1 = _floor(floor0, i, live), _floor(floor1, i, live)
    if c0 is not None:
        floor0 = floor0[:, None]
    if c1 is not None:
        floor1 = floor1[:, None]
    k += row * stride_kb + (head // GROUP) * stride_kh
    v += row * stride_vb + (head // GROUP) * stride_vh
    own, of_head = (i.to(tl.int64) * H + head) * P, head.to(tl.int64) * n + i
    given = _load(do + own, live, P, BP, True)
    dot = tl.sum(given.to(tl.float32) * _load(o + own, live, P, BP, True).to(tl.float32), 1)
    tl.store(dots + of_head, dot, mask=live)
    given, queries = given.to(DOT), _load(q + own, live, P, BP, True).to(DOT)
    total = tl.load(sums + of_head, mask=live, other=0.0)
    gradient = tl.zeros((BM, BP), tl.float32)
    LIMITED: tl.constexpr = readable is not None or c0 is not None
    begin, left, middle, finish = _band(at, low, live, N, BN, LIMITED)
    for t in range((left - begin) // BN + tl.cdiv(finish - middle, BN)):
        gradient = _gradient_of_scores(
            queries, given, total, dot, gradient, _edge(t, begin, left, middle, BN),
            at, low, N, row * N, readable, c0, floor0, c1, floor1,
            k, v, stride_k, stride_v, scale, P, BP, BN, DOT, PRECISION, True,
        )  # fmt: skip
    for t in range((middle - left) // BN):
        gradient = _gradient_of_scores(
            queries, given, total, dot, gradient, left + t * BN,
            at, low, N, row * N, readable, c0, floor0, c1, floor1,
            k, v, stride_k, stride_v, scale, P, BP, BN, DOT, PRECISION, False,
        )  # fmt: skip
    _store(dq + own, gradient * factor, live, P, BP)


@jit
def _backward_keys(
    q, k, v, do, sums, dots, dk, dv, firsts, lasts, at, low, readable, c0, floor0, c1, floor1,
    factor, scale, n, N, H,
    stride_kb, stride_k, stride_kh, stride_vb, stride_v, stride_vh,
    GROUP: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program is a tile of columns of one row and key head: scores here are (BN, BM), a column's in a row."""
    tile, key_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    j = tile * BN + tl.arange(0, BN)
    inside = j < N
    step = j.to(tl.int64)
    keys = _load(k + row * stride_kb + key_head * stride_kh + step * stride_k, inside, P, BP, True).to(DOT)
    values = _load(v + row * stride_vb + key_head * stride_vh + step * stride_v, inside, P, BP, True).to(DOT)
    of_keys, of_values = tl.zeros((BN, BP), tl.float32), tl.zeros((BN, BP), tl.float32)
    watched = row * tl.num_programs(0) + tile
    first, last = tl.load(firsts + watched), tl.load(lasts + watched)
    for member in range(GROUP):
        head = key_head * GROUP + member
        for block in range(first, last, BM):
            i = block + tl.arange(0, BM)
            live = i < last
            own, of_head = (i.to(tl.int64) * H + head) * P, head.to(tl.int64) * n + i
            queries, given = (_load(q + own, live, P, BP, True).to(DOT), _load(do + own, live, P, BP, True).to(DOT))
            here, lowest = tl.load(at + i, mask=live, other=-1), tl.load(low + i, mask=live, other=0)
            above0, above1 = _floor(floor0, i, live), _floor(floor1, i, live)
            if c0 is not None:
                above0 = above0[None, :]
            if c1 is not None:
                above1 = above1[None, :]
            seen = _sees(
                here[None, :], lowest[None, :], j[:, None], N, row * N, readable, c0, above0, c1, above1
            )  # fmt: skip
            total = tl.load(sums + of_head, mask=live, other=0.0)
            s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale - total[None, :]
            p = tl.exp2(tl.where(seen, s, float("-inf")))
            of_values = tl.dot(p.to(DOT), given, of_values, input_precision=PRECISION)
            dot = tl.load(dots + of_head, mask=live, other=0.0)
            ds = p * (tl.dot(values, tl.trans(given), input_precision=PRECISION) - dot[None, :])
            of_keys = tl.dot(ds.to(DOT), queries, of_keys, input_precision=PRECISION)
    own = ((row * N + step) * tl.num_programs(1) + key_head) * P
    _store(dk + own, of_keys * factor, inside, P, BP)
    _store(dv + own, of_values, inside, P, BP)


@jit
def _step(
    q, keys, values, seen, rows, found, peaks, masses, scale, W, parts,
    stride_kb, stride_kh, stride_k, stride_vb, stride_vh, stride_v,
    GROUP: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BG: tl.constexpr, BN: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The heads of a key head are the rows of its products, padded to BG."""
    row, key_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    if rows is not None and tl.load(rows + row) == 0:
        return
    keys += row * stride_kb + key_head * stride_kh
    values += row * stride_vb + key_head * stride_vh
    member = tl.arange(0, BG)
    head, live = (row * tl.num_programs(1) + key_head) * GROUP + member, member < GROUP
    queries = _load(q + head * P, live, P, BP, True).to(DOT)
    peak, mass = tl.full((BG,), float("-inf"), tl.float32), tl.zeros((BG,), tl.float32)
    o = tl.zeros((BG, BP), tl.float32)
    for first in range(part * PART, tl.minimum(part * PART + PART, W), BN):
        j = first + tl.arange(0, BN)
        there = tl.load(seen + row * W + j, mask=j < W, other=0) != 0  # what is not seen is not read either
        tile = _load(keys + j.to(tl.int64) * stride_k, there, P, BP, True).to(DOT)
        s = tl.dot(queries, tl.trans(tile), input_precision=PRECISION) * scale
        s = tl.where(there[None, :], s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        p, shrunk = tl.exp2(s - level[:, None]), tl.exp2(peak - level)
        tile = _load(values + j.to(tl.int64) * stride_v, there, P, BP, True).to(DOT)
        o = tl.dot(p.to(DOT), tile, o * shrunk[:, None], input_precision=PRECISION)
        peak, mass = higher, mass * shrunk + tl.sum(p, 1)
    if peaks is None:
        _store(found + head * P, o / mass[:, None], live, P, BP)
    else:
        at = head * parts + part
        _store(found + at * P, o, live, P, BP)
        tl.store(peaks + at, peak, mask=live)
        tl.store(masses + at, mass, mask=live)


@jit
def _join(
    found, peaks, masses, rows, out, parts,
    P: tl.constexpr, BP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if rows is not None and tl.load(rows + row) == 0:
        return
    head = row * tl.num_programs(1) + tl.program_id(1)
    part, d = tl.arange(0, PARTS), tl.arange(0, BP)
    there = part < parts
    peak = tl.load(peaks + head * parts + part, mask=there, other=float("-inf"))
    weight = tl.exp2(peak - tl.max(peak, 0))
    mass = tl.sum(weight * tl.load(masses + head * parts + part, mask=there, other=0.0), 0)
    o = _load(found + (head * parts + part) * P, there, P, BP, True)
    tl.store(out + head * P + d, (tl.sum(o * weight[:, None], 0) / mass).to(out.dtype.element_ty), mask=d < P)
