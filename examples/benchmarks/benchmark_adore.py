"""Decode steps of ADORE's cache (scrubjay) against full attention (peer), at equal batch and in equal memory.

The decoders are multi-head (MHA) Llamas, where a cached token is dear and a rebuilt one cheap. Full attention has all
its memory from the start (transformers' StaticCache), filled at random; ADORE has read as many tokens. R tokens are
rebuilt in a step, or none, or R in every fourth step, apart, because they cost different things. The controller is
untrained: its time counts, its choices do not.

R rebuilt, m budget, n tokens before the clock starts. Times in seconds, memory in bytes.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from scrubjay import AdoreCache
from scrubjay.examples.benchmarks.comparison import Comparison
from scrubjay.examples.measuring.measure import cache_nbytes
from scrubjay.modeling.decoder.controller import Controller
from scrubjay.modeling.inputs.cache_argument import named

PIECE = 1024  # tokens of a call that reads the context
NEVER = 10**9  # steps from one that rebuilds to the next


@dataclass(frozen=True)
class Sizes:
    """A decoder (two layers of Llama-2-7B) and the cache: m tokens, R rebuilt, n before the clock starts."""

    name: str = "7B width"
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 2
    num_attention_heads: int = 32
    vocab_size: int = 32000
    context: int = 8192
    cache_size: int = 192
    rebuild: int = 8
    rebuild_from: str = "model"
    batch: int = 8
    most: int = 64  # rows at most in equal memory
    steps: int = 4  # of one pass
    passes: int = 32  # for which full attention has room
    dtype: str = "bfloat16"


LARGE, OTHERS = Sizes(), (Sizes(dtype="float32"), Sizes("160M", 768, 3072, 12, 12))
SMALL = Sizes("tiny", 32, 48, 2, 4, 97, 40, 8, 3, batch=2, most=4, steps=2, dtype="float32")


def decoder(sizes: Sizes) -> LlamaForCausalLM:
    """A random model; every query head has a key head of its own. The same for all caches of one shape."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    room = sizes.context + sizes.steps * sizes.passes
    shape = {name: getattr(sizes, name) for name in names} | {"max_position_embeddings": room}
    return random_llama(sizes.dtype, **shape)


@lru_cache(maxsize=1)
def random_llama(dtype: str, **shape: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**shape, attn_implementation="sdpa")
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


@torch.no_grad()
def full_cache(sizes: Sizes) -> StaticCache:
    """Keys and values of the whole text, allocated once and random, which costs its steps the same."""
    config, generator = decoder(sizes).config, torch.Generator().manual_seed(0)
    like = decoder(sizes).lm_head.weight
    cache = StaticCache(config=config, max_cache_len=config.max_position_embeddings)
    shape = (sizes.batch, config.num_key_value_heads, sizes.context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, generator=generator).to(like) for _ in "kv")
        cache.update(keys, values, layer)
    return cache


def adore_cache(sizes: Sizes, every: int = 1) -> AdoreCache:
    """One row that has read n tokens, and rebuilds R in every so many steps. Reading takes longer than all steps: what
    has read is kept, and this is its copy."""
    cache = deepcopy(has_read(sizes))
    cache.settings = replace(cache.settings, rebuild_every=every)
    return cache


@lru_cache(maxsize=1)
@torch.no_grad()
def has_read(sizes: Sizes) -> AdoreCache:
    """A cache after n tokens."""
    model = decoder(sizes)
    torch.manual_seed(0)
    controller = Controller(model.config.hidden_size).to(model.device).eval()
    settings = {"cache_size": sizes.cache_size, "rebuild": sizes.rebuild, "rebuild_from": sizes.rebuild_from}
    cache = AdoreCache(model, controller=controller, prefill="chunked", **settings)
    for piece in torch.randint(sizes.vocab_size, (1, sizes.context)).to(model.device).split(PIECE, 1):
        model(piece, **named(cache), logits_to_keep=1)
    return cache


def steps(sizes: Sizes, cache, batch: int) -> Callable[[], int]:
    """Greedy steps of all rows; returns the number of tokens."""
    model = decoder(sizes)
    token = torch.arange(batch, device=model.device)[:, None]

    @torch.no_grad()
    def run() -> int:
        nonlocal token
        for _ in range(sizes.steps):
            token = model(token, **named(cache), logits_to_keep=1).logits[:, -1:].argmax(-1)
        return batch * sizes.steps

    return run


def decode(sizes: Sizes, every: int, equal_memory: bool) -> dict[str, Callable[[], int]]:
    """Both sides with the same number of rows, or ours with as many as fit into the bytes of full attention's.

    All rows of ours are copies of one: the work is the same, and none of it is shared.
    """
    full, ours, batch = full_cache(sizes), adore_cache(sizes, every), sizes.batch
    if equal_memory:
        batch = min(max(cache_nbytes(full) // ours.nbytes, 1), sizes.most)
    ours.batch_repeat_interleave(batch)
    return {"peer": steps(sizes, full, sizes.batch), "scrubjay": steps(sizes, ours, batch)}


def row_weights(sizes: Sizes) -> dict[str, Callable[[], int]]:
    """Bytes a row, with everything that a cache knows of its tokens."""
    return {
        "peer": lambda: cache_nbytes(full_cache(sizes)) // sizes.batch,
        "scrubjay": lambda: has_read(sizes).nbytes,
    }


def growth(sizes: Sizes) -> dict[str, Callable[[], int]]:
    """Bytes of ADORE's keys and values after a quarter of the text (peer) and all of it."""

    def held(context: int) -> int:
        cache = has_read(replace(sizes, context=context))
        return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))

    whole = held(sizes.context)  # first: what has read it may be kept
    return {"peer": lambda: held(sizes.context // 4), "scrubjay": lambda: whole}


def decode_line(sizes: Sizes, every: int = 1, *, equal_memory: bool = False, floor=None) -> Comparison:
    where = "equal memory" if equal_memory else f"batch {sizes.batch}"
    how = f"R = {sizes.rebuild if every < NEVER else 0}" + (f" every {every}th step" if 1 < every < NEVER else "")
    make = partial(decode, sizes, every, equal_memory)
    return Comparison(f"ADORE decode, {sizes.name} {sizes.dtype}, {how}, {where}", make, floor)


def lines(sizes: Sizes, others: tuple[Sizes, ...] = ()) -> list[Comparison]:
    """What the benchmark shows of ADORE: one decoder in full, of others the step alone."""
    n = sizes.context
    return [  # those of one decoder together: one is held
        decode_line(sizes, floor=2.2),
        decode_line(sizes, 4),
        decode_line(sizes, NEVER),
        decode_line(sizes, equal_memory=True),
        decode_line(sizes, NEVER, equal_memory=True),
        Comparison(f"memory, ADORE row, {sizes.name} {sizes.dtype}", partial(row_weights, sizes), None, "bytes"),
        Comparison(f"memory, ADORE's keys at {n // 4} and {n}", partial(growth, sizes), 1.0, "bytes"),
        *(decode_line(other, every) for other in others for every in (1, NEVER)),
    ]
