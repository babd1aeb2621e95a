"""A cache layer that holds all keys and values of its text, for policies that choose anew which of them a step reads.

Where they lie, `hold` and `hold_bits` say: on the device or on the host, exact or in few bits, or both: few bits on the
device to choose by, and exact ones on the host, of which those chosen are fetched. A step that needs all of a layer's
has them on the device while that layer runs, no longer.

B batch, H query heads, G key heads, P head size, T new columns, n columns held, K budget.
"""

import copy
from typing import Any

import torch

from scrubjay.kernels.recycle import decode, gather_pair
from scrubjay.modeling.caches.buffers import appended, roomy, writable
from scrubjay.modeling.caches.few_bits_keys import FewBits
from scrubjay.modeling.caches.host_rows import side_stream
from scrubjay.modeling.caches.kept_keys import TAIL, KeepingLayer

GROWTH = 1.25  # of the full buffer when it is full


class HoldingLayer(KeepingLayer):
    """All keys and values. By itself it attends all of them; subclasses give `step`.

    full_keys, full_values: (B, G, capacity, P), `seen` columns in use, exact, on the device or the host; None where few
    bits are all there is. few: those, or None. tail: (B, H, 64, P), the query of column c at
    c mod 64; where c is padding, that of the token before it. scaling: of the model's scores.
    """

    full_keys: torch.Tensor
    full_values: torch.Tensor
    tail: torch.Tensor
    names: tuple[str, ...] = ("full_keys", "full_values", "tail")
    counters: tuple[str, ...] = ("seen", "oldest", "scaling")
    is_croppable = True

    def clear(self) -> None:
        super().clear()
        self.oldest, self.scaling = 0, None
        self.few: FewBits | None = None
        self._coming: Any = None  # keys and values on their way, what to wait for, and how many there were

    @property
    def far(self) -> bool:
        """Whether keys are to be fetched, from the host or out of few bits."""
        return self.settings.hold == "host" or self.settings.hold_bits is not None

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the layer holds, by name."""
        few = {} if self.few is None else {f"few.{name}": x for name, x in self.few.tensors().items()}
        return super().tensors() | few

    def set(self, name: str, tensor: torch.Tensor) -> None:
        """Replace one of `tensors`."""
        if name.startswith("few."):
            self.few = self.few or FewBits(self.settings.hold_bits or 0, TAIL)
            setattr(self.few, name[4:], tensor)
        else:
            own = self.settings.hold == "host" and name in ("full_keys", "full_values")
            super().set(name, tensor.cpu() if own else tensor)

    @property
    def host_nbytes(self) -> int:
        """Bytes of what lies on the host."""
        if self.settings.hold != "host" or self.full_keys is None:
            return 0
        return self.full_keys.nbytes + self.full_values.nbytes

    def take(self, other: "HoldingLayer") -> None:
        """Have read what another has read; of its few bits what they say, where this one is to hold others."""
        self.seen, self.oldest, self.scaling = other.seen, other.oldest, other.scaling
        if other.settings.hold_bits == self.settings.hold_bits is not None:
            self.few = copy.deepcopy(other.few)
        keys, values = (x.to(other.tail.device) for x in other.exact())
        self.lazy_initialization(other.tail, other.tail)
        self.store(keys, values, 0)
        self.tail = other.tail.clone()

    def store(self, k, v, used) -> None:
        """Write new columns (B, G, T, P) behind `used` ones."""
        settings = self.settings
        if settings.hold == "host" or settings.hold_bits is None:
            host = settings.hold == "host"
            self.full_keys, self.full_values = (
                written(buffer, new, used, host) for buffer, new in ((self.full_keys, k), (self.full_values, v))
            )
        if settings.hold_bits is not None and (self.few is None or used):
            self.few = self.few or FewBits(settings.hold_bits, TAIL)
            self.few.append(k, v, used + k.shape[2])

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values (B, G, n, P), as exact as they are held, wherever that is."""
        if self.full_keys is None:
            return self.few.whole(self.seen)
        return self.full_keys[:, :, : self.seen], self.full_values[:, :, : self.seen]

    def whole(self, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, G, n - start, P) on the device, to attend or to choose by."""
        if self.few is not None:
            return self.few.whole(self.seen, start)
        if self.settings.hold == "host" and start == 0:
            return self._arrived()
        keys, values = self.exact()
        return keys[:, :, start:].to(self.tail.device), values[:, :, start:].to(self.tail.device)

    def rows(self, index) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, G, M, P) of the columns `index` (B, G, M), on the device, as exact as they are held."""
        if self.full_keys is None:
            return self.few.rows(index, self.seen)
        rows = gather_pair(self.full_keys, self.full_values, index.to(self.full_keys.device))
        return rows[0].to(self.tail.device), rows[1].to(self.tail.device)

    def send(self) -> None:
        """Have all keys and values on their way from the host, beside what the device computes."""
        if self._coming is not None or self.tail.device.type != "cuda" or self.full_keys is None:
            return
        beside, arrived = side_stream(self.tail.device), torch.cuda.Event()
        with torch.cuda.stream(beside):
            pair = [
                x[:, :, : self.seen].to(self.tail.device, non_blocking=True) for x in (self.full_keys, self.full_values)
            ]
            arrived.record(beside)
        self._coming = pair, arrived, self.seen

    def _arrived(self):
        self.send()
        if self._coming is None:  # the host is the device
            return self.exact()
        pair, arrived, seen = self._coming
        self._coming = None
        stream = torch.cuda.current_stream(self.tail.device)
        stream.wait_event(arrived)
        for x in pair:
            x.record_stream(stream)
        if seen < self.seen:  # sent before its new column was there
            last = (x[:, :, seen : self.seen].to(self.tail.device) for x in (self.full_keys, self.full_values))
            pair = [appended(x, new) for x, new in zip(pair, last, strict=True)]
        if (after := self.layer_idx + 1) < len(self.call.layers) and self.settings.schedule == "fixed":
            self.call.layers[after].send()
        return tuple(pair)

    def remembered(self):
        """(B, H, m, P): the queries of the last m columns, in their order."""
        columns = torch.arange(max(self.oldest, self.seen - TAIL), self.seen, device=self.tail.device)
        return self.tail[:, :, columns % TAIL]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask for `query_length` new columns."""
        return self.seen + query_length, 0

    def extend(self, k, v):
        """Append; returns all columns, as views where they lie on the device. Of what is fetched a step's own column
        alone, for `attend` fetches the others; pieces of several tokens attend themselves exactly."""
        used = self.seen - k.shape[2]
        if self.far:
            before = self._before(used) if used and k.shape[2] > 1 else None
            self.store(k.detach(), v.detach(), used)
            return (k.view_as(k), v) if before is None else (appended(before[0], k), appended(before[1], v))
        if torch.is_grad_enabled() and k.requires_grad:  # a graph may need what is there: no writing in place
            old = (x[:, :, :used] for x in (self.full_keys, self.full_values)) if used else (k[:, :, :0], v[:, :, :0])
            self.full_keys, self.full_values = (appended(*pair) for pair in zip(old, (k, v), strict=True))
            return self.full_keys.view_as(self.full_keys), self.full_values
        self.full_keys, self.full_values = (
            written(buffer, new, used) for buffer, new in ((self.full_keys, k), (self.full_values, v))
        )
        return self.full_keys[:, :, : self.seen], self.full_values[:, :, : self.seen]

    def _before(self, used):
        """Keys and values (B, G, used, P) on the device, of the columns before this call's."""
        now, self.seen = self.seen, used
        try:
            return self.whole()
        finally:
            self.seen = now

    def attend(self, query, key, value, scaling):
        """(B, T, H, P), or None to attend all keys as the model always does."""
        first, self.scaling = self.tail is None, scaling
        self.note(query)
        if first or query.shape[2] > 1:
            self.renew()
            return None
        full = self.layer_idx in self.settings.full_layers
        out = (self.read_all if full else self.step)(query, key, value, scaling)
        if out is None and self.far:
            return decode(query[:, :, 0], *self.whole(), scaling, self.real_until(self.seen))[:, None]
        return out

    def renew(self) -> None:
        """All keys were attended, by several queries."""

    def step(self, query, key, value, scaling):
        """`attend` of a single token, (B, H, 1, P), its own key among the others already."""
        return self.read_all(query, key, value, scaling)

    def read_all(self, query, key, value, scaling):
        """A single token that attends all keys; the model's own attention where they are few."""
        if self.seen <= self.settings.budget:
            return None
        keys, values = self.whole() if self.far else (key, value)
        return decode(query[:, :, 0], keys, values, scaling, self.real_until(self.seen))[:, None]

    def last_queries(self, query):
        """What `note` remembers of a call: rows (B, ., m, P) by name, for its last m columns."""
        return {"tail": self.call.last(query, TAIL).detach()}

    def note(self, query):
        """Remember the last queries, from which a later choice may have to be made."""
        new = self.last_queries(query)
        start = self.seen - new["tail"].shape[2]
        if self.tail is None:
            self.oldest = start
        columns = torch.arange(start, self.seen, device=query.device)
        for name, rows in new.items():
            held = getattr(self, name)
            if held is None:
                held = rows.new_zeros(*rows.shape[:2], TAIL, rows.shape[3])
            held = roomy(writable(held), rows)
            rows = rows.to(held.dtype)
            if getattr(self, name) is not None and self.call.source is not None:
                before = held[:, :, (self.seen - query.shape[2] - 1) % TAIL, None]  # no token in this call so far
                rows = torch.where(self.call.source[:, None, :, None] < 0, before, rows)
            held[:, :, columns % TAIL] = rows
            setattr(self, name, held)
        self.oldest = max(self.oldest, self.seen - TAIL)

    def query_of(self, columns):
        """(B, H, P): of the last token of the first `columns`."""
        return self.tail[:, :, (columns - 1) % TAIL]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns (a negative count, as transformers passes it)."""
        tokens_to_remove = int(tokens_to_remove)  # assisted generation counts with a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of columns to forget; got {tokens_to_remove}.")
        if tokens_to_remove == 0:
            return
        columns = self.seen + tokens_to_remove
        if columns <= self.oldest:
            raise ValueError(
                f"The queries of the last {self.seen - self.oldest} columns are remembered, and a crop needs one that "
                f"stays; got {tokens_to_remove}. Keep a copy (copy.deepcopy(cache)) to go further back."
            )
        if self.few is not None:
            self.few.crop(columns, self.seen)
        self.seen, self._coming = columns, None
        self.renew()

    def __getstate__(self):
        """A copy or a pickle: what is on its way is sent again."""
        return self.__dict__ | {"_coming": None}


def written(buffer, new, used, host=False):
    """The buffer with new columns written behind `used` ones, in larger memory if they do not fit; on the host, pinned
    where the columns come from CUDA."""
    (B, G, _, P), needed = new.shape, used + new.shape[2]
    buffer = None if buffer is None else roomy(writable(buffer), new)
    if buffer is None or buffer.shape[2] < needed:
        columns = max(256, needed + int(needed * (GROWTH - 1)) if used else needed + 256)
        like, place = new if buffer is None else buffer, {"device": "cpu", "pin_memory": new.is_cuda} if host else {}
        larger = torch.empty(B, G, columns, P, **{"dtype": like.dtype, "device": like.device} | place)
        if used:
            larger[:, :, :used] = buffer[:, :, :used]
        buffer = larger
    buffer[:, :, used:needed] = new
    return buffer
