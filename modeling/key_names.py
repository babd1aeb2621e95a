"""Kinds of rows for tables of names that tensors have elsewhere, which both `from_pretrained` and a converter read.

The tables, KEY_NAMES, stand in the modeling files.

A name is written with `*` where a layer's number stands: "backbone.layers.*.norm.weight".
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming


@dataclass(frozen=True)
class Rename:
    """One tensor of theirs is one of ours."""

    theirs: str
    ours: str


@dataclass(frozen=True)
class Merge:
    """Tensors of theirs, all of one shape and in this order along the first dimension, are one of ours."""

    theirs: tuple[str, ...]
    ours: str


@dataclass(frozen=True)
class Copy:
    """A tensor of theirs that repeats another of theirs, `of`, where ours has no tensor of its own for it.

    It may be absent; where it is present, the two must be equal. written: whether their files have it.
    """

    theirs: str
    of: str
    written: bool


@dataclass(frozen=True)
class Ignore:
    """A tensor of theirs that is not a weight, such as a buffer that generation left behind."""

    theirs: str
    reason: str


@dataclass(frozen=True)
class New:
    """A tensor of ours that they do not have: it starts from its initial value, and is left out on the way back."""

    ours: str
    reason: str


Row = Rename | Merge | Copy | Ignore | New


def same(*names: str) -> tuple[Rename, ...]:
    """Rows of tensors that have one name on both sides."""
    return tuple(Rename(name, name) for name in names)


def layer_of(pattern: str, name: str) -> str | None:
    """What stands for the first `*` in a name: "" where the pattern has none, None where the two do not match."""
    found = re.fullmatch(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
    return None if found is None else "".join(found.groups()[:1])


def as_mapping(*tables: Iterable[Row]) -> list[WeightRenaming | WeightConverter]:
    """Tables of several formats, as transformers' `register_checkpoint_conversion_mapping` takes them."""
    rows = list(dict.fromkeys(row for table in tables for row in table))
    renamed = [row for row in rows if isinstance(row, Rename) and row.theirs != row.ours]
    merged = [row for row in rows if isinstance(row, Merge)]
    mapping: list[WeightRenaming | WeightConverter] = [
        WeightRenaming("^" + _escaped(row.theirs).replace("*", r"(\d+)"), row.ours.replace("*", r"\1"))
        for row in renamed
    ]
    for row in merged:  # a converter names its target by what follows the layer's number
        theirs, ours = [_escaped(_behind_layer(name)) for name in row.theirs], _behind_layer(row.ours)
        mapping.append(WeightConverter(theirs, ours, operations=[Concatenate(dim=0)]))
    return mapping


def ignored(*tables: Iterable[Row]) -> list[str]:
    """Patterns of the names that these tables ignore, as `_keys_to_ignore_on_load_unexpected` takes them."""
    rows = {row.theirs for table in tables for row in table if isinstance(row, Ignore)}
    return [f"^{_escaped(name).replace('*', '[0-9]+')}$" for name in sorted(rows)]


def _escaped(name):
    return name.replace(".", r"\.")


def _behind_layer(name):
    return name.rsplit("*", 1)[-1]
