"""What each cause of slowness on a CPU costs: ours as it is, and with one thing outside of the library switched.

Where a mend works, its switch makes no difference any more: numbers that are never subnormal need no flushing.
What stays switched stays so for the line's own samples alone, in this process.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from scrubjay.examples.benchmarks.benchmark_rows import Row, Shape
from scrubjay.examples.benchmarks.comparison import in_turn, summarized
from scrubjay.examples.benchmarks.model_work import model_pass


@contextmanager
def flushed() -> Iterator[None]:
    """Subnormal numbers count as zero; PyTorch has no way to ask what was set, and starts without."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def without_onednn() -> Iterator[None]:
    """Every product by PyTorch's own choice: MKL in float32, its plain loops in bfloat16."""
    before = torch.backends.mkldnn.set_flags(False)[0]
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(before)


@contextmanager
def one_thread() -> Iterator[None]:
    """What is bound by calls and not by arithmetic takes as long with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Cause:
    """A thing that can be switched from outside, and the rows on which that is shown."""

    name: str
    switch: Callable[[], AbstractContextManager]
    works: tuple[str, ...]


CAUSES = (
    Cause("subnormal numbers flushed", flushed, ("prefill", "decode", "train")),
    Cause("no oneDNN", without_onednn, ("prefill", "decode", "train")),
    Cause("one thread", one_thread, ("prefill", "decode")),
)


def rows(shape: Shape) -> list[Row]:
    """What is timed with each switch, float32 and bfloat16."""
    long, short, decoded = shape.long, shape.short, shape.decoded
    return [
        row
        for dtype in ("float32", "bfloat16")
        for row in (
            Row(f"prefill {long} {dtype}", "prefill", long, dtype),
            Row(f"decode after {short} {dtype}, per token", "decode", short, dtype, passes=decoded),
            Row(f"forward + backward {short} {dtype}", "train", short, dtype),
        )
    ]


def lines(shape: Shape) -> list[tuple[Cause, Row]]:
    """Every cause on each of its rows, those of one dtype together."""
    return [
        (cause, replace(row, name=f"{row.name}: {cause.name}"))
        for row in rows(shape)
        for cause in CAUSES
        if row.work in cause.works
    ]


def measure_cause(cause: Cause, row: Row, model: PreTrainedModel, repetitions: int) -> dict:
    """A record of the row: peer is the same work with the switch."""
    plain = model_pass(model, row)

    def switched() -> int:
        with cause.switch():
            plain()
        return row.passes

    def as_it_is() -> int:
        plain()
        return row.passes

    sides: Mapping[str, Callable[[], int]] = {"peer": switched, "scrubjay": as_it_is}
    return summarized(row.name, in_turn(sides, repetitions), None) | {"cause": cause.name}
