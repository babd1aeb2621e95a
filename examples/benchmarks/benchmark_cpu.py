"""What `benchmark.py --cpu` measures: the same work done by a peer, by scrubjay, by bare products, in one run.

Models: transformers' own Mamba2 and our SSD with the same weights, checked to give the same logits before anything is
timed. SW-SKA: torch's scaled_dot_product_attention with a dense band mask, and `window_attention`. Then the lines of
benchmark_width.py, benchmark_recycled.py, benchmark_adore.py and benchmark_taipan.py, which say what is their peer.
A peak of memory is taken in a process of its own.

Times in seconds, memory in bytes.
"""

import gc
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from scrubjay.examples.benchmarks import (
    benchmark_adore,
    benchmark_causes,
    benchmark_recycled,
    benchmark_taipan,
    benchmark_width,
    llama_cpp_peer,
)
from scrubjay.examples.benchmarks.benchmark_rows import VARIANTS, Row, Shape, rows_of
from scrubjay.examples.benchmarks.benchmark_tables import most
from scrubjay.examples.benchmarks.ceilings import bandwidth, gemm_rates, weight_bytes
from scrubjay.examples.benchmarks.comparison import SIDES, Comparison, in_turn, summarized
from scrubjay.examples.benchmarks.model_work import (
    DEFAULT_CHUNK,
    counted,
    fastest_chunk,
    load,
    model_pass,
    products,
    set_chunk,
    tokens,
    window_pass,
    write_checkpoint,
)
from scrubjay.examples.benchmarks.saved_run import Rows, SavedRun
from scrubjay.examples.measuring.memory import high_water, memory_method

DTYPES = ("float32", "bfloat16")


def lines_of(shape: Shape) -> list[Comparison | benchmark_width.WidthLine]:
    """The systems that are not compared with a model of another library."""
    return [
        *benchmark_width.lines(shape),
        *benchmark_recycled.lines(shape.recycled),
        *benchmark_adore.lines(shape.adore, shape.adore_others),
        *benchmark_taipan.lines(shape.taipan),
    ]


def ceilings(shape: Shape) -> dict:
    """Bandwidth, and rates of the model's own products at the long prefill, in every type and library."""
    D, heads = shape.hidden_size, 2 * shape.hidden_size // shape.head_dim
    packed = 4 * D + 2 * shape.state_size + heads
    sizes = [(shape.long, D, packed), (shape.long, 2 * D, D), (1, D, packed), (1, D, shape.vocab_size)]
    rates = {dtype: gemm_rates(sizes, getattr(torch, dtype)) for dtype in DTYPES}
    return {"bytes_per_second": bandwidth(shape.traffic), "operations_per_second": rates}


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    return float((x.float() - reference).norm() / reference.norm())


@torch.no_grad()
def check_logits(folder: str, shape: Shape) -> dict[str, float]:
    """Relative errors of the logits; a benchmark of two different functions would mean nothing.

    In float32 both differ by rounding alone, 1.6e-6 at the 130M shape when this was written.
    In bfloat16 each is held against float32: ours must not be further from it than theirs, give or take chance.
    """
    ids = tokens(shape.vocab_size, shape.short)
    logits = {(side, dtype): load(side, folder, dtype)(ids).logits for dtype in DTYPES for side in SIDES}
    exact = logits["peer", "float32"]
    theirs = relative_error(logits["peer", "bfloat16"], exact)
    return {
        "logits float32": checked("logits float32", logits["scrubjay", "float32"], exact, 1e-5),
        "logits bfloat16": checked("logits bfloat16", logits["scrubjay", "bfloat16"], exact, 1.5 * theirs),
        "logits bfloat16, peer": theirs,
    }


def check_window(shape: Shape) -> dict[str, float]:
    """Relative error of the two outputs, where 1e-5 is far above float32 rounding and far below one key too many."""
    return {"SW-SKA": checked("SW-SKA", window_pass("scrubjay", shape)(), window_pass("peer", shape)(), 1e-5)}


def checked(name: str, x: torch.Tensor, reference: torch.Tensor, limit: float) -> float:
    """The relative error, or RuntimeError where it is above its limit (or not a number)."""
    error = relative_error(x, reference)
    if not error <= limit:
        raise RuntimeError(f"{name}: the two sides differ by {error:.1e} relative, at most {limit:.1e} is rounding.")
    return error


def time_row(row: Row, shape: Shape, models: dict[str, PreTrainedModel], repetitions: int) -> dict:
    """Seconds of all sides in turn."""
    record: dict = {"limit": row.limit}
    if row.work == "window":
        work = {side: counted(window_pass(side, shape), 1) for side in SIDES}
        return summarized(row.name, in_turn(work, repetitions), row.floor) | record
    if row.variant:
        models = {"peer": models["scrubjay"], "scrubjay": VARIANTS[row.variant](deepcopy(models["scrubjay"]))}
    elif row.work == "decode":
        set_chunk(models["peer"], min(DEFAULT_CHUNK, row.length))  # of the prompt before it
    else:
        chunk, timed = fastest_chunk(models["peer"], row) if row.chunks else (DEFAULT_CHUNK, {})
        set_chunk(models["peer"], chunk)
        record |= {"chunk": chunk, "seconds_by_chunk": timed}
    work = {side: counted(model_pass(models[side], row), row.passes) for side in SIDES}
    if not row.variant:  # whose weights are no plain matrices
        work["products"] = products(models["scrubjay"], row)
    record = summarized(row.name, in_turn(work, repetitions), row.floor) | record
    record |= {"tokens_per_second": row.tokens / record["scrubjay"], "variant": row.variant}
    return record | ({"weight_bytes": weight_bytes(models["scrubjay"])} if row.work == "decode" else {})


