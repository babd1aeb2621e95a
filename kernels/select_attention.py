"""Sliding-window attention of the few tokens that a gate selects (Taipan, arXiv:2410.18572, section 3, equation 4).

    o_i = sum_j softmax_j(scale q_i . k_j) v_j        for selected i alone;  j runs over what i sees:
    0 <= i - j < w;   i - j <= b_i;   c_i - c_j < r for each limit (c, r);   j readable, or j = i

B batch, T columns, S columns of the past before them, n selected queries of the whole batch, H query heads,
K key heads, P head size, w window. Columns are positions where every token writes a key; where only selected tokens do,
columns are those, and a limit on positions keeps the window's meaning.

q: (n, H, P)   k, v: (B, S + T, K, P)   b "before": (B, T) int64, how far i may look back: tokens before it in its row
or document   c: (B, S + T) int64   readable: (B, S + T) bool. K divides H; query head h reads key head h // (H / K).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from scrubjay.kernels.dispatch import alike, choose, compiled, exported, traced, without_autocast
from scrubjay.kernels.operators import Operator
from scrubjay.kernels.recurrence import wants_gradient
from scrubjay.kernels.select_attention_triton import (
    select_attention_fits,
    select_attention_step_triton,
    select_attention_triton,
)

Limit = tuple[torch.Tensor, int]


@dataclass(frozen=True)
class Packed:
    """Which of (B, T) columns are queries: tile after tile and in a tile row after row, or (not `tiled`) row after row.

    index: (n,) int64, row * T + column of each query, columns of a row rising. asked: (B, T) bool, where
    all columns are queries, of which only some attend and the others find zeros; None: all do.
    """

    index: torch.Tensor
    shape: tuple[int, int]
    tile: int
    tiled: bool
    asked: torch.Tensor | None = None

    @property
    def rows(self) -> torch.Tensor:
        """(n,) the row of each query."""
        return self.index // self.shape[1]

    @property
    def columns(self) -> torch.Tensor:
        """(n,) the column of each query."""
        return self.index % self.shape[1]

    @cached_property
    def counts(self) -> list[list[int]]:
        """Queries of each tile, then row, on the host: to read them waits for the device."""
        (B, T), tile = self.shape, self.tile
        places = self.columns // tile * B + self.rows
        return places.bincount(minlength=-(-T // tile) * B).view(-1, B).tolist()


def pack(mask: torch.Tensor, window: int, *, every: bool = False, tiled: bool | None = None) -> Packed:
    """Gather the columns of (B, T) bool `mask` for `select_attention`; `every`: all of them, whatever it says, as it is
    always where the call is exported. Where it is compiled all are queries too, for how many there are is no value.

    A tile covers as many columns as make one product worth its call and few enough that the keys read for it are not
    many more than a window: 64 to 256. `tiled` is the order; None takes the one that the mask's device is fastest with.
    """
    B, T = mask.shape
    if traced():
        asked = None if every or exported() else mask
        return Packed(torch.arange(B * T, device=mask.device), (B, T), T, False, asked)
    tile = min(max(64, min(256, window // 4)), T)
    if not (mask.device.type == "cpu" if tiled is None else tiled):
        index = torch.arange(B * T, device=mask.device) if every else mask.flatten().nonzero()[:, 0]
        return Packed(index, (B, T), tile, False)
    mask = torch.ones_like(mask) if every else mask
    padded = F.pad(mask, (0, -T % tile)).view(B, -1, tile).transpose(0, 1)  # (tiles, B, tile)
    at = padded.nonzero()
    return Packed(at[:, 1] * T + at[:, 0] * tile + at[:, 2], (B, T), tile, True)


def select_attention_reference(
    q, k, v, packed: Packed, before, window: int, limits: Sequence[Limit] = (), readable=None, *, scale=None
):
    """Every score of every column, dense, in float32 (float64 for float64 inputs). Slow, T x T; the law."""
    (B, T), (_, H, P), S = packed.shape, q.shape, k.shape[1] - packed.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    every = q.new_zeros(B * T, H, P, dtype=wide).index_copy(0, packed.index, q.to(wide)).view(B, T, H, P)
    seen = _seen_by_all(S, before, window, limits, readable)
    keys, values = (x.to(wide).repeat_interleave(H // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihp,bjhp->bhij", every, keys) * _scale(q, scale)
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhp->bihp", weights, values).flatten(0, 1)[packed.index]


def _seen_by_all(S, before, window, limits, readable):
    """(B, T, S + T) bool: what each column would see."""
    T, device = before.shape[1], before.device
    i, j = torch.arange(S, S + T, device=device)[:, None], torch.arange(S + T, device=device)
    seen = (j <= i) & (i - j < window) & (i - j <= before[..., None])
    for c, reach in limits:
        seen = seen & (c[:, S:, None] - c[:, None] < reach)
    return seen if readable is None else seen & (readable[:, None] | (i == j))


@without_autocast
def select_attention_step(q, keys, values, seen, scale=None, rows=None, *, backend=None):
    """One query a row against what its row holds, in any order.

    Args:
        q: (n, H, P). keys, values: (n, K, W, P). seen: (n, W) bool.
        scale: of the scores; None is P ** -0.5.
        rows: (n,) bool, which rows attend; None: all. The others get zeros. Where the kernel runs they read nothing,
            and nobody has to know on the host which they are.
        backend: None chooses by device; "torch" and "triton" are obeyed or refused.

    Returns: (n, H, P).
    """
    (n, H, P), K = q.shape, keys.shape[1]
    if choose(backend, "select_attention_step", q, keys, values, fused=_step_fits(q, keys, values)) == "triton":
        return select_attention_step_triton(q, keys, values, seen, rows, _scale(q, scale))
    if rows is not None:
        seen = seen | ~rows[:, None]
    dtype, (q, keys, values) = q.dtype, alike(q, keys, values)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q.view(n, K, H // K, P), keys.mT).to(wide) * _scale(q, scale)
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).to(values.dtype)
    o = torch.matmul(weights, values).reshape(n, H, P).to(dtype)
    return o if rows is None else torch.where(rows[:, None, None], o, 0)


def steps_by_mask(keys) -> bool:
    """Whether a step over `keys` is faster for all rows, with a mask of those that attend, than for those alone: to
    name them, a GPU has to be waited for. Not where a gradient may be wanted; always where a program is written."""
    fused = _step_fits(keys, keys, keys) and not torch.is_grad_enabled()
    return traced() or choose(None, "select_attention_step", keys, fused=fused) == "triton"


def _step_fits(q, keys, values):
    return select_attention_fits(q, keys, values) and not wants_gradient(q, keys, values)


def select_attention(
    q,
    k,
    v,
    packed: Packed,
    before,
    window: int,
    limits: Sequence[Limit] = (),
    readable=None,
    *,
    scale=None,
    backend=None,
):
    """Attend for the selected columns alone: n * (w + tile) scores a head, whatever T is. Exported, for every column.

    Args:
        q: queries in `packed`'s order; k, v, before, limits, readable: see the header. The last T columns of k and v
            are those that `packed` was made from.
        scale: of the scores; None is P ** -0.5.
        backend: None chooses by device; "torch" and "triton" are obeyed or refused.

    Returns: (n, H, P) in `packed`'s order.

    Raises:
        ValueError: shapes that do not fit each other, a backend that cannot run.
    """
    _check(q, k, v, packed, before, window, limits, readable)
    if compiled():
        columns, reaches = zip(*limits, strict=True) if limits else ((), ())
        tensors = [q, k, v, packed.asked, before, readable, *columns]
        return _OPERATOR(tensors, [window, *reaches], [_scale(q, scale)])[0]
    path = choose(backend, "select_attention", q, k, v, fused=select_attention_fits(q, k, v, limits))
    if exported():
        (B, T), S = packed.shape, k.shape[1] - packed.shape[1]
        seen = _seen_by_all(S, before, window, limits, readable)
        return _attend(q.view(B, T, *q.shape[1:]), k, v, seen, _scale(q, scale)).flatten(0, 1)
    if not q.shape[0]:
        return q + 0 * (k.sum() + v.sum())  # every parameter keeps a gradient, zero
    if path == "triton":
        return select_attention_triton(q, k, v, packed, before, window, limits, readable, _scale(q, scale))
    if not packed.tiled:
        order = (packed.columns // packed.tile * packed.shape[0] + packed.rows).argsort(stable=True)
        packed = Packed(packed.index[order], packed.shape, packed.tile, True)
        o = _by_tiles(q[order], k, v, packed, before, window, limits, readable, _scale(q, scale))
        return torch.empty_like(o).index_copy(0, order, o)
    return _by_tiles(q, k, v, packed, before, window, limits, readable, _scale(q, scale))


def _run(tensors, integers, floats):
    """`select_attention` of the columns that attend, among all."""
    (q, k, v, asked, before, readable, *columns), (window, *reaches) = tensors, integers
    every = torch.ones_like(before, dtype=torch.bool) if asked is None else asked
    packed, limits = pack(every, window), list(zip(columns, reaches, strict=True))
    o = select_attention(q[packed.index], k, v, packed, before, window, limits, readable, scale=floats[0])
    return [torch.zeros_like(q).index_copy(0, packed.index, o)]


def _shapes(tensors, integers):
    return [torch.empty_like(tensors[0], memory_format=torch.contiguous_format)]


_OPERATOR = Operator("select_attention", _run, _shapes)


def _by_tiles(q, k, v, packed, before, window, limits, readable, scale):
    """One product of each tile's queries with the keys that any of them sees."""
    T, S = packed.shape[1], k.shape[1] - packed.shape[1]
    columns, rows = packed.columns, packed.rows
    starts = torch.arange(0, T, packed.tile, device=q.device)
    floors = (S + starts - before[:, starts]).amin(0).tolist()  # nothing before a document's start is worth reading
    sizes = [sum(counts) for counts in packed.counts]
    own = q.split(sizes)
    sight = before[rows, columns].clamp(max=window - 1).split(sizes)
    outs, blocks = [], _blocks(k, v, packed.tile)
    for tile, (counts, at, row) in enumerate(
        zip(packed.counts, (columns + S).split(sizes), rows.split(sizes), strict=True)
    ):
        if not sizes[tile]:
            continue
        place = _Places(counts, row, at)
        start = S + tile * packed.tile
        low = max(0, start - window + 1, floors[tile])
        low, keys, values = _reach(k, v, blocks, packed.tile, low, min(start + packed.tile, S + T))
        seen = _seen(place, sight[tile], low, keys.shape[1], limits, readable)
        outs.append(place.leave(_attend(place.enter(own[tile]), keys, values, seen, scale)))
    return torch.cat(outs)


