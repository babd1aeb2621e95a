"""Tables and the figure of the study of a pretrained model (real.py)."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean

from scrubjay.examples.measuring.run_report import FULL, GRAY, OURS
from scrubjay.examples.studies.drawing import confidence, panels, write_between
from scrubjay.examples.studies.laboratory import effort
from scrubjay.examples.studies.real_policies import ABLATIONS, ADORE, HELD, LAYERS, POLICIES
from scrubjay.examples.studies.real_tasks import ASKED, RULER

RESULTS = Path(__file__).resolve().parents[1] / "results" / "real.json"
GUIDE = Path(__file__).with_name("README.md")
Column = tuple[str, int, int]  # kind, tokens of the prompt, budget
EIGHTH = 8
BELOW, LEFT = ("Low rank, R = 32", "Recycled, S = 5", "SnapKV", "TOVA"), ("Quest",)  # names in the figure


def collected(records: Iterable[dict], group: str) -> dict[Column, dict[str, dict[str, list[float]]]]:
    """{column: {cache: {"scores" and "losses": one of each prompt, "nbytes": of each row}}} of a group of caches.

    Beside the caches of another group than "policies" stands what full attention did on the same prompts; cells for
    which that is not known yet are left out.
    """
    done = sorted((record for record in records if "result" in record), key=lambda record: record["cell"]["seed"])
    whole = {_prompts(one): one["result"]["full"] for one in done if "full" in one["result"]}
    found: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for record in done:
        settings = record["cell"]["settings"]
        if settings["caches"] != group or _prompts(record) not in whole:
            continue
        column = settings["kind"], settings["length"], settings["budget"]
        for name, result in ({"full": whole[_prompts(record)]} | record["result"]).items():
            mine, rows = found[column][name], max(len(result["scores"]), len(result.get("losses", ())))
            mine["scores"] += result["scores"]
            mine["losses"] += result.get("losses", [])
            mine["nbytes"] += [result["nbytes"] / rows] * rows
    return found


def _prompts(record: dict) -> str:
    """What decides the prompts of a cell, and the budget."""
    cell = record["cell"]
    return json.dumps(
        [cell["model"], cell["seed"], cell["settings"] | {"caches": "", "controller": ""}], sort_keys=True
    )


def measured(column: Column, found: dict[str, dict[str, list[float]]], name: str) -> list[float]:
    """What a cache is judged by, one number a prompt: the score; of "text" the loss beyond full attention's."""
    if column[0] != "text":
        return found[name]["scores"]
    return [a - b for a, b in zip(found[name]["losses"], found["full"]["losses"], strict=True)]


def shown(values: list[float], digits: int = 2) -> str:
    """`0.79 ± 0.05`: the mean and half of its interval at 95 %, over prompts."""
    interval = confidence(values)
    half = "" if interval is None else f" ± {(interval[1] - interval[0]) / 2:.{digits}f}"
    return f"{fmean(values):.{digits}f}{half}"


def titled(column: Column, prompts: int) -> str:
    """Head of a column."""
    kind, length, budget = column
    counted = f"{prompts * ASKED} questions in {prompts} prompts" if kind == "questions" else f"{prompts} prompts"
    what = "nats more" if kind == "text" else kind
    return f"{what}, {length} tokens, K = {budget}: {counted}"


