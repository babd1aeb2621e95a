"""A decode step of ADORE's two ways to bring released tokens back, beside none and beside full attention.

    python examples/benchmarks/benchmark_adore_host.py           writes examples/results/adore_host_<processor>.json
    python examples/benchmarks/benchmark_adore_host.py --smoke   tiny sizes, to check that everything runs

All sides are measured in turn, in one run, at each batch: full attention with all its memory from the start, ADORE
that brings nothing back, that runs R tokens again, and that fetches R from host memory. On a GPU where there is one.
The controller is untrained: its time counts, its choices do not. No row shares memory with another.
Seconds a token: those of a step, by the rows that it serves. Bytes of the cache: by where they are.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch

from scrubjay import AdoreCache
from scrubjay.examples.benchmarks.benchmark_adore import LARGE, SMALL, Sizes, decoder, full_cache, has_read, steps
from scrubjay.examples.benchmarks.comparison import in_turn
from scrubjay.examples.measuring.measure import cache_nbytes
from scrubjay.examples.measuring.processor import processor, slug
from scrubjay.examples.measuring.run_report import commit, machine, size, table, versions, write_whole

RESULTS = Path(__file__).resolve().parents[1] / "results"
BATCHES = (1, 8)
FULL = "full attention"


def ways(sizes: Sizes) -> dict[str, AdoreCache]:
    """One row that has read n tokens, by how released tokens come back."""
    return {
        "R = 0": has_read(replace(sizes, rebuild=0)),
        f"R = {sizes.rebuild} run again": has_read(sizes),
        f"R = {sizes.rebuild} from the host": has_read(replace(sizes, rebuild_from="host")),
    }


def rows_of(cache: AdoreCache, batch: int) -> AdoreCache:
    """So many rows like the one of `cache`. Repeated rows share theirs on the host; when one leaves, the others get
    rows of their own, as texts of their own have."""
    cache = deepcopy(cache)
    cache.batch_repeat_interleave(batch + 1)
    cache.batch_select_indices(torch.arange(batch))
    return cache


def waited_for(work: Callable[[], int], device: torch.device) -> Callable[[], int]:
    """The work, and the end of what the device does of it."""

    def run() -> int:
        units = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return units

    return run


def measure(sizes: Sizes, batch: int, read: dict[str, AdoreCache], repetitions: int) -> list[dict]:
    """A record of each side."""
    device, sizes = decoder(sizes).device, replace(sizes, batch=batch)
    caches = {FULL: full_cache(sizes)} | {name: rows_of(cache, batch) for name, cache in read.items()}
    bytes_of = {
        name: getattr(cache, "nbytes_by_place", {"device": cache_nbytes(cache), "host": 0})
        for name, cache in caches.items()
    }
    sides = {name: waited_for(steps(sizes, cache, batch), device) for name, cache in caches.items()}
    return [
        {"name": name, "batch": batch, "seconds": median(taken), "samples": taken, "bytes": bytes_of[name]}
        for name, taken in in_turn(sides, repetitions).items()
    ]


def summary(result: dict) -> str:
    """The table: milliseconds a token, and bytes by place."""
    title = f"{result['sizes']['name']} {result['sizes']['dtype']}, after {result['sizes']['context']} tokens"
    cells = [
        [f"batch {row['batch']}, {row['name']}", f"{row['seconds'] * 1e3:.3g} ms", *map(size, row["bytes"].values())]
        for row in result["rows"]
    ]
    return table(title, ["a token", "device", "host"], cells)


def main(argv: list[str] | None = None) -> dict:
    """Measure, print, write; returns what is in the JSON."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--repetitions", type=int, default=5, help="samples of each side (default 5)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the model (default bfloat16)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; writes no file unless --out is given")
    parser.add_argument("--out", type=Path, help="JSON to write (default: results/adore_host_<processor>.json)")
    args = parser.parse_args(argv)
    sizes, before = SMALL if args.smoke else LARGE, torch.get_num_threads()
    sizes = replace(sizes, dtype=args.dtype or sizes.dtype)
    torch.set_num_threads(args.threads)
    try:
        where = machine() | processor() | {"load_average_at_start": os.getloadavg()[0]}
        decoder(sizes).to("cuda" if torch.cuda.is_available() else "cpu")
        # all sides have room for one pass to warm up and for as many as are sampled
        repetitions = min(args.repetitions, sizes.passes - 1)
        read = ways(sizes)
        rows = [row for batch in BATCHES for row in measure(sizes, batch, read, repetitions)]
    finally:
        torch.set_num_threads(before)
    command = shlex.join(["python", "examples/benchmarks/benchmark_adore_host.py", *argv])
    result = {"command": command, "commit": commit(), "machine": where, "versions": versions()}
    result |= {"sizes": asdict(sizes), "repetitions": repetitions, "rows": rows}
    print(summary(result))
    name = slug(where if where["gpu"] is None else {"cpu": where["gpu"], "amx": False, "capability": ""})
    if out := args.out or (None if args.smoke else RESULTS / f"adore_host_{name}.json"):
        write_whole(out, json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