class _Places:
    """The way of a tile's packed queries into (B, N), N the most of any row, and back."""

    def __init__(self, counts, rows, columns):
        self.size, self.columns = max(counts), columns
        self.batch = len(counts)
        self.full = min(counts) == self.size
        starts = torch.tensor(counts, device=rows.device).cumsum(0) - torch.tensor(counts, device=rows.device)
        self.rows = rows
        self.flat = rows * self.size + torch.arange(len(rows), device=rows.device) - starts[rows]

    def enter(self, x):
        """(n, ...) -> (B, N, ...), zeros where a row has fewer."""
        if not self.full:
            x = x.new_zeros(self.batch * self.size, *x.shape[1:]).index_copy(0, self.flat, x)
        return x.reshape(self.batch, self.size, *x.shape[1:])

    def leave(self, x):
        """(B, N, ...) -> (n, ...)."""
        x = x.reshape(self.batch * self.size, *x.shape[2:])
        return x if self.full else x[self.flat]


def _seen(place, sight, low, size, limits, readable):
    """(B, N, size) bool: what each query of a tile sees of the columns from `low` on. Places of no query see all."""
    j = torch.arange(low, low + size, device=sight.device)
    back = place.enter(place.columns)[..., None] - j
    seen = (back >= 0) & (back <= place.enter(sight)[..., None])
    for c, reach in limits:
        seen &= place.enter(c[place.rows, place.columns])[..., None] - c[:, None, low : low + size] < reach
    if readable is not None:
        seen &= readable[:, None, low : low + size] | (back == 0)
    return seen if place.full else seen | ~place.enter(torch.ones_like(sight, dtype=torch.bool))[..., None]


