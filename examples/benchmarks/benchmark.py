"""Speed and memory beside the peers and beside what the machine can do at most, as ratios within one run.

    python examples/benchmarks/benchmark.py --cpu        all of it: forty minutes on two cores without bfloat16
        --only prefill       the rows whose name contains a word; kept only with --out
        --fresh              all anew, where a run that was stopped would go on
        --llama-cpp DIR      also beside a llama.cpp that was built in DIR, once its greedy text equals ours
        --causes             instead: ours with one thing switched that makes CPUs slow, such as subnormal numbers
        --tables             instead: the recorded runs in Markdown, as kernels/README.md has them
        --smoke              all of it at tiny sizes in seconds; the numbers mean nothing

Prints one table and writes examples/results/benchmark_cpu_<processor>.json (every sample) and .png. Until all is
measured, what is stands in benchmark_cpu_<processor>.partial.json; the same command goes on from there, at the same
commit and versions on the same machine. On a busy machine threads wait for each other, and the numbers say little: run
it alone.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging

from scrubjay.examples.benchmarks.benchmark_cpu import measure
from scrubjay.examples.benchmarks.benchmark_rows import SMOKE, Shape
from scrubjay.examples.benchmarks.benchmark_tables import RESULTS, about, of_two_lengths, pages, recorded, shown, times
from scrubjay.examples.benchmarks.saved_run import SavedRun
from scrubjay.examples.measuring.processor import described, processor, slug
from scrubjay.examples.measuring.run_report import GRAY, OURS, commit, machine, table, versions

BUSY = 0.5  # load average above which a run says that it was not alone


def benchmark(
    shape: Shape,
    *,
    threads: int,
    repetitions: int,
    only: str,
    command: str,
    llama_cpp: Path | None = None,
    causes: bool = False,
    place: Callable[[dict], Path | None] = lambda where: None,
    fresh: bool = False,
) -> dict:
    """Measure, with `threads` torch threads; returns everything that is printed and drawn.

    Args:
        place: the file of the result on a machine, None for none; a run that was stopped is continued there.
        fresh: not even then.
    """
    load = os.getloadavg()[0]
    if load > BUSY:
        print(f"warning: the load average is {load:.2f}: other work is running, and the numbers below suffer from it.")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        where = machine() | processor() | {"load_average_at_start": load}
        print(described(where))
        run = {"command": command, "commit": commit(), "machine": where, "versions": versions()}
        run |= {"shape": asdict(shape), "repetitions": repetitions}
        saved = SavedRun(place(where), run, fresh=fresh)
        asked = {"repetitions": repetitions, "only": only, "llama_cpp": llama_cpp, "causes": causes}
        log = partial(print, flush=True)  # row by row into a file too
        return saved.finish(measure(shape, **asked, saved=saved, log=log))
    finally:
        torch.set_num_threads(before)


def summary(result: dict) -> str:
    """The table: medians of both sides, their ratio, what ours is of the products and of reading, what is promised."""
    rows = []
    for row in result["rows"]:
        sides = [shown(row[side], row["unit"]) if side in row else "" for side in ("peer", "scrubjay", "products")]
        multiples = [times(row["ratio"], 2), times(row.get("of_products"), 2), times(row.get("of_weights"), 2)]
        speed = f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else ""
        count = str(len(row["samples"]["scrubjay"]))
        rows.append([row["name"], *sides, count, str(row.get("chunk", "")), *multiples, speed, promised(row)])
    legend = [
        f"{about(result)}",
        f"Medians of n samples a side, taken in turn: {result['repetitions']}, of long passes fewer, at least two;",
        "of memory one. ratio: peer / scrubjay; /products, /reading: scrubjay as a multiple of its matrix products",
        "alone and of reading its weights once.",
        "peer: transformers' Mamba2 with the same weights, at the chunk size given (its fastest in prefill and",
        "training); for SW-SKA, torch's SDPA with a dense band mask; for Recycled Attention, full attention on the",
        "same buffer with packed heads; for ADORE, full attention with a preallocated cache (equal memory: ours of as",
        "many rows as fit into its bytes, at most 64); for Taipan, the same weights with all tokens selected. Of two",
        "lengths, the first is peer. With --causes, peer is ours with the switch.",
        f"memory: {result['memory']}.",
    ]
    header = ["peer", "scrubjay", "products", "n", "chunk", "ratio", "/products", "/reading", "tokens/s", "promised"]
    return "\n\n".join([table(described(result["machine"]), header, rows), "\n".join(legend)])


def promised(row: dict) -> str:
    """What the project promises of a row and whether the run kept it, "" where it promises nothing."""
    words, floor, limit = [], row["floor"], row.get("limit")
    if floor:
        words.append(f">= {floor:g}x {'met' if row['ratio'] >= floor else 'MISSED'}")
    multiple = row.get("of_weights", row.get("of_products"))
    if limit and multiple is not None:
        words.append(f"<= {limit:g}x {'met' if multiple <= limit else 'MISSED'}")
    return ", ".join(words)


def plot(result: dict, path: Path) -> None:
    """A bar per row: how many times less time or memory than the peer, with the promised floor as a mark.

    Rows that compare two lengths of one thing promise that nothing changes: there is no bar to show.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    rows = [row for row in result["rows"][::-1] if row["ratio"] is not None and not of_two_lengths(row)]
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
    axes.set(xlabel="peer / scrubjay", title=described(result["machine"]))
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
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="also beside llama.cpp: its folder, built")
    parser.add_argument("--causes", action="store_true", help="instead: ours with one cause of slowness switched")
    parser.add_argument("--tables", action="store_true", help="instead: print the recorded runs in Markdown")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to check that everything runs")
    parser.add_argument("--fresh", action="store_true", help="do not go on with a run that was stopped")
    parser.add_argument(
        "--out", type=Path, help="JSON to write, a PNG beside it (default: results/benchmark_cpu_<processor>.json)"
    )
    return parser


def main(argv: list[str] | None = None) -> dict:
    """Run what the arguments ask for; returns what is in the JSON."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = vars(make_parser().parse_args(argv))
    del arguments["cpu"]
    return run(**arguments, command=shlex.join(["python", "examples/benchmarks/benchmark.py", *argv]))


def run(
    *,
    threads: int,
    repetitions: int,
    only: str,
    llama_cpp: Path | None,
    causes: bool,
    tables: bool,
    smoke: bool,
    fresh: bool,
    out: Path | None,
    command: str,
) -> dict:
    """Measure, print, write; returns what is in the JSON. With `tables`: print the recorded runs, return them."""
    if tables:
        print(pages())
        return recorded()
    logging.disable_progress_bar()
    shape, repetitions = (SMOKE, 2) if smoke else (Shape(), repetitions)
    asked = {"threads": threads, "repetitions": repetitions, "only": only, "command": command}
    part = only or smoke or causes

    def place(where: dict) -> Path | None:
        """Part of the table must not replace all of it, nor tiny sizes the real ones."""
        return out or (None if part else RESULTS / f"benchmark_cpu_{slug(where)}.json")

    try:
        result = benchmark(shape, **asked, llama_cpp=llama_cpp, causes=causes, place=place, fresh=fresh)
    except KeyboardInterrupt:
        print("\nStopped. Where a file was to be written, the same command goes on after the last row above.")
        raise
    print(f"\n{summary(result)}")
    if out := place(result["machine"]):
        plot(result, out.with_suffix(".png"))
        print(f"\nIn {out.parent}: {out.name} (every sample) and {out.with_suffix('.png').name}.")
    return result


if __name__ == "__main__":
    main()
