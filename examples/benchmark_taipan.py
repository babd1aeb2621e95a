"""What selection saves in Taipan: the same weights with a share C of tokens selected, and with all of them.

    python examples/benchmark_taipan.py            one unit of the reconstructed 190M shape, about five minutes
    python examples/benchmark_taipan.py --smoke    tiny sizes in seconds; the numbers mean nothing

One unit is six Mamba-2 blocks and one selective layer. Its gate's threshold is set so that the share of the prompt's
tokens that is selected is C, to the token. Measured: prefill of the selective layer alone and of the unit, a decode
step of the unit after contexts of several lengths, and the bytes of its cache there. Times are taken in turn (C, all,
C, ...) and their medians reported; on a busy machine they say little.

B = 1, T time. Times in seconds, memory in bytes.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from scrubjay import TaipanCache, TaipanConfig, TaipanForCausalLM
from scrubjay.examples.report import commit, machine, size, table, versions
from scrubjay.modeling.layout import Layout
from scrubjay.modeling.modeling_taipan import SelectiveBlock

RESULTS = Path(__file__).resolve().parent / "results" / "benchmark_taipan.json"
ALL = 1e-9  # a threshold below every a


@dataclass(frozen=True)
class Shape:
    """The 190M shape with a small vocabulary, whose head would hide what is measured."""

    hidden_size: int = 768
    state_size: int = 128
    sliding_window: int = 2048
    vocab_size: int = 1024
    capacity: float = 0.15
    length: int = 8192  # tokens of a prefill
    contexts: tuple[int, ...] = (1024, 4096, 16384, 65536)
    decoded: int = 32  # tokens of one decode pass


SMOKE = Shape(64, 16, 32, 64, 0.15, 256, (64, 128, 256), 4)


def build(shape: Shape) -> TaipanForCausalLM:
    """One unit with random weights, whose gate tells tokens apart."""
    torch.manual_seed(0)
    config = TaipanConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=7,
        vocab_size=shape.vocab_size,
        state_size=shape.state_size,
        sliding_window=shape.sliding_window,
    )
    return TaipanForCausalLM(config).eval()


def selective(model: TaipanForCausalLM) -> SelectiveBlock:
    """The unit's selective layer."""
    (found,) = (block for block in model.model.layers if isinstance(block, SelectiveBlock))
    return found


def in_turn(sides: dict[str, Callable], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each side, taken one after the other, once unmeasured before."""
    for work in sides.values():
        work()
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, work in sides.items():
            start = time.perf_counter()
            work()
            samples[name].append(time.perf_counter() - start)
    return samples


@torch.no_grad()
def measure(shape: Shape, repetitions: int) -> dict:
    """Everything that is printed and written."""
    model = build(shape)
    ids = torch.randint(0, shape.vocab_size, (1, max(*shape.contexts, shape.length)))
    prompt = ids[:, : shape.length]
    model.calibrate(prompt, shape.capacity)
    thresholds = {f"C = {shape.capacity}": model.config.eval_threshold, "all": ALL}
    block, h = selective(model), torch.randn(1, shape.length, shape.hidden_size)
    layout = Layout(torch.arange(shape.length)[None])

    def with_threshold(threshold: float, work: Callable) -> Callable:
        def run():
            model.config.eval_threshold = threshold
            return work()

        return run

    def both(work: Callable) -> dict[str, list[float]]:
        return in_turn({name: with_threshold(x, work) for name, x in thresholds.items()}, repetitions)

    selected = {
        name: float(with_threshold(x, lambda: model(prompt, logits_to_keep=1).selection)()[0, 0])
        for name, x in thresholds.items()
    }
    prefill = {
        "selective layer": both(lambda: block(h, layout)),
        "unit": both(lambda: model(prompt, logits_to_keep=1, use_cache=False)),
    }
    decode, nbytes, cache, done = {}, {}, TaipanCache(model), 0
    for context in shape.contexts:
        model.config.eval_threshold = thresholds[f"C = {shape.capacity}"]
        for start in range(done, context, 4096):
            model(ids[:, start : min(start + 4096, context)], past_key_values=cache, logits_to_keep=1)
        done, nbytes[context] = context, cache.nbytes
        # steps advance the cache they are measured on, which is of constant size: a copy would be measured with it
        decode[context] = both(lambda: [model(ids[:, t : t + 1], past_key_values=cache) for t in range(shape.decoded)])
    return {"selected": selected, "prefill": prefill, "decode": decode, "nbytes": nbytes}


def summary(result: dict) -> str:
    """Medians of both sides and their ratio."""
    few, every = result["selected"]
    rows = []

    def row(name: str, samples: dict, count: int) -> None:
        medians = [statistics.median(samples[side]) / count for side in (few, every)]
        rows.append([name, *(f"{1e6 * x:,.1f} us" for x in medians), f"{medians[1] / medians[0]:.2f}x"])

    shape = result["shape"]
    for name, samples in result["prefill"].items():
        row(f"prefill of the {name}, per token of {shape['length']}", samples, shape["length"])
    for context, samples in result["decode"].items():
        row(f"step of the unit after {context} tokens", samples, shape["decoded"])
    shares = ", ".join(f"{name}: {share:.3f}" for name, share in result["selected"].items())
    weights = ", ".join(f"{context}: {size(nbytes)}" for context, nbytes in result["nbytes"].items())
    title = f"{result['machine']['cpu']}, {result['machine']['torch_threads']} threads"
    return f"{table(title, [few, every, 'ratio'], rows)}\n\nselected {shares}\ncache {weights}"


def main(argv: list[str] | None = None) -> dict:
    """Measure, print, write; returns what is in the JSON."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="benchmark_taipan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--repetitions", type=int, default=5, help="samples of each side and row (default 5)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to check that everything runs")
    parser.add_argument("--out", type=Path, help="JSON to write (default: results/benchmark_taipan.json)")
    args = parser.parse_args(argv)
    shape, repetitions = (SMOKE, 2) if args.smoke else (Shape(), args.repetitions)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        where, result = machine(), measure(shape, repetitions)
    finally:
        torch.set_num_threads(before)
    command = shlex.join(["python", "examples/benchmark_taipan.py", *argv])
    result = {
        "command": command, "commit": commit(), "machine": where, "versions": versions(), "shape": asdict(shape)
    } | result  # fmt: skip
    print(summary(result))
    out = args.out or (None if args.smoke else RESULTS)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