def _attend(q, k, v, seen, scale):
    """q (B, N, H, P), k, v (B, S, K, P), seen (B, N, S) -> (B, N, H, P). A group's heads share a key head."""
    (B, N, H, P), K = q.shape, k.shape[2]
    q = q.view(B, N, K, H // K, P).permute(0, 2, 3, 1, 4).reshape(B, K, -1, P)
    seen = seen[:, None].expand(-1, H // K, -1, -1).reshape(B, 1, -1, k.shape[1])
    o = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), seen, scale=scale)
    return o.view(B, K, H // K, N, P).permute(0, 3, 1, 2, 4).reshape(B, N, H, P)


def _blocks(k, v, size):
    """k and v cut into blocks where a gradient is wanted: that of a slice is as large as what it was cut from."""
    return (k.split(size, 1), v.split(size, 1)) if wants_gradient(k, v) else None


def _reach(k, v, blocks, size, low, high):
    """(low, keys, values) of the columns [low, high), or of some more before and after them."""
    if blocks is None:
        return low, k[:, low:high], v[:, low:high]
    first, last = low // size, (high - 1) // size + 1
    keys, values = (torch.cat(x[first:last], 1) if last - first > 1 else x[first] for x in blocks)
    return first * size, keys, values


def _scale(q, scale):
    return q.shape[-1] ** -0.5 if scale is None else scale


def _check(q, k, v, packed, before, window, limits, readable):
    B, T = packed.shape
    fits = q.ndim == 3 and k.ndim == 4 and k.shape == v.shape and q.shape[0] == packed.index.shape[0]
    fits = fits and k.shape[0] == B and k.shape[1] >= T and k.shape[3] == q.shape[2] and not q.shape[1] % k.shape[2]
    if not fits:
        raise ValueError(
            f"select_attention needs q ({len(packed.index)}, H, P) for {len(packed.index)} packed queries, k and v "
            f"({B}, S + {T}, K, P) with K dividing H; got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        )
    if window < 1:
        raise ValueError(f"select_attention: window must be at least 1, the query's own key; got {window}.")
    wanted = [("before", before, (B, T))] + [("a limit", c, tuple(k.shape[:2])) for c, _ in limits]
    wanted += [] if readable is None else [("readable", readable, tuple(k.shape[:2]))]
    for name, got, shape in wanted:
        if tuple(got.shape) != shape:
            raise ValueError(f"select_attention needs {name} of shape {shape}; got {tuple(got.shape)}.")
