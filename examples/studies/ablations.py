"""Ablations: what are the parts of Rodimus, the attention layers of a hybrid and the capacity of Taipan worth?

Small models read 262,144 tokens of the standard library's source, in windows of 128. All variants have the same effort:
five rates in runs of a quarter of the tokens on a seed of its own, then three seeds at the best one. Where the
question is what a state remembers, the task is that of recall.py, and four rates are tried in runs as
long as the others.

    gates      Rodimus without the temperature, with a full input gate or none, without the short convolution
    recall     the same, recalling 32 pairs from a state of 4 keys
    keys       Rodimus+ whose attention stays in the residual stream, or has keys and values shared otherwise
    layers     SSD in which so many of ten blocks are attention; as many parameters each
    capacity   Taipan with capacity .10 to .25, with and without rotary positions; and which tokens it attends for

    python examples/studies/ablations.py                      trains what is missing; goes on where it stopped
    python examples/studies/ablations.py --only '^layers'     of one question
    python examples/studies/ablations.py --plan               what is missing, and its time by what is there
    python examples/studies/ablations.py --table              tables and figures of what is there, into the guide too
    python examples/studies/ablations.py --smoke              the code path in seconds, learns nothing

Depth and widths of `gates`, `recall` and `keys` are those of the model as published: a switch that adds or removes
parameters shows in the tables, nothing makes up for it. Bits per byte are of one held-out text, read in contexts of 1
and 16 times the training length.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from scrubjay.examples.measuring.run_report import FULL, GRAY, OURS
from scrubjay.examples.studies.cells import Cell, Tuning
from scrubjay.examples.studies.drawing import ranged, spread, write_between
from scrubjay.examples.studies.equal_models import Sizes
from scrubjay.examples.studies.laboratory import command_line, effort, opened, study_parser
from scrubjay.examples.studies.language import markdown, millions, rate_in
from scrubjay.examples.studies.language_runs import Budget, ShortTrials, queue, settings_of, train_cell
from scrubjay.examples.studies.recall import cost as recall_cost
from scrubjay.examples.studies.recall import median_take_off
from scrubjay.examples.studies.recall import score as recall_score
from scrubjay.examples.studies.recall import settings as recall_settings
from scrubjay.examples.studies.recall import work as recall_work
from scrubjay.examples.studies.selection_picture import draw_selection, marked

HERE = Path(__file__).resolve().parent
RESULTS, GUIDE = HERE.parent / "results" / "ablations.json", HERE / "README.md"
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


GATES = {
    "as published": {},
    "no temperature": switched(temperature_gate=False),
    "full input gate": switched(input_gate="full"),
    "no input gate": switched(input_gate="none"),
    "no short convolution": switched(short_conv=False),
}
RECALL = "recall_gates"  # the question that is asked of another task
QUESTIONS = {
    "gates": Question("Rodimus' mixer", "rodimus", GATES),
    RECALL: Question("Rodimus' mixer, recall", "rodimus", GATES),
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

    sizes: Sizes
    budget: Budget
    tuning: Tuning
    recall: dict
    recall_tuning: Tuning

    def tuned(self, name: str) -> Tuning:
        return self.recall_tuning if name == RECALL else self.tuning

    def variants(self, name: str) -> dict[str, tuple[str, dict]]:
        """Model and settings of each variant of a question."""
        question = QUESTIONS[name]
        more = {"drawn": question.drawn} if question.drawn else {}
        common = self.recall if name == RECALL else settings_of(self.sizes, self.budget, **more)
        return {variant: (question.model, common | given) for variant, given in question.variants.items()}

    def cells(self, records: list[dict], guess: bool = False) -> list[Cell]:
        queues = (queue(self.tuned(name), name, self.variants(name), records, guess) for name in QUESTIONS)
        return [cell for some in queues for cell in some]

    def results(self, name: str, records: list[dict]) -> dict[str, list[dict]]:
        """Of the reported seeds of each variant of a question, as far as they are there."""
        found = {
            variant: self.tuned(name).results(name, model, settings, records)
            for variant, (model, settings) in self.variants(name).items()
        }
        return {variant: results for variant, results in found.items() if results}


STUDY = Study(
    Sizes(hidden_size=128, blocks=10, vocab_size=2048, state_size=64, head_dim=32),
    Budget(tokens=1 << 18, scored=[128, 2048], rows=16),
    ShortTrials(
        rates=(2e-3, 4e-3, 8e-3, 16e-3, 32e-3),
        seeds=(100,),
        reported=(0, 1, 2),
        score=lambda result: -result["validation"],
        short={"tokens": 1 << 16, "scored": [], "drawn": None},
    ),
    recall_settings("rodimus", 32, 4),  # of 16 keys Rodimus recalls nearly all
    Tuning((1e-3, 3e-3, 1e-2, 2e-2), seeds=(100,), reported=(0, 1, 2), score=recall_score),
)
SMOKE = Study(
    Sizes(hidden_size=32, blocks=10, vocab_size=300, state_size=8, head_dim=8, window=8),
    Budget(tokens=64, batch_size=2, length=16, scored=[16, 64], rows=1, validation=32, train_bytes=1 << 17),
    ShortTrials(
        (1e-3,), (100,), (0,), lambda result: -result["validation"], {"tokens": 32, "scored": [], "drawn": None}
    ),
    recall_settings("rodimus", 4, 8) | {"length": 16, "vocab_size": 32, "steps": 2},
    Tuning((1e-3,), (100,), (0,), recall_score),
)


def work(cell: Cell) -> dict:
    """A training on text, or on recall."""
    return recall_work(cell) if cell.study == RECALL else train_cell(cell)


def tables(study: Study, records: list[dict]) -> str:
    """A table for each question of which there is something, as Markdown. A cell is mean and range over the seeds."""
    lengths = [str(length) for length in study.budget.scored]
    parts = []
    for name, question in QUESTIONS.items():
        results, settings = study.results(name, records), study.variants(name)
        columns = measures(name, lengths)
        if name == "capacity":
            columns |= {"selected in training": lambda found: fmean(found["selected_in_training"])}
            columns |= {f"selected of {at}": partial(_selected, at) for at in lengths}
        rows = []
        for variant, some in results.items():
            rate = study.tuned(name).best(name, *settings[variant], records)
            row = [variant, millions(some[0]["parameters"]), rate_in(study.tuned(name), rate)]
            seeds = len(study.tuned(name).reported)
            row += [ranged([measure(found) for found in some], seeds) for measure in columns.values()]
            rows.append(row + ([median_take_off(some)] if name == RECALL else []))
        if rows:
            header = [question.title, "parameters", "rate", *columns]
            parts.append(markdown(header + (["median step of taking off"] if name == RECALL else []), rows))
    return "\n\n".join(parts)


def table(records: list[dict]) -> str:
    """What the guide shows."""
    parts = [tables(STUDY, records), effort(records), "![Ablations](../results/ablations.png)"]
    if drawn(STUDY, records):
        parts.append("![What a Taipan attends for](../results/ablations_selection.png)")
    return "\n\n".join(parts)


def measures(name: str, lengths: Sequence[str]) -> dict[str, Callable[[dict], float]]:
    """What a question is answered by, of a result: a column each."""
    if name == RECALL:
        return {"accuracy": lambda found: found["accuracy"]}
    return {f"{at} tokens": partial(_bits, at) for at in lengths}


def _bits(length: str, found: dict) -> float:
    return found["bits_per_byte"][length]


def _selected(length: str, found: dict) -> float:
    return fmean(found["selected"][length])


def drawn(study: Study, records: list[dict]) -> dict | None:
    """What the gate of the first variant of `capacity`, at its first seed, said of a text; None: not there yet."""
    results = study.results("capacity", records).get(next(iter(QUESTIONS["capacity"].variants)))
    return results[0]["drawn"] if results else None


def draw(study: Study, records: list[dict], path: Path) -> None:
    """A panel for each question: its variants against what it is answered by, at the shortest and longest context."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(18, 8), layout="constrained")
    panels = figure.subplots(2, 3).flat
    ends = [str(study.budget.scored[0]), str(study.budget.scored[-1])]
    for (name, question), axes in zip(QUESTIONS.items(), panels, strict=False):  # panels last: none is lost
        results, columns = study.results(name, records), measures(name, ends)
        for (label, measure), color in zip(columns.items(), (OURS, FULL), strict=False):
            _dots(axes, [[measure(found) for found in some] for some in results.values()], color, label)
        axes.set(yticks=range(len(results)), yticklabels=results, title=question.title)
        axes.set_xlabel("accuracy" if name == RECALL else "bits per byte")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="x", color=GRAY, alpha=0.2)
        if results and len(columns) > 1:
            axes.legend(frameon=False, fontsize=8)
    for axes in panels:  # of no question
        axes.axis("off")
    figure.savefig(path, dpi=120)


