"""What is remembered of every token of a text, a row of a table each: enough to score it and to run it again.

B batch, T columns given so far (padding included), D width of embeddings, F of the scorer's features, S of its state.
"""

import torch

from scrubjay.modeling.caches.buffers import writable

CHUNK = 256  # columns by which the tables grow, so that a step copies nothing
TABLES = ("ids", "embeds", "host", "positions", "real", "features")


class TokenHistory:
    """Tables of the batch's tokens, batch first, grown in pieces of `CHUNK` columns.

    ids: (B, T) int32, or embeds: (B, T, D) where embeddings were given, or host: (B, T) int32, the number of its row in
    `HostRows`; none where nothing is brought back. positions: (B, T) int32, real tokens before
    each. real: (B, T) bool. features: (B, T, F). counts: (B,) int64, real tokens. state: (B, S) of the scorer.
    """

    def __init__(self) -> None:
        self.tables: dict[str, torch.Tensor] = {}
        self.rows: dict[str, torch.Tensor] = {}
        self.length = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        """A table, (B, T, ...)."""
        return self.tables[name][:, : self.length]

    @property
    def counts(self) -> torch.Tensor:
        """(B,) int64, real tokens of each row."""
        return self.rows["counts"]

    @property
    def state(self) -> torch.Tensor:
        """(B, S), the scorer's after the last real token of each row."""
        return self.rows["state"]

    @property
    def capacity(self) -> int:
        """Columns for which there is room."""
        return self.tables["real"].shape[1] if self.tables else 0

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first token."""
        return len(self.counts) if self.rows else -1

    @property
    def nbytes(self) -> int:
        """Bytes of all tables, with the room ahead."""
        return sum(x.nbytes for x in (*self.tables.values(), *self.rows.values()))

    def locate(self, real: torch.Tensor) -> torch.Tensor:
        """Positions (B, q) of new columns, of which `real` (B, q) are tokens."""
        before = self.counts[:, None] if self.rows else 0
        return before + (real.long().cumsum(1) - 1).clamp(min=0)

    def append(self, columns: dict[str, torch.Tensor], state: torch.Tensor) -> None:
        """Add q columns, (B, q, ...) each by the name of its table; `state` (B, S) is the scorer's after them."""
        real = columns["real"]
        end = self.length + real.shape[1]
        if end > self.capacity:
            room = -(-end // CHUNK) * CHUNK
            for name, new in columns.items():
                grown = new.new_zeros(len(new), room, *new.shape[2:])
                if name in self.tables:
                    grown[:, : self.length] = self.tables[name][:, : self.length]
                self.tables[name] = grown
        for name, new in columns.items():
            self.tables[name] = writable(self.tables[name])
            self.tables[name][:, self.length : end] = new
        counted = real.sum(1)
        self.rows["counts"] = self.counts + counted if self.rows else counted
        self.rows["state"] = state
        self.length = end

    def embed(self, embedding) -> None:
        """Hold embeddings in place of ids from now on."""
        if "ids" in self.tables:
            self.tables["embeds"] = embedding(self.tables.pop("ids").long()).detach()

    def renumber(self) -> torch.Tensor:
        """Number the rows on the host anew, a batch row's tokens one after another; returns the old (B * T,) there."""
        old = self["host"].flatten().cpu().long()
        self.tables["host"] = writable(self.tables["host"])
        self.tables["host"][:, : self.length] = torch.arange(len(old)).view(-1, self.length)
        return old

    def map(self, change) -> None:
        """Apply a change of rows to every table."""
        self.tables = {name: change(x) for name, x in self.tables.items()}
        self.rows = {name: change(x) for name, x in self.rows.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file keeps: the tables without the room ahead, and the rows."""
        return {name: x[:, : self.length] for name, x in self.tables.items()} | self.rows

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor]) -> "TokenHistory":
        """From `tensors`."""
        history = cls()
        history.tables = {name: tensors[name] for name in TABLES if name in tensors}
        history.rows = {name: tensors[name] for name in ("counts", "state")}
        history.length = tensors["real"].shape[1]
        return history
