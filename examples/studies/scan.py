"""Mamba-1's selective scan against SSD: what a larger state costs where its decay is a number for each of its entries
(arXiv:2312.00752), and where it is one for a head (arXiv:2405.21060), so that the work becomes products of matrices.

    python examples/studies/scan.py            time all sizes into examples/results/scan_cpu.json; 20 minutes, alone
    python examples/studies/scan.py --table    table and figure from what is there
    python examples/studies/scan.py --smoke    the code path in seconds, measures nothing

Timed is the core of a layer alone, between its projections, with the sizes of the smallest published models: M = 1536
values, in SSD 24 heads of 64. Three sides, one after the other: the scan of Transformers as it runs without CUDA
kernels of its own; the same scan as fast as PyTorch's operations do it (`selective_scan.py`); SSD as scrubjay runs it
on the device. Each has a first call and seven more, whose median counts. (Run in turn, SSD paid for memory that the
others had just given back.) On a GPU: scan_gpu.json.

Operations for each token, N numbers of state a value, Q = 64 steps a chunk, one group of keys:
    selective scan    6 M N, and M N exponentials      decay, write, state, output: elementwise
    SSD               4 M N + 2 Q M + 2 Q N            state in and out, outputs and scores within the chunk: products
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from scrubjay.examples.measuring.run_report import FULL, GRAY, OURS
from scrubjay.examples.studies.cells import Cell
from scrubjay.examples.studies.drawing import panels, write_between
from scrubjay.examples.studies.laboratory import command_line, effort, opened, study_parser
from scrubjay.examples.studies.selective_scan import selective_scan
from scrubjay.kernels.ssd import ssd

HERE = Path(__file__).resolve().parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAME = "scan_gpu" if DEVICE == "cuda" else "scan_cpu"
RESULTS, GUIDE = HERE.parent / "results" / f"{NAME}.json", HERE / "README.md"
VALUES, HEADS, CHUNK = 1536, 24, 64
STATES, LENGTHS, MODES = (16, 32, 64, 128, 256), (256, 1024, 4096), ("forward", "training")
LIMIT = 8e9  # bytes that a side may keep: more is not timed, and the record says so
TRAFFIC = 1e11  # and bytes that the gradients of Transformers' slices may: half a minute of a call
SIDES = {"transformers": "Transformers' scan", "selective_scan": "selective scan", "ssd": "SSD"}
COLORS = {"transformers": GRAY, "selective_scan": FULL, "ssd": OURS}


def cells() -> list[Cell]:
    return [
        Cell("scan", DEVICE, 0, 0, {"mode": mode, "length": length, "state_size": state, "values": VALUES})
        for mode in MODES
        for length in LENGTHS
        for state in STATES
    ]


def operations(state: int, values: int) -> dict[str, float]:
    """For each token of a forward pass, by the header; exponentials are left out."""
    scan = 6.0 * values * state
    return {
        "transformers": scan,
        "selective_scan": scan,
        "ssd": 4.0 * values * state + 2.0 * CHUNK * (values + state),
    }


def sides(length: int, state: int, values: int, heads: int) -> dict[str, tuple[Callable, list[torch.Tensor]]]:
    """{side: (function, inputs)} of one row; the state of all has values * state numbers."""
    x, step = torch.randn(1, values, length, device=DEVICE), torch.rand(1, values, length, device=DEVICE) * 0.1
    b, c = torch.randn(2, 1, state, length, device=DEVICE)
    decay = -torch.arange(1.0, state + 1, device=DEVICE).expand(values, state).contiguous()
    keys, queries = (each.mT[:, :, None].contiguous() for each in (b, c))  # (1, T, 1, N)
    v = x.mT.reshape(1, length, heads, values // heads).contiguous()
    g = torch.rand(1, length, heads, device=DEVICE) * 0.1
    rate = torch.linspace(1, 16, heads, device=DEVICE)
    return {
        "transformers": (mamba_selective_scan, [x, step, decay, b, c]),
        "selective_scan": (selective_scan, [x, step, decay, b, c]),
        "ssd": (lambda *inputs: ssd(*inputs, chunk=CHUNK)[0], [queries, keys, v, -g * rate, g]),
    }


def refused(side: str, mode: str, length: int, state: int, values: int) -> str | None:
    """Why a side is not timed."""
    whole = 4.0 * length * values * state  # all states in float32
    keeps = side == "transformers" or (side == "selective_scan" and mode == "training")
    if keeps and 3 * whole > LIMIT:
        return f"it keeps {3 * whole / 1e9:.0f} GB"
    if side == "transformers" and mode == "training" and 2 * whole * length > TRAFFIC:
        return f"the gradients of its slices are {2 * whole * length / 1e9:,.0f} GB of zeros"
    return None


def timed(function: Callable, inputs: list[torch.Tensor], mode: str) -> float:
    """Seconds of a call, in training with its gradients."""
    training = mode == "training"
    inputs = [each.detach().requires_grad_(training) for each in inputs]
    started = _now()
    with torch.set_grad_enabled(training):
        y = function(*inputs)
        if training:
            y.backward(torch.ones_like(y))
    return _now() - started


def _now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def work(cell: Cell, *, repetitions: int = 7) -> dict:
    """Microseconds for each token of every side: the repetitions after one that warms up."""
    chosen = cell.settings
    mode, sizes = chosen["mode"], (chosen["length"], chosen["state_size"], chosen["values"])
    heads = HEADS * chosen["values"] // VALUES
    found = sides(*sizes, heads)
    reasons = {side: reason for side in found if (reason := refused(side, mode, *sizes))}
    samples: dict[str, list[float]] = {}
    for side in found:
        if side not in reasons:
            seconds = [timed(*found[side], mode) for _ in range(repetitions + 1)][1:]
            samples[side] = [round(1e6 * each / chosen["length"], 3) for each in seconds]
    return {
        "microseconds_per_token": {side: statistics.median(taken) for side, taken in samples.items()},
        "samples": samples,
        "operations_per_token": operations(*sizes[1:]),
        "not_timed": reasons,
    }


def medians(records: Iterable[dict]) -> dict[tuple[str, int, int], dict[str, float]]:
    """{(mode, length, state size): {side: microseconds for each token}}."""
    found = {}
    for record in records:
        if "result" in record:
            chosen = record["cell"]["settings"]
            key = chosen["mode"], chosen["length"], chosen["state_size"]
            found[key] = record["result"]["microseconds_per_token"]
    return found


def table(records: Iterable[dict]) -> str:
    """In Markdown: microseconds for each token, how many times SSD's the selective scan takes, and the figure."""
    records = list(records)
    found = medians(records)
    head = ["", "tokens", "state", *(f"{name}, µs/token" for name in SIDES.values()), "selective scan / SSD"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (mode, length, state), times in sorted(found.items()):
        shown = [f"{times[side]:.1f}" if side in times else "not timed" for side in SIDES]
        ratio = f"{times['selective_scan'] / times['ssd']:.1f}" if "selective_scan" in times else ""
        lines.append("| " + " | ".join([mode, f"{length:,}", str(state), *shown, ratio]) + " |")
    lines += ["", effort(records), "", f"![Time of a token](../results/scan_{records[0]['cell']['model']}.png)"]
    return "\n".join(lines)


def figure(records: Iterable[dict], path: Path) -> None:
    """Microseconds for each token against the state at the longest length, and against length at a state of 64."""
    found = medians(records)
    longest = max(length for _, length, _ in found)
    middle = 64 if any(state == 64 for _, _, state in found) else min(state for _, _, state in found)
    drawn, (left, right) = panels(2)
    for side, name in SIDES.items():
        for mode, style in zip(MODES, ("-", "--"), strict=True):
            look = {
                "color": COLORS[side],
                "linestyle": style,
                "marker": "o",
                "markersize": 4,
                "label": f"{name}, {mode}",
            }
            for axes, place, fixed, value in ((left, 2, 1, longest), (right, 1, 2, middle)):
                points = sorted(
                    (key[place], times[side])
                    for key, times in found.items()
                    if key[0] == mode and key[fixed] == value and side in times
                )
                if points:
                    axes.loglog(*zip(*points, strict=True), base=2, **look)
    left.set(xlabel="state size", ylabel="microseconds per token", title=f"{longest:,} tokens")
    right.set(xlabel="tokens", title=f"state size {middle}")
    for axes in (left, right):
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_major_formatter("{x:g}")
    left.legend(frameon=False, fontsize=8)
    drawn.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> list[dict]:
    """Run what the command line asks for; returns the records."""
    argv = sys.argv[1:] if argv is None else argv
    parser = study_parser("scan.py", __doc__, RESULTS)
    args = parser.parse_args(argv)
    if args.workers > 1:
        parser.error("workers would time each other; take --workers 1")
    laboratory = opened(args, command_line("examples/studies/scan.py", argv))
    if args.plan:
        print(laboratory.plan(cells(), cost))
        return []
    if args.table:
        if args.out == args.results:
            write_between(GUIDE, NAME, table(laboratory.records()))
        figure(laboratory.records(), args.out.with_suffix(".png"))
        return laboratory.records()
    if args.smoke:
        small = [Cell("scan", DEVICE, 0, 0, {"mode": m, "length": 20, "state_size": 4, "values": 128}) for m in MODES]
        return laboratory.run(small, partial(work, repetitions=2), args.minutes)
    return laboratory.run(cells(), work, args.minutes)


def cost(cell: Cell) -> float:
    """Numbers of all states that are passed through."""
    chosen = cell.settings
    return chosen["length"] * chosen["state_size"] * (4 if chosen["mode"] == "training" else 1)


if __name__ == "__main__":
    main()
