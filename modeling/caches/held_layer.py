"""Layers of Recycled Attention whose keys and values all lie in host memory, or in few bits (`held_keys.py`).

The first call attends its own keys, on the device, as the model always does. Later calls of several tokens, and steps
that read all keys, take them page by page, without a gradient. B batch, H query heads, G key heads, P head size.
"""

import copy

import torch

from scrubjay.kernels.pages import attend_pages
from scrubjay.modeling.caches.buffers import GROWTH
from scrubjay.modeling.caches.choosing_layer import LowRankLayer
from scrubjay.modeling.caches.held_keys import HeldKeys
from scrubjay.modeling.caches.holding_layer import HoldingLayer
from scrubjay.modeling.caches.kept_keys import Kept
from scrubjay.modeling.caches.recycled_layer import RecycledLayer


class HeldLayer(HoldingLayer):
    """Stands before a policy's layer: what that takes of its buffers comes from `held`. Keys and values that attention
    functions are given, and hand on to `attend`, are the call's own."""

    counters = (*HoldingLayer.counters, "coded")

    def clear(self) -> None:
        super().clear()
        self.held = HeldKeys(self.settings.hold_bits, self.settings.hold == "host")

    def tensors(self):
        """What the layer holds, by name."""
        return super().tensors() | {f"held.{name}": x for name, x in self.held.tensors().items()}

    def set(self, name, tensor):
        """Replace one of `tensors`, where it belongs."""
        if name.startswith("held."):
            self.held.set(name[5:], tensor)
        else:
            super().set(name, tensor)

    @property
    def coded(self):
        """Columns of which there are few bits."""
        return self.held.coded

    @coded.setter
    def coded(self, columns):
        self.held.coded = columns

    def everything(self):
        """All keys and values (B, G, n, P), exact, on the device.

        Raises:
            ValueError: some are held in few bits alone.
        """
        if self.held.rounded:
            raise ValueError(
                f"hold='device' with hold_bits={self.settings.hold_bits} has rounded this text's first {self.coded} "
                "columns: fork it with the same hold and hold_bits, or make the first cache with hold='host'."
            )
        pages = list(self.held.exact_pages(self.seen, self.tail.device))
        return [torch.cat(x, 2) for x in zip(*pages, strict=True)]

    def receive(self, other):
        """Hold what another layer holds."""
        if isinstance(other, HeldLayer) and all(
            getattr(self.settings, name) == getattr(other.settings, name) for name in ("hold", "hold_bits")
        ):
            self.held = copy.deepcopy(other.held)
        else:
            self.held.append(*other.everything(), 0)

    def extend(self, k, v):
        """Write new columns; returns them alone."""
        self.held.append(k, v, self.seen - k.shape[2])
        return k.view_as(k), v

    def attend(self, query, key, value, scaling):
        """(B, T, H, P), or None in the first call."""
        first = self.tail is None
        out = super().attend(query, key, value, scaling)
        return self.read_all(query, key, value, scaling) if out is None and not first else out

    @torch.no_grad()
    def read_all(self, query, key, value, scaling):
        """Attend all keys."""
        pages = self.held.pages(self.seen, query.device)
        return attend_pages(query, pages, self.seen, scaling, self.real_until(self.seen))[0]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns."""
        super().crop(tokens_to_remove)
        self.held.crop(self.seen)


class HeldRecycledLayer(HeldLayer, RecycledLayer):
    """`RecycledLayer`, of which a full step reads pages, and what it has chosen is fetched once."""

    counters = (*RecycledLayer.counters, "coded")

    def attend_all(self, q, k, v, scaling, real):
        """(B, H, P), and the log-probabilities (B, H, n) of all keys."""
        pages = self.held.pages(self.seen, q.device)
        out, logp = attend_pages(q[:, :, None], pages, self.seen, scaling, real, scores=True)
        return out[:, 0], logp

    def scored_until(self, columns, k, scaling):
        """Pooled scores (B, G, columns) of the first columns for the last of their queries."""
        q, real = self.query_of(columns), self.real_until(columns)
        pages = self.held.pages(columns, q.device)
        logp = attend_pages(q[:, :, None], pages, columns, scaling, real, scores=True)[1]
        return self.pool(logp, k.shape[1], real)

    def keep(self, k, v, index, columns):
        """`Kept` of the columns at index (B, G, M)."""
        rows = torch.arange(index.shape[2], device=index.device).expand_as(index)
        pinned = self.pinned(columns, index)
        return Kept(*self.held.rows(index), index, self.capacity, self.real_until(columns), pinned, rows)


class HeldLowRankLayer(HeldLayer, LowRankLayer):
    """`LowRankLayer`, whose directions' part of the keys lies on the device."""

    counters = (*LowRankLayer.counters, "coded")

    def blocks(self, keys, start=0):
        """Keys (B, G, m, P) from column `start` on: those of this call as they came, others in pages."""
        first = self.seen - keys.shape[2]
        if start >= first:
            return [keys[:, :, start - first :]]
        return (k for k, _ in self.held.pages(self.seen, keys.device, start))

    def rows(self, keys, values, index):
        """Keys and values (B, G, M, P) at index (B, G, M)."""
        return self.held.rows(index)

    @property
    def room(self):
        """Columns for which there is to be memory."""
        have = 0 if self.low is None else self.low.shape[3]
        return have if have >= self.seen else max(256, int(GROWTH * self.seen))


HELD = {"recycled": HeldRecycledLayer, "full": HeldLayer, "lowrank": HeldLowRankLayer}
