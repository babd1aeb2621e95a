"""Decode steps of ADORE's cache against full attention, at equal batch and in equal memory.

The shape is a multi-head (MHA) Llama: there a cached token is dear and a rebuilt one cheap. Full attention has all its
memory from the start, filled at random with `context` tokens. ADORE reads as many, in pieces, and is measured with R
rebuilt tokens a step and with none, apart, because they cost different things. The controller is untrained: its time
counts, its choices do not.

    python examples/benchmark_adore.py            on a CUDA device; without one two layers on the CPU, about ten minutes
    python examples/benchmark_adore.py --smoke    the code path in seconds, the numbers mean nothing
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from scrubjay import AdoreCache
from scrubjay.examples.measure import cache_nbytes
from scrubjay.examples.report import commit, machine, versions
from scrubjay.modeling.controller import Controller

RESULTS = Path(__file__).resolve().parent / "results" / "benchmark_adore.json"


@dataclass(frozen=True)
class Shape:
    """The decoder (Llama-2-7B's heads, fewer layers), and the cache: m tokens, R rebuilt, n before the clock starts."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 8
    num_attention_heads: int = 32
    vocab_size: int = 32000
    context: int = 8192
    cache_size: int = 192
    rebuild: int = 8
    batch: int = 8
    steps: int = 64
    dtype: str = "bfloat16"


CPU = Shape(num_hidden_layers=2, steps=10)
SMOKE = Shape(32, 48, 2, 4, 97, context=40, cache_size=8, rebuild=3, batch=2, steps=3, dtype="float32")


def build(shape: Shape, device: str) -> LlamaForCausalLM:
    """A random model; every query head has a key head of its own."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    sizes = {name: getattr(shape, name) for name in names}
    config = LlamaConfig(**sizes, max_position_embeddings=shape.context + shape.steps + 1, attn_implementation="sdpa")
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(getattr(torch, shape.dtype)).eval()


def full_cache(model, shape: Shape, batch: int) -> StaticCache:
    """Keys and values of the whole text, allocated once."""
    return StaticCache(config=model.config, max_cache_len=shape.context + shape.steps + 1)


def adore_cache(model, shape: Shape, rebuild: int) -> AdoreCache:
    """With a controller of the default width."""
    torch.manual_seed(0)
    controller = Controller(model.config.hidden_size).to(model.device).eval()
    settings = {"cache_size": shape.cache_size, "rebuild": rebuild, "prefill": "chunked"}
    return AdoreCache(model, controller=controller, **settings)


@torch.no_grad()
def fill(model, cache, ids: torch.Tensor) -> None:
    """Bring a cache to the end of a prompt: full attention's at random, which costs its steps the same."""
    if isinstance(cache, AdoreCache):
        for piece in ids.split(1024, 1):
            model(piece, past_key_values=cache, logits_to_keep=1)
        return
    config, generator = model.config, torch.Generator(model.device).manual_seed(0)
    shape = (len(ids), config.num_key_value_heads, ids.shape[1], config.head_dim)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, generator=generator, device=ids.device).to(model.dtype) for _ in "kv")
        cache.update(keys, values, layer)


@torch.no_grad()
def decode_rate(model, shape: Shape, batch: int, make: Callable) -> dict:
    """Tokens per second of greedy steps after `context` tokens, and bytes of the cache before and after them."""
    ids = torch.randint(0, shape.vocab_size, (batch, shape.context), device=model.device)
    cache = make()
    fill(model, cache, ids)
    token, early = ids[:, -1:], kept_nbytes(cache)
    start = 0.0
    for step in range(shape.steps + 1):
        if step == 1:  # the first one compiles and allocates
            synchronize(model)
            start = time.perf_counter()
        token = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    synchronize(model)
    seconds = time.perf_counter() - start
    late = kept_nbytes(cache)
    if isinstance(cache, AdoreCache) and early != late:
        raise RuntimeError(f"Keys and values of {early} bytes have become {late}: they must not grow.")
    return {"tokens_per_second": batch * shape.steps / seconds, "kv_nbytes": late, "nbytes": cache_nbytes(cache)}


def kept_nbytes(cache) -> int:
    """Bytes of keys and values alone."""
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def synchronize(model) -> None:
    """Wait for the device, so that the clock measures work and not its queueing."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def equal_memory_batch(full: dict, adore: dict, batch: int) -> int:
    """Rows whose ADORE caches fill the bytes of the full cache of `batch` rows."""
    return max(batch, int(full["nbytes"] / adore["nbytes"] * batch))


def benchmark(shape: Shape, device: str, max_batch: int) -> dict:
    """Every measurement: full attention, then ADORE with R and without, each at equal batch and in equal memory."""
    model, rows = build(shape, device), []

    def measure(name, batch, make):
        numbers = decode_rate(model, shape, batch, make)
        rows.append({"name": name, "batch": batch} | numbers)
        print("{name:32s} batch {batch:4d}  {tokens_per_second:10.1f} tokens/s  {nbytes:15,d} bytes".format(**rows[-1]))
        return numbers

    full = measure("full attention", shape.batch, lambda: full_cache(model, shape, shape.batch))
    for rebuild in (shape.rebuild, 0):
        name = f"ADORE, {rebuild} rebuilt"
        adore = measure(name, shape.batch, lambda rebuild=rebuild: adore_cache(model, shape, rebuild))
        larger = min(equal_memory_batch(full, adore, shape.batch), max_batch)
        measure(f"{name}, equal memory", larger, lambda rebuild=rebuild: adore_cache(model, shape, rebuild))
    return {"shape": asdict(shape), "rows": rows}


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON to write (default: results/benchmark_adore.json)")
    parser.add_argument("--max-batch", type=int, default=64, help="most rows in equal memory (default 64)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads on a CPU (default 2)")
    parser.add_argument("--smoke", action="store_true", help="seconds on a CPU; its times mean nothing")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() and not args.smoke else "cpu"
    shape = SMOKE if args.smoke else CPU if device == "cpu" else Shape()
    if not args.smoke:
        torch.set_num_threads(args.threads)
    result = benchmark(shape, device, 4 if args.smoke else args.max_batch)
    result |= {"command": shlex.join(["python", "examples/benchmark_adore.py", *argv])}
    result |= {"commit": commit(), "machine": machine(), "versions": versions()}
    out = args.out or (None if args.smoke else RESULTS)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
