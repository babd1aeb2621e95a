"""DDTS on a GPU: the recurrence of ddts.py, forward and backward, and one decoding step, as Triton kernels.

Letters as in ddts.py, with chunks of C steps, 64 or (in float32) 32, cut into blocks of 16. Per chunk, with S the state
before it:

    A_ij = sum_n q_in k_jn exp(a_(j+1) + ... + a_i)  for j <= i             the scores
    I_i  = q_i exp(a_1 + ... + a_i)      O_j = k_j exp(a_(j+1) + ... + a_C)     E = exp(a_1 + ... + a_C)
    y_i  = sum_j A_ij v_j + S^T I_i      S' = diag(E) S + sum_j O_j v_j^T

`_prepare` computes A, I, O and E of all chunks: they do not depend on the value channels. `_advance` goes over the
chunks of a row with a tile of the state in registers: it reads v once and writes y once. Between queries of one block
and keys of earlier ones a decay is split at the start s of the queries' block, exp(a_(j+1) + ... + a_(s-1)) times
exp(a_s + ... + a_i), which makes the scores a product of matrices with no exponent above 0. Within a block it is formed
for each pair. Every sum is over just the steps that it stands for, so no difference of large sums is ever taken.

The backward pass keeps nothing but the inputs. It prepares the chunks again; `_advance` writes the states before them;
`_reverse` goes back over the chunks with the gradient D of the state after each,

    dv_j = sum_i A_ij dy_i + D^T O_j     D' = diag(E) D + sum_i I_i dy_i^T

and writes it too; `_contract` sums over the value channels, for each chunk by itself,

    dA_ij = dy_i . v_j     dI_i = S dy_i     dO_j = D v_j     e = E's gradient = (S * D) summed over the value channels

and `_finish` turns these into dq, dk and da, block by block; a_t gathers the pairs i >= t > j that it decays.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from scrubjay.kernels.recurrence import LOG2_E, locked
from scrubjay.kernels.triton_tools import (
    Chunks,
    chunk_table,
    dot_dtype,
    interpreted,
    jit,
    launch,
    precision,
    tile_side,
    tl,
    triton,
)

BLOCK = 16  # steps of a chunk's block
CHANNELS = 16  # of the keys, at a time, where pairs of a block are formed one by one
PROGRAMS = 128  # at least, where tiles can be made smaller: about one a multiprocessor
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def ddts_fits(q, k, v, a):
    """Whether the kernels cover these operands: no float64, at most 128 key channels."""
    return all(x.dtype in NARROW for x in (q, k, v, a)) and q.shape[-1] <= 128


def ddts_triton(q, k, v, a, state, cu_seqlens=None):
    """`ddts` on a GPU from a given float32 state: the same shapes, dtypes and result."""
    return _DDTS.apply(q, k, v, a, state, cu_seqlens)


class _DDTS(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, a, state, cu_seqlens):
        q, k, v, a, state = (x.contiguous() for x in (q, k, v, a, state))
        ctx.save_for_backward(q, k, v, a, state, cu_seqlens)
        y, final = torch.empty_like(v), torch.empty_like(state)
        _go_forward(_terms(q, k, v, a, cu_seqlens), v, state, y=y, final=final)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        q, k, v, a, state, cu_seqlens = ctx.saved_tensors
        dy, dfinal = dy.contiguous(), dfinal.contiguous()
        terms = _terms(q, k, v, a, cu_seqlens)
        before = _kept(terms, v)
        _go_forward(terms, v, state, kept=before)
        dv, dstate, after = torch.empty_like(v), torch.empty_like(state), _kept(terms, v)
        _go_back(terms, dy, dfinal, dv, dstate, after)
        dq, dk, da = _key_gradients(terms, q, k, v, a, _sums_over_channels(terms, v, dy, before, after))
        return dq, dk, dv, da, dstate, None


class _Terms(NamedTuple):
    """The `_prepare`d chunks, in the dtype of products; steps and channels that do not exist are 0.

    table: where the n chunks lie. scores: (n, C, C) A, rows are queries. into, out_of: (1 or 2, n, C, NP) I and O, with
    NP the key channels padded to a power of two. total: (n, NP) E, float32.

    What enters a state or its gradient is exact to float32: in 16 bits I and O have two parts, the rounded number and
    what was rounded off. Their products with v and dy, which have 16 bits themselves, then lose nothing.
    """

    table: Chunks
    scores: torch.Tensor
    into: torch.Tensor
    out_of: torch.Tensor
    total: torch.Tensor


def _terms(q, k, v, a, cu_seqlens):
    """A working memory of C + 2 N numbers a step beside the M of v, read again by every tile of value channels."""
    batch, length, size = q.shape
    chunk = _chunk(v)
    table = chunk_table(cu_seqlens, batch, length, chunk, q.device)
    n, padded, low = len(table.row), tile_side(size), _product_dtype(v)
    scores = torch.empty(n, chunk, chunk, dtype=low, device=q.device)
    parts = 2 if _splits(v) else 1
    into, out_of = (torch.empty(parts, n, chunk, padded, dtype=low, device=q.device) for _ in range(2))
    total = torch.empty(n, padded, dtype=torch.float32, device=q.device)
    launch(
        _prepare,
        (n, chunk // BLOCK),
        *(q, k, a, table.start, table.stop, scores, into, out_of, total, into[0].numel()),
        **_key_sizes(q, v) | {"SPLIT": _splits(v)},
        num_warps=4 if v.dtype == torch.float32 else 8,
    )
    return _Terms(table, scores, into, out_of, total)


def _go_forward(terms, v, state, y=None, final=None, kept=None):
    """Write whichever of y, the final states and the states before all chunks is given."""
    grid, meta = _tiles(state, v)
    launch(
        _advance,
        grid,
        *(v, *terms[1:], state, y, final, kept, terms.table.start, terms.table.stop, terms.table.first),
        *(state.shape[1], state.shape[2], terms.into[0].numel()),
        **meta,
    )


def _go_back(terms, dy, dfinal, dv, dstate, kept):
    """Write dv, the gradient of the initial states, and those of the states after all chunks."""
    grid, meta = _tiles(dfinal, dy)
    launch(
        _reverse,
        grid,
        *(dy, *terms[1:], dfinal, dv, dstate, kept, terms.table.start, terms.table.stop, terms.table.first),
        *(dfinal.shape[1], dfinal.shape[2], terms.into[0].numel()),
        **meta,
    )


class _Sums(NamedTuple):
    """Gradients of what `_prepare` made, float32: dA (n, C, C), dI and dO (n, C, NP), e (n, NP)."""

    scores: torch.Tensor
    into: torch.Tensor
    out_of: torch.Tensor
    total: torch.Tensor


def _sums_over_channels(terms, v, dy, before, after):
    """The channels are cut into parts where the chunks alone are too few for a GPU; torch adds the parts up."""
    n, padded = terms.total.shape
    width = v.shape[-1]
    tile = min(64 if dot_dtype(v) != tl.float32 else 32, tile_side(width))
    tiles = triton.cdiv(width, tile)
    parts = max(1, min(triton.cdiv(2 * PROGRAMS, n), tiles // 4))
    chunk = _chunk(v)
    shapes = (chunk, chunk), (chunk, padded), (chunk, padded), (padded,)
    sums = [torch.empty(parts, n, *shape, dtype=torch.float32, device=v.device) for shape in shapes]
    launch(
        _contract,
        (n, parts),
        *(v, dy, before, after, *sums, terms.table.start, terms.table.stop, width, n),
        **{"NP": padded, "C": _chunk(v), "BM": tile, "TILES": triton.cdiv(tiles, parts)},
        **{"DOT": dot_dtype(v), "PRECISION": precision(), "num_warps": 8, "num_stages": 2},
    )
    return _Sums(*(x[0] if parts == 1 else x.sum(0) for x in sums))


def _key_gradients(terms, q, k, v, a, sums):
    dq, dk, da = (torch.empty_like(x) for x in (q, k, a))
    sizes = _key_sizes(q, v)
    launch(
        _finish,
        (len(terms.table.row), sizes["C"] // BLOCK, sizes["NP"] // sizes["NB"]),
        *(q, k, a, *sums, dq, dk, da, terms.table.start, terms.table.stop),
        **sizes,
        num_warps=4,
    )
    return dq, dk, da


def _product_dtype(v):
    """The torch dtype of `dot_dtype`: what products are formed of is also kept in it."""
    return torch.float32 if interpreted() else v.dtype


def _splits(v):
    """Whether I and O are kept in two parts."""
    return _product_dtype(v) != torch.float32


def _kept(terms, v):
    """Memory for a state of every chunk, (n, NP, M): only products read it."""
    return torch.empty(*terms.total.shape, v.shape[-1], dtype=_product_dtype(v), device=v.device)


def _chunk(v):
    """Steps of a chunk. Products of float32 take three times the registers."""
    return 32 if v.dtype == torch.float32 else 64


def _key_sizes(q, v):
    """Constants of the kernels that form decays. TF32 is finer than what their products meet in 16 bits."""
    size, exact = q.shape[-1], precision()
    sizes = {"N": size, "NP": tile_side(size), "NB": CHANNELS, "C": _chunk(v), "SUB": BLOCK, "LOG2_E": LOG2_E}
    return sizes | {"PRECISION": "tf32" if exact == "tf32x3" and v.dtype != torch.float32 else exact}


def _tiles(state, v):
    """Grid and constants of the kernels that go over chunks: smaller tiles of value channels for few rows."""
    rows, size, width = state.shape
    tile = 32 if v.dtype == torch.float32 or size > 64 else 128
    while tile > 32 and rows * triton.cdiv(width, tile) < PROGRAMS:
        tile //= 2
    tile = min(tile, tile_side(width))
    warps = 8 if tile > 32 or size > 64 or v.dtype == torch.float32 else 4
    meta = {"NP": tile_side(size), "C": _chunk(v), "BM": tile, "SPLIT": _splits(v)}
    meta |= {"DOT": dot_dtype(v), "PRECISION": precision()}
    return (triton.cdiv(width, tile), rows), meta | {"num_warps": warps, "num_stages": 2}


@jit
def _key_tile(x, t, stop, n, N: tl.constexpr):
    """Rows t and channels n of a (steps, N) tensor in float32; 0 where there are none."""
    mask = (t < stop)[:, None] & (n < N)[None, :]
    return tl.load(x + t[:, None] * N + n[None, :], mask=mask, other=0).to(tl.float32)


@jit
def _between(a):
    """(i, j, n): a_(j+1) + ... + a_i where j <= i, else 0. a: the (rows, channels) of one block."""
    i = tl.arange(0, a.shape[0])
    later = (i[:, None] > i[None, :])[:, :, None]
    return tl.cumsum(tl.where(later, a[:, None, :], 0.0), 0)


@jit
def _store(to, at, x, part, SPLIT: tl.constexpr):
    """x, and in the second part of `to` what the first one rounds off."""
    rounded = x.to(to.dtype.element_ty)
    tl.store(to + at, rounded)
    if SPLIT:
        tl.store(to + part + at, x - rounded.to(tl.float32))


@jit
def _prepare(
    q, k, a, start, stop, scores, into, out_of, total, part,
    N: tl.constexpr, NP: tl.constexpr, NB: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, SPLIT: tl.constexpr,
    LOG2_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rows of one block in all that `_Terms` holds."""
    c, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * SUB
    t, end = tl.load(start + c).to(tl.int64), tl.load(stop + c)
    i, j = first + tl.arange(0, SUB), tl.arange(0, C)
    lower = tl.arange(0, SUB)[:, None] >= tl.arange(0, SUB)[None, :]
    earlier_scores = tl.zeros((SUB, C), dtype=tl.float32)
    own_scores = tl.zeros((SUB, SUB), dtype=tl.float32)
    for at in range(0, NP, NB):
        n = at + tl.arange(0, NB)
        q_own, k_own = _key_tile(q, t + i, end, n, N), _key_tile(k, t + i, end, n, N)
        a_own, a_all = _key_tile(a, t + i, end, n, N) * LOG2_E, _key_tile(a, t + j, end, n, N) * LOG2_E
        # sums over the steps after each one, up to the end of its block, and up to the start of the own block
        next_own = tl.where((i + 1 < first + SUB)[:, None], _key_tile(a, t + i + 1, end, n, N) * LOG2_E, 0.0)
        next_all = tl.where((j + 1 < first)[:, None], _key_tile(a, t + j + 1, end, n, N) * LOG2_E, 0.0)
        reached, left = tl.cumsum(a_own, 0), tl.cumsum(next_own, 0, reverse=True)
        keys = _key_tile(k, t + j, end, n, N) * tl.exp2(tl.cumsum(next_all, 0, reverse=True))
        keys = tl.where((j < first)[:, None], keys, 0.0)
        earlier_scores += tl.dot(q_own * tl.exp2(reached), tl.trans(keys), input_precision=PRECISION)
        decays = tl.where(lower[:, :, None], tl.exp2(_between(a_own)), 0.0)
        own_scores += tl.sum(decays * (q_own[:, None, :] * k_own[None, :, :]), 2)

        before = tl.sum(tl.where((j < first)[:, None], a_all, 0.0), 0)
        after = tl.sum(tl.where((j >= first + SUB)[:, None], a_all, 0.0), 0)
        to = (c * C + i)[:, None] * NP + n[None, :]
        _store(into, to, q_own * tl.exp2(before[None, :] + reached), part, SPLIT)
        _store(out_of, to, k_own * tl.exp2(left + after[None, :]), part, SPLIT)
        if first == 0:
            tl.store(total + c * NP + n, tl.exp2(tl.sum(a_all, 0)))
    rows = scores + (c * C + i)[:, None] * C
    tl.store(rows + j[None, :], earlier_scores, mask=((j < first) | (j >= first + SUB))[None, :])
    tl.store(rows + i[None, :], own_scores)


