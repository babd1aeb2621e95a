"""torch.compile of the recurrent models beside the models as they are: graphs, breaks, recompilations, equality, time.

    python examples/benchmarks/benchmark_compile.py                                inductor, the 130M shape, all models
    python examples/benchmarks/benchmark_compile.py --model ssd --work step --layers 2      one of them, less of it
    python examples/benchmarks/benchmark_compile.py --backend aot_eager --smoke    tiny, without a C++ compiler

Each work is done at several lengths, or places of a text, before it is timed: "graphs" counts the programs that were
made, the first one of fixed sizes included. "error" is the largest difference of what both compute (logits; for
training the gradient of the embedding) over the largest value. Times are minima, taken in turn.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._dynamo.utils import counters

from scrubjay import RodimusConfig, RodimusForCausalLM, SSDConfig, SSDForCausalLM, TaipanConfig, TaipanForCausalLM

MODELS = ("ssd", "rodimus", "rodimus_plus", "taipan")
WORKS = ("prefill", "step", "training")


@dataclass(frozen=True)
class Sizes:
    """The 130M shape of Mamba-2, and the same width for the others."""

    hidden_size: int = 768
    num_hidden_layers: int = 24
    vocab_size: int = 50288
    length: int = 512
    steps: int = 16


SMOKE = Sizes(32, 2, 97, 40, 4)


def build(name: str, sizes: Sizes):
    """A model of random weights."""
    shape: dict = {
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_hidden_layers,
        "vocab_size": sizes.vocab_size,
    }
    torch.manual_seed(0)
    if name == "ssd":
        return SSDForCausalLM(SSDConfig(head_dim=min(64, sizes.hidden_size), **shape))
    heads: dict = {"num_attention_heads": max(1, sizes.hidden_size // 64)}
    if name == "taipan":
        return TaipanForCausalLM(TaipanConfig(head_dim=min(64, sizes.hidden_size), **heads, **shape))
    plus = name == "rodimus_plus"
    shape["num_hidden_layers"] = max(1, sizes.num_hidden_layers // 2) if plus else sizes.num_hidden_layers
    kind: dict = {} if plus else {"block_type": "rodimus"}
    return RodimusForCausalLM(RodimusConfig(**kind, **heads, **shape))


def works(model, sizes: Sizes) -> dict[str, Callable]:
    """name -> call(forward, turn): does the work by `forward` and returns what is compared. Lengths change with turns;
    those from 2 on are alike."""

    def ids(length, turn):
        return torch.randint(0, sizes.vocab_size, (1, length), generator=torch.Generator().manual_seed(turn))

    def length(turn):
        return sizes.length - 3 * max(0, 2 - turn)

    @torch.no_grad()
    def prefill(forward, turn):
        return forward(input_ids=ids(length(turn), turn), logits_to_keep=1).logits

    @torch.no_grad()
    def step(forward, turn):
        cache = model.cache_class(model)
        model(input_ids=ids(8 + turn, 0), cache=cache, logits_to_keep=1)
        started = time.perf_counter()
        every = [forward(input_ids=ids(1, place), cache=cache).logits for place in range(sizes.steps)]
        step.seconds = (time.perf_counter() - started) / sizes.steps
        return torch.cat(every)

    def training(forward, turn):
        batch = ids(length(turn), turn)
        torch.manual_seed(turn)
        model.zero_grad()
        forward(input_ids=batch, labels=batch).loss.backward()
        return model.get_input_embeddings().weight.grad.clone()

    return {"prefill": prefill, "step": step, "training": training}


def measure(name: str, work: str, backend: str, sizes: Sizes, repetitions: int) -> dict:
    """A record of one line."""
    model = build(name, sizes).train(work == "training")
    torch.compiler.reset()
    counters.clear()
    program, call = torch.compile(model, backend=backend, fullgraph=False), works(model, sizes)[work]
    started = time.perf_counter()
    errors = []
    for turn in range(4):
        got, want = call(program, turn), call(model, turn)
        errors.append(float((got - want).abs().max() / want.abs().max()))
    record = {
        "model": name,
        "work": work,
        "backend": backend,
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "error": max(errors),
        "seconds to compile": time.perf_counter() - started,
    }
    samples: dict[str, list[float]] = {"eager": [], "compiled": []}
    for turn in range(4, 4 + repetitions):
        for side, forward in (("eager", model), ("compiled", program)):
            started = time.perf_counter()
            call(forward, turn)
            samples[side].append(getattr(call, "seconds", time.perf_counter() - started))
    more = counters["stats"]["unique_graphs"] - record["graphs"]
    return record | {"graphs while timed": more} | {side: min(times) for side, times in samples.items()}


def main(argv: list[str] | None = None) -> list[dict]:
    """Measure and print what the arguments ask for; returns the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=WORKS)
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default inductor, needs a compiler)")
    parser.add_argument("--repetitions", type=int, default=5, help="samples of each side (default 5)")
    parser.add_argument("--layers", type=int, default=24, help="fewer compile sooner (default 24)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to check that everything runs")
    chosen, records = parser.parse_args(argv), []
    print("model work: graphs (while timed), breaks, error, seconds to compile; ms eager, ms compiled, ratio")
    for name in chosen.model:
        for work in chosen.work:
            sizes = SMOKE if chosen.smoke else Sizes(num_hidden_layers=chosen.layers)
            record = measure(name, work, chosen.backend, sizes, 1 if chosen.smoke else chosen.repetitions)
            records.append(record)
            print(
                f"{name} {work}: {record['graphs']} ({record['graphs while timed']}), {record['breaks']}, "
                f"{record['error']:.1e}, {record['seconds to compile']:.0f}; {record['eager'] * 1e3:.1f}, "
                f"{record['compiled'] * 1e3:.1f}, {record['eager'] / record['compiled']:.2f}",
                flush=True,
            )
    return records


if __name__ == "__main__":
    main()