def _dots(axes, rows: Sequence[Sequence[float]], color: str, label: str) -> None:
    """A row for each variant: mean, range and every seed; a line where the first one's mean is."""
    for place, values in enumerate(rows):
        mean, low, high = spread(values)
        if place == 0:
            axes.axvline(mean, color=color, linewidth=0.8, linestyle="--", zorder=0)
        bars = {"xerr": [[mean - low], [high - mean]], "fmt": "o", "capsize": 3, "color": color}
        axes.errorbar(mean, place, label=label if place == 0 else None, **bars)
        axes.plot(values, [place] * len(values), "|", color=color, markersize=5)


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
    parser = study_parser("ablations.py", __doc__, RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict]:
    """Run what the command line asks for; returns all records of the study."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    study = SMOKE if args.smoke else STUDY
    laboratory = opened(args, command_line("examples/studies/ablations.py", argv), VERSION)
    if args.plan:
        print(laboratory.plan(study.cells(laboratory.records(), guess=True), cost))
        return laboratory.records()
    if not args.table:
        laboratory.run(study.cells, work, args.minutes)
    records = laboratory.records()
    show(study, records, laboratory.out)
    if args.table and args.out == args.results:
        write_between(GUIDE, "ablations", table(records))
    return records


def cost(cell: Cell) -> float:
    """Tokens of a run."""
    return recall_cost(cell) if cell.study == RECALL else cell.settings["tokens"]


if __name__ == "__main__":
    main()
