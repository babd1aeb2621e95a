"""SSD on a GPU: the recurrence of ssd.py, forward and backward, and one decoding step, as Triton kernels.

Letters as in ssd.py: per head, chunks of Q steps with inclusive sums c_i = a_1 + ... + a_i of their log-decays,
w_ij = exp(c_i - c_j) for j <= i, e_i = exp(c_i), f_j = exp(c_Q - c_j), scores s_ij = q_i . k_j, S the state before a
chunk and dS the gradient of the state after it.

    `_sums`     c, as two float32 numbers whose sum has float64's accuracy, so that a difference c_i - c_j is exact to
                float32 however large both are; and the gains, both with time as the fastest axis
    `_states`   over the chunks of a row, a tile of the state in registers:  S' = e_Q S + sum_j f_j g_j k_j v_j^T
    `_outputs`  y_i = sum_j w_ij g_j s_ij v_j + e_i S^T q_i

The scores of a group are formed once for several of its heads, in registers: q and k are never expanded to heads, and
only the states between chunks go through memory, in the inputs' dtype. The backward pass keeps nothing but the inputs:

    `_states` again, and backwards over the chunks:  dS' = e_Q dS + sum_i e_i q_i dy_i^T, and with
    b_ij = w_ij (dy_i . v_j) g_j,
    `_group_gradients`  dq_i = sum_j (sum_h b_ij) k_j + sum_h e_i S dy_i
                        dk_j = sum_i (sum_h b_ij) q_i + sum_h f_j g_j dS v_j
    `_head_gradients`   dv_j = g_j u_j and dg_j = v_j . u_j with u_j = sum_i w_ij s_ij dy_i + f_j dS^T k_j
                        da_t = sum_(i>=t>j) s_ij b_ij + sum_(i>=t) e_i dy_i . S^T q_i
                               + sum_(j<t) f_j g_j v_j . dS^T k_j + e_Q <S, dS>

A program of the first goes over heads of one group and sums their dq and dk in registers; what several programs add to
is summed afterwards, in order. They are two kernels because one would spill its registers. Every sum in da is over
pairs that a_t decays, so nothing large cancels.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from scrubjay.kernels.recurrence import FORGETS, LOG2_E
from scrubjay.kernels.triton_tools import chunk_table, dot_dtype, jit, launch, precision, tile_side, tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROGRAMS = 264  # wanted of a kernel at least: two a multiprocessor of an H200
HEADS = 8  # whose scores one program of `_outputs` or `_head_gradients` forms, at most


def ssd_fits(q, k, v, a, g):
    """Whether the kernels cover these operands: at most 32 bits, q, k and v of one dtype, N and P at most 256."""
    same = q.dtype == k.dtype == v.dtype and all(x.dtype in DTYPES for x in (q, a, g))
    return same and q.shape[-1] <= 256 and v.shape[-1] <= 256


def ssd_triton(q, k, v, a, g, initial_state=None, cu_seqlens=None):
    """`ssd` of ssd.py for operands that fit; initial_state in float32 or None. Both results have a gradient."""
    return _SSD.apply(q, k, v, a, g, initial_state, cu_seqlens)


def ssd_step_triton(q, k, v, a, g, state=None, out=None):
    """`ssd_step` of ssd.py, without gradient: each number of the state is read and written once.

    Args:
        state: (B, H, N, P) float32; None is zero.
        out: where the new state goes, `state` itself or None for new memory.
    """
    (B, H, P), (G, N) = v.shape, q.shape[1:]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    y = torch.empty((B, H, P), dtype=v.dtype, device=v.device)
    if out is None:
        out = torch.empty((B, H, N, P), dtype=torch.float32, device=v.device)
    old = out if state is None else state  # for its strides
    BP = step_tile(B * H, N, P)
    launch(
        _step,
        (-(-P // BP) * H * B,),
        *(q, k, v, a, g, state, out, y, H, H // G, q.stride(0), q.stride(1), k.stride(0), k.stride(1)),
        *(v.stride(0), v.stride(1), *a.stride(), *g.stride(), *old.stride(), *out.stride()),
        **{"N": N, "P": P, "BN": tile_side(N), "BP": BP, "num_warps": 4},
    )
    return y, out


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, a, g, state, cu_seqlens):
        ctx.save_for_backward(q, k, v, a, g, state, cu_seqlens)
        ctx.set_materialize_grads(False)
        call = _Call(q, k, v, a, g, cu_seqlens, forward_tiles(q.shape[3], v.shape[3], v.dtype))
        entered, final = call.states(call.k, call.v, state)
        return call.outputs(entered), final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        q, k, v, a, g, state, cu_seqlens = ctx.saved_tensors
        dy = torch.zeros_like(v) if dy is None else dy
        call = _Call(q, k, v, a, g, cu_seqlens, backward_tiles(q.shape[3], v.shape[3], v.dtype))
        dy = _by_steps(dy)
        entered, _ = call.states(call.k, call.v, state, keep=False)
        left, first = call.states(call.q, dy, dstate, reverse=True, keep=ctx.needs_input_grad[5])
        return *call.gradients(dy, entered, left), first, None


class _Call:
    """What the kernels of one pass share: inputs as one axis of M = B T steps, the chunks on it, and their sums.

    tiles: names to the constants of each kernel, and "Q", the steps of a chunk.
    """

    def __init__(self, q, k, v, a, g, cu_seqlens, tiles):
        self.q, self.k, self.v, a, g = (_by_steps(x) for x in (q, k, v, a, g))
        (B, T, self.H, self.P), (self.G, self.N) = v.shape, q.shape[2:]
        self.shape, self.M, self.T, self.R, self.tiles = (B, T), B * T, T, self.H // self.G, tiles
        self.places = _places(cu_seqlens, B, T, tiles["Q"], v.device)
        self.sums = self._new(3, self.H, self.places.number, tiles["Q"])
        BH = min(16, tile_side(self.H, 1))
        launch(
            _sums,
            (self.places.number * -(-self.H // BH),),
            *(a, g, self.sums, self.places.start, self.places.stop, self.places.number, T, self.H),
            *(a.stride(1), a.stride(2), g.stride(1), g.stride(2)),
            **{"Q": tiles["Q"], "BH": BH, "FORGETS": FORGETS[torch.float32], "SCALE": LOG2_E, "num_warps": 4},
        )

    def _new(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.v.device)

    def _constants(self, kernel):
        sizes = {"N": self.N, "P": self.P, "Q": self.tiles["Q"], "DOT": dot_dtype(self.v), "PRECISION": precision()}
        return sizes | self.tiles[kernel]

    def states(self, x, y, initial, reverse=False, keep=True):
        """The state before each chunk (after it, going in reverse), and that after (before) all chunks of a row."""
        meta = self._constants("states")
        entered = self._new(self.places.number, self.H, self.N, self.P, dtype=self.v.dtype)
        final = self._new(self.places.rows, self.H, self.N, self.P) if keep else None
        tiles = -(-self.N // meta["BN"]) * -(-self.P // meta["BP"])
        launch(
            _states,
            (tiles * self.H * self.places.rows,),
            *(x, y, self.sums, entered, None if initial is None else initial.contiguous(), final),
            *(self.places.first, self.places.bounds, self.places.number, self.T, self.H, self.R),
            *(*x.stride()[1:3], *y.stride()[1:3]),
            **meta | {"REVERSE": reverse},
        )
        return entered, final

    def outputs(self, entered):
        meta, inputs = self._constants("outputs"), (self.q, self.k, self.v)
        y = self._new(*self.v.shape, dtype=self.v.dtype)
        tiles = -(-self.P // meta["BP"])
        share, parts = self._split(self.places.number * tiles * self.G, HEADS)
        launch(
            _outputs,
            (tiles * parts * self.G * self.places.number,),
            *(*inputs, self.sums, entered, y, self.places.start, self.places.stop, self.places.number),
            *(self.T, self.H, self.R, share, parts, *(stride for x in inputs for stride in x.stride()[1:3])),
            **meta,
        )
        return y

    def gradients(self, dy, entered, left):
        """dq, dk, dv, da, dg, from the states before the chunks and the gradients of those after them."""
        number, M, H, inputs = self.places.number, self.M, self.H, (self.q, self.k, self.v, dy, self.sums)
        strides = [stride for x in inputs[:4] for stride in x.stride()[1:3]]
        places = self.places.start, self.places.stop, number

        meta = self._constants("group_gradients")
        tiles = -(-self.N // meta["BN"])
        share, parts = self._split(number * tiles * self.G, self.R)
        dq, dk = (self._shares(parts, self.G, self.N) for _ in range(2))
        summands = tiles * -(-self.P // meta["BP"])
        arriving, kept = self._new(summands, H, number, meta["Q"]), self._new(summands, number, H)
        launch(
            _group_gradients,
            (tiles * parts * self.G * number,),
            *(*inputs, entered, left, dq, dk, arriving, kept, *places, self.T, M, H, self.R, share, parts),
            *strides,
            **meta,
        )
        meta = self._constants("head_gradients")
        tiles = -(-self.P // meta["BP"])
        share, parts = self._split(number * tiles * self.G, HEADS)
        dv = self._new(*self.v.shape, dtype=self.v.dtype)
        da, dg = (self._new(tiles, *self.shape, H) for _ in range(2))
        launch(
            _head_gradients,
            (tiles * parts * self.G * number,),
            *(*inputs, left, _summed(arriving), _summed(kept), dv, da, dg, *places, self.T, M, H, self.R, share, parts),
            *strides,
            **meta,
        )
        dq, dk = (_summed(x).to(self.v.dtype) for x in (dq, dk))
        return dq, dk, dv, _summed(da), _summed(dg)

    def _split(self, programs, most):
        """How many heads of a group, at most `most`, one program takes, and how many programs that makes of one."""
        share = max(1, min(most, self.R * programs // PROGRAMS))
        parts = -(-self.R // min(share, self.R))
        return -(-self.R // parts), parts

    def _shares(self, number, *shape):
        """Memory for what `number` programs add to a gradient: in float32, unless it is the gradient."""
        return self._new(number, *self.shape, *shape, dtype=self.v.dtype if number == 1 else torch.float32)


def _summed(shares):
    return shares[0] if len(shares) == 1 else shares.sum(0)


def _by_steps(x):
    """`x` (B, T, ...) with steps at equal distances over all rows: a copy only of what is not."""
    even = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if even and (x.ndim == 3 or x.stride(-1) == 1) else x.contiguous()


class _Places(NamedTuple):
    """Where the chunks lie: their number, that of state rows, and for packed documents the tables of `chunk_table`."""

    number: int
    rows: int
    start: torch.Tensor | None = None
    stop: torch.Tensor | None = None
    first: torch.Tensor | None = None
    bounds: torch.Tensor | None = None


def _places(cu_seqlens, batch, length, size, device):
    if cu_seqlens is None:
        return _Places(batch * -(-length // size), batch)
    bounds = cu_seqlens.to(device, torch.int32)
    table = chunk_table(bounds, batch, length, size, device)
    return _Places(len(table.start), len(bounds) - 1, table.start, table.stop, table.first, bounds)


# Steps of a chunk, tiles of at most BN state channels and BP head channels, and launch options. There are 16 steps for
# each warp: where a product is made from another's result, warps beyond that would repeat each other's work.


def forward_tiles(N, P, dtype):
    if dtype == torch.float32:
        return {"Q": 64, "states": _tiles(N, P, 64, 32, 4, 2), "outputs": _tiles(N, P, 32, 32, 4, 1)}
    outputs = _tiles(N, P, 128, 64, 8, 2) if N <= 128 else _tiles(N, P, 64, 32, 8, 2)
    return {"Q": 128, "states": _tiles(N, P, 64, 32, 4, 3), "outputs": outputs}


def backward_tiles(N, P, dtype):
    if dtype == torch.float32:
        groups, heads = _tiles(N, P, 32, 16, 2, 1), _tiles(N, P, 16, 16, 2, 1)
        return {"Q": 32, "states": _tiles(N, P, 64, 32, 4, 2), "group_gradients": groups, "head_gradients": heads}
    groups, heads = _tiles(N, P, 64, 64, 4, 2), _tiles(N, P, 64, 64 if N <= 128 else 32, 4, 2)
    return {"Q": 64, "states": _tiles(N, P, 64, 32, 4, 3), "group_gradients": groups, "head_gradients": heads}


def step_tile(heads, N, P):
    """Head channels of a program of `_step`, whose tile has at most 8192 numbers: fewer where there are few heads."""
    most = max(1, 8192 // tile_side(N))
    return min(most, tile_side(P), 64 if heads >= PROGRAMS else 16)


def _tiles(N, P, BN, BP, warps, stages):
    return {"BN": min(tile_side(N), BN), "BP": min(tile_side(P), BP), "num_warps": warps, "num_stages": stages}


# fmt: off
@jit
def _place(starts, stops, chunk, T, Q: tl.constexpr):
    """[start, stop) of a chunk, on the axis of all steps; empty where it does not exist."""
    if starts is None:
        per_row = tl.cdiv(T, Q)
        row = chunk // per_row
        start = row * T + (chunk - row * per_row) * Q
        stop = tl.minimum(start + Q, row * T + T)
    else:
        start, stop = tl.load(starts + chunk), tl.load(stops + chunk)
    return start, stop


@jit
def _wide(x):
    return tl.full((), 0, tl.int64) + x


@jit
def _work(tiles: tl.constexpr, parts, G):
    """What this program is for: tile, part of a group's heads, group, chunk."""
    rest = tl.program_id(0) // tiles
    return tl.program_id(0) % tiles, rest % parts, rest // parts % G, rest // parts // G


