"""Triton kernels of `recycle.py`. One token reads all keys once: they are cut into parts, so that few heads fill a GPU.

    s_hj = scale q_h . k_j
    L_hc = log sum_(j in part c) exp s_hj     o_hc = sum_(j in part c) exp(s_hj - L_hc) v_j       _part_kernel
    L_h = log sum_c exp L_hc     o_h = sum_c exp(L_hc - L_h) o_hc     log p_hj = s_hj - L_h       _whole_kernel
    u_j = the largest, over the neighbours i of j, of what the heads say of i                     _pool_kernel
    (score, column) as one integer that orders as the pair does                                   _order_kernel
    the rows of `index` to a buffer; a new row to the slot of the lowest rank        _rows_kernel, _put_kernel

B batch, H query heads, G key heads, R = H / G, n keys, P head size, M rows, C slots. The R query heads of a key head
are the rows of one product. None of these has a gradient.
"""

import torch

from scrubjay.kernels.recurrence import wants_gradient
from scrubjay.kernels.triton_tools import dot_dtype, jit, launch, precision, tile_side, tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PROGRAMS = 1024  # that keep a large GPU busy to the end: about four for each place on it
MOST_PARTS = 64  # they are added up by one program a head
SHORT = 2  # tiles that one program reads sooner than a second kernel is launched
LARGEST_HEAD, MOST_ROWS = 256, 64
MOST_NEIGHBOURS = 63


def decode_fits(q, k, v=None, real=None):
    """Whether `decode_triton` and its kin cover the call."""
    tensors = [q, k] if v is None else [q, k, v]
    (P, H), G = (q.shape[-1], q.shape[1]), k.shape[1]
    return (
        q.dtype in DTYPES
        and all(x.dtype == q.dtype and x.shape[-1] == P for x in tensors)
        and all(x.stride(-1) == 1 for x in tensors[1:])
        and P <= LARGEST_HEAD
        and H // G <= MOST_ROWS
        and k.shape[2] > 0
        and (real is None or real.dtype == torch.bool)
        and not wants_gradient(*tensors)
    )


def decode_triton(q, k, v, scale, real=None):
    """o (B, H, P); shapes in `recycle.py`. A row that has no real key gives zeros."""
    return _attended(q, k, v, scale, real, scored=False)[0]


def decode_with_scores_triton(q, k, v, scale, real=None):
    """o (B, H, P) and log-probabilities (B, H, n) in float32."""
    return _attended(q, k, v, scale, real, scored=True)


def scores_of_triton(q, k, scale, real=None):
    """Log-probabilities (B, H, n) in float32."""
    return _attended(q, k, None, scale, real, scored=True)[1]


