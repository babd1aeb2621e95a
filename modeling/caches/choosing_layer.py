"""Cache layers that hold all keys and, at every step, choose those that the new query is likely to need.

The choice reads little: bounds of pages of keys (Quest, arXiv:2406.10774), or every key in a few directions
("lowrank").

B batch, H query heads, G key heads, P head size, n columns held, K budget, R rank, W columns of a page.
"""

import torch

from scrubjay.kernels.dispatch import without_autocast
from scrubjay.kernels.largest import largest_columns
from scrubjay.kernels.recycle import best, decode, gather_pair, pooled
from scrubjay.kernels.slots import NARROW
from scrubjay.modeling.caches.buffers import roomy, writable
from scrubjay.modeling.caches.holding_layer import HoldingLayer

SHRINKAGE = 0.1  # of the queries' second moments towards a multiple of the identity: 64 queries are few


class ChoosingLayer(HoldingLayer):
    """Subclasses give `choose(q, keys, scaling, real)`: (B, G, M) columns that this step reads, at most K, for queries
    q (B, H, P) among keys (B, G, n, P)."""

    chosen: torch.Tensor | None = None  # by the last step

    def clear(self) -> None:
        super().clear()
        self.chosen = None

    def attended(self):
        """(B, G, M), the columns that the last step chose; None: all."""
        return self.chosen

    def step(self, query, key, value, scaling):
        """Attend the columns chosen for the last token's query, among them the newest; all while they fit."""
        self.chosen = None
        if self.seen <= self.settings.budget:
            return None
        with torch.no_grad():
            q, real = self.query_of(self.seen), self.real_until(self.seen)
            index = self.chosen = self.choose(q, key, scaling, real)
            keys, values = self.rows(key, value, index)
            real = None if real is None else real[:, None].expand(-1, key.shape[1], -1).gather(2, index)
            return decode(q, keys, values, scaling, real)[:, None]

    def rows(self, keys, values, index):
        """Keys and values (B, G, M, P) at index (B, G, M)."""
        both = (("keys", keys), ("values", values))
        out = [self.call.memory(name, (*index.shape, x.shape[3]), x) for name, x in both]
        return gather_pair(keys, values, index, out)


class LowRankLayer(ChoosingLayer):
    """Every step attends the K keys that score highest in R directions.

    The directions, of each key head, are those that lose the least of q . k in the mean over the queries and keys of
    the text: with the Cholesky factor L of the queries' second moments, the principal directions V of the keys' L^T k.
    A key is held as V^T L^T k once more, beside itself, and a query becomes V^T L^-1 q. Principal directions of the
    keys alone are Loki's (arXiv:2406.02542). They are found at the first step that chooses, from the last 64 queries
    and all keys, and anew whenever the text has become twice as long: for all rows of a batch at the same column.

    low: (B, G, R, capacity), `lowered` columns in use. to_low: (B, G, 2, P, R), of keys and of queries. mean:
    (B, G, 1, P), of the keys. found_at: columns of which the directions were found.
    """

    names = (*HoldingLayer.names, "low", "to_low", "mean")
    counters = (*HoldingLayer.counters, "lowered", "found_at")

    def clear(self) -> None:
        super().clear()
        self.lowered = self.found_at = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns."""
        super().crop(tokens_to_remove)
        self.lowered = min(self.lowered, self.seen)

    def reads(self, columns):
        """The budget, and R of the 2 P numbers of each key and value."""
        size = self.tail.shape[3]
        return self.settings.budget + columns * min(self.settings.rank, size) / (2 * size)

    @without_autocast
    def choose(self, q, keys, scaling, real):
        """The K best by the scores of few directions, of which each head's largest counts."""
        settings, groups = self.settings, keys.shape[1]
        if not self.found_at or self.seen >= 2 * self.found_at:
            self.find(keys, real)
        self.lower(keys)
        wide, held = self.to_low.dtype, self.low
        low = torch.matmul(q.unflatten(1, (groups, -1)).to(wide), self.to_low[:, :, 1]) * scaling
        if held.device.type != "cpu" or held.dtype not in NARROW:  # there a part of 16 bits would be copied first
            held = held[..., : self.seen]
        scores = torch.matmul(low.to(held.dtype), held)[..., : self.seen].to(wide)
        if real is not None:
            scores = scores.masked_fill(~real[:, None, None], -torch.inf)
        scores = pooled(scores.log_softmax(-1).flatten(1, 2), groups, settings.group_reduce, 1, real)
        return best(scores, settings.budget, settings.recent, settings.sinks, real)

    def lower(self, keys):
        """Write the directions' part of keys (B, G, n, P) that have come since; a column of `low` for each."""
        of_keys, blocks = self.to_low[:, :, 0], self.blocks(keys, self.lowered)
        parts = [torch.matmul(x.to(of_keys.dtype) - self.mean, of_keys) for x in blocks]
        new, held, room = (parts[0] if len(parts) == 1 else torch.cat(parts, 2)).mT, self.low, self.room
        if held is None or held.shape[3] != room or held.dtype != roomy(held, keys).dtype:
            self.low = keys.new_empty(*new.shape[:3], room)
            if held is not None:
                self.low[..., : self.lowered] = held[..., : self.lowered]
        self.low = writable(self.low)
        self.low[..., self.lowered : self.seen] = new
        self.lowered = self.seen

    def blocks(self, keys, start=0):
        """Keys (B, G, m, P) from column `start` on, in parts."""
        return [keys[:, :, start:]]

    @property
    def room(self):
        """Columns for which there is to be memory."""
        return self.full_keys.shape[2]

    def find(self, keys, real):
        """The directions; keys are then written anew."""
        wide = torch.promote_types(keys.dtype, torch.float32)
        queries = self.remembered().to(wide).unflatten(1, (keys.shape[1], -1))
        if real is not None:  # what is padding counts as nothing
            queries = torch.where(real[:, None, None, -queries.shape[3] :, None], queries, 0)
        total, products, start, near = 0, 0, 0, None  # near: a first mean, so that little is left to be taken off
        for x in self.blocks(keys):
            x, stop = x.to(wide), start + x.shape[2]
            near = x.mean(2, keepdim=True) if near is None else near
            x = x - near
            if real is not None:
                x = torch.where(real[:, None, start:stop, None], x, 0)
            total, products, start = total + x.sum(2, keepdim=True), products + x.mT @ x, stop
        count = self.seen if real is None else real.sum(1).clamp(min=1)[:, None, None, None]
        apart = total / count
        self.mean = near + apart
        spread = products - count * (apart.mT @ apart)
        queries = queries.flatten(2, 3)
        moments = queries.mT @ queries
        size = moments.diagonal(dim1=-1, dim2=-2).mean(-1)[..., None, None].clamp(min=torch.finfo(wide).tiny)
        moments = moments / size + SHRINKAGE * torch.eye(keys.shape[3], dtype=wide, device=keys.device)
        factor = torch.linalg.cholesky(moments)
        directions = torch.linalg.eigh(factor.mT @ spread @ factor).eigenvectors[..., -self.settings.rank :]
        to_query = torch.linalg.solve_triangular(factor.mT, directions, upper=True)  # q^T L^-T V
        self.to_low = torch.stack([factor @ directions, to_query], 2)
        self.low, self.lowered, self.found_at = None, 0, self.seen


