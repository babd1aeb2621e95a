"""What each cause of slowness on a CPU costs: ours as it is, and with one thing switched.

Of what is switched outside of the library, a mend leaves no difference: numbers that are never subnormal need no
flushing. What is switched inside is the mend itself, so that its line says what it gains on this processor.
What stays switched stays so for the line's own samples alone, in this process.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from scrubjay.examples.benchmarks.benchmark_rows import Row, Shape
from scrubjay.examples.benchmarks.comparison import in_turn, summarized
from scrubjay.examples.benchmarks.model_work import model_pass
from scrubjay.kernels import linear, recurrence
from scrubjay.modeling import base


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


def subnormal() -> AbstractContextManager:
    """Decays count down to the smallest number that there is."""
    return patch.object(recurrence, "NOTHING", {torch.float32: -200, torch.float64: -1100})


def one_chunk() -> AbstractContextManager:
    """A block has one chunk."""
    return patch.object(recurrence, "BLOCK", 1)


def onednn_for_all() -> AbstractContextManager:
    """Every product in float32 by oneDNN."""
    return patch.multiple(linear, SLOW_VECTORS=True, SLOW_MATRICES=True)


def onednn_for_none() -> AbstractContextManager:
    """Every product in float32 by what PyTorch calls, which is MKL on x86."""
    return patch.multiple(linear, SLOW_VECTORS=False, SLOW_MATRICES=False)


def many_calls() -> AbstractContextManager:
    """One token takes the way of a sequence."""
    return patch.object(base, "one_token", lambda x: False)


def as_matrix() -> AbstractContextManager:
    """One row of bfloat16 is a matrix."""
    return patch.object(linear, "_one_of_16_bits", lambda x, rows: False)


def in_one_piece() -> AbstractContextManager:
    """One row of float32 by oneDNN where it is MKL's in pieces of the weight."""
    return patch.object(linear, "_pieces", lambda rows, b: 0)


def in_16_bits() -> AbstractContextManager:
    """Products of bfloat16 in bfloat16 on a processor that has none."""
    return patch.object(linear, "WITHOUT_PRODUCTS", frozenset())


@dataclass(frozen=True)
class Cause:
    """A thing that can be switched, the rows on which that is shown, and their dtypes."""

    name: str
    switch: Callable[[], AbstractContextManager]
    works: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


BOTH, ALL = ("prefill", "train"), ("prefill", "decode", "train")
CAUSES = (
    Cause("subnormal numbers flushed", flushed, ALL),
    Cause("subnormal numbers made", subnormal, BOTH),
    Cause("no oneDNN", without_onednn, ALL, ("float32",)),
    Cause("oneDNN for all products", onednn_for_all, ALL, ("float32",)),
    Cause("PyTorch's choice for all products", onednn_for_none, ALL, ("float32",)),
    Cause("one chunk at a time", one_chunk, BOTH),
    Cause("the calls of a sequence", many_calls, ("decode",)),
    Cause("weights in one piece", in_one_piece, ("decode",), ("float32",)),
    Cause("one row as a matrix", as_matrix, ("decode",), ("bfloat16",)),
    Cause("products in 16 bits", in_16_bits, BOTH, ("bfloat16",)),
    Cause("one thread", one_thread, ("prefill", "decode")),
)


def rows(shape: Shape) -> list[Row]:
    """What is timed with each switch, float32 and bfloat16."""
    short, decoded = shape.short, shape.decoded
    return [
        row
        for dtype, length in (("float32", shape.long), ("bfloat16", short))
        for row in (
            Row(f"prefill {length} {dtype}", "prefill", length, dtype),
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
        if row.work in cause.works and row.dtype in cause.dtypes
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
