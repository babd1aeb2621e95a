"""Where the real tokens of a batch are: padding on any side, and documents packed into rows.

Blocks see one of three arrangements and nothing else:
    plain    every column of every row is a token
    ragged   the real tokens of each row come first, `lengths` (B,) of them. Causal operations never look right, so
             what comes after a row's end reaches no token; only the states that are handed on must stop there
    packed   one row of documents, `cu_seqlens` (D + 1,) their offsets; nothing crosses them

A padding mask, whatever its pattern, becomes ragged by one stable sort of the columns, undone after the last block. So
a row gives what it would give alone, and padding before, after or between tokens is the same case.
"""

from dataclasses import dataclass, replace

import torch

from scrubjay.kernels.dispatch import exported, traced
from scrubjay.modeling.context_parallel import SequenceShard


@dataclass(frozen=True)
class Layout:
    """Arrangement of the (B, T) columns that the blocks see.

    positions: (B, T) int64, of real tokens in their row or document. rotary: cos, sin of shape (B, T, R / 2), or None.
    shard: which slice of a plain layout over several ranks the T columns are, or None.
    """

    positions: torch.Tensor
    lengths: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    shard: SequenceShard | None = None

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
        return Layout(self.positions.to(device), lengths, offsets, rotary, self.shard)

    def segment(self, start: int, stop: int) -> "Layout":
        """The columns [start, stop) of a plain or ragged layout."""
        lengths = None if self.lengths is None else (self.lengths - start).clamp(0, stop - start)
        rotary = None if self.rotary is None else (self.rotary[0][:, start:stop], self.rotary[1][:, start:stop])
        return replace(self, positions=self.positions[:, start:stop], lengths=lengths, rotary=rotary)


@dataclass(frozen=True)
class Arrangement:
    """A layout, and the way of (B, T, C) hidden states into it and back."""

    layout: Layout
    shape: tuple[int, int]
    order: torch.Tensor | None = None

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """From the caller's columns to the blocks'."""
        if self.order is not None:
            return x.gather(1, self.order[..., None].expand_as(x))
        return x.reshape(*self.layout.positions.shape, x.shape[-1])

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """From the blocks' columns to the caller's."""
        if self.order is not None:
            back = self.order.argsort(dim=1)
            return x.gather(1, back[..., None].expand_as(x))
        return x.reshape(*self.shape, x.shape[-1])


def arrange(shape, device, counts, mask=None, position_ids=None, cu_seqlens=None, seq_idx=None, seen=0) -> Arrangement:
    """Arrange a call of shape (B, T).

    Args:
        counts: (B,) real tokens that the cache has seen, or None.
        mask: (B, T) or (B, seen + T), 1 where a token is real; its last T columns speak of this call.
        position_ids: (B, T); where they restart, a document starts.
        cu_seqlens: (D + 1,) offsets over the B * T columns in order; seq_idx: (B, T) document numbers.
        seen: columns that the cache has seen.

    Raises:
        ValueError: arguments that do not fit the call or each other.
    """
    _check_shapes(shape, mask, position_ids, seq_idx, seen)
    mask = None if mask is None else mask[:, -shape[1] :].bool()
    padded = mask is not None and _padded(mask, position_ids, cu_seqlens, seq_idx)
    if exported():
        _refuse_documents(shape, mask, position_ids, cu_seqlens, seq_idx)
        position_ids = None
    offsets = _documents(shape, device, position_ids, cu_seqlens, seq_idx, padded)
    if offsets is not None:
        if padded or seen:
            what = "a padding mask" if padded else "a cache that already holds tokens"
            raise ValueError(f"Packed documents cannot be combined with {what}: pass one row of documents and neither.")
        starts = torch.repeat_interleave(offsets[:-1], offsets.diff())
        positions = torch.arange(shape[0] * shape[1], device=device) - starts
        return Arrangement(Layout(positions[None], cu_seqlens=offsets), shape)
    base = torch.zeros(shape[0], dtype=torch.int64, device=device) if counts is None else counts
    positions = base[:, None] + torch.arange(shape[1], device=device)
    if not padded:
        return Arrangement(Layout(positions), shape)
    return Arrangement(Layout(positions, lengths=mask.sum(1)), shape, _tokens_first(mask))


def _tokens_first(mask):
    return mask.int().argsort(dim=1, descending=True, stable=True)


def _padded(mask, *packing) -> bool:
    """Whether a row of the mask has padding. Where its values are not known, all of them may: no padding is a case of
    it. A compiled call that may be of packed documents has to look, for with those padding is refused."""
    if exported() or (traced() and all(x is None for x in packing)):
        return True
    return not bool(mask.all())


def _refuse_documents(shape, mask, position_ids, cu_seqlens, seq_idx):
    """In a call that is exported: where documents end is a value, which nobody knows."""
    if cu_seqlens is not None or seq_idx is not None:
        raise ValueError(
            "torch.export cannot write down packed documents (cu_seq_lens_q, seq_idx): how many there are is no shape. "
            "Export a call of one document a row, with an attention_mask."
        )
    if position_ids is None or shape[1] == 1:
        return
    positions, goes_on = position_ids.expand(shape), None
    if mask is not None:
        order = _tokens_first(mask)
        positions, goes_on = positions.gather(1, order), ~mask.gather(1, order)[:, 1:]
    rise = positions.diff(dim=1) > 0
    one = rise if goes_on is None else rise | goes_on
    torch._assert_async(one.all(), "position_ids restart: this program was exported for one document a row.")


def _documents(shape, device, position_ids, cu_seqlens, seq_idx, padded):
    """Offsets (D + 1,) of the packed documents over B * T columns, or None where there is one document a row."""
    total = shape[0] * shape[1]
    if cu_seqlens is not None:
        offsets = cu_seqlens.to(device, torch.int64).flatten()
        if offsets[0] != 0 or offsets[-1] != total or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"cu_seq_lens_q must rise from 0 to batch * length = {total}; got {offsets.tolist()[:8]}, the last "
                f"being {int(offsets[-1])}."
            )
        rows = torch.arange(0, total + 1, shape[1], device=device)
        return torch.cat([offsets, rows]).unique() if shape[0] > 1 else offsets
    if seq_idx is not None:
        new = seq_idx.diff(dim=1) != 0
    elif position_ids is not None and shape[1] > 1 and not padded:
        new = position_ids.expand(shape).diff(dim=1) <= 0
    else:
        return None
    if not bool(new.any()):
        return None
    new = torch.cat([new.new_ones(shape[0], 1), new.to(device)], 1).flatten()
    return torch.cat([new.nonzero()[:, 0], torch.tensor([total], device=device)])


def _check_shapes(shape, mask, position_ids, seq_idx, seen):
    batch, length = shape
    if length == 0 or batch == 0:
        raise ValueError(f"The input has shape {tuple(shape)}; at least one row and one token are needed.")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
        got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be a (batch, length) tensor, 1 for tokens and 0 for padding; got {got}.")
    if mask is not None and (mask.shape[0] != batch or mask.shape[1] not in (length, seen + length)):
        raise ValueError(
            f"attention_mask must have shape {(batch, length)}"
            + (f" or {(batch, seen + length)}, with the {seen} columns in the cache" if seen else "")
            + f"; got {tuple(mask.shape)}."
        )
    for name, value in (("position_ids", position_ids), ("seq_idx", seq_idx)):
        if value is not None and (value.ndim != 2 or value.shape[1] != length or value.shape[0] not in (1, batch)):
            raise ValueError(f"{name} must have shape {(batch, length)}; got {tuple(value.shape)}.")
