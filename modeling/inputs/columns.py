"""What the arguments of a call say of its columns: which are tokens, and where documents start.

The one place that reads attention_mask, position_ids, cu_seq_lens_q and seq_idx, whose conventions differ from one
collator to the next. Padding is read first, and documents are judged among tokens alone: what stands in a padded column
of position_ids or seq_idx starts nothing.

B batch, T columns of the call, S columns that a cache has seen, N tokens of the call, D documents.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from scrubjay.kernels.dispatch import exported, traced

HIDDEN = -1e3  # an additive mask's value from here on hides a column: its exponential is 0 in every dtype
MASKS = (
    "1 for tokens and 0 for padding, True and False, the numbers of documents from 1 on and 0 for padding, or what is "
    "added to scores: 0 for tokens, -inf or the dtype's lowest number for padding"
)


@dataclass(frozen=True)
class Columns:
    """The columns of a call of `shape` (B, T).

    mask: bool, which columns are tokens, (B, T) or (B, S + T) as it was given; None: all. real: its last T columns;
    None where they are all tokens. Where there are several documents in a row, `offsets` (D + 1,) into the N tokens,
    taken row by row, and `index` (N,), the tokens' places among the B * T columns, None: all; else both None. marks:
    the arguments that said so.
    """

    shape: tuple[int, int]
    device: torch.device
    mask: torch.Tensor | None = None
    real: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    index: torch.Tensor | None = None
    marks: tuple[str, ...] = ()

    @property
    def packed(self) -> bool:
        """Whether a row holds several documents."""
        return self.offsets is not None

    def located(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(N,) number of each token's document, from 1, and (N,) its position there, from 0; of packed documents."""
        assert self.offsets is not None
        total = self.shape[0] * self.shape[1] if self.index is None else len(self.index)
        token = torch.arange(total, device=self.device)
        number = torch.searchsorted(self.offsets, token, right=True)
        return number, token - self.offsets[number - 1]

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """(N, ...) of the tokens -> (B, T, ...), zeros at padding."""
        if self.index is not None:
            x = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:]).index_copy(0, self.index.to(x.device), x)
        return x.view(*self.shape, *x.shape[1:])

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) -> (N, ...) of the tokens."""
        x = x.flatten(0, 1)
        return x if self.index is None else x[self.index.to(x.device)]


def read_columns(
    shape, device, mask=None, position_ids=None, cu_seqlens=None, seq_idx=None, cu_seqlens_k=None, seen=0, cache=None
) -> Columns:
    """Read what a call of shape (B, T) says of its columns.

    Args:
        mask: (B, T) or (B, S + T), in any of the conventions of `MASKS`; its last T columns speak of this call.
        position_ids: (B, T) or (1, T); where they do not rise from one token to the next, a document starts.
        cu_seqlens: (D + 1,) offsets over the B * T columns in order, padding included; cu_seqlens_k: the same again.
        seq_idx: (B, T) or (1, T) document numbers, negative at padding.
        seen: S. cache: the one that the call was given, or None.

    Raises:
        ValueError: arguments that do not fit the call or each other; documents beside a cache.
    """
    shape, cu_seqlens = tuple(shape), _same(cu_seqlens, cu_seqlens_k)
    check_shapes(shape, mask, position_ids, cu_seqlens, seq_idx, seen)
    # a compiled call that may be of packed documents has to look at values; to others those say nothing
    marked = cu_seqlens is not None or seq_idx is not None or (position_ids is not None and shape[1] > 1)
    look = not exported() and (marked or not traced())
    segments = None
    if mask is not None:
        mask, segments = read_mask(mask.to(device), look)
        if seen and segments is not None and _several(mask, segments):
            _refuse_cache(("attention_mask",), seen)
    if seq_idx is not None:
        seq_idx = seq_idx.to(device, torch.int64).expand(shape)
        mask = _also(mask, seq_idx >= 0)
    real = None if mask is None else mask[:, -shape[1] :]
    if look and real is not None and bool(real.all()):
        real = None
    if exported():
        _refuse_documents(shape, real, position_ids, cu_seqlens, seq_idx)
    if not look:
        return Columns(shape, device, mask, real)
    offsets, index, marks = _documents(shape, device, real, position_ids, cu_seqlens, seq_idx, segments)
    if offsets is not None and cache is not None:
        _refuse_cache(marks, seen)
    return Columns(shape, device, mask, real, offsets, index, marks)


def read_mask(mask: torch.Tensor, look: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, M) bool, which columns are tokens; and (B, M) int64 document numbers where the mask has them, or None.

    `look`: whether values may be looked at, else they are asserted when the call runs.

    Raises:
        ValueError: a mask of no convention of `MASKS`, or of two.
    """
    if mask.dtype == torch.bool:
        return mask, None
    zero = mask == 0
    ones, additive, unclear = (zero | (mask == 1)).all(), (zero | (mask <= HIDDEN)).all(), zero.all()
    if not mask.is_floating_point():
        additive, unclear = additive & False, unclear & False
    if not look:
        wanted = "attention_mask must be of 1 and 0, or of what is added to scores, when a program is traced."
        torch._assert_async((ones | additive) & ~unclear, wanted)
        return zero ^ ones, None
    counted = ((mask >= 0) & mask.isfinite() & (mask == mask.round() if mask.is_floating_point() else True)).all()
    ones, additive, unclear, counted = torch.stack([ones, additive, unclear, counted]).tolist()
    if unclear:
        raise ValueError(
            f"attention_mask is {mask.dtype} and 0 everywhere: padding alone, or, as what is added to scores, tokens "
            "alone. Pass a mask of bools or integers."
        )
    if ones:
        return ~zero, None
    if additive:
        return zero, None
    if counted:
        return ~zero, mask.long()
    values = mask.unique()
    raise ValueError(f"attention_mask must hold {MASKS}; got {values[:4].tolist()}{' ...' if len(values) > 4 else ''}.")


