"""Speed and memory beside the peers, as ratios within one run.

    python examples/benchmarks/benchmark.py --cpu        all of it: about twenty minutes on two cores
        --only prefill    the rows whose name contains a word; kept only with --out
        --smoke           all of it at tiny sizes in seconds; the numbers mean nothing

Prints one table and writes examples/results/benchmark_cpu.json (every sample) and .png. On a busy machine threads wait
for each other, and the numbers say little: run it alone.
"""

import argparse
import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils import logging

from scrubjay.examples.benchmarks.benchmark_cpu import SMOKE, Shape, measure
from scrubjay.examples.measuring.run_report import GRAY, OURS, commit, machine, table, versions

RESULTS = Path(__file__).resolve().parents[1] / "results" / "benchmark_cpu.json"
BUSY = 0.5  # load average above which a run says that it was not alone


def benchmark(shape: Shape, *, threads: int, repetitions: int, only: str, command: str) -> dict:
    """Measure, with `threads` torch threads; returns everything that is printed, drawn and written."""
    load = os.getloadavg()[0]
    if load > BUSY:
        print(f"warning: the load average is {load:.2f}: other work is running, and the numbers below suffer from it.")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        where = machine() | {"load_average_at_start": load}
        result = measure(shape, repetitions=repetitions, only=only)
    finally:
        torch.set_num_threads(before)
    run = {"command": command, "commit": commit(), "machine": where, "versions": versions()}
    return run | {"shape": asdict(shape), "repetitions": repetitions} | result


def summary(result: dict) -> str:
    """The table: medians of both sides, their ratio, and the ratio promised."""
    where, rows = result["machine"], []
    for row in result["rows"]:
        floor, ratio = row["floor"], row["ratio"]
        promise = [f">= {floor:g}x", "met" if ratio >= floor else "MISSED"] if floor else ["", ""]
        chunk = str(row.get("chunk", ""))
        rows.append([row["name"], *(shown(row[side], row["unit"]) for side in ("peer", "scrubjay")), chunk])
        rows[-1] += [f"{ratio:.2f}x", *promise]
    title = f"{where['cpu']}, {where['torch_threads']} threads, load {where['load_average_at_start']:.2f} at start"
    legend = [
        f"Medians of {result['repetitions']} taken in turn. peer: transformers' Mamba2 with the same weights, at the",
        "chunk size given (its fastest in prefill and training); for SW-SKA, torch's SDPA with a dense band mask; for",
        "Recycled Attention, full attention on the same buffer with packed heads; for ADORE, full attention with a",
        "preallocated cache (equal memory: ours of as many rows as fit into its bytes, at most 64); for Taipan, the",
        "same weights with all tokens selected. Of two lengths, the first is peer.",
        f"memory: {result['memory']}.",
    ]
    return "\n\n".join([table(title, ["peer", "scrubjay", "chunk", "ratio", "floor", ""], rows), "\n".join(legend)])


def shown(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**20:,.0f} MiB" if value >= 2**20 else f"{value / 2**10:,.0f} KiB"
    return f"{value * 1e3:,.1f} ms" if value >= 1e-3 else f"{value * 1e6:,.0f} us"


def plot(result: dict, path: Path) -> None:
    """A bar per row: how many times less time or memory than the peer, with the promised floor as a mark.

    Rows that compare two lengths of one thing promise that nothing changes: there is no bar to show.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    rows = [row for row in result["rows"][::-1] if (row["floor"] or 2) > 1]
    figure = Figure(figsize=(10, 0.8 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([row["name"] for row in rows], [row["ratio"] for row in rows], color=OURS, height=0.6)
    axes.bar_label(bars, fmt="%.1fx", padding=5, fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    floors = [(row["floor"], at) for at, row in enumerate(rows) if row["floor"]]
    if floors:
        axes.plot(*zip(*floors, strict=True), "|", color="black", markersize=16, label="floor")
        axes.legend(frameon=False, loc="lower right")
    axes.axvline(1, color=GRAY, linewidth=0.8)
    axes.set(xlabel="peer / scrubjay", title=result["machine"]["cpu"])
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def make_parser() -> argparse.ArgumentParser:
    """The arguments; those of `scrubjay bench` are the same."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", required=True, help="the comparison on this machine's CPU")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--repetitions", type=int, default=5, help="samples of each side and row (default 5)")
    parser.add_argument("--only", default="", help="measure only rows whose name contains this")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to check that everything runs")
    parser.add_argument("--out", type=Path, help="JSON to write, a PNG beside it (default: results/benchmark_cpu.json)")
    return parser


def main(argv: list[str] | None = None) -> dict:
    """Run what the arguments ask for; returns what is in the JSON."""
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    command = shlex.join(["python", "examples/benchmarks/benchmark.py", *argv])
    asked = {"threads": args.threads, "repetitions": args.repetitions, "only": args.only, "smoke": args.smoke}
    return run(**asked, out=args.out, command=command)


def run(*, threads: int, repetitions: int, only: str, smoke: bool, out: Path | None, command: str) -> dict:
    """Measure, print, write; returns what is in the JSON."""
    logging.disable_progress_bar()
    shape, repetitions = (SMOKE, 2) if smoke else (Shape(), repetitions)
    result = benchmark(shape, threads=threads, repetitions=repetitions, only=only, command=command)
    print(f"\n{summary(result)}")
    # Part of the table must not replace all of it, nor tiny sizes the real ones.
    out = out or (None if only or smoke else RESULTS)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        plot(result, out.with_suffix(".png"))
        print(f"\nIn {out.parent}: {out.name} (every sample) and {out.with_suffix('.png').name}.")
    return result


if __name__ == "__main__":
    main()