class QuestLayer(ChoosingLayer):
    """Quest: the smallest and largest number in each dimension of a page's 16 keys bound what a query can find there.
    Every step attends the pages of the highest bounds, K / 16 of them, the one in which the text goes on among them.

    low, high: (B, G, pages, P), of the pages that are whole.
    """

    low: torch.Tensor
    high: torch.Tensor
    names = (*HoldingLayer.names, "low", "high")

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns."""
        super().crop(tokens_to_remove)
        if self.low is not None:
            whole = self.seen // self.settings.page
            self.low, self.high = self.low[:, :, :whole], self.high[:, :, :whole]

    def reads(self, columns):
        """The budget, and two bounds of each page."""
        return self.settings.budget + columns / self.settings.page

    @without_autocast
    def choose(self, q, keys, scaling, real):
        """Columns of the best pages, and of the one that is not whole."""
        page, (groups, n) = self.settings.page, keys.shape[1:3]
        whole = n // page
        self.bound(keys, real)
        by_group = q.unflatten(1, (groups, -1)).to(self.low.dtype)
        bounds = by_group.clamp(min=0) @ self.high.mT + by_group.clamp(max=0) @ self.low.mT
        if real is not None:
            some = real[:, : whole * page].unflatten(1, (whole, page)).any(2)
            bounds = bounds.masked_fill(~some[:, None, None], -torch.inf)
        rest = torch.arange(whole * page, n, device=keys.device).expand(*keys.shape[:2], -1)
        room = max((self.settings.budget - rest.shape[2]) // page, 1)
        best = largest_columns(bounds.amax(2), min(room, whole))
        columns = (best[..., None] * page + torch.arange(page, device=keys.device)).flatten(2)
        return torch.cat([columns, rest], 2)

    def bound(self, keys, real):
        """Note the smallest and largest numbers of pages that have become whole."""
        page, known = self.settings.page, 0 if self.low is None else self.low.shape[2]
        whole = keys.shape[2] // page
        if whole == known:
            return
        new = keys[:, :, known * page : whole * page]
        lowest = highest = new
        if real is not None:
            tokens = real[:, None, known * page : whole * page, None]
            lowest, highest = new.masked_fill(~tokens, torch.inf), new.masked_fill(~tokens, -torch.inf)
        low, high = lowest.unflatten(2, (-1, page)).amin(3), highest.unflatten(2, (-1, page)).amax(3)
        for name, rows in (("low", low), ("high", high)):
            held = getattr(self, name)
            setattr(self, name, rows if held is None else torch.cat([roomy(writable(held), rows), rows], 2))