def one_text_a_row(kwargs: dict) -> dict:
    """Keyword arguments of generate(), which counts positions by an attention_mask of 1 and 0, with one.

    Raises:
        ValueError: a row of several documents.
    """
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return kwargs
    tokens, segments = read_mask(mask)
    if segments is not None and _several(tokens, segments):
        raise ValueError(
            "attention_mask numbers several documents in a row, and generate() continues one text a row. Give each "
            "document a row, with 1 for tokens and 0 for padding."
        )
    return kwargs | {"attention_mask": tokens.long()}


def tokens_first(real: torch.Tensor) -> torch.Tensor:
    """(B, T) columns of each row, its tokens before its padding, both in order."""
    return real.int().argsort(dim=1, descending=True, stable=True)


def _same(queries, keys):
    """The offsets of a call of self-attention, whose keys are its queries'."""
    if queries is None or keys is None or queries is keys:
        return keys if queries is None else queries
    if queries.shape != keys.shape or bool((queries != keys.to(queries.device)).any()):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k disagree: pass the former, or both alike.")
    return queries


def _also(mask, real):
    if mask is None:
        return real
    past = mask.shape[1] - real.shape[1]
    return mask & (F.pad(real, (past, 0), value=True) if past else real)


def _several(tokens, segments) -> bool:
    """Whether a row has tokens of several numbers."""
    lowest = segments.masked_fill(~tokens, torch.iinfo(segments.dtype).max).amin(1)
    return bool((segments.amax(1) > lowest).any())


def _refuse_cache(marks, seen):
    held = " that already holds tokens" if seen else ""
    raise ValueError(
        f"Packed documents ({', '.join(marks)}) cannot be combined with a cache{held}: a cache holds one text a row. "
        "Pass the documents without a cache, or one document a row."
    )


def _refuse_documents(shape, real, position_ids, cu_seqlens, seq_idx):
    """In a call that is exported: where documents end is a value, which nobody knows."""
    if cu_seqlens is not None or seq_idx is not None:
        raise ValueError(
            "torch.export cannot write down packed documents (cu_seq_lens_q, seq_idx): how many there are is no shape. "
            "Export a call of one document a row, with an attention_mask."
        )
    if position_ids is None or shape[1] == 1:
        return
    positions, goes_on = position_ids.expand(shape), None
    if real is not None:
        order = tokens_first(real)
        positions, goes_on = positions.gather(1, order), ~real.gather(1, order)[:, 1:]
    rise = positions.diff(dim=1) > 0
    one = rise if goes_on is None else rise | goes_on
    torch._assert_async(one.all(), "position_ids restart: this program was exported for one document a row.")


