"""Which rows `benchmark.py --cpu` has, at which sizes.

B batch, T time. Times in seconds, memory in bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel

from scrubjay import quantize
from scrubjay.examples.benchmarks import benchmark_adore, benchmark_recycled, benchmark_taipan

# Other forms of the SSD model (fewer bits, compiled), each made of the float32 model as it was loaded: a name and the
# function. A line here gives it rows of prefill and decode beside the model that it was made of.
VARIANTS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "8 bits": partial(quantize, bits=8),
    "4 bits": partial(quantize, bits=4),
}


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
    brief: int = 64  # of a training step in bfloat16: transformers' takes minutes for 512 without such instructions
    decoded: int = 16  # tokens of one decode pass
    batches: tuple[int, ...] = (8, 32, 64)  # rows that are decoded at once, besides one
    begun: int = 16  # tokens of each before that: a state's size does not depend on them
    steps: int = 2  # of such a pass
    traffic: int = 2**28  # bytes of the arrays that bandwidth is measured on: more than caches hold
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
    16,
    4,
    batches=(2,),
    begun=4,
    steps=2,
    traffic=2**16,
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
    """One measurement of models, ours beside transformers'.

    Args:
        work: "prefill", "decode", "train" (forward and backward) of the models; or "window", one layer's attention.
        length: T, tokens of one pass; for decode those before it.
        floor: the ratio peer / scrubjay that the project promises, None where it promises none.
        limit: the most that scrubjay may take as a multiple of its products alone, in decode of reading its weights.
        chunks: chunk sizes from which transformers' fastest is taken; empty leaves its default.
        passes: units of one pass, so that decode is a time per step.
        batch: B.
        memory: peak memory above the idle model instead of time.
        variant: the name in VARIANTS of what is measured; then the peer is the model it was made of.
    """

    name: str
    work: str
    length: int
    dtype: str = "float32"
    floor: float | None = None
    limit: float | None = None
    chunks: tuple[int, ...] = ()
    passes: int = 1
    batch: int = 1
    memory: bool = False
    variant: str = ""

    @property
    def tokens(self) -> int:
        """Tokens that a unit of this work reads."""
        return self.batch * (1 if self.work == "decode" else self.length)


def rows_of(shape: Shape) -> list[Row]:
    """The table, in its order; rows of one dtype stand together because only one pair of models is held."""
    long, short, brief, longest, T = shape.long, shape.short, shape.brief, shape.longest, shape.window_length
    chunks, once = shape.chunks, shape.chunks[:1]
    return [
        Row(f"prefill {short} float32", "prefill", short, chunks=chunks),
        Row(f"prefill {long} float32", "prefill", long, floor=2.5, limit=1.7, chunks=chunks),
        Row(f"prefill {longest} float32", "prefill", longest, chunks=once),
        Row("prompt of 1 token float32", "prefill", 1, floor=5.0),
        *decode_rows(shape, "float32", 1.9, 1.25),
        Row(f"forward + backward {short} float32", "train", short, floor=2.5, chunks=chunks),
        *variant_rows(shape),
        Row(f"prefill {short} bfloat16", "prefill", short, "bfloat16", chunks=chunks),
        Row(f"prefill {long} bfloat16", "prefill", long, "bfloat16", chunks=chunks),
        Row(f"prefill {longest} bfloat16", "prefill", longest, "bfloat16", floor=4.0, chunks=once),
        *decode_rows(shape, "bfloat16", 3.0, 1.7),
        Row(f"forward + backward {brief} bfloat16", "train", brief, "bfloat16", chunks=once),
        Row(f"SW-SKA {T}, window {shape.window} float32", "window", T, floor=4.0),
        Row(f"memory, prefill {long} float32", "prefill", long, chunks=chunks, memory=True),
        Row(f"memory, forward + backward {short} float32", "train", short, floor=3.0, chunks=chunks, memory=True),
        Row(
            f"memory, forward + backward {brief} bfloat16", "train", brief, "bfloat16", chunks=once, memory=True
        ),
        Row(f"memory, SW-SKA {T}, window {shape.window}", "window", T, memory=True),
    ]  # fmt: skip


def decode_rows(shape: Shape, dtype: str, floor: float, limit: float) -> list[Row]:
    """A step of one text, which is what is promised, and of many."""
    short, begun = shape.short, shape.begun
    one = Row(f"decode after {short} {dtype}, per token", "decode", short, dtype, floor, limit, passes=shape.decoded)
    many = [
        Row(f"decode after {begun} {dtype}, batch {B}, per step", "decode", begun, dtype, passes=shape.steps, batch=B)
        for B in shape.batches
    ]
    return [one, *many]


def variant_rows(shape: Shape) -> list[Row]:
    short, decoded = shape.short, shape.decoded
    return [
        row
        for name in VARIANTS
        for row in (
            Row(f"prefill {short}, {name}", "prefill", short, variant=name),
            Row(f"decode after {short}, {name}, per token", "decode", short, passes=decoded, variant=name),
        )
    ]
