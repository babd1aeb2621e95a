"""Recorded runs of `benchmark.py --cpu` as the tables of kernels/README.md.

A record holds "peer" and "scrubjay" (seconds or bytes), their "ratio", and in runs that measured them "products" (the
matrix products alone), "weights_once" (a step's weights read once), and what scrubjay is as a multiple of each.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from scrubjay.examples.measuring.processor import described

RESULTS = Path(__file__).resolve().parents[1] / "results"
PARTIAL = ".partial.json"  # how the file of a run that has not ended is named
CACHES = ("SW-SKA", "Recycled", "ADORE", "Taipan's", "Taipan decode")  # how their rows begin, also behind "memory, "
GROUPS = {
    "ssd": ("SSD", "transformers' Mamba2"),
    "variants": ("SSD in other forms", "as loaded, float32"),
    "llama.cpp": ("SSD beside llama.cpp", "llama.cpp"),
    "width": ("Models of the same width and depth", ""),
    "caches": ("Attention and caches", "all of it"),
}
COLUMNS: dict[str, Callable[[Mapping], str]] = {
    "{peer}": lambda row: shown(row["peer"], row["unit"]) if "peer" in row else "",
    "scrubjay": lambda row: shown(row["scrubjay"], row["unit"]),
    "ratio": lambda row: times(row["ratio"]),
    "its products alone": lambda row: shown(row["products"], row["unit"]) if "products" in row else "",
    "scrubjay / that": lambda row: times(row.get("of_products"), 2),
    "its weights read once": lambda row: shown(row["weights_once"], row["unit"]) if "weights_once" in row else "",
    "scrubjay / reading": lambda row: times(row.get("of_weights"), 2),
    "tokens a second": lambda row: f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "",
}


def recorded() -> dict[str, dict]:
    """Runs in examples/results that have ended, by the name of their file, in its order."""
    files = [file for file in sorted(RESULTS.glob("benchmark_cpu_*.json")) if not file.name.endswith(PARTIAL)]
    runs = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in files}
    return {name: run for name, run in runs.items() if run.get("complete", True)}


def pages() -> str:
    """The sections of all recorded runs, for kernels/README.md."""
    return "\n\n".join(section(result, name) for name, result in recorded().items())


def group_of(row: Mapping) -> str:
    """The key in GROUPS of a row."""
    bare = row["name"].removeprefix("memory, ")
    if bare.startswith(CACHES):
        return "caches"
    if " of width " in bare:
        return "width"
    if bare.startswith("llama.cpp"):
        return "llama.cpp"
    return "variants" if row.get("variant") else "ssd"


def section(result: Mapping, name: str) -> str:
    """A section in Markdown: the machine, the run, a table for each kind of row, and the figure beside file `name`.

    Rows that compare two lengths of one thing promise that nothing changes, and stand in the file alone.
    """
    where = {"capability": name.removesuffix(".json").rpartition("-")[2].upper()}  # which older runs do not record
    parts = [f"### {described(where | result['machine'])}", about(result)]
    for group, (title, peer) in GROUPS.items():
        rows = [row for row in result["rows"] if group_of(row) == group and not of_two_lengths(row)]
        if rows:
            parts.append(markdown(title, peer, rows))
    at = f"../examples/results/{name}"
    parts.append(f"Every sample: [{name}]({at})\n\n![Benchmark]({at.removesuffix('.json')}.png)")
    return "\n\n".join(parts)


def of_two_lengths(row: Mapping) -> bool:
    """Whether a row compares a system with itself at another length, and so promises that nothing changes."""
    return re.search(r" \d+ and \d+\b", row["name"]) is not None


def about(result: Mapping) -> str:
    """The run in a sentence or two."""
    versions, load = result["versions"], result["machine"]["load_average_at_start"]
    at = f" at commit {result['commit'][:9]}" if result["commit"] else ""  # an installed package has no history
    text = (
        f"With `{arguments(result['command'])}`{at}, PyTorch {versions['torch']}, "
        f"transformers {versions['transformers']}; load {load:.2f} at the start."
    )
    return f"{text} {most(result['ceilings'])}" if "ceilings" in result else text


def arguments(command: str) -> str:
    """What follows the program in a command; programs move."""
    words = command.split()
    return " ".join(words[next(at for at, word in enumerate(words) if word.startswith("-")) :])


def most(ceilings: Mapping) -> str:
    """What the machine does at most, in a sentence."""
    bytes_per_second, operations = (ceilings[key] for key in ("bytes_per_second", "operations_per_second"))
    best = {dtype: max(max(found.values()) for found in rates.values()) for dtype, rates in operations.items()}
    rates = ", ".join(f"{rate / 1e9:,.0f} GF/s in {dtype}" for dtype, rate in best.items())
    traffic = ", ".join(f"{kind} {rate / 1e9:.1f} GB/s" for kind, rate in bytes_per_second.items())
    return f"Products {rates}; {traffic}."


def markdown(title: str, peer: str, rows: list[Mapping]) -> str:
    """A table of the columns in which some row has something."""
    cells = {name.format(peer=peer): [column(row) for row in rows] for name, column in COLUMNS.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    lines = [[title, *cells], ["---"] * (1 + len(cells))]
    lines += [[row["name"], *(column[at] for column in cells.values())] for at, row in enumerate(rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: float, unit: str) -> str:
    """Seconds or bytes as people read them, three figures."""
    if unit == "bytes":
        return f"{value / 2**20:,.0f} MiB" if value >= 2**20 else f"{value / 2**10:,.0f} KiB"
    scale, name = next((s, n) for s, n in ((1, "s"), (1e-3, "ms"), (1e-6, "us")) if value >= s or n == "us")
    value /= scale
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} {name}"


def times(ratio: float | None, digits: int = 1) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.{digits}f}x"
