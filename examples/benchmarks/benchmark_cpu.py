"""What `benchmark.py --cpu` measures: the same work done by a peer and by scrubjay, in one run on one machine.

Models: transformers' own Mamba2 and our SSD with the same weights, checked to give the same logits before anything is
timed. SW-SKA: torch's scaled_dot_product_attention with a dense band mask, and `window_attention`. Then the lines of
benchmark_recycled.py, benchmark_adore.py and benchmark_taipan.py, which say what is their peer.
A peak of memory is taken in a process of its own.

B = 1, T time, H heads, P head size. q, v (1, T, H, P), k (1, T, 1, P). Times in seconds, memory in bytes.
"""

import gc
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedModel
from transformers.utils import logging

from scrubjay import SSDForCausalLM
from scrubjay.configuration.cache_names import CACHE_NAMES
from scrubjay.examples.benchmarks import benchmark_adore, benchmark_recycled, benchmark_taipan
from scrubjay.examples.benchmarks.comparison import SIDES, Comparison, in_turn, summarized
from scrubjay.examples.measuring.memory import high_water, memory_method
from scrubjay.kernels.window import window_attention

DTYPES = ("float32", "bfloat16")
DEFAULT_CHUNK = 256  # of transformers' Mamba2; a shorter prompt is padded to it


@dataclass(frozen=True)
class Shape:
    """Sizes of the comparison. The model is the 130M shape of Mamba-2 (one group, tied embeddings)."""

    hidden_size: int = 768
    num_hidden_layers: int = 24
    state_size: int = 128
    head_dim: int = 64
    vocab_size: int = 50288
    chunks: tuple[int, ...] = (64, 128, 256)  # transformers is compared at the fastest of these
    long: int = 2048  # tokens of the long prefill
    longest: int = 8192
    short: int = 512  # tokens of the short prefill, of a training step, and before decoding
    decoded: int = 16  # tokens of one decode pass
    window_length: int = 8192
    window: int = 512
    window_heads: int = 16
    recycled: benchmark_recycled.Sizes = benchmark_recycled.LARGE
    adore: benchmark_adore.Sizes = benchmark_adore.LARGE
    adore_others: tuple[benchmark_adore.Sizes, ...] = benchmark_adore.OTHERS
    taipan: benchmark_taipan.Sizes = benchmark_taipan.LARGE


SMOKE = Shape(
    64,
    2,
    16,
    32,
    256,
    (16, 32),
    64,
    96,
    32,
    4,
    window_length=256,
    window=32,
    window_heads=2,
    recycled=benchmark_recycled.SMALL,
    adore=benchmark_adore.SMALL,
    adore_others=(),
    taipan=benchmark_taipan.SMALL,
)


@dataclass(frozen=True)
class Row:
    """One measurement of both models.

    Args:
        work: "prefill", "decode", "train" (forward and backward) of the models; or "window", one layer's attention.
        length: T, tokens of one pass; for decode those before it.
        floor: the ratio peer / scrubjay that the project promises, None where it promises none.
        chunks: chunk sizes from which transformers' fastest is taken; empty leaves its default.
        passes: units of one pass, so that decode is a time per token.
        memory: peak memory above the idle model instead of time.
    """

    name: str
    work: str
    length: int
    dtype: str = "float32"
    floor: float | None = None
    chunks: tuple[int, ...] = ()
    passes: int = 1
    memory: bool = False


def rows_of(shape: Shape) -> list[Row]:
    """The table, in its order; rows of one dtype stand together because only one pair of models is held."""
    long, short, decoded, chunks, T = shape.long, shape.short, shape.decoded, shape.chunks, shape.window_length
    return [
        Row(f"prefill {long} float32", "prefill", long, floor=2.4, chunks=chunks),
        Row("prompt of 1 token float32", "prefill", 1, floor=5.0),
        Row(f"decode after {short} float32, per token", "decode", short, floor=2.0, passes=decoded),
        Row(f"forward + backward {short} float32", "train", short, floor=2.5, chunks=chunks),
        Row(f"prefill {shape.longest} float32", "prefill", shape.longest, chunks=chunks[:1]),
        Row(f"prefill {short} bfloat16", "prefill", short, "bfloat16", floor=4.0, chunks=chunks),
        Row(f"decode after {short} bfloat16, per token", "decode", short, "bfloat16", floor=2.0, passes=decoded),
        Row(f"forward + backward {short} bfloat16", "train", short, "bfloat16", chunks=chunks),
        Row(f"prefill {shape.longest} bfloat16", "prefill", shape.longest, "bfloat16", chunks=chunks[:1]),
        Row(f"SW-SKA {T}, window {shape.window} float32", "window", T, floor=4.0),
        Row(f"memory, prefill {long} float32", "prefill", long, chunks=chunks, memory=True),
        Row(f"memory, forward + backward {short} float32", "train", short, floor=2.0, chunks=chunks, memory=True),
        Row(f"memory, SW-SKA {T}, window {shape.window}", "window", T, memory=True),
    ]


def lines_of(shape: Shape) -> list[Comparison]:
    """The systems that are not compared with a model of another library."""
    return [
        *benchmark_recycled.lines(shape.recycled),
        *benchmark_adore.lines(shape.adore, shape.adore_others),
        *benchmark_taipan.lines(shape.taipan),
    ]


def write_checkpoint(shape: Shape, folder: str) -> None:
    """A randomly initialised Mamba2 of transformers, in its own layout."""
    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        state_size=shape.state_size,
        head_dim=shape.head_dim,
        num_heads=2 * shape.hidden_size // shape.head_dim,
        vocab_size=shape.vocab_size,
        n_groups=1,
        chunk_size=DEFAULT_CHUNK,
        tie_word_embeddings=True,
        initializer_range=0.02,  # its default of 0.1 makes a chaotic network, whose bfloat16 logits are a third noise
    )
    Mamba2ForCausalLM(config).save_pretrained(folder)