def grid(found: dict, columns: list[Column], names: Iterable[str]) -> str:
    """A row for each cache."""
    heads = [titled(column, len(found[column][next(iter(found[column]))]["nbytes"])) for column in columns]
    lines = ["| cache | " + " | ".join(heads) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = [measured(column, found[column], name) if name in found[column] else [] for column in columns]
        digits = [3 if column[0] == "text" else 2 for column in columns]
        texts = [shown(cell, digit) if cell else "" for cell, digit in zip(cells, digits, strict=True)]
        if any(texts):
            lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def table(records: list[dict]) -> str:
    """What the guide has: several questions and text by length, RULER's kinds, shares of the keys, ablations."""
    found, parts = collected(records, "policies"), []

    def part(title: str, wanted: Callable[[Column], bool], source=found, names: Iterable[str] = POLICIES) -> None:
        columns = sorted(column for column in source if wanted(column))
        if columns:
            parts.extend([f"**{title}**", grid(source, columns, names)])

    for kind, title in {
        "questions": "Eight questions in one output, answered in full",
        "text": "Loss of 128 tokens of text",
        "copy": "A passage copied, tokens found",
        "agree": "What full attention would write next, tokens found",
    }.items():
        part(title, lambda c, kind=kind: c[0] == kind and c[2] == c[1] // EIGHTH)
    part("RULER's kinds, answers found", lambda c: c[0] in RULER)
    part("Other shares of the keys", lambda c: c[0] in ("questions", "text") and c[2] != c[1] // EIGHTH)
    part("Where some layers choose", lambda c: True, collected(records, "layers"), ("full", *LAYERS))
    part("ADORE, by a controller of this model", lambda c: True, collected(records, "adore"), ("full", *ADORE))
    part("What decides", lambda c: True, collected(records, "ablations"), ("full", *ABLATIONS))
    part("All keys on the host, or in few bits", lambda c: True, collected(records, "held"), ("full", *HELD))
    if (RESULTS.with_suffix(".png")).is_file() and parts:
        parts.append("![Quality against time and bytes](../results/real.png)")
    return "\n\n".join([*parts, effort(records)]) if parts else "Not run yet."


def timed(length: int, rows: int) -> dict[str, float]:
    """{cache: milliseconds a step} after so many tokens in bfloat16, of the first recorded processor."""
    for path in sorted(RESULTS.parent.glob("real_speed_*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            if (row["length"], row["rows"], row["dtype"]) == (length, rows, "bfloat16"):
                return row["token"]
    return {}


def draw(records: list[dict], path: Path) -> None:
    """Answers and loss against the time of a step at batch 1 and 8 and against bytes held, a column of panels each; and
    beside it, for the first page, the answers after the longest prompts that are timed at batch 8."""
    found = collected(records, "policies")
    others = [(collected(records, group), names) for group, names in (("layers", LAYERS), ("adore", ADORE))]
    wanted = [c for c in sorted(found) if c[0] in ("questions", "text") and c[2] == c[1] // EIGHTH]
    if not wanted:
        return
    figure, axes = panels(len(wanted), rows=3, width=4.2, height=3.4)
    for i, column in enumerate(wanted):
        for j, rows in enumerate((1, 8, None)):
            panel(axes[j * len(wanted) + i], column, found[column], rows)
            for other, names in others:
                panel(axes[j * len(wanted) + i], column, other.get(column, {}), rows, names)
    figure.savefig(path, dpi=90)
    asked = [c for c in wanted if c[0] == "questions" and timed(c[1], 8)]
    if not asked:
        return
    figure, axes = panels(2, width=5.0, height=3.6)
    for axis, rows in zip(axes, (8, None), strict=True):
        panel(axis, asked[-1], found[asked[-1]], rows)
        for other, names in others:
            panel(axis, asked[-1], other.get(asked[-1], {}), rows, names)
    figure.savefig(path.with_stem(f"{path.stem}_first"), dpi=90)


def panel(axis, column: Column, found: dict, rows: int | None, names: Iterable[str] = POLICIES) -> None:
    """Quality against milliseconds of a step of so many rows; None: against MiB of a row's cache."""
    times = timed(column[1], rows) if rows else {}
    axis.set_visible(bool(times) or rows is None)
    for name in (name for name in names if name in found):
        x = times.get(name) if rows else fmean(found[name]["nbytes"]) / 2**20
        if x is not None:
            _point(axis, name, x, measured(column, found, name))
    label = f"ms a step, batch {rows}" if rows else "MiB of cache for a text"
    axis.set(xlabel=label, title=f"{column[0]}, {column[1]} tokens, K = {column[2]}")
    axis.set_ylabel("nats more than full attention" if column[0] == "text" else "questions answered")


def _point(axis, name: str, x: float, values: list[float]) -> None:
    interval = confidence(values)
    half = 0.0 if interval is None else (interval[1] - interval[0]) / 2
    color = FULL if name == "full" else OURS if name.startswith(("Low", "low", "Rec")) else GRAY
    axis.errorbar(x, fmean(values), yerr=half, fmt="o", color=color, capsize=3)
    below, left = name in BELOW, name in LEFT  # where the names of neighbours do not stand
    at = {"xytext": (-5 if left else 5, -9 if below else 3), "ha": "right" if left else "left"}
    axis.annotate(name, (x, fmean(values)), **at, textcoords="offset points", fontsize=7)


def show(records: list[dict], out: Path | None, guide: bool) -> None:
    """Tables on the terminal, the figure beside the JSON, both in the guide if asked for."""
    if out:
        draw(records, out.with_suffix(".png"))
    text = table(records)
    print(text)
    if guide:
        write_between(GUIDE, "real", text)