def _attended(q, k, v, scale, real, scored):
    """(o or None, log-probabilities or None). Two launches; one where a single part is the whole and no scores."""
    (B, H, P), (G, n) = q.shape, k.shape[1:3]
    q = q if q.stride(-1) == 1 else q.contiguous()
    block, warps, stages = _tiles(P, q.dtype)
    parts, size = _parts(B * G, n, block)
    whole = parts == 1 and not scored
    out = None if v is None else torch.empty(B, H, P, dtype=v.dtype, device=q.device)
    part = out if whole or v is None else torch.empty(B * H, parts, P, dtype=torch.float32, device=q.device)
    total = None if whole else torch.empty(B * H, parts, dtype=torch.float32, device=q.device)
    scores = torch.empty(B, H, n, dtype=torch.float32, device=q.device) if scored else None
    padded = tile_side(P)
    strides = (*q.stride()[:2], *k.stride()[:3], *((0, 0, 0) if v is None else v.stride()[:3]), *_strides(real))
    operands = (q, k, v, real, part, total, scores, scale, n, size, parts, G, *strides)
    launch(
        _part_kernel,
        (B * G, parts),
        *operands,
        R=H // G,
        P=P,
        ROWS=tile_side(H // G),
        PADDED=padded,
        BLOCK=block,
        DOT=dot_dtype(q),
        PRECISION=precision(),
        num_warps=warps,
        num_stages=stages,
    )
    if not whole:
        block = 1024
        launch(
            _whole_kernel,
            (B * H, triton.cdiv(n, block) if scored else 1),
            part,
            total,
            scores,
            out,
            n,
            parts,
            P=P,
            PARTS=triton.next_power_of_2(parts),
            PADDED=padded,
            BLOCK=block,
            num_warps=4,
        )
    return out, scores


def _tiles(P, dtype):
    """(keys of a tile, warps, stages)."""
    if dtype == torch.float32:
        return (32, 4, 2) if P <= 128 else (16, 4, 2)
    return (64, 4, 3) if P <= 128 else (32, 4, 3)


def _parts(rows, n, block):
    """(parts, keys of a part): whole tiles, and as many programs as a large GPU wants."""
    tiles = triton.cdiv(n, block)
    parts = 1 if tiles <= SHORT else min(MOST_PARTS, max(1, PROGRAMS // max(rows, 1)), tiles)
    size = triton.cdiv(triton.cdiv(n, parts), block) * block
    return triton.cdiv(n, size), size


def _strides(real):
    """Those of (B, G, n) for `real` (B, n) or (B, G, n), or None."""
    if real is None:
        return 0, 0, 0
    return real.stride() if real.ndim == 3 else (real.stride(0), 0, real.stride(1))


@jit
def _part_kernel(
    q,
    k,
    v,
    real,
    part,
    total,
    scores,
    scale,
    n,
    size,
    parts,
    G,
    q_b,
    q_h,
    k_b,
    k_g,
    k_n,
    v_b,
    v_g,
    v_n,
    r_b,
    r_g,
    r_n,
    R: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys [c size, (c + 1) size) of one key head. What is not real is not read either: it may be anything."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    b, g, c = (tl.program_id(0) // G).to(tl.int64), (tl.program_id(0) % G).to(tl.int64), tl.program_id(1)
    r, p = tl.arange(0, ROWS), tl.arange(0, PADDED)
    query = tl.load(
        q + b * q_b + (g * R + r[:, None]) * q_h + p[None, :], mask=(r < R)[:, None] & (p < P)[None, :], other=0.0
    ).to(DOT)
    row = (b * G + g) * R + r
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(c * size, tl.minimum((c + 1) * size, n), BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < n
        there = inside
        if real is not None:
            there &= tl.load(real + b * r_b + g * r_g + j.to(tl.int64) * r_n, mask=inside, other=0).to(tl.int1)
        seen = there[:, None] & (p < P)[None, :]
        key = tl.load(k + b * k_b + g * k_g + j.to(tl.int64)[:, None] * k_n + p[None, :], mask=seen, other=0.0)
        s = tl.dot(query, tl.trans(key.to(DOT)), input_precision=PRECISION) * scale  # [ROWS, BLOCK]
        s = tl.where(there[None, :], s, float("-inf"))
        if scores is not None:
            tl.store(scores + row[:, None] * n + j[None, :], s, mask=(r < R)[:, None] & inside[None, :])
        now = tl.maximum(highest, tl.max(s, 1))
        finite = tl.where(now == float("-inf"), 0.0, now)
        e = tl.exp2((s - finite[:, None]) * LOG2_E)
        decay = tl.exp2((highest - finite) * LOG2_E)
        weight = weight * decay + tl.sum(e, 1)
        if v is not None:
            value = tl.load(v + b * v_b + g * v_g + j.to(tl.int64)[:, None] * v_n + p[None, :], mask=seen, other=0.0)
            o = tl.dot(e.to(DOT), value.to(DOT), o * decay[:, None], input_precision=PRECISION)
        highest = now
    weight = tl.where(weight == 0.0, 1.0, weight)  # nothing was real: o is 0, its logarithm -inf
    if total is not None:
        tl.store(total + row * parts + c, highest + tl.log(weight), mask=r < R)
    if v is not None:
        o /= weight[:, None]
        tl.store(part + (row * parts + c)[:, None] * P + p[None, :], o, mask=(r < R)[:, None] & (p < P)[None, :])


@jit
def _whole_kernel(
    part,
    total,
    scores,
    out,
    n,
    parts,
    P: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One query head; each program a piece of its scores, the first one the output."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, PARTS)
    logs = tl.load(total + row * parts + c, mask=c < parts, other=float("-inf"))
    highest = tl.max(logs, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2((logs - highest) * LOG2_E)
    whole = tl.sum(weight, 0)
    whole = tl.where(whole == 0.0, 1.0, whole)
    if out is not None and i == 0:
        p = tl.arange(0, PADDED)
        mask = (c < parts)[:, None] & (p < P)[None, :]
        o = tl.load(part + (row * parts + c)[:, None] * P + p[None, :], mask=mask, other=0.0)
        o = tl.sum(o * (weight / whole)[:, None], 0)
        tl.store(out + row * P + p, o, mask=p < P)
    if scores is not None:
        j = i * BLOCK + tl.arange(0, BLOCK)
        s = tl.load(scores + row * n + j, mask=j < n, other=float("-inf"))
        tl.store(scores + row * n + j, s - (highest + tl.log(whole)), mask=j < n)


def pooled_fits(logp, kernel):
    """Whether `pooled_triton` covers the call."""
    return logp.dtype == torch.float32 and kernel <= MOST_NEIGHBOURS and logp.numel() > 0 and not wants_gradient(logp)


def pooled_triton(logp, groups, reduce="max", kernel=7, real=None):
    """Scores (B, G, n) of keys; but for "mean" to the bit those of `pooled`. Three launches where there is padding."""
    (B, H, n), G = logp.shape, groups
    out = torch.empty(B, G, n, dtype=torch.float32, device=logp.device)
    counts = column = None
    if real is not None and kernel > 1:
        counts = real.cumsum(-1)
        column = torch.empty_like(counts)
        rows = counts.numel() // n
        of_row = real if real.is_contiguous() else real.contiguous()
        launch(_column_kernel, (rows, triton.cdiv(n, 1024)), of_row, counts, column, n, BLOCK=1024, num_warps=4)
    launch(
        _pool_kernel,
        (B * G, triton.cdiv(n, 1024)),
        logp.contiguous(),
        real,
        counts,
        column,
        out,
        n,
        G,
        *_strides(real),
        *_strides(counts)[:2],
        R=H // G,
        KERNEL=kernel,
        REDUCE=reduce,
        BLOCK=1024,
        num_warps=8,
    )
    return out


@jit
def _column_kernel(real, counts, column, n, BLOCK: tl.constexpr):
    """column[i] = where the i-th token of a row stands; behind the last token nothing is written, nor read."""
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = tl.load(real + row * n + j, mask=j < n, other=0).to(tl.int1)
    i = tl.load(counts + row * n + j, mask=there, other=1) - 1
    tl.store(column + row * n + i, j.to(tl.int64), mask=there)


@jit
def _pool_kernel(
    logp,
    real,
    counts,
    column,
    out,
    n,
    G,
    r_b,
    r_g,
    r_n,
    c_b,
    c_g,
    R: tl.constexpr,
    KERNEL: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A piece of one key head's columns. Neighbours are read again from the cache: KERNEL times, once from memory."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    ALL: tl.constexpr = tl.PropagateNan.ALL
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b, g = row // G, row % G
    inside = j < n
    there = inside
    if real is not None:
        there &= tl.load(real + b * r_b + g * r_g + j.to(tl.int64) * r_n, mask=inside, other=0).to(tl.int1)
    at, last = j.to(tl.int64), n
    if column is not None:  # the number of each token, and of tokens: neighbours are those of the next numbers
        first = b * c_b + g * c_g
        at = tl.load(counts + first + j, mask=there, other=1) - 1
        last = tl.load(counts + first + n - 1)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for step in range(KERNEL):
        i = at + step - KERNEL // 2
        near = there & (i >= 0) & (i < last)
        if column is not None:
            i = tl.load(column + first + i, mask=near, other=0)
        u = tl.load(logp + row * R * n + i, mask=near, other=float("-inf"))
        if REDUCE != "first":
            for h in tl.static_range(1, R):
                other = tl.load(logp + (row * R + h) * n + i, mask=near, other=float("-inf"))
                u = tl.maximum(u, other, propagate_nan=ALL)
        if REDUCE == "mean":  # of probabilities, up to a constant
            finite = tl.where(u == float("-inf"), 0.0, u)
            p = tl.zeros([BLOCK], tl.float32)
            for h in tl.static_range(R):
                other = tl.load(logp + (row * R + h) * n + i, mask=near, other=float("-inf"))
                p += tl.exp2((other - finite) * LOG2_E)
            u = tl.where(p == 0.0, u, finite + tl.log(tl.where(p == 0.0, 1.0, p)))
        best = tl.maximum(best, u, propagate_nan=ALL)
    tl.store(out + row * n + j, best, mask=inside)  # -inf where no token is near, as where there is none


def order_fits(scores):
    """Whether `order_triton` covers the call."""
    return scores.dtype == torch.float32 and scores.numel() > 0


def order_triton(scores, recent, sinks, real=None):
    """(B, G, n) int64 that orders columns as `top` does. One launch, two where there is padding."""
    B, G, n = scores.shape
    rank = torch.empty(B, G, n, dtype=torch.int64, device=scores.device)
    counts = None if real is None else real.cumsum(-1)
    grid, strides = (B * G, triton.cdiv(n, 1024)), (*_strides(real), *_strides(counts))
    operands = (scores.contiguous(), real, counts, rank, n, recent, sinks, G, *strides)
    launch(_order_kernel, grid, *operands, BLOCK=1024, num_warps=4)
    return rank


@jit
def _order_kernel(scores, real, counts, rank, n, recent, sinks, G, r_b, r_g, r_n, c_b, c_g, c_n, BLOCK: tl.constexpr):
    """As `ordered` in release.py, with what `top` says of the first, the newest, padding and what is no number."""
    LARGEST: tl.constexpr = 3.4028234663852886e38
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b, g = row // G, row % G
    inside = j < n
    x = tl.load(scores + row * n + j, mask=inside, other=0.0)
    x = tl.where(x != x, float("-inf"), x)
    x = tl.where(x == 0.0, 0.0, x)  # -0 is 0
    there, number, last = inside, (j + 1).to(tl.int64), n
    if real is not None:
        there &= tl.load(real + b * r_b + g * r_g + j.to(tl.int64) * r_n, mask=inside, other=0).to(tl.int1)
        of_row = counts + b * c_b + g * c_g
        number = tl.load(of_row + j.to(tl.int64) * c_n, mask=inside, other=0)
        last = tl.load(of_row + (n - 1) * c_n)
    x = tl.where(number > last - recent, LARGEST, x)
    x = tl.where(number <= sinks, float("inf"), x)
    x = tl.where(there, x, float("-inf"))
    bits = x.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    tl.store(rank + row * n + j, (bits.to(tl.int64) << 31) + j, mask=inside)


def rows_fit(*moves):
    """Whether `gather_pair_triton` and `put_triton` can move rows: of keys, (from, to), and of values."""
    tensors = [x for move in moves for x in move]
    return (
        all(x.shape[-1] == tensors[0].shape[-1] and x.stride(-1) == 1 for x in tensors)
        and all(x.dtype == to.dtype and x.dtype in (*DTYPES, torch.float64) for x, to in moves)
        and not wants_gradient(*tensors)
    )


def gather_pair_triton(k, v, index, out):
    """Rows `index` (B, G, M) of k and v (B, G, n, P) into the first M rows of the two of `out`, in one launch."""
    (B, G, M), P, (keys, values) = index.shape, k.shape[3], out
    grid, block = (B * G, triton.cdiv(M, 16)), 16
    strides = [s for x in (k, v, keys, values) for s in x.stride()[:3]]
    padded = triton.next_power_of_2(P)
    operands = (k, v, index.contiguous(), keys, values, M, G, *strides)
    launch(_rows_kernel, grid, *operands, P=P, PADDED=padded, BLOCK=block, num_warps=4)


@jit
def _rows_kernel(
    k,
    v,
    index,
    keys,
    values,
    M,
    G,
    k_b,
    k_g,
    k_n,
    v_b,
    v_g,
    v_n,
    keys_b,
    keys_g,
    keys_n,
    values_b,
    values_g,
    values_n,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK rows of one key head."""
    row, m = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b, g, p = row // G, row % G, tl.arange(0, PADDED)
    j = tl.load(index + row * M + m, mask=m < M, other=0)
    mask = (m < M)[:, None] & (p < P)[None, :]
    key = tl.load(k + b * k_b + g * k_g + j[:, None] * k_n + p[None, :], mask=mask)
    value = tl.load(v + b * v_b + g * v_g + j[:, None] * v_n + p[None, :], mask=mask)
    tl.store(keys + b * keys_b + g * keys_g + m[:, None] * keys_n + p[None, :], key, mask=mask)
    tl.store(values + b * values_b + g * values_g + m[:, None] * values_n + p[None, :], value, mask=mask)


def put_triton(held, k, v, column, rank, real, filled):
    """`put_row` in one launch. held: keys, values, index, rank, real or None, all contiguous."""
    keys, _, index, *_ = held
    (B, G, C), P = index.shape, keys.shape[3]
    slot = torch.empty(B, G, 1, dtype=torch.int64, device=keys.device)
    strides = (*k.stride()[:2], *v.stride()[:2], rank.stride(0), 0 if real is None else real.stride(0))
    operands = (*held, k, v, rank, real, slot, column, filled, C, G, *strides)
    padded = triton.next_power_of_2(P)
    launch(_put_kernel, (B * G,), *operands, ROOM=filled < C, P=P, PADDED=padded, BLOCK=1024, num_warps=4)
    return slot


@jit
def _put_kernel(
    keys,
    values,
    index,
    rank,
    reals,
    k,
    v,
    new_rank,
    new_real,
    slot,
    column,
    filled,
    C,
    G,
    k_b,
    k_g,
    v_b,
    v_g,
    rank_b,
    real_b,
    ROOM: tl.constexpr,
    P: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One key head: find the slot, the first of the lowest rank, and write the new row there."""
    row = tl.program_id(0).to(tl.int64)
    b, g = row // G, row % G
    if ROOM:
        at = row * 0 + filled
    else:
        lowest = tl.full([BLOCK], float("inf"), tl.float64)
        where = tl.arange(0, BLOCK) * 0
        for start in range(0, C, BLOCK):
            c = start + tl.arange(0, BLOCK)
            ranks = tl.load(rank + row * C + c, mask=c < C, other=float("inf"))
            where = tl.where(ranks < lowest, c, where)
            lowest = tl.minimum(lowest, ranks)
        least = tl.min(lowest, 0)
        at = tl.min(tl.where(lowest == least, where, C), 0).to(tl.int64)
    tl.store(slot + row, at)
    order, there = tl.load(new_rank + b * rank_b), True
    if new_real is not None:
        there = tl.load(new_real + b * real_b).to(tl.int1)
        order = tl.where(there, order, float("-inf"))
    if ROOM or there:
        p = tl.arange(0, PADDED)
        to = (row * C + at) * P + p
        tl.store(keys + to, tl.load(k + b * k_b + g * k_g + p, mask=p < P), mask=p < P)
        tl.store(values + to, tl.load(v + b * v_b + g * v_g + p, mask=p < P), mask=p < P)
        tl.store(index + row * C + at, column)
        tl.store(rank + row * C + at, order)
        if reals is not None:
            tl.store(reals + row * C + at, there)