@jit
def _place(start, stop, first, row):
    """A row's first chunk, the number of its chunks, its first step and the one after its last."""
    c, after = tl.load(first + row), tl.load(first + row + 1)
    begin = tl.load(start + c, mask=c < after, other=0)
    return c.to(tl.int64), after - c, begin.to(tl.int64), tl.load(stop + after - 1, mask=c < after, other=0)


@jit
def _advance(
    v, scores, into, out_of, total, state, y, final, kept, start, stop, first, N, M, part,
    NP: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All chunks of one row, for a tile of value channels."""
    row = tl.program_id(1).to(tl.int64)
    m, n, i = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, NP), tl.arange(0, C)
    first_chunk, count, begin, end = _place(start, stop, first, row)
    in_state = (n < N)[:, None] & (m < M)[None, :]
    s = tl.load(state + row * N * M + n[:, None] * M + m[None, :], mask=in_state, other=0)
    square = i[:, None] * C + i[None, :]
    key = i[:, None] * NP + n[None, :]
    for at in range(0, count):
        c, t = first_chunk + at, begin + at * C + i
        mask = (t < end)[:, None] & (m < M)[None, :]
        values = tl.load(v + t[:, None] * M + m[None, :], mask=mask, other=0).to(DOT)
        if kept is not None:
            tl.store(kept + c * NP * M + n[:, None] * M + m[None, :], s, mask=(m < M)[None, :])
        if y is not None:
            here = tl.load(scores + c * C * C + square).to(DOT)
            out = tl.dot(here, values, input_precision=PRECISION)
            query = tl.load(into + c * C * NP + key).to(DOT)
            out = tl.dot(query, s.to(DOT), out, input_precision=PRECISION)
            tl.store(y + t[:, None] * M + m[None, :], out, mask=mask)
        leaving = tl.load(out_of + c * C * NP + key).to(DOT)
        s = s * tl.load(total + c * NP + n)[:, None]
        s = tl.dot(tl.trans(leaving), values, s, input_precision=PRECISION)
        if SPLIT:
            s = tl.dot(tl.trans(tl.load(out_of + part + c * C * NP + key)), values, s)
    if final is not None:
        tl.store(final + row * N * M + n[:, None] * M + m[None, :], s, mask=in_state)


@jit
def _reverse(
    dy, scores, into, out_of, total, dfinal, dv, dstate, kept, start, stop, first, N, M, part,
    NP: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All chunks of one row from the last to the first, for a tile of value channels."""
    row = tl.program_id(1).to(tl.int64)
    m, n, i = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, NP), tl.arange(0, C)
    first_chunk, count, begin, end = _place(start, stop, first, row)
    in_state = (n < N)[:, None] & (m < M)[None, :]
    d = tl.load(dfinal + row * N * M + n[:, None] * M + m[None, :], mask=in_state, other=0)
    square = i[:, None] * C + i[None, :]
    key = i[:, None] * NP + n[None, :]
    for back in range(0, count):
        at = count - 1 - back
        c, t = first_chunk + at, begin + at * C + i
        mask = (t < end)[:, None] & (m < M)[None, :]
        tl.store(kept + c * NP * M + n[:, None] * M + m[None, :], d, mask=(m < M)[None, :])
        gradient = tl.load(dy + t[:, None] * M + m[None, :], mask=mask, other=0).to(DOT)
        here = tl.load(scores + c * C * C + square).to(DOT)
        out = tl.dot(tl.trans(here), gradient, input_precision=PRECISION)
        leaving = tl.load(out_of + c * C * NP + key).to(DOT)
        out = tl.dot(leaving, d.to(DOT), out, input_precision=PRECISION)
        tl.store(dv + t[:, None] * M + m[None, :], out, mask=mask)
        query = tl.load(into + c * C * NP + key).to(DOT)
        d = d * tl.load(total + c * NP + n)[:, None]
        d = tl.dot(tl.trans(query), gradient, d, input_precision=PRECISION)
        if SPLIT:
            d = tl.dot(tl.trans(tl.load(into + part + c * C * NP + key)), gradient, d)
    tl.store(dstate + row * N * M + n[:, None] * M + m[None, :], d, mask=in_state)


