"""Where the real tokens of a batch are: padding on any side, and documents packed into rows.

What a call says of that is read in inputs/columns.py; kernels/recurrence.py cuts what it computes at `cu_seqlens`.

Blocks see one of three arrangements and nothing else:
    plain    every column of every row is a token
    ragged   the real tokens of each row come first, `lengths` (B,) of them. Causal operations never look right, so
             what comes after a row's end reaches no token; only the states that are handed on must stop there
    packed   one row of all the batch's documents, `cu_seqlens` (D + 1,) their offsets; nothing crosses them

A padding mask, whatever its pattern, becomes ragged by one stable sort of the columns, undone after the last block. So
a row gives what it would give alone, and padding before, after or between tokens is the same case. Where rows hold
several documents padding is left out, and what comes back of it is zeros.
"""

from dataclasses import dataclass, replace

import torch

from scrubjay.modeling.inputs.columns import Columns, tokens_first
from scrubjay.modeling.training.context_parallel import SequenceShard


@dataclass(frozen=True)
class Layout:
    """Arrangement of the (B, T) columns that the blocks see.

    positions: (B, T) int64, of real tokens in their row or document. rotary: cos, sin of shape (B, T, R / 2), or None.
    shard: which slice of a plain layout over several ranks the T columns are, or None.
    one_token: whether the layout is plain, T is 1, and blocks may take the calls of kernels/one_token.py.
    """

    positions: torch.Tensor
    lengths: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    shard: SequenceShard | None = None
    one_token: bool = False

    @property
    def real(self) -> torch.Tensor | None:
        """(B, T, 1) bool, or None where every column is a token."""
        if self.lengths is None:
            return None
        columns = torch.arange(self.positions.shape[1], device=self.positions.device)
        return (columns < self.lengths[:, None])[..., None]

    def with_rotary(self, table: tuple[torch.Tensor, torch.Tensor]) -> "Layout":
        """The same with the table of a rotary encoding."""
        return replace(self, rotary=table)

    def to(self, device, non_blocking: bool = False) -> "Layout":
        """The same on another device, as accelerate asks of a block's arguments when blocks lie on several."""
        lengths, offsets = (None if x is None else x.to(device) for x in (self.lengths, self.cu_seqlens))
        rotary = None if self.rotary is None else (self.rotary[0].to(device), self.rotary[1].to(device))
        positions = self.positions.to(device)
        one_token = self.one_token and positions.device.type == "cpu"
        return Layout(positions, lengths, offsets, rotary, self.shard, one_token)

    def segment(self, start: int, stop: int) -> "Layout":
        """The columns [start, stop) of a plain or ragged layout."""
        lengths = None if self.lengths is None else (self.lengths - start).clamp(0, stop - start)
        rotary = None if self.rotary is None else (self.rotary[0][:, start:stop], self.rotary[1][:, start:stop])
        return replace(self, positions=self.positions[:, start:stop], lengths=lengths, rotary=rotary)


@dataclass(frozen=True)
class Arrangement:
    """A layout, and the way of (B, T, C) hidden states into it and back."""

    layout: Layout
    columns: Columns
    order: torch.Tensor | None = None

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """From the caller's columns to the blocks'."""
        if self.order is not None:
            return x.gather(1, self.order.to(x.device)[..., None].expand_as(x))
        return self.columns.gather(x)[None] if self.columns.packed else x

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """From the blocks' columns to the caller's; zeros in the padding of packed documents."""
        if self.order is not None:
            back = self.order.argsort(dim=1).to(x.device)
            return x.gather(1, back[..., None].expand_as(x))
        return self.columns.spread(x[0]) if self.columns.packed else x


def arrange(columns: Columns, counts: torch.Tensor | None = None, one_token: bool = False) -> Arrangement:
    """Arrange a call's columns. `counts`: (B,) real tokens that the cache has seen, or None. `one_token`: whether
    blocks may take the short way of one, where the layout is plain."""
    shape, device, real = columns.shape, columns.device, columns.real
    if columns.packed:
        positions = columns.located()[1]
        return Arrangement(Layout(positions[None], cu_seqlens=columns.offsets), columns)
    base = torch.zeros(shape[0], dtype=torch.int64, device=device) if counts is None else counts
    positions = base[:, None] + torch.arange(shape[1], device=device)
    if real is None:
        return Arrangement(Layout(positions, one_token=one_token), columns)
    return Arrangement(Layout(positions, lengths=real.sum(1)), columns, tokens_first(real))