@jit
def _at(base, start, stop, stride, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Addresses of the steps [start, start + ROWS) and the columns from `column`, and which of them exist."""
    t, x = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    at = base + _wide(start) * stride + (t[:, None] * stride + x[None, :])
    real = (start + t < stop)[:, None]
    if WIDTH % COLUMNS:
        real = real & (x < WIDTH)[None, :]
    return at, real


@jit
def _load(base, start, stop, stride, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at, real = _at(base, start, stop, stride, column, WIDTH, ROWS, COLUMNS)
    return tl.load(at, mask=real, other=0.0)


@jit
def _store(base, x, start, stop, stride, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at, real = _at(base, start, stop, stride, column, WIDTH, ROWS, COLUMNS)
    tl.store(at, x.to(base.dtype.element_ty), mask=real)


@jit
def _vector(base, Q: tl.constexpr):
    return tl.load(base + tl.arange(0, Q))


@jit
def _to_end(base, plane, Q: tl.constexpr, j: tl.constexpr, SIZE: tl.constexpr):
    """f of the steps [j, j + SIZE) of the chunk and head at `base` in `sums`."""
    high = tl.load(base + Q - 1) - _vector(base + j, SIZE)
    return tl.exp2(tl.minimum(high + (tl.load(base + plane + Q - 1) - _vector(base + plane + j, SIZE)), 0.0))


@jit
def _decays(base, plane, Q: tl.constexpr, TRANSPOSED: tl.constexpr):
    """w_ij, or w_ji, for j <= i, and 1 for j > i, where scores are 0: clamped before exp2, so never more."""
    high, low = _vector(base, Q), _vector(base + plane, Q)
    if TRANSPOSED:
        high, low = -high, -low
    return tl.exp2(tl.minimum((high[:, None] - high[None, :]) + (low[:, None] - low[None, :]), 0.0))


@jit
def _dot_wide(exact, x, acc, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + exact @ x, with x, in float32, in two parts: one alone would cost the sum half of its digits."""
    rounded = x.to(DOT)
    acc = tl.dot(exact, rounded, acc, input_precision=PRECISION)
    if tl.float32 != DOT:
        acc = tl.dot(exact, (x - rounded.to(tl.float32)).to(DOT), acc)
    return acc


@jit
def _sums(
    a, g, sums, starts, stops, chunks, T, H, sat, sah, sgt, sgh, Q: tl.constexpr, BH: tl.constexpr,
    FORGETS: tl.constexpr, SCALE: tl.constexpr,
):
    """Program (tile of heads, chunk). sums: (3, H, chunks, Q), c in log2, rounded, what was rounded off, and the gain.
    After the chunk's last step c stays and the gain is 0. A decay below FORGETS counts as that, see `chunked`."""
    tiles = tl.cdiv(H, BH)
    chunk = tl.program_id(0) // tiles
    start, stop = _place(starts, stops, chunk, T, Q)
    h, t = tl.program_id(0) % tiles * BH + tl.arange(0, BH), tl.arange(0, Q)
    step, here = _wide(start) + t, (h < H)[None, :]
    real = (start + t < stop)[:, None] & here
    decay = tl.load(a + step[:, None] * sat + h[None, :] * sah, mask=real, other=0.0).to(tl.float32)
    gain = tl.load(g + step[:, None] * sgt + h[None, :] * sgh, mask=real, other=0.0).to(tl.float32)
    decay = tl.where(decay < FORGETS, FORGETS, decay)  # a maximum would hide what is no number
    c = tl.cumsum(decay.to(tl.float64) * SCALE, 0)
    high = c.to(tl.float32)
    at = sums + (h[None, :].to(tl.int64) * chunks + chunk) * Q + t[:, None]
    plane = _wide(H) * chunks * Q
    tl.store(at, high, mask=here)
    tl.store(at + plane, (c - high.to(tl.float64)).to(tl.float32), mask=here)
    tl.store(at + 2 * plane, gain, mask=here)


@jit
def _states(
    x, y, sums, entered, initial, final, firsts, bounds, chunks, T, H, R, sxt, sxg, syt, syh,
    N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, REVERSE: tl.constexpr,
):
    """Program (tile of the state, head, row of states): over the chunks of a row, s = e_Q s + sum_t weight_t x_t y_t^T.

    x, y, weight: k, v, f g forwards; q, dy, e in reverse. entered: (chunks, H, N, P), s as each chunk finds it.
    """
    across: tl.constexpr = tl.cdiv(P, BP)
    tiles: tl.constexpr = tl.cdiv(N, BN) * across
    BQ: tl.constexpr = min(Q, 64)
    pid = tl.program_id(0)
    tile, h, row = pid % tiles, pid // tiles % H, pid // tiles // H
    n, p = tile // across * BN, tile % across * BP
    if bounds is None:
        number, begin, end = tl.cdiv(T, Q), row * T, row * T + T
        first = row * number
    else:
        first, begin, end = tl.load(firsts + row), tl.load(bounds + row), tl.load(bounds + row + 1)
        number = tl.load(firsts + row + 1) - first
    x += h // R * sxg
    y += h * syh
    plane, size = _wide(H) * chunks * Q, N * P
    if initial is None:
        s = tl.zeros((BN, BP), tl.float32)
    else:
        s = _load(initial + (_wide(row) * H + h) * size, n, N, P, p, P, BN, BP)
    for step in tl.range(number):
        at = number - 1 - step if REVERSE else step
        start = begin + at * Q
        stop = tl.minimum(start + Q, end)
        _store(entered + (_wide(first + at) * H + h) * size, s, n, N, P, p, P, BN, BP)
        base = sums + (_wide(h) * chunks + first + at) * Q
        s *= tl.exp2(tl.load(base + Q - 1))
        for j in tl.static_range(0, Q, BQ):
            if REVERSE:
                weight = tl.exp2(_vector(base + j, BQ))
            else:
                weight = _to_end(base, plane, Q, j, BQ) * _vector(base + 2 * plane + j, BQ)
            keys = _load(x, start + j, stop, sxt, n, N, BQ, BN).to(DOT)
            values = _load(y, start + j, stop, syt, p, P, BQ, BP).to(tl.float32) * weight[:, None]
            s = _dot_wide(tl.trans(keys), values, s, DOT, PRECISION)
    if final is not None:
        _store(final + (_wide(row) * H + h) * size, s, n, N, P, p, P, BN, BP)


@jit
def _outputs(
    q, k, v, sums, entered, y, starts, stops, chunks, T, H, R, share, parts, sqt, sqg, skt, skg, svt, svh,
    N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile of P, `share` heads of a group, group, chunk). entered: (chunks, H, N, P), the states before."""
    tile, part, group, chunk = _work(tl.cdiv(P, BP), parts, H // R)
    start, stop = _place(starts, stops, chunk, T, Q)
    if start >= stop:
        return
    q += group * sqg
    k += group * skg
    p, plane = tile * BP, _wide(H) * chunks * Q
    scores = tl.zeros((Q, Q), tl.float32)
    for n in tl.static_range(0, N, BN):
        queries = _load(q, start, stop, sqt, n, N, Q, BN).to(DOT)
        keys = _load(k, start, stop, skt, n, N, Q, BN).to(DOT)
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
    t = tl.arange(0, Q)
    scores = tl.where(t[:, None] >= t[None, :], scores, 0.0)
    for h in tl.range(group * R + part * share, group * R + tl.minimum(part * share + share, R)):
        acc = tl.zeros((Q, BP), tl.float32)
        state = entered + (_wide(chunk) * H + h) * (N * P)
        for n in tl.static_range(0, N, BN):
            if N > BN:
                queries = _load(q, start, stop, sqt, n, N, Q, BN).to(DOT)
            s = _load(state, n, N, P, p, P, BN, BP).to(DOT)
            acc = tl.dot(queries, s, acc, input_precision=PRECISION)
        base = sums + (_wide(h) * chunks + chunk) * Q
        weights = scores * _decays(base, plane, Q, False) * _vector(base + 2 * plane, Q)[None, :]
        values = _load(v + h * svh, start, stop, svt, p, P, Q, BP).to(DOT)
        acc = tl.dot(weights.to(DOT), values, acc * tl.exp2(_vector(base, Q))[:, None], input_precision=PRECISION)
        _store(y + h * P, acc, start, stop, H * P, p, P, Q, BP)


@jit
def _group_gradients(
    q, k, v, dy, sums, entered, left, dq, dk, arriving, kept, starts, stops, chunks, T, M, H, R, share, parts,
    sqt, sqg, skt, skg, svt, svh, sdt, sdh,
    N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile of N, `share` heads of a group, group, chunk): dq, dk (parts, M, G, N), and what da needs of S:
    arriving (tiles, H, chunks, Q), dy_i . S^T q_i, and kept (tiles, chunks, H), <S, dS>, over all tiles of N and P.

    entered: the states before the chunks; left: the gradients of those after.
    """
    across: tl.constexpr = tl.cdiv(P, BP)
    tile, part, group, chunk = _work(tl.cdiv(N, BN), parts, H // R)
    start, stop = _place(starts, stops, chunk, T, Q)
    if start >= stop:
        return
    n, plane = tile * BN, _wide(H) * chunks * Q
    queries = _load(q + group * sqg, start, stop, sqt, n, N, Q, BN).to(DOT)
    t = tl.arange(0, Q)
    dscores = tl.zeros((Q, Q), tl.float32)
    query_acc, key_acc = tl.zeros((Q, BN), tl.float32), tl.zeros((Q, BN), tl.float32)
    first, last = part * share, tl.minimum(part * share + share, R)
    for one in tl.range(first * across, last * across):
        h, p = group * R + one // across, one % across * BP
        here, at = (_wide(h) * chunks + chunk) * Q, (_wide(chunk) * H + h) * (N * P)
        base, summand = sums + here, tile * across + one % across
        reached, reaching = tl.exp2(_vector(base, Q)), _to_end(base, plane, Q, 0, Q) * _vector(base + 2 * plane, Q)
        cotangent = _load(dy + h * sdh, start, stop, sdt, p, P, Q, BP)
        s = _load(entered + at, n, N, P, p, P, BN, BP)
        carried = tl.dot(queries, s.to(DOT), input_precision=PRECISION)
        arrived = tl.sum(carried * cotangent.to(tl.float32), 1)
        received = (cotangent.to(tl.float32) * reached[:, None]).to(DOT)
        query_acc = tl.dot(received, tl.trans(s.to(DOT)), query_acc, input_precision=PRECISION)
        ds = _load(left + at, n, N, P, p, P, BN, BP)
        product = tl.sum(s.to(tl.float32) * ds.to(tl.float32))
        values = _load(v + h * svh, start, stop, svt, p, P, Q, BP)
        given = (values.to(tl.float32) * reaching[:, None]).to(DOT)
        key_acc = tl.dot(given, tl.trans(ds.to(DOT)), key_acc, input_precision=PRECISION)
        tl.store(arriving + summand * plane + here + t, arrived)
        tl.store(kept + (_wide(summand) * chunks + chunk) * H + h, product)
        pairs = tl.dot(cotangent.to(DOT), tl.trans(values.to(DOT)), input_precision=PRECISION)
        dscores += pairs * _vector(base + 2 * plane, Q)[None, :] * _decays(base, plane, Q, False)
    dscores = tl.where(t[:, None] >= t[None, :], dscores, 0.0).to(DOT)
    keys = _load(k + group * skg, start, stop, skt, n, N, Q, BN).to(DOT)
    into = (_wide(part) * M * (H // R) + group) * N
    query_acc = tl.dot(dscores, keys, query_acc, input_precision=PRECISION)
    _store(dq + into, query_acc, start, stop, H // R * N, n, N, Q, BN)
    key_acc = tl.dot(tl.trans(dscores), queries, key_acc, input_precision=PRECISION)
    _store(dk + into, key_acc, start, stop, H // R * N, n, N, Q, BN)


@jit
def _head_gradients(
    q, k, v, dy, sums, left, arriving, kept, dv, da, dg, starts, stops, chunks, T, M, H, R, share, parts,
    sqt, sqg, skt, skg, svt, svh, sdt, sdh,
    N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile of P, `share` heads of a group, group, chunk): dv (M, H, P), and da, dg (tiles of P, M, H) from the
    tile alone. arriving (H, chunks, Q), kept (chunks, H), left as in `_group_gradients`. Pairs of steps are [j, i]."""
    tile, part, group, chunk = _work(tl.cdiv(P, BP), parts, H // R)
    start, stop = _place(starts, stops, chunk, T, Q)
    if start >= stop:
        return
    q += group * sqg
    k += group * skg
    p, plane, t = tile * BP, _wide(H) * chunks * Q, tl.arange(0, Q)
    scores = tl.zeros((Q, Q), tl.float32)
    for n in tl.static_range(0, N, BN):
        queries = _load(q, start, stop, sqt, n, N, Q, BN).to(DOT)
        keys = _load(k, start, stop, skt, n, N, Q, BN).to(DOT)
        scores = tl.dot(keys, tl.trans(queries), scores, input_precision=PRECISION)
    scores = tl.where(t[:, None] <= t[None, :], scores, 0.0)
    for h in tl.range(group * R + part * share, group * R + tl.minimum(part * share + share, R)):
        base = sums + (_wide(h) * chunks + chunk) * Q
        weights = (scores * _decays(base, plane, Q, True)).to(DOT)
        values = _load(v + h * svh, start, stop, svt, p, P, Q, BP)
        cotangent = _load(dy + h * sdh, start, stop, sdt, p, P, Q, BP).to(DOT)
        of_value = tl.zeros((Q, BP), tl.float32)
        for n in tl.static_range(0, N, BN):
            if N > BN:
                keys = _load(k, start, stop, skt, n, N, Q, BN).to(DOT)
            ds = _load(left + (_wide(chunk) * H + h) * (N * P), n, N, P, p, P, BN, BP).to(DOT)
            of_value = tl.dot(keys, ds, of_value, input_precision=PRECISION)
        of_value *= _to_end(base, plane, Q, 0, Q)[:, None]
        leaving = tl.sum(values.to(tl.float32) * of_value, 1)
        of_value = tl.dot(weights, cotangent, of_value, input_precision=PRECISION)
        dgain = tl.sum(values.to(tl.float32) * of_value, 1)
        pairs = tl.dot(values.to(DOT), tl.trans(cotangent), input_precision=PRECISION)
        of_value *= _vector(base + 2 * plane, Q)[:, None]
        _store(dv + h * P, of_value, start, stop, H * P, p, P, Q, BP)
        at, real = (_wide(tile) * M + start + t) * H + h, start + t < stop
        tl.store(dg + at, dgain, mask=real)
        before = (t + tl.minimum(h, 0))[:, None] < t[None, :]  # plus nothing: else it would be kept in registers
        pairs *= scores * _decays(base, plane, Q, True)
        onwards = _onwards(pairs, before, DOT, PRECISION)
        decay = (onwards + leaving[:, None]) * _vector(base + 2 * plane, Q)[:, None]
        arrived, from_state = tl.zeros((Q,), tl.float32), 0.0
        if tile == 0:
            arrived = _vector(arriving + (_wide(h) * chunks + chunk) * Q, Q) * tl.exp2(_vector(base, Q))
            from_state = tl.load(kept + _wide(chunk) * H + h) * tl.exp2(tl.load(base + Q - 1))
        decay = tl.sum(tl.where(before, decay, arrived[:, None]), 0) + from_state
        tl.store(da + at, decay, mask=real)


@jit
def _onwards(pairs, before, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """[j, t]: sum of pairs[j, i] over i >= t, as a product with ones. In two parts, as in `_dot_wide`; never float16,
    whose largest number a gradient that is scaled up may pass."""
    if tl.float32 == DOT:
        onwards = tl.dot(pairs, tl.where(before, 0.0, 1.0), input_precision=PRECISION)
    else:
        rounded, ones = pairs.to(tl.bfloat16), tl.where(before, 0.0, 1.0).to(tl.bfloat16)
        onwards = tl.dot((pairs - rounded.to(tl.float32)).to(tl.bfloat16), ones, tl.dot(rounded, ones))
    return onwards


@jit
def _step(
    q, k, v, a, g, state, out, y, H, R, sqb, sqg, skb, skg, svb, svh, sab, sah, sgb, sgh,
    ssb, ssh, ssn, ssp, sob, soh, son, sop,
    N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):
    """Program (tile of P, head, batch row)."""
    tiles: tl.constexpr = tl.cdiv(P, BP)
    pid = tl.program_id(0)
    tile, h, b = pid % tiles, pid // tiles % H, _wide(pid // tiles // H)
    n, p = tl.arange(0, BN), tile * BP + tl.arange(0, BP)
    group = h // R
    queries = tl.load(q + b * sqb + group * sqg + n, mask=n < N, other=0.0).to(tl.float32)
    keys = tl.load(k + b * skb + group * skg + n, mask=n < N, other=0.0).to(tl.float32)
    values = tl.load(v + b * svb + h * svh + p, mask=p < P, other=0.0).to(tl.float32)
    decay = tl.exp(tl.load(a + b * sab + h * sah).to(tl.float32))
    gain = tl.load(g + b * sgb + h * sgh).to(tl.float32)
    real = (n < N)[:, None] & (p < P)[None, :]
    s = keys[:, None] * (values * gain)[None, :]
    if state is not None:
        at = state + b * ssb + _wide(h) * ssh + n[:, None] * ssn + p[None, :] * ssp
        s += tl.load(at, mask=real, other=0.0) * decay
    tl.store(out + b * sob + _wide(h) * soh + n[:, None] * son + p[None, :] * sop, s, mask=real)
    outputs = tl.sum(s * queries[:, None], 0)
    tl.store(y + (b * H + h) * P + p, outputs.to(y.dtype.element_ty), mask=p < P)
# fmt: on
