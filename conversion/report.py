"""What a conversion read, wrote and left out, and what a check of it found."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from scrubjay.conversion.checkpoint import Checkpoint
from scrubjay.conversion.formats import Format
from scrubjay.conversion.keymap import Plan
from scrubjay.conversion.weights import Entries, nbytes


@dataclass
class Report:
    """Of one conversion.

    Attributes:
        source: as it was named.
        layouts: of the source and of the destination.
        family: the model of the zoo.
        tensors, parameters: numbers of tensors that were written, and of the model's parameters.
        bytes_read, bytes_written: of the files of weights.
        dtypes: for each, the bytes written.
        notes: where values of the configuration come from, and whatever else is worth knowing.
        left_out, new: tensors of the source that were not written, and tensors that the source does not have, with
            the reason of each.
        check: what `compare` found; None where no check was asked for.
    """

    source: str
    layouts: tuple[str, str]
    family: str
    tensors: int
    parameters: int
    bytes_read: int
    bytes_written: int
    dtypes: dict[str, int]
    notes: list[str]
    left_out: dict[str, str]
    new: dict[str, str]
    check: dict[str, Any] | None = field(default=None)

    @classmethod
    def of(
        cls,
        source: Any,
        theirs: Format,
        target: Format,
        checkpoint: Checkpoint,
        entries: Entries,
        files: list[Path],
        notes: list[str],
        plan: Plan,
        out: Plan,
    ) -> "Report":
        """Of a conversion whose weights are written."""
        dtypes: dict[str, int] = {}
        for entry in entries.values():
            name = str(entry[1]).removeprefix("torch.")
            dtypes[name] = dtypes.get(name, 0) + nbytes(*entry)
        return cls(
            source=str(source),
            layouts=(theirs.name, target.name),
            family=theirs.family,
            tensors=len(entries),
            parameters=sum(torch.Size(shape).numel() for shape in plan.shapes.values()),
            bytes_read=checkpoint.nbytes,
            bytes_written=sum(file.stat().st_size for file in files),
            dtypes=dtypes,
            notes=notes,
            left_out=plan.left_out | out.left_out,
            new=plan.new if not out.left_out else {},
        )

    def text(self) -> str:
        """For people, in Markdown."""
        lines = [
            f"{self.source}: {self.layouts[0]} -> {self.layouts[1]} ({self.family})",
            "",
            f"- {self.tensors} tensors, {self.parameters:,} parameters",
            f"- {self.bytes_read:,} bytes read, {self.bytes_written:,} bytes written",
            *(f"- {name}: {size:,} bytes" for name, size in self.dtypes.items()),
            *(f"- {note}" for note in self.notes),
            *_grouped("left out", self.left_out),
            *_grouped("new", self.new),
        ]
        if self.check is not None:
            lines += _check_lines(self.check)
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """conversion.json and conversion.md."""
        (folder / "conversion.json").write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        (folder / "conversion.md").write_text(f"# Conversion of {self.text()}\n", encoding="utf-8")


def _grouped(what, reasons):
    """One line for each reason, with how many tensors have it."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    for reason, members in names.items():
        more = f" and {len(members) - 1} more" if len(members) > 1 else ""
        yield f"- {what}: {members[0]}{more} ({reason})"


def _check_lines(check):
    yield from ("", f"Checked on {check['tokens']} random tokens, in float32:", "")
    bound = f"bound {check['allowed']:.2e}, of {check['bound']:g} * max(1, largest logit {check['scale']:.3g})"
    for what, value in check["max_logit_difference"].items():
        yield f"- {what}: logits differ by at most {value:.2e} ({bound})"
    if not check["max_logit_difference"]:
        yield f"- no comparison of logits: {check['why_not']}"
    for name, (theirs, ours) in check["config_differences"].items():
        yield f"- configuration: {name} is {ours!r}, was {theirs!r}"
    yield from (f"- sha256 of {name}: {value}" for name, value in check["sha256"].items())
