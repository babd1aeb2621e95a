"""What the arguments of a call say of its columns: which are tokens, and where documents start.

The one place that reads the arguments of `Marks`, whose conventions differ from one collator to the next. Padding is
read first, and documents are judged among tokens alone: what stands in a padded column of position_ids or seq_idx
starts nothing.

B batch, T columns of the call, S columns that a cache has seen, N tokens of the call, D documents.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
import torch.nn.functional as F

from scrubjay.kernels.dispatch import compiled, exported, traced
from scrubjay.modeling.inputs.masks import read_mask
from scrubjay.modeling.inputs.offsets import asserted_offsets

DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # arguments that nothing but documents has a use for
STEP = " This call is of one column a row: if generate() made it, leave that argument out of generate()."


@dataclass(frozen=True)
class Marks:
    """The arguments of a call that speak of its columns, by the names that forward has for them. None: not given.

    attention_mask: (B, T) or (B, S + T), in any of the conventions of `masks.MASKS`; its last T are this call's.
    position_ids: (B, T) or (1, T); where they do not rise from one token to the next, a document starts.
    cu_seq_lens_q: (D + 1,) offsets over the B * T columns in order, padding included; cu_seq_lens_k: the same again, or
    alone. seq_idx: (B, T) or (1, T) document numbers, negative at padding.
    """

    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    cu_seq_lens_q: torch.Tensor | None
    cu_seq_lens_k: torch.Tensor | None
    seq_idx: torch.Tensor | None

    @classmethod
    def of(cls, arguments: Mapping) -> "Marks":
        """Those among a call's keyword arguments."""
        return cls(**{field.name: arguments.get(field.name) for field in fields(cls)})

    def alone(self, shape, cache) -> bool:
        """Whether cu_seq_lens_q says all there is to say: of one row, without padding or a cache."""
        padded = self.attention_mask is not None or self.seq_idx is not None
        return self.cu_seq_lens_q is not None and shape[0] == 1 and not padded and cache is None


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

    def to(self, device, non_blocking: bool = False) -> "Columns":
        """The same on another device, as accelerate asks of a module's arguments."""
        moved = {name: getattr(self, name) for name in ("mask", "real", "offsets", "index")}
        moved = {name: None if x is None else x.to(device) for name, x in moved.items()}
        return replace(self, device=torch.device(device), **moved)

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


def read_columns(shape, device, marks: Marks, *, seen=0, cache=None, held=None) -> Columns:
    """Read what a call of shape (B, T) says of its columns.

    Args:
        seen: S. cache: the one that the call was given, or None.
        held: (B,) bool, the rows of which the cache has tokens; None: as the mask says, or all if S > 0.

    Raises:
        ValueError: arguments that do not fit the call or each other; beside a cache, documents, or one that starts
            with the call where a row has tokens already. That a single new column starts one is not asked of
            position_ids: a decode step waits for no value.
    """
    shape = tuple(shape)
    check_shapes(shape, marks, seen)
    if compiled() and marks.alone(shape, cache):
        cuts = marks.cu_seq_lens_q, shape[1], device, marks.cu_seq_lens_k, marks.position_ids
        offsets = asserted_offsets(*cuts)
        several = len(offsets) > 2
        return Columns(shape, device, offsets=offsets, marks=("cu_seq_lens_q",)) if several else Columns(shape, device)
    mask, position_ids, seq_idx = marks.attention_mask, marks.position_ids, marks.seq_idx
    cu_seqlens = _same(marks.cu_seq_lens_q, marks.cu_seq_lens_k)
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
    offsets, index, found = _documents(shape, device, real, position_ids, cu_seqlens, seq_idx, segments)
    if offsets is not None and cache is not None:
        _refuse_cache(found, seen)
    if seen and marked:
        if held is None and mask is not None and mask.shape[1] > shape[1]:
            held = mask[:, : -shape[1]].any(1)
        _refuse_start(shape, device, real, position_ids, cu_seqlens, seq_idx, held)
    return Columns(shape, device, mask, real, offsets, index, found)


