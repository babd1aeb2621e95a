"""A cache layer that holds all keys and values of its text, for policies that choose anew which of them a step reads.

B batch, H query heads, G key heads, P head size, T new columns, n columns held, K budget.
"""

import torch

from scrubjay.kernels.recycle import decode
from scrubjay.modeling.caches.buffers import appended, roomy, writable, written
from scrubjay.modeling.caches.kept_keys import TAIL, KeepingLayer


class HoldingLayer(KeepingLayer):
    """All keys and values in one buffer. By itself it attends all of them; subclasses give `step`.

    full_keys, full_values: (B, G, capacity, P), `seen` columns in use. tail: (B, H, 64, P), the query of column c at
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

    def take(self, other: "HoldingLayer") -> None:
        """Have read what another has read."""
        self.lazy_initialization(other.tail, other.tail)
        self.seen, self.oldest, self.scaling = other.seen, other.oldest, other.scaling
        self.receive(other)
        self.tail = other.tail.clone()

    def receive(self, other: "HoldingLayer") -> None:
        """Hold what another layer holds."""
        self.full_keys, self.full_values = (written(None, x, 0) for x in other.everything())

    def everything(self):
        """All keys and values (B, G, n, P), exact, on the device."""
        return [x[:, :, : self.seen] for x in (self.full_keys, self.full_values)]

    def remembered(self):
        """(B, H, m, P): the queries of the last m columns, in their order."""
        columns = torch.arange(max(self.oldest, self.seen - TAIL), self.seen, device=self.tail.device)
        return self.tail[:, :, columns % TAIL]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask for `query_length` new columns."""
        return self.seen + query_length, 0

    def extend(self, k, v):
        """Append to the buffer; returns views of all columns."""
        used = self.seen - k.shape[2]
        if torch.is_grad_enabled() and k.requires_grad:  # a graph may need what is there: no writing in place
            old = (x[:, :, :used] for x in (self.full_keys, self.full_values)) if used else (k[:, :, :0], v[:, :, :0])
            self.full_keys, self.full_values = (appended(*pair) for pair in zip(old, (k, v), strict=True))
            return self.full_keys.view_as(self.full_keys), self.full_values
        self.full_keys, self.full_values = (
            written(buffer, new, used) for buffer, new in ((self.full_keys, k), (self.full_values, v))
        )
        return self.full_keys[:, :, : self.seen], self.full_values[:, :, : self.seen]

    def attend(self, query, key, value, scaling):
        """(B, T, H, P), or None to attend all keys as the model always does."""
        first, self.scaling = self.tail is None, scaling
        self.note(query)
        if first or query.shape[2] > 1:
            self.renew()
            return None
        if self.layer_idx in self.settings.full_layers:
            return self.read_all(query, key, value, scaling)
        return self.step(query, key, value, scaling)

    def renew(self) -> None:
        """All keys were attended, by several queries."""

    def step(self, query, key, value, scaling):
        """`attend` of a single token, (B, H, 1, P), its own key among the others already."""
        return self.read_all(query, key, value, scaling)

    def read_all(self, query, key, value, scaling):
        """A single token that attends all keys; the model's own attention where they are few."""
        if self.seen <= self.settings.budget:
            return None
        return decode(query[:, :, 0], key, value, scaling, self.real_until(self.seen))[:, None]

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
            if len(columns) == 1:  # as in every step, where a slice is quicker than an index
                held[:, :, start % TAIL, None] = rows
            else:
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
        self.seen = columns
        self.renew()
