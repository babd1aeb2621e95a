"""The work that `benchmark.py --cpu` times: a prefill, decode steps, a training step, or one layer's attention.

B batch, T time, H heads, P head size. q, v (1, T, H, P), k (1, T, 1, P).
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedModel

from scrubjay import SSDForCausalLM
from scrubjay.configuration.cache_names import CACHE_NAMES
from scrubjay.examples.benchmarks.benchmark_rows import Row, Shape
from scrubjay.examples.benchmarks.ceilings import Alone, products_of
from scrubjay.examples.benchmarks.comparison import WARM
from scrubjay.kernels.window import window_attention

DEFAULT_CHUNK = 256  # of transformers' Mamba2; a shorter prompt is padded to it
SEARCH = 20.0  # seconds in which chunk sizes are compared


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


def tokens(vocab_size: int, length: int, batch: int = 1) -> torch.Tensor:
    """The same random ids for all sides, (B, T)."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


def model_pass(model: PreTrainedModel, row: Row) -> Callable[[], object]:
    """A function without arguments that does the row's work once."""
    vocab_size = model.config.vocab_size
    ids = tokens(vocab_size, row.length, row.batch)
    model.train(row.work == "train")
    if row.work == "train":
        return lambda: train_step(model, ids)
    if row.work == "prefill":
        return lambda: prefill(model, ids)
    out = prefill(model, ids)
    cached = next(name for name in (*CACHE_NAMES, "cache_params") if name in out)  # the last: Mamba2's before 5.24
    cache = {cached: out[cached]}
    steps = tokens(vocab_size, row.passes, row.batch).split(1, dim=1)

    @torch.no_grad()
    def decode() -> None:
        for step in steps:
            cache[cached] = model(input_ids=step, use_cache=True, logits_to_keep=1, **cache)[cached]

    return decode


def products(model: PreTrainedModel, row: Row) -> Alone:
    """The matrix products of the row's work, a training step's with their gradients."""
    ids = tokens(model.config.vocab_size, row.length, row.batch)
    if row.work == "train":
        with torch.no_grad():
            return Alone(products_of(model, lambda: model(input_ids=ids, use_cache=False)), gradients=True)
    if row.work == "prefill":
        return Alone(products_of(model, lambda: prefill(model, ids)))
    return Alone(products_of(model, model_pass(model, row)), units=row.passes)


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


def counted(work: Callable[[], object], units: int) -> Callable[[], int]:
    """The work, which then says how many units it did."""

    def run() -> int:
        work()
        return units

    return run


def fastest_chunk(model: Mamba2ForCausalLM, row: Row) -> tuple[int, dict[int, float]]:
    """Chunk size at which transformers does this work fastest, and the seconds of all that were tried.

    One pass each, from the smallest on, as many as SEARCH allows: the smallest was the fastest of long prompts on every
    processor so far. A pass before them counts for nothing, unless it is so long (WARM) that it stands for the first.
    """
    smallest, *others = sorted(row.chunks)
    set_chunk(model, smallest)
    if not others:
        return smallest, {}
    work = model_pass(model, row)
    spent = cold = seconds(work)
    timed = {smallest: cold} if cold >= WARM else {}
    for chunk in (smallest, *others)[len(timed) :]:
        if timed and spent + max(timed.values()) > SEARCH:
            break
        set_chunk(model, chunk)
        timed[chunk] = seconds(work)
        spent += timed[chunk]
    return min(timed, key=timed.get), timed


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
