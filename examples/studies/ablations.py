"""Ablations: what are the parts of Rodimus, the attention layers of a hybrid and the capacity of Taipan worth?

Small models read half a million tokens of the standard library's source, in windows of 128. Every variant has the same
effort: three rates in runs of a quarter of the tokens on a seed of its own, then three seeds at the best one.

    gates      Rodimus without the temperature, with a full input gate or none, without the short convolution
    keys       Rodimus+ whose attention stays in the residual stream, or has keys and values shared otherwise
    layers     SSD in which so many of ten blocks are attention; as many parameters each
    capacity   Taipan with capacity .10 to .25, with and without rotary positions; and which tokens it attends for

    python examples/studies/ablations.py                      trains what is missing; goes on where it stopped
    python examples/studies/ablations.py --only '^layers'     of one question
    python examples/studies/ablations.py --plan               what is missing, and its time by what is there
    python examples/studies/ablations.py --table              prints the tables and draws the figures of what is there
    python examples/studies/ablations.py --smoke              the code path in seconds, learns nothing

Depth and widths of `gates` and `keys` are those of the model as published: a switch that adds or removes parameters
shows in the tables, nothing makes up for it. Bits per byte are of one held-out text, read in contexts of 1 and 16 times
the training length.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from scrubjay.examples.measuring.run_report import FULL, GRAY, OURS
from scrubjay.examples.studies.cells import Cell, Tuning
from scrubjay.examples.studies.drawing import spread
from scrubjay.examples.studies.equal_models import Sizes
from scrubjay.examples.studies.laboratory import add_arguments, command_line, opened
from scrubjay.examples.studies.language import markdown, millions, ranged, rate_in
from scrubjay.examples.studies.language_runs import Budget, ShortTrials, queue, settings_of, train_cell
from scrubjay.examples.studies.selection_picture import draw_selection, marked

RESULTS = Path(__file__).resolve().parents[1] / "results" / "ablations.json"
VERSION = 1  # raised when records of an older one are worth nothing beside new ones


@dataclass(frozen=True)
class Question:
    """Variants of one model.

    Args:
        variants: by name, `shape` and `switches` as `configured` takes them; the first is what others are held against.
        drawn: tokens of held-out text whose selection is kept.
    """

    title: str
    model: str
    variants: dict[str, dict]
    drawn: int = 0


def switched(**switches) -> dict:
    return {"switches": switches}


QUESTIONS = {
    "gates": Question(
        "Rodimus' mixer",
        "rodimus",
        {
            "as published": {},
            "no temperature": switched(temperature_gate=False),
            "full input gate": switched(input_gate="full"),
            "no input gate": switched(input_gate="none"),
            "no short convolution": switched(short_conv=False),
        },
    ),
    "keys": Question(
        "Rodimus+'s attention",
        "rodimus_plus",
        {
            "as published: keys shared": {},
            "kept in the stream": switched(two_hop=False),
            "keys and values shared (MQA)": switched(num_key_heads=1, num_value_heads=1),
            "of two heads each (GQA)": switched(num_key_heads=2, num_value_heads=2),
            "none shared (MHA)": switched(num_key_heads=4, num_value_heads=4),
        },
    ),
    "layers": Question(
        "Attention layers of a hybrid",
        "ssd_hybrid",
        {str(count): {"shape": {"attention": count}} for count in (0, 1, 2, 3, 5, 10)},
    ),
    "capacity": Question(
        "Taipan's capacity",
        "taipan",
        {
            f"{capacity:.2f}{', rotary' if positions == 'rope' else ''}": switched(capacity=capacity, sal_pos=positions)
            for positions in ("none", "rope")
            for capacity in (0.15, 0.1, 0.2, 0.25)
        },
        drawn=256,
    ),
}


@dataclass(frozen=True)
class Study:
    """What the command line decides."""

    sizes: Sizes = Sizes(hidden_size=128, blocks=10, vocab_size=2048, state_size=64, head_dim=32)
    budget: Budget = Budget(tokens=1 << 19, scored=[128, 2048], rows=16, validation=1 << 15)
    tuning: Tuning = ShortTrials(
        rates=(2e-3, 4e-3, 8e-3),
        seeds=(100,),
        reported=(0, 1, 2),
        score=lambda result: -result["validation"],
        short={"tokens": 1 << 17, "scored": [], "drawn": 0},
    )

    def variants(self, name: str) -> dict[str, tuple[str, dict]]:
        """Model and settings of each variant of a question."""
        question = QUESTIONS[name]
        more = {"drawn": question.drawn} if question.drawn else {}
        return {
            variant: (question.model, settings_of(self.sizes, self.budget, **given, **more))
            for variant, given in question.variants.items()
        }

    def cells(self, records: list[dict], guess: bool = False) -> list[Cell]:
        return [cell for name in QUESTIONS for cell in queue(self.tuning, name, self.variants(name), records, guess)]

    def results(self, name: str, records: list[dict]) -> dict[str, list[dict]]:
        """Of the reported seeds of each variant of a question, as far as they are there."""
        found = {
            variant: self.tuning.results(name, model, settings, records)
            for variant, (model, settings) in self.variants(name).items()
        }
        return {variant: results for variant, results in found.items() if results}


SMOKE = Study(
    Sizes(hidden_size=32, blocks=10, vocab_size=300, state_size=8, head_dim=8, window=8),
    Budget(tokens=64, batch_size=2, length=16, scored=[16, 64], rows=1, validation=32, train_bytes=1 << 17),
    ShortTrials((1e-3,), (100,), (0,), lambda result: -result["validation"], {"tokens": 32, "scored": [], "drawn": 0}),
)


def tables(study: Study, records: list[dict]) -> str:
    """A table for each question of which there is something, as Markdown. A cell is mean and range over the seeds."""
    lengths = [str(length) for length in study.budget.scored]
    parts = []
    for name, question in QUESTIONS.items():
        results, settings = study.results(name, records), study.variants(name)
        if not results:
            continue
        picks = any("selected" in found for some in results.values() for found in some)
        header = [question.title, "parameters", "rate", *(f"{length} tokens" for length in lengths)]
        header += [f"selected of {length}" for length in lengths] if picks else []
        rows = []
        for variant, some in results.items():
            rate = study.tuning.best(name, *settings[variant], records)
            row = [variant, millions(some[0]["parameters"]), rate_in(study.tuning, rate)]
            row += [ranged([found["bits_per_byte"][length] for found in some]) for length in lengths]
            if picks:
                row += [ranged([found["selected"][length][0] for found in some], 2) for length in lengths]
            rows.append(row)
        parts.append(markdown(header, rows))
    return "\n\n".join(parts)


def drawn(study: Study, records: list[dict]) -> dict | None:
    """What the gate of the first variant of `capacity`, at its first seed, said of a text; None: not there yet."""
    results = study.results("capacity", records).get(next(iter(QUESTIONS["capacity"].variants)))
    return results[0]["drawn"] if results else None


def draw(study: Study, records: list[dict], path: Path) -> None:
    """A panel for each question: bits per byte of its variants at the shortest and the longest context."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(13, 8), layout="constrained")
    lengths = study.budget.scored[0], study.budget.scored[-1]
    for axes, (name, question) in zip(figure.subplots(2, 2).flat, QUESTIONS.items(), strict=True):
        results = study.results(name, records)
        rows = [variant for variant in question.variants if variant in results]
        for length, color in zip(lengths, (OURS, FULL), strict=True):
            for place, variant in enumerate(rows):
                values = [found["bits_per_byte"][str(length)] for found in results[variant]]
                mean, low, high = spread(values)
                label = f"{length} tokens of context" if place == 0 else None
                bars = {"xerr": [[mean - low], [high - mean]], "fmt": "o", "capsize": 3, "color": color}
                axes.errorbar(mean, place, label=label, **bars)
                axes.plot(values, [place] * len(values), "|", color=color, markersize=5)
            if rows:
                axes.axvline(spread([found["bits_per_byte"][str(length)] for found in results[rows[0]]])[0],
                             color=color, linewidth=0.8, linestyle="--", zorder=0)  # fmt: skip
        axes.set(yticks=range(len(rows)), yticklabels=rows, xlabel="bits per byte", title=question.title)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="x", color=GRAY, alpha=0.2)
        if rows:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def show(study: Study, records: list[dict], out: Path | None) -> None:
    """Tables and the selection as text on the terminal, the figures beside the JSON if there is one."""
    print(tables(study, records))
    found = drawn(study, records)
    for place, numbers in (found["layers"] if found else {}).items():
        print(f"\nWhat layer {place} of a Taipan attends for:\n{marked(found['tokens'], numbers)}")
    if out:
        draw(study, records, out.with_suffix(".png"))
    if out and found:
        first = next(iter(QUESTIONS["capacity"].variants))
        draw_selection(found, out.with_name(f"{out.stem}_selection.png"), f"Taipan, capacity {first}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ablations.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, RESULTS)
    parser.add_argument("--table", action="store_true", help="run nothing: print the tables, draw the figures")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict]:
    """Run what the command line asks for; returns all records of the study."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    study = SMOKE if args.smoke else Study()
    laboratory = opened(args, command_line("examples/studies/ablations.py", argv), VERSION)
    if args.plan:
        cells = study.cells(laboratory.records(), guess=True)
        print(laboratory.plan(cells, cost=lambda cell: cell.settings["tokens"]))
        return laboratory.records()
    if not args.table:
        laboratory.run(study.cells, train_cell, args.minutes)
    records = laboratory.records()
    show(study, records, laboratory.out)
    return records


if __name__ == "__main__":
    main()