@jit
def _contract(
    v, dy, before, after, dscores, dinto, dout_of, dtotal, start, stop, M, chunks,
    NP: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, TILES: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of one chunk over TILES tiles of value channels."""
    c, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, end = tl.load(start + c).to(tl.int64), tl.load(stop + c)
    i, n = tl.arange(0, C), tl.arange(0, NP)
    ds = tl.zeros((C, C), dtype=tl.float32)
    di, do = tl.zeros((C, NP), dtype=tl.float32), tl.zeros((C, NP), dtype=tl.float32)
    de = tl.zeros((NP,), dtype=tl.float32)
    width = tl.where(t < end, M, 0)  # a chunk that does not exist has no states
    for tile in range(0, TILES):
        m = (part * TILES + tile) * BM + tl.arange(0, BM)
        mask = (t + i < end)[:, None] & (m < M)[None, :]
        step = (t + i)[:, None] * M + m[None, :]
        values = tl.load(v + step, mask=mask, other=0).to(DOT)
        gradient = tl.load(dy + step, mask=mask, other=0).to(DOT)
        place, inside = (c * NP + n)[:, None] * M + m[None, :], (m < width)[None, :]
        s = tl.load(before + place, mask=inside, other=0).to(DOT)
        d = tl.load(after + place, mask=inside, other=0).to(DOT)
        ds = tl.dot(gradient, tl.trans(values), ds, input_precision=PRECISION)
        di = tl.dot(gradient, tl.trans(s), di, input_precision=PRECISION)
        do = tl.dot(values, tl.trans(d), do, input_precision=PRECISION)
        de += tl.sum(s.to(tl.float32) * d.to(tl.float32), 1)
    to = part.to(tl.int64) * chunks + c
    tl.store(dscores + to * C * C + i[:, None] * C + i[None, :], ds)
    key = to * C * NP + i[:, None] * NP + n[None, :]
    tl.store(dinto + key, di)
    tl.store(dout_of + key, do)
    tl.store(dtotal + to * NP + n, de)


@jit
def _finish(
    q, k, a, dscores, dinto, dout_of, dtotal, dq, dk, da, start, stop,
    N: tl.constexpr, NP: tl.constexpr, NB: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr,
    LOG2_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one block's rows, for a tile of key channels."""
    c, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * SUB
    t, end = tl.load(start + c).to(tl.int64), tl.load(stop + c)
    if t + first >= end:
        return
    n, x, j = tl.program_id(2) * NB + tl.arange(0, NB), tl.arange(0, SUB), tl.arange(0, C)
    i, last = first + x, first + SUB
    earlier, later = (j < first)[:, None], (j >= last)[:, None]
    q_own, k_own = _key_tile(q, t + i, end, n, N), _key_tile(k, t + i, end, n, N)
    a_own, a_all = _key_tile(a, t + i, end, n, N) * LOG2_E, _key_tile(a, t + j, end, n, N) * LOG2_E
    next_own = tl.where((i + 1 < last)[:, None], _key_tile(a, t + i + 1, end, n, N) * LOG2_E, 0.0)
    next_all = tl.where((j + 1 < first)[:, None], _key_tile(a, t + j + 1, end, n, N) * LOG2_E, 0.0)
    reached, left = tl.exp2(tl.cumsum(a_own, 0)), tl.exp2(tl.cumsum(next_own, 0, reverse=True))
    before = tl.exp2(tl.sum(tl.where(earlier, a_all, 0.0), 0))
    after = tl.exp2(tl.sum(tl.where(later, a_all, 0.0), 0))
    across = tl.exp2(tl.sum(a_own, 0))

    # earlier keys, decayed up to the own block, and later queries, decayed from it
    keys = _key_tile(k, t + j, end, n, N) * tl.exp2(tl.cumsum(next_all, 0, reverse=True))
    keys = tl.where(earlier, keys, 0.0)
    queries = _key_tile(q, t + j, end, n, N) * tl.exp2(tl.cumsum(tl.where(later, a_all, 0.0), 0))
    queries = tl.where(later, queries, 0.0)

    square = dscores + c * C * C
    by_earlier = tl.dot(tl.load(square + i[:, None] * C + j[None, :]), keys, input_precision=PRECISION)
    by_later = tl.dot(tl.load(square + j[None, :] * C + i[:, None]), queries, input_precision=PRECISION)
    by_both = tl.dot(tl.load(square + j[:, None] * C + j[None, :]), keys, input_precision=PRECISION)
    own = tl.load(square + i[:, None] * C + i[None, :])
    weights = tl.where((x[:, None] >= x[None, :])[:, :, None], tl.exp2(_between(a_own)), 0.0) * own[:, :, None]

    key_own, key_all = (c * C + i)[:, None] * NP + n[None, :], (c * C + j)[:, None] * NP + n[None, :]
    dq_crossing = by_earlier * reached + tl.load(dinto + key_own) * (before[None, :] * reached)
    dk_crossing = by_later * left + tl.load(dout_of + key_own) * (after[None, :] * left)
    dq_own = tl.sum(weights * k_own[None, :, :], 1)
    dk_own = tl.sum(weights * q_own[:, None, :], 0)

    # a_t: pairs within the block; own queries with what comes before it; own keys with what comes after it; the rest
    pairs = tl.cumsum(weights * (q_own[:, None, :] * k_own[None, :, :]), 0, reverse=True)
    pairs += (k_own * dk_crossing)[None, :, :]
    decayed = tl.sum(tl.where((x[:, None] > x[None, :])[:, :, None], pairs, 0.0), 1)
    decayed += tl.cumsum(q_own * dq_crossing, 0, reverse=True)
    later_part = by_both + tl.load(dinto + key_all) * before[None, :]
    rest = tl.sum(queries * later_part, 0) + tl.sum(keys * tl.load(dout_of + key_all), 0) * after
    rest += tl.load(dtotal + c * NP + n) * before * after
    decayed += (rest * across)[None, :]

    to, mask = (t + i)[:, None] * N + n[None, :], (t + i < end)[:, None] & (n < N)[None, :]
    tl.store(dq + to, dq_crossing + dq_own, mask=mask)
    tl.store(dk + to, dk_crossing + dk_own, mask=mask)
    tl.store(da + to, decayed, mask=mask)


def ddts_step_triton(q, k, v, a, state, overwrite=False):
    """`ddts_step` on a GPU: the state is read once and written once, in place where it may be overwritten."""
    q, k, v, a = (x.contiguous() for x in (q, k, v, a))
    state = state.contiguous()
    new, y = state if overwrite and not locked(state) else torch.empty_like(state), torch.empty_like(v)
    rows, size, width = state.shape
    tile = 64 if rows * width >= 64 * 4 * PROGRAMS else 32
    grid = (triton.cdiv(width, tile), rows)
    launch(_step, grid, q, k, v, a, state, new, y, width, N=size, NP=tile_side(size), BM=tile, num_warps=4)
    return y, new


@jit
def _step(q, k, v, a, state, new, y, M, N: tl.constexpr, NP: tl.constexpr, BM: tl.constexpr):
    """One token of one row, for a tile of value channels."""
    row = tl.program_id(1).to(tl.int64)
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, NP)
    query = tl.load(q + row * N + n, mask=n < N, other=0).to(tl.float32)
    key = tl.load(k + row * N + n, mask=n < N, other=0).to(tl.float32)
    decay = tl.exp(tl.load(a + row * N + n, mask=n < N, other=0).to(tl.float32))
    value = tl.load(v + row * M + m, mask=m < M, other=0).to(tl.float32)
    at, mask = row * N * M + n[:, None] * M + m[None, :], (n < N)[:, None] & (m < M)[None, :]
    s = tl.load(state + at, mask=mask, other=0) * decay[:, None] + key[:, None] * value[None, :]
    tl.store(new + at, s, mask=mask)
    tl.store(y + row * M + m, tl.sum(s * query[:, None], 0), mask=m < M)