def peak_memory(side: str, row: Row, shape: Shape, folder: str, chunk: int, threads: int) -> int:
    """Bytes that one pass takes above the idle model at its highest; run in a fresh process."""
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    if row.work == "window":
        before = high_water(reset=True)
        window_pass(side, shape)()  # inputs (both sides) and mask (the peer) are part of what it takes
        return high_water() - before
    model = load(side, folder, row.dtype)
    for parameter in model.parameters():  # out of the file's mapped pages, which the first pass would otherwise read in
        parameter.data = parameter.data.clone()
    if side == "peer":
        set_chunk(model, chunk)
    work = model_pass(model, row)
    gc.collect()
    before = high_water(reset=True)
    work()
    return high_water() - before


def memory_row(row: Row, shape: Shape, folder: str, chunk: int, threads: int) -> dict:
    """Peak memory of both sides, each in a new process forked from one that has only imported, not computed."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        jobs = {side: pool.submit(peak_memory, side, row, shape, folder, chunk, threads) for side in SIDES}
        samples = {side: [job.result()] for side, job in jobs.items()}
    return summarized(row.name, samples, row.floor, "bytes") | ({} if row.work == "window" else {"chunk": chunk})


def measure(
    shape: Shape,
    *,
    repetitions: int,
    only: str = "",
    llama_cpp: Path | None = None,
    causes: bool = False,
    saved: SavedRun | None = None,
    log: Callable[[str], None] = print,
) -> dict:
    """Measure the rows whose name contains `only`; returns ceilings, agreement of the sides and a record per row.

    Args:
        llama_cpp: where it was built; its rows come last.
        causes: those of benchmark_causes.py instead of all others.
        saved: takes what is measured after every row, and has the rows that need not be measured again.
    """
    earlier = saved.found if saved else {}
    machine = earlier.get("ceilings") or ceilings(shape)
    log(most(machine))
    measured = {"ceilings": machine, "agreement": earlier.get("agreement", {}), "memory": memory_method(), "rows": []}
    rows = Rows(measured, earlier.get("rows", []), saved.save if saved else None, log)
    with tempfile.TemporaryDirectory() as folder:
        models = Pairs(shape, folder)
        if causes:
            for cause, row in benchmark_causes.lines(shape):
                if only in row.name and not rows.keep(row.name):
                    rows.add(benchmark_causes.measure_cause(cause, row, models(row.dtype)["scrubjay"], repetitions))
        else:
            measure_rows([row for row in rows_of(shape) if only in row.name], models, repetitions, rows, log)
            for line in lines_of(shape):
                if only in line.name and not rows.keep(line.name):
                    rows.add(line.measure(repetitions))
        if llama_cpp:
            measure_llama_cpp(llama_cpp, models, repetitions, only, rows)
    return measured


def measure_llama_cpp(place: Path, models: "Pairs", repetitions: int, only: str, rows: Rows) -> None:
    """Add the rows of llama.cpp; what it needs is made for all of them together, so that they are kept together."""
    names = [row.name for row in llama_cpp_peer.rows(models.shape) if only in row.name]
    if rows.missing(names):
        place_of = {"folder": Path(models.folder), "repetitions": repetitions, "only": only}
        found = llama_cpp_peer.compare(place, models.checkpoint, models.shape, **place_of, add=rows.add)
        rows.measured["agreement"]["llama.cpp"] = found
    else:
        for name in names:
            rows.keep(name)


class Pairs:
    """The two sides' models in a dtype, from one checkpoint that is written when it is needed; the last are held."""

    def __init__(self, shape: Shape, folder: str):
        self.shape, self.folder, self.held = shape, folder, ("", {})

    @cached_property
    def checkpoint(self) -> str:
        folder = f"{self.folder}/checkpoint"
        write_checkpoint(self.shape, folder)
        return folder

    def __call__(self, dtype: str) -> dict[str, PreTrainedModel]:
        if self.held[0] != dtype:
            self.held = ("", {})  # the others go first
            self.held = (dtype, {side: load(side, self.checkpoint, dtype) for side in SIDES})
        return self.held[1]


def agreements(rows: list[Row], models: Pairs, log: Callable[[str], None]) -> dict[str, float]:
    """Relative differences of the two sides in what these rows use."""
    found: dict[str, float] = {}
    if any(row.work != "window" for row in rows):
        found |= check_logits(models.checkpoint, models.shape)
    if any(row.work == "window" for row in rows):
        found |= check_window(models.shape)
    if found:
        log("relative difference of the two sides: " + ", ".join(f"{k} {v:.1e}" for k, v in found.items()))
    return found


def measure_rows(
    wanted: list[Row], models: Pairs, repetitions: int, rows: Rows, log: Callable[[str], None] = print
) -> None:
    """Add a record for each row. Memory is taken at the chunk size at which the same work was fastest for the peer;
    where that was not timed, at the smallest."""
    new = [row for row in wanted if rows.missing([row.name])]
    rows.measured["agreement"] |= agreements(new, models, log)
    chunks: dict[str, int] = {}
    for row in wanted:
        record = rows.keep(row.name)
        if not record and row.memory:
            chunk = chunks.get(row.name.removeprefix("memory, "), min(row.chunks, default=DEFAULT_CHUNK))
            checkpoint = "" if row.work == "window" else models.checkpoint
            record = rows.add(memory_row(row, models.shape, checkpoint, chunk, torch.get_num_threads()))
        elif not record:
            pair = {} if row.work == "window" else models(row.dtype)
            record = rows.add(time_row(row, models.shape, pair, repetitions))
        if "chunk" in record:
            chunks[row.name] = record["chunk"]