def one_text_a_row(kwargs: dict, inputs=None) -> dict:
    """Keyword arguments of generate(), which counts positions by an attention_mask of 1 and 0, with one; and without
    cu_seq_lens_q and seq_idx, which would be of the prompt's columns at every step. inputs: given by position.

    Raises:
        ValueError: a row of several documents.
    """
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        tokens, segments = read_mask(mask)
        if segments is not None and _several(tokens, segments):
            _refuse_texts(("attention_mask",))
        mask = tokens.long()
        kwargs = kwargs | {"attention_mask": mask}
    names = [name for name in DOCUMENTS if kwargs.get(name) is not None]
    given = [inputs, *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
    x = next((x for x in reversed(given) if isinstance(x, torch.Tensor)), None)
    if not names or x is None:
        return kwargs
    own = isinstance(mask, torch.Tensor) and mask.shape == x.shape[:2]
    marks = Marks.of({name: kwargs[name] for name in names} | ({"attention_mask": mask} if own else {}))
    columns = read_columns(x.shape[:2], x.device, marks)
    if columns.packed:
        _refuse_texts(columns.marks)
    kwargs = {name: value for name, value in kwargs.items() if name not in names}
    return kwargs | {"attention_mask": columns.mask.long()} if columns.mask is not None else kwargs


def _refuse_texts(marks):
    raise ValueError(
        f"{', '.join(marks)} say that there are several documents in a row, and generate() continues one text a row. "
        "Give each document a row, with an attention_mask of 1 for tokens and 0 for padding."
    )


def check_rows_hold_tokens(real: torch.Tensor) -> None:
    """Refuse a row without a token: nothing can be said at its last one. real: (B, T) bool.

    Raises:
        ValueError: how many there are; where values are not known yet, an assertion when the call runs.
    """
    held = real.any(1)
    if exported() or traced():
        torch._assert_async(held.all(), "A row has no token in this call by its attention_mask, and so no score.")
    elif not bool(held.all()):
        rows = (~held).nonzero()[:, 0].tolist()
        raise ValueError(
            f"Row {rows[0]} of {len(real)} has no token in this call by its attention_mask, and so no score (rows "
            f"without: {len(rows)}). Leave such rows out."
        )


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


def _refuse_start(shape, device, real, position_ids, cu_seqlens, seq_idx, held):
    """Refuse a document that starts with a call, in a row whose cache holds tokens of another. held: None, all do."""
    starts = {}
    if position_ids is not None and shape[1] > 1:
        first = 0 if real is None else real.int().argmax(1, keepdim=True)  # of a row without tokens any
        at = position_ids.to(device).expand(shape)
        starts["position_ids"] = (at[:, :1] if real is None else at.gather(1, first))[:, 0] == 0
    for name, given in (("cu_seq_lens_q", cu_seqlens), ("seq_idx", seq_idx)):
        if given is not None:
            starts[name] = torch.ones(shape[0], dtype=torch.bool, device=device)
    if not starts:
        return
    goes_on = torch.ones(shape[0], dtype=torch.bool, device=device) if held is None else held.to(device)
    goes_on = goes_on if real is None else goes_on & real.any(1)
    if len(goes_on) != shape[0]:  # a cache of other rows, which is refused as such
        return
    bad = torch.stack([(goes_on & found).any() for found in starts.values()]).tolist()
    names = ", ".join(name for name, wrong in zip(starts, bad, strict=True) if wrong)
    if names:
        raise ValueError(
            f"A document that starts with this call ({names}) would go on with the text that the cache holds of its "
            "row. Give a new text a new cache; to continue the old one, leave them out, or count position_ids on from "
            "the row's tokens."
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
            + (STEP if shape[1] == 1 else "")
        )
    rows = torch.arange(0, total + 1, shape[1], device=device)
    return torch.cat([offsets, rows]).unique() if shape[0] > 1 else offsets


def check_shapes(shape, marks: Marks, seen):
    """Refuse arguments whose shapes do not fit a call of (B, T) to a cache of `seen` columns.

    Raises:
        ValueError: what came and what was needed.
    """
    (batch, length), mask = shape, marks.attention_mask
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
    for name in ("position_ids", *DOCUMENTS):
        value = getattr(marks, name)
        if value is not None and not are_integers(value):
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"{name} must be a tensor of integers; got {kind}.")
    for name in ("position_ids", "seq_idx"):
        value = getattr(marks, name)
        if value is not None and (value.ndim != 2 or value.shape[1] != length or value.shape[0] not in (1, batch)):
            hint = STEP if length == 1 and name == "seq_idx" else ""
            shapes = " or ".join(str((rows, length)) for rows in sorted({1, batch}, reverse=True))
            raise ValueError(f"{name} must have shape {shapes}; got {tuple(value.shape)}.{hint}")


def are_integers(x) -> bool:
    """Whether x is a tensor of integers, which truths are not."""
    if not isinstance(x, torch.Tensor):
        return False
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
