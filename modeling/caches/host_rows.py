"""Keys and values of one layer in host memory: written once, never moved, fetched before they are needed.

B batch, q new, r fetched, H key heads, P_k and P_v sizes of a key and a value, N rows.
"""

from functools import cache
from typing import Any

import torch

from scrubjay.modeling.caches.buffers import roomy, writable

CHUNK = 256  # rows of room at least, when the table grows


class HostRows:
    """A table (N, H, P_k + P_v), a row for each token of each row of the batch, in the order in which they came.

    Whose row is whose is no matter of this table: `AdoreCache` has the number of each token's row, so that a change of
    the batch's rows (beams) moves none of them. Of keys on CUDA it is pinned, and copies run beside the computation.
    """

    _written: torch.cuda.Event | None = None  # after the last copy to the table
    _coming: Any = None  # rows on their way, and what to wait for

    def __init__(self, table: torch.Tensor | None = None):
        self.table: Any = table  # None before the first row
        self.length = 0 if table is None else len(table)
        self.pinned = False

    @property
    def nbytes(self) -> int:
        """Bytes held, with the room ahead."""
        return 0 if self.table is None else self.table.nbytes

    @torch.compiler.disable  # the host's own memory and copies beside the program
    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add B * q rows from keys (B, H, q, P_k) and values (B, H, q, P_v): a batch row's tokens one after another."""
        dtype = torch.promote_types(keys.dtype, values.dtype)
        rows = torch.cat([keys.to(dtype), values.to(dtype)], -1).transpose(1, 2).flatten(0, 1)
        self.pinned = rows.is_cuda
        if self.table is None:
            self.table = self._allocated(0, rows)
        self._settle()
        held, end = roomy(self.table, rows), self.length + len(rows)
        rows = rows.to(held.dtype)
        if torch.is_grad_enabled():  # a gradient may need what was there, and flows to what is added
            self.table = torch.cat([held[: self.length], rows.to(held.device)])
        else:
            self.table = self._with_room(writable(held), end)
            self.table[self.length : end].copy_(rows, non_blocking=True)
            if rows.is_cuda:
                self._written = torch.cuda.Event()
                self._written.record(torch.cuda.current_stream(rows.device))
        self.length = end

    @torch.compiler.disable
    def fetch(self, numbers: torch.Tensor, device: torch.device) -> None:
        """Send the rows `numbers`, (B, r) on the host, on their way to `device`; `fetched` waits for them."""
        self._settle()
        if device.type != "cuda" or torch.is_grad_enabled():
            self._coming = self.table[numbers].to(device), None
            return
        staged = self._allocated(numbers.numel(), self.table)
        torch.index_select(self.table, 0, numbers.flatten(), out=staged)
        arrived, beside = torch.cuda.Event(), side_stream(device)
        with torch.cuda.stream(beside):
            rows = staged.to(device, non_blocking=True).unflatten(0, numbers.shape)
            arrived.record(beside)
        self._coming = rows, arrived

    @torch.compiler.disable
    def fetched(self) -> torch.Tensor:
        """Keys and values (B, H, r, P_k + P_v) of the rows that were asked for last."""
        rows, arrived = self._coming
        self._coming = None
        if arrived is not None:
            stream = torch.cuda.current_stream(rows.device)
            stream.wait_event(arrived)
            rows.record_stream(stream)
        return rows.transpose(1, 2)

    def keep(self, numbers: torch.Tensor) -> None:
        """Hold the rows `numbers` (n,) alone, in that order, and give the memory of the others back."""
        self._settle()
        kept = self.table[numbers]
        self.table, self.length = (kept.pin_memory() if self.pinned else kept), len(numbers)

    def tensor(self) -> torch.Tensor:
        """(N, H, P_k + P_v), without the room ahead."""
        self._settle()
        return self.table[: self.length]

    def _settle(self):
        """Wait until the last copy to the table has ended: the host reads no sooner."""
        if self._written is not None:
            self._written.synchronize()
            self._written = None

    def _allocated(self, count, like):
        return torch.empty(count, *like.shape[1:], dtype=like.dtype, device="cpu", pin_memory=self.pinned)

    def _with_room(self, held, end):
        """`held` if it has room for `end` rows, or a copy that is larger by half."""
        if end <= len(held):
            return held
        grown = self._allocated(max(end + CHUNK, len(held) + len(held) // 2), held)
        grown[: self.length] = held[: self.length]
        return grown

    def __getstate__(self):
        """A copy or a pickle: the table, which is pinned again when it grows."""
        self._settle()
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device on which rows arrive while it computes."""
    return torch.cuda.Stream(device)