def _documents(shape, device, real, position_ids, cu_seqlens, seq_idx, segments):
    """(offsets, index, marks) of packed documents, as `Columns` has them; Nones where there is one document a row."""
    none, cuts = (None, None, ()), None
    numbers = {} if segments is None else {"attention_mask": segments[:, -shape[1] :]}
    if cu_seqlens is not None:
        cuts = _cuts(shape, device, cu_seqlens)
        column = torch.arange(shape[0] * shape[1], device=device)
        numbers["cu_seq_lens_q"] = torch.searchsorted(cuts, column, right=True)
    if seq_idx is not None:
        numbers["seq_idx"] = seq_idx
    if not numbers and (position_ids is None or shape[1] == 1):
        return none
    index = None if real is None else real.flatten().nonzero()[:, 0]
    if index is not None and not len(index):
        return none
    rows = torch.arange(shape[0], device=device)[:, None].expand(shape)
    rows, *others = (x.flatten() if index is None else x.flatten()[index] for x in (rows, *numbers.values()))
    edges = F.pad(rows.diff() != 0, (1, 0), value=True)  # (N,) a row's first token
    found = {name: F.pad(x.diff() != 0, (1, 0), value=True) | edges for name, x in zip(numbers, others, strict=True)}
    if position_ids is not None:
        positions = position_ids.to(device, torch.int64).expand(shape).flatten()
        positions = positions if index is None else positions[index]
        found["position_ids"] = F.pad(positions.diff() <= 0, (1, 0), value=True) | edges
    several, *clash = torch.stack([torch.stack(list(found.values())).any(0).ne(edges).any(), *_clashes(found)]).tolist()
    if any(clash):
        _refuse_clash(list(found), clash)
    if cuts is not None and len(cuts) - 1 > shape[0]:  # some of these documents may be empty
        before = cuts if real is None else F.pad(real.flatten().cumsum(0), (1, 0))[cuts]
        return before, index, ("cu_seq_lens_q", *(name for name in found if name != "cu_seq_lens_q"))
    if not several:
        return none
    starts = next(iter(found.values())).nonzero()[:, 0]
    marks = tuple(name for name, first in found.items() if bool((first & ~edges).any()))
    return F.pad(starts, (0, 1), value=len(rows)), index, marks


def _clashes(found):
    """Of what each argument says of where documents start, against the first: () bool each, whether they disagree.

    Numbers say all of it. Positions that go on say nothing, for a caller may have counted those of the row.
    """
    names = list(found)
    first = found[names[0]]
    for name in names[1:]:
        yield (found[name] & ~first).any() if name == "position_ids" else found[name].ne(first).any()


def _refuse_clash(names, clash):
    other = next(name for name, bad in zip(names[1:], clash, strict=True) if bad)
    raise ValueError(
        f"{names[0]} and {other} disagree about where documents start. Pass one of them, or make them agree."
    )


def _cuts(shape, device, cu_seqlens):
    """(D + 1,) offsets over the B * T columns, at which rows end too."""
    total = shape[0] * shape[1]
    offsets = cu_seqlens.to(device, torch.int64).flatten()
    numbers = offsets.tolist()
    if not numbers or numbers[0] != 0 or numbers[-1] != total or any(b < a for a, b in pairwise(numbers)):
        last = f", the last being {numbers[-1]}" if numbers else ""
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to batch * length = {total}, padding included; got {numbers[:8]}{last}."
        )
    rows = torch.arange(0, total + 1, shape[1], device=device)
    return torch.cat([offsets, rows]).unique() if shape[0] > 1 else offsets


def check_shapes(shape, mask, position_ids, cu_seqlens, seq_idx, seen):
    """Refuse arguments whose shapes do not fit a call of (B, T) to a cache of `seen` columns.

    Raises:
        ValueError: what came and what was needed.
    """
    batch, length = shape
    if length == 0 and seen:
        raise ValueError(
            f"The cache holds {seen} columns, and this call brings none beyond them: generate() takes what it is given "
            "for the same text, continued. For another text call cache.reset() or pass a new cache."
        )
    if length == 0 or batch == 0:
        raise ValueError(f"The input has shape {shape}; at least one row and one token are needed.")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
        got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be a (batch, length) tensor, 1 for tokens and 0 for padding; got {got}.")
    if mask is not None and (mask.shape[0] != batch or mask.shape[1] not in (length, seen + length)):
        raise ValueError(
            f"attention_mask must have shape {(batch, length)}"
            + (f" or {(batch, seen + length)}, with the {seen} columns in the cache" if seen else "")
            + f"; got {tuple(mask.shape)}."
        )
    for name, value in (("position_ids", position_ids), ("seq_idx", seq_idx), ("cu_seq_lens_q", cu_seqlens)):
        if value is not None and not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} must be a tensor of integers; got {type(value).__name__}.")
    for name, value in (("position_ids", position_ids), ("seq_idx", seq_idx)):
        if value is not None and (value.ndim != 2 or value.shape[1] != length or value.shape[0] not in (1, batch)):
            raise ValueError(f"{name} must have shape {(batch, length)} or {(1, length)}; got {tuple(value.shape)}.")