def load(side: str, folder: str, dtype: str) -> PreTrainedModel:
    """Either side from the one checkpoint."""
    cls = Mamba2ForCausalLM if side == "peer" else SSDForCausalLM
    return cls.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def set_chunk(model: Mamba2ForCausalLM, chunk: int) -> None:
    """Chunk size of transformers' scan: changes its speed and memory, not its result."""
    for block in model.backbone.layers:
        block.mixer.chunk_size = chunk


def tokens(vocab_size: int, length: int) -> torch.Tensor:
    """The same random ids for both sides, (1, T)."""
    return torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(length))


def model_pass(model: PreTrainedModel, work: str, length: int, shape: Shape) -> Callable[[], object]:
    """A function without arguments that does the work once."""
    ids = tokens(shape.vocab_size, length)
    model.train(work == "train")
    if work == "train":
        return lambda: train_step(model, ids)
    if work == "prefill":
        return lambda: prefill(model, ids)
    out = prefill(model, ids)
    cached = next(name for name in (*CACHE_NAMES, "cache_params") if name in out)  # the last: Mamba2's before 5.24
    cache = {cached: out[cached]}
    steps = tokens(shape.vocab_size, shape.decoded).split(1, dim=1)

    @torch.no_grad()
    def decode() -> None:
        for step in steps:
            cache[cached] = model(input_ids=step, use_cache=True, logits_to_keep=1, **cache)[cached]

    return decode


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: torch.Tensor):
    return model(input_ids=ids, use_cache=True, logits_to_keep=1)


def train_step(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Forward and backward; the gradients are dropped, no optimizer runs."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def window_pass(side: str, shape: Shape) -> Callable[[], torch.Tensor]:
    """SW-SKA, one layer's attention. The mask is made outside, because a model makes it once for all its layers."""
    generator = torch.Generator().manual_seed(0)
    T, H, P = shape.window_length, shape.window_heads, shape.head_dim
    q, k, v = (torch.randn(1, T, heads, P, generator=generator) for heads in (H, 1, H))
    if side == "scrubjay":
        return torch.no_grad()(lambda: window_attention(q, k, v, window=shape.window))
    mask = torch.ones(T, T, dtype=torch.bool).tril_().triu_(1 - shape.window)  # in place: nothing larger than itself
    q, k, v = (x.transpose(1, 2) for x in (q, k.expand_as(q), v))
    return torch.no_grad()(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2))


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


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def fastest_chunk(model: Mamba2ForCausalLM, row: Row, shape: Shape) -> tuple[int, dict[int, float]]:
    """Chunk size at which transformers does this work fastest (better of two, so not the cold one), and all seen."""
    timed = {}
    for chunk in row.chunks:
        set_chunk(model, chunk)
        work = model_pass(model, row.work, row.length, shape)
        timed[chunk] = min(seconds(work), seconds(work))
    return min(timed, key=timed.get), timed


def time_row(row: Row, shape: Shape, models: dict[str, PreTrainedModel], repetitions: int) -> dict:
    """Seconds of both sides in turn."""
    record = {}
    if row.work == "window":
        work = {side: window_pass(side, shape) for side in SIDES}
    else:
        chunk, timed = fastest_chunk(models["peer"], row, shape) if row.chunks else (DEFAULT_CHUNK, {})
        set_chunk(models["peer"], chunk)
        record = {} if row.work == "decode" else {"chunk": chunk, "seconds_by_chunk": timed}
        work = {side: model_pass(models[side], row.work, row.length, shape) for side in SIDES}

    def counted(side: str) -> Callable[[], int]:
        def run() -> int:
            work[side]()
            return row.passes

        return run

    return summarized(row.name, in_turn({side: counted(side) for side in SIDES}, repetitions), row.floor) | record


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
    work = model_pass(model, row.work, row.length, shape)
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


def measure(shape: Shape, *, repetitions: int, only: str = "", log: Callable[[str], None] = print) -> dict:
    """Measure the rows whose name contains `only`; returns the agreement of the two sides and a record per row."""
    rows = [row for row in rows_of(shape) if only in row.name]
    agreement: dict[str, float] = {}
    records: list[dict] = []

    def add(record: dict) -> None:
        log(f"  {record['name']}: {record['ratio']:.2f}x")
        records.append(record)

    with tempfile.TemporaryDirectory() as folder:
        if any(row.work != "window" for row in rows):
            write_checkpoint(shape, folder)
            agreement |= check_logits(folder, shape)
        if any(row.work == "window" for row in rows):
            agreement |= check_window(shape)
        log("relative difference of the two sides: " + ", ".join(f"{k} {v:.1e}" for k, v in agreement.items()))

        @lru_cache(maxsize=1)
        def models(dtype: str) -> dict[str, PreTrainedModel]:
            return {side: load(side, folder, dtype) for side in SIDES}

        for row in rows:
            if row.memory:  # at the chunk size at which the same work was fastest; without that row, at the smallest
                timed = (r["chunk"] for r in records if row.chunks and r["name"] == row.name.removeprefix("memory, "))
                chunk = next(timed, min(row.chunks, default=DEFAULT_CHUNK))
                add(memory_row(row, shape, folder, chunk, torch.get_num_threads()))
            else:
                add(time_row(row, shape, {} if row.work == "window" else models(row.dtype), repetitions))
        models.cache_clear()
    for line in lines_of(shape):
        if only in line.name:
            add(line.measure(repetitions))
    return {"agreement": agreement, "memory": memory_method(), "rows": records}
