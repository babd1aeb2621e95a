"""From rows of names to a checked plan: which tensor of the target is made of which tensors of the source.

Everything that does not fit is gathered and said in one error, before anything is read or written.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from scrubjay.modeling.key_names import Copy, Ignore, Merge, New, Rename, Row, layer_of

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Recipe:
    """A tensor of the target: its sources, concatenated on dim 0; of that, one of `parts` equal parts."""

    sources: tuple[str, ...]
    part: int = 0
    parts: int = 1

    def make(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The tensor; `read` gives a source by its name."""
        tensors = [read(name) for name in self.sources]
        whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return whole.chunk(self.parts)[self.part] if self.parts > 1 else whole


@dataclass
class Plan:
    """How to make each tensor of the target, and what happens to the rest.

    recipes, shapes: by the target's names. copies: pairs of the source's names that must be equal. left_out: the
    source's names, with the reason. new: the target's names that the source cannot give, with the reason.
    """

    recipes: dict[str, Recipe] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    copies: list[tuple[str, str]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)

    @property
    def used(self) -> set[str]:
        """Names of the source that make something."""
        return {name for recipe in self.recipes.values() for name in recipe.sources}


def our_shapes(rows: Iterable[Row], theirs: Shapes) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint by our names, of those tensors for which all that is needed is there."""
    found: dict[str, tuple[int, ...]] = {}
    for row in rows:
        if not isinstance(row, (Rename, Merge)):
            continue
        first, *others = (row.theirs,) if isinstance(row, Rename) else row.theirs
        for name, shape in theirs.items():
            layer = layer_of(first, name)
            if layer is not None and all(other.replace("*", layer) in theirs for other in others):
                shapes = [shape, *(theirs[other.replace("*", layer)] for other in others)]
                whole = (sum(one[0] for one in shapes), *shape[1:]) if all(shapes) else ()
                found[row.ours.replace("*", layer)] = whole
    return found


def require(shapes: Shapes, dims: Mapping[str, int], what: str) -> None:
    """Refuse a checkpoint that is no `what`, as far as some of its tensors tell.

    Args:
        shapes: by our names.
        dims: how many dimensions each of these tensors has.

    Raises:
        ValueError: lists those that are missing, or those of another number of dimensions or without elements.
    """
    if absent := [name for name in dims if name not in shapes]:
        raise ValueError(f"The checkpoint is no {what}: it has nothing for {', '.join(absent)}.")
    if wrong := [
        f"{name} is {list(shapes[name])}, needed {n} dimensions"
        for name, n in dims.items()
        if len(shapes[name]) != n or 0 in shapes[name]
    ]:
        raise ValueError(f"The checkpoint is no {what}: wrong shape: {'; '.join(wrong)}.")


def theirs_of(rows: Iterable[Row], parts: Iterable[str]) -> list[str]:
    """Their names of our tensors in whose name one of the parts stands."""
    wanted = set(parts)
    names: list[str] = []
    for row in rows:
        if isinstance(row, (Rename, Merge)) and wanted & set(row.ours.split(".")):
            names += [row.theirs] if isinstance(row, Rename) else row.theirs
    return names


def plan_in(rows: Iterable[Row], theirs: Shapes, ours: Shapes) -> Plan:
    """Plan from their tensors to ours.

    Args:
        rows: the names.
        theirs: names and shapes that the checkpoint has.
        ours: names and shapes that our model wants; without a head where it is tied to the embedding.

    Raises:
        ValueError: lists every tensor that is missing, unknown or of a wrong shape.
    """
    rows, plan, faults = list(rows), Plan(), []
    for name, shape in ours.items():
        row, sources = _sources(rows, name)
        if isinstance(row, New):
            plan.new[name] = row.reason
            continue
        if row is None:
            faults.append(f"missing: no name is known for {name} {list(shape)} in this format")
            continue
        plan.recipes[name], plan.shapes[name] = Recipe(sources), tuple(shape)
        part = (shape[0] // len(sources), *shape[1:]) if len(sources) > 1 else tuple(shape)
        for source in sources:
            if source not in theirs:
                faults.append(f"missing: {source} {list(part)}")
            elif tuple(theirs[source]) != part:
                faults.append(f"wrong shape: {source} is {list(theirs[source])}, needed {list(part)}")
    faults += _rest(rows, theirs, plan)
    refuse(faults, "the checkpoint")
    return plan


def plan_out(rows: Iterable[Row], ours: Shapes) -> Plan:
    """Plan from our tensors to theirs.

    Raises:
        ValueError: lists every tensor of ours that has no name in the format.
    """
    rows, plan, faults = list(rows), Plan(), []
    for name, shape in ours.items():
        row, targets = _sources(rows, name)
        if row is None:
            faults.append(f"unknown: {name} {list(shape)} has no name in the target's format")
        elif isinstance(row, New):
            plan.left_out[name] = row.reason
        for part, target in enumerate(targets):
            plan.recipes[target] = Recipe((name,), part, len(targets))
            plan.shapes[target] = (shape[0] // len(targets), *shape[1:]) if len(targets) > 1 else tuple(shape)
    for row in rows:
        if isinstance(row, Copy) and row.written and row.theirs not in plan.recipes:
            plan.recipes[row.theirs], plan.shapes[row.theirs] = plan.recipes[row.of], plan.shapes[row.of]
    refuse(faults, "the model")
    return plan


def refuse(faults: list[str], what: str) -> None:
    """One error of all faults, none if there are none."""
    if faults:
        raise ValueError(f"{len(faults)} tensors of {what} do not fit. Nothing was written.\n  " + "\n  ".join(faults))


def _sources(rows, ours):
    """The row that gives one of our tensors, and their names for it."""
    for row in rows:
        if isinstance(row, (Rename, Merge, New)):
            layer = layer_of(row.ours, ours)
            if layer is not None:
                names = () if isinstance(row, New) else (row.theirs,) if isinstance(row, Rename) else row.theirs
                return row, tuple(name.replace("*", layer) for name in names)
    return None, ()


def _rest(rows, theirs, plan):
    """Sort out their tensors that make nothing: copies, what is known to be no weight, and faults."""
    faults, used = [], plan.used
    for name, shape in theirs.items():
        if name in used:
            continue
        row = next(
            (row for row in rows if isinstance(row, (Copy, Ignore)) and layer_of(row.theirs, name) is not None), None
        )
        if isinstance(row, Copy) and tuple(theirs.get(row.of, ())) == tuple(shape):
            plan.copies.append((name, row.of))
            plan.left_out[name] = f"repeats {row.of}"
        elif isinstance(row, Copy):
            faults.append(
                f"wrong shape: {name} is {list(shape)}, {row.of}, which it repeats, {list(theirs.get(row.of, ()))}"
            )
        elif row is not None:
            plan.left_out[name] = row.reason
        else:
            faults.append(f"unknown: {name} {list(shape)}")
    return faults
