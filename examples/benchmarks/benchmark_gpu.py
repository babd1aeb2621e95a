"""Speed of the kernels and of whole models on one GPU, beside the peers that are installed there.

    python examples/benchmarks/benchmark_gpu.py            writes examples/results/gpu_<name>.json (every line) and .png
    python examples/benchmarks/benchmark_gpu.py --only ssd the lines whose name contains a word; kept only with --out
    python examples/benchmarks/benchmark_gpu.py --smoke    tiny sizes on any machine, to check that everything runs

Times are medians of triton.testing.do_bench, all in one run. Beside each the rate: TFLOP/s of the products that the
algorithm needs, or GB/s of the bytes that it has to move, and the fraction of what this GPU reached in a matrix product
and in a copy. Peers: flash-linear-attention and mamba_ssm where they can be imported, PyTorch's own attention.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from scrubjay.examples.benchmarks.gpu_peers import PEERS
from scrubjay.examples.benchmarks.gpu_work import LARGE, SMALL, Sizes, Work, works
from scrubjay.examples.measuring.run_report import OURS, commit, machine, table, versions

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True)
class Ceiling:
    """What this device reaches: bytes a second in a copy, multiplications and additions a second in a product."""

    copy: float
    product: float


@dataclass
class Line:
    """One work: seconds of each side, its rate, and the fraction of the ceiling that bounds it."""

    name: str
    seconds: dict[str, float]
    unit: str
    rate: float
    fraction: float
    ratio: float | None = None
    notes: dict[str, str] = field(default_factory=dict)


def seconds(call: Callable[[], object], device: torch.device, repetitions: int = 3) -> float:
    """Median seconds of a call; compiled and warm before anything is timed."""
    call()
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=50, rep=200, return_mode="median") * 1e-3
    samples = []
    for _ in range(repetitions):
        started = time.perf_counter()
        call()
        samples.append(time.perf_counter() - started)
    return median(samples)


def ceiling(sizes: Sizes, device: torch.device) -> Ceiling:
    """Measured here and now, not from a data sheet."""
    x = torch.empty(sizes.copied, dtype=torch.bfloat16, device=device).zero_()
    y = torch.empty_like(x)
    a = torch.randn(sizes.product, sizes.product, device=device).bfloat16()
    copied = seconds(lambda: y.copy_(x), device)
    multiplied = seconds(lambda: a @ a, device)
    return Ceiling(2 * x.numel() * x.element_size() / copied, 2 * sizes.product**3 / multiplied)


def measured(work: Work, top: Ceiling, device: torch.device) -> Line:
    """Our side, and every peer that runs; a peer that fails is named with its error, never left out in silence."""
    taken, notes = {"scrubjay": seconds(work.ours(device), device)}, {}
    for name, make in PEERS.get(work.kind, {}).items():
        try:
            taken[name] = seconds(make(work, device), device)
        except Exception as error:  # whatever a foreign library raises here is a fact about it, not about us
            notes[name] = f"{type(error).__name__}: {str(error)[:200]}"
    bound, unit = (top.product, "TFLOP/s") if work.flops else (top.copy, "GB/s")
    rate = (work.flops or work.bytes) / taken["scrubjay"]
    others = [value for name, value in taken.items() if name != "scrubjay" and name not in work.peer_flops]
    ratio = min(others) / taken["scrubjay"] if others else None
    for name in work.peer_flops.keys() & taken.keys():
        notes[name] = f"{rate / (work.peer_flops[name] / taken.pop(name)):.0%} of its rate"
    return Line(work.name, taken, unit, rate / (1e12 if work.flops else 1e9), rate / bound, ratio, notes)


def lines(sizes: Sizes, top: Ceiling, device: torch.device, only: str) -> Iterator[Line]:
    """Each work in turn, its tensors freed before the next."""
    for work in works(sizes):
        if only in work.name:
            line = measured(work, top, device)
            print(f"{line.name}: {line.seconds['scrubjay'] * 1e3:.3f} ms", flush=True)
            yield line
            if device.type == "cuda":
                torch.cuda.empty_cache()


def summary(result: dict) -> str:
    """The table: our time, the fastest peer's, their ratio, the rate and the share of the ceiling."""
    rows = []
    for line in result["lines"]:
        others = {name: value for name, value in line["seconds"].items() if name != "scrubjay"}
        fastest = min(others, key=others.__getitem__) if others else ""
        peer = f"{others[fastest] * 1e3:,.3f} ms ({fastest})" if fastest else "-"
        ratio = f"{line['ratio']:.2f}x" if line["ratio"] else ""
        rate = f"{line['rate']:,.0f} {line['unit']}"
        rows.append([line["name"], f"{line['seconds']['scrubjay'] * 1e3:,.3f} ms", peer, ratio, rate])
        rows[-1].append(f"{line['fraction']:.0%}")
    top = result["ceiling"]
    title = (
        f"{result['device']}: {top['copy'] / 1e12:.2f} TB/s copied, {top['product'] / 1e12:,.0f} TFLOP/s in bfloat16"
    )
    noted = {f"{line['name']}, {peer}: {why}" for line in result["lines"] for peer, why in line["notes"].items()}
    said = sorted(noted)
    return "\n".join([table(title, ["scrubjay", "fastest peer", "ratio", "rate", "of ceiling"], rows), *said])


def plot(result: dict, path: Path) -> None:
    """A bar per line: the share of the ceiling that was reached."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    shown = result["lines"][::-1]
    figure = Figure(figsize=(10, 0.8 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([line["name"] for line in shown], [100 * line["fraction"] for line in shown], color=OURS)
    axes.bar_label(bars, [f"{line['ratio']:.1f}x" if line["ratio"] else "" for line in shown], padding=5, fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.set(xlabel="% of the measured ceiling; behind each bar: fastest peer / scrubjay", title=result["device"])
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> dict:
    """Measure, print, write; returns what is in the JSON."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure only lines whose name contains this")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU too")
    parser.add_argument("--out", type=Path, help="JSON to write, a PNG beside it (default: results/gpu_<name>.json)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not args.smoke:
        parser.error("no CUDA device here. --smoke runs tiny sizes on the CPU, to check the script.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    sizes = SMALL if args.smoke else LARGE
    top = ceiling(sizes, device)
    found = [vars(line) for line in lines(sizes, top, device, args.only)]
    command = shlex.join(["python", "examples/benchmarks/benchmark_gpu.py", *argv])
    result = {"command": command, "commit": commit(), "device": name, "machine": machine(), "versions": versions()}
    result |= {"ceiling": vars(top), "lines": found}
    print(f"\n{summary(result)}")
    default = RESULTS / f"gpu_{name.split()[-1].lower()}.json"
    out = args.out or (None if args.only or args.smoke else default)
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
        plot(result, out.with_suffix(".png"))
    return result


if __name__ == "__main__":
    main()
