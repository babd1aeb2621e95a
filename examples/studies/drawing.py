"""Error bars, and the figures and tables of all studies: one colour and one name for a model everywhere."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from scrubjay.examples.measuring.run_report import FULL, GRAY, OURS, write_whole

COLORS = {
    "ssd": OURS,
    "ssd_mlp": "#5fb0d3",
    "ssd_hybrid": "#0a3d62",
    "rodimus": FULL,
    "rodimus_plus": "#6a4c93",
    "taipan": "#1b7f5c",
    "llama": "#d4a017",
    "mamba1": "#b5838d",
    "mamba2": GRAY,
}
NAMES = {
    "ssd": "SSD",
    "ssd_mlp": "SSD with MLP",
    "ssd_hybrid": "SSD hybrid",
    "rodimus": "Rodimus",
    "rodimus_plus": "Rodimus+",
    "taipan": "Taipan",
    "llama": "Llama",
    "mamba1": "Mamba-1",
    "mamba2": "Mamba-2 of Transformers",
}
# Student's t, 0.975, by degrees of freedom; a series in 1 / df is within 0.002 of it above.
T975 = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, lowest, highest): what an error bar over seeds shows."""
    return statistics.fmean(values), min(values), max(values)


def ranged(values: Sequence[float], seeds: int = 1, digits: int = 3) -> str:
    """`1.702 (1.698 to 1.707)`; where fewer than `seeds` values are there it says so."""
    mean, low, high = spread(values)
    notes = [f"{low:.{digits}f} to {high:.{digits}f}"] if len(values) > 1 else []
    notes += [f"{len(values)} of {seeds} seeds"] if len(values) < seeds else []
    return f"{mean:.{digits}f}" + (f" ({', '.join(notes)})" if notes else "")


def confidence(values: Sequence[float]) -> tuple[float, float] | None:
    """Interval of the mean at 95 %, by Student's t; None of fewer than three values."""
    if len(values) < 3:
        return None
    df = len(values) - 1
    t = T975.get(df, 1.96 + 2.37 / df + 2.9 / df**2)
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def write_between(guide: Path, name: str, text: str) -> None:
    """Put `text` between the lines <!-- name --> and <!-- /name --> of a guide.

    Raises:
        ValueError: the guide has no such lines.
    """
    before, opening, rest = guide.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, closing, after = rest.partition(f"<!-- /{name} -->")
    if not closing:
        raise ValueError(f"{guide.name} has no lines <!-- {name} --> and <!-- /{name} --> to write between.")
    write_whole(guide, f"{before}{opening}\n{text}\n\n{closing}{after}")


def panels(count: int, *, rows: int = 1, width: float = 5.5, height: float = 4.4):
    """(figure, list of axes) side by side in each row, row by row, without a window or global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, count, squeeze=False).flat)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_line(axes, model: str, points: Mapping[float, Sequence[float]], **style) -> None:
    """Mean over seeds against x, with bars from the lowest to the highest.

    Args:
        points: {x: values, one a seed}.
        style: as matplotlib's `errorbar` takes; label and colour are the model's own unless given.
    """
    xs = sorted(x for x, values in points.items() if values)
    if not xs:
        return
    means, lows, highs = zip(*(spread(points[x]) for x in xs), strict=True)
    bars = [[m - low for m, low in zip(means, lows, strict=True)], [h - m for m, h in zip(means, highs, strict=True)]]
    look = {"color": COLORS.get(model), "label": NAMES.get(model, model), "marker": "o", "markersize": 4, "capsize": 3}
    axes.errorbar(xs, means, yerr=bars, **(look | style))


def draw_bars(axes, columns: Sequence[str], rows: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """A bar of the mean over seeds for each model in each column, with its error bar and every seed as a point.

    Args:
        columns: names below the groups of bars.
        rows: {model: values of each column, one a seed, empty where there are none}.
    """
    width = 0.8 / max(len(rows), 1)
    for place, (model, cells) in enumerate(rows.items()):
        shift, label = width * (place - (len(rows) - 1) / 2), NAMES.get(model, model)
        for column, values in enumerate(cells):
            if not values:
                continue
            mean, low, high = spread(values)
            at, color = column + shift, COLORS.get(model)
            axes.bar(at, mean, width * 0.9, color=color, alpha=0.75, label=label)
            axes.errorbar(at, mean, yerr=[[mean - low], [high - mean]], color="black", capsize=2, linewidth=0.8)
            axes.plot([at] * len(values), values, ".", color="black", markersize=3)
    axes.set(xticks=range(len(columns)), xticklabels=columns)
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # one entry a model, not a bar
    if named:
        axes.legend(named.values(), named.keys(), frameon=False, fontsize=8)
