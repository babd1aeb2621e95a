"""Recall: what can a fixed-size state remember? Multi-query associative recall (`mqar.py`) by models of equal size.

A sequence lists pairs and asks for every key again. Attention looks the answer up; a recurrent model must have put all
pairs into its state, so accuracy over (pairs, state size) measures the state and the rule that writes to it.

    python examples/studies/recall.py --plan                    what is missing, and its time
    python examples/studies/recall.py --workers 2               run it into examples/results/recall.json; continues
    python examples/studies/recall.py --only 'ssd .*pairs=8 '   a part of it
    python examples/studies/recall.py --table                   table and figure from what is there
    python examples/studies/recall.py --smoke                   the code path in seconds, learns nothing

Every model has as many parameters (`recall_models.py`), and the same recipe: AdamW, a tenth of warm-up, cosine to zero,
batches of the task at its length, half and a quarter of it. Its learning rate is the best of one grid on a seed apart;
then three other seeds run at that rate. A run ends early where it has solved the task, or is hopeless: after 60 % of
its steps it is not beyond twice what guessing among the listed values gives. What takes off late and what never does
are told apart by the step at which accuracy reaches one half.

A researcher adds a model by a line in `MAKERS` and its name here, and a cell by a line in `LINES`.
"""

import math
import statistics
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from scrubjay.examples.learning.optimizer import decay_groups
from scrubjay.examples.studies.cells import Cell, Tuning
from scrubjay.examples.studies.drawing import NAMES, draw_bars, draw_line, panels, ranged, write_between
from scrubjay.examples.studies.laboratory import command_line, effort, opened, study_parser
from scrubjay.examples.studies.mqar import accuracy, causal_labels, mqar_batch
from scrubjay.examples.studies.recall_models import MAKERS, STATELESS, Sizes, build
from scrubjay.examples.studies.selective_scan import fast_mamba1

HERE = Path(__file__).resolve().parent
RESULTS, GUIDE = HERE.parent / "results" / "recall.json", HERE / "README.md"
VERSION = 1  # of everything that decides a cell's result and does not stand in its settings
SOLVED, TAKEN_OFF, PATIENCE = 0.999, 0.5, 0.6
STEPS, BATCH, EVERY = 2000, 32, 50
PARAMETERS = 200_000

# In the order in which they are run: (pairs, state sizes, models).
RECURRENT, OTHERS = ("ssd", "rodimus"), ("ssd_hybrid", "rodimus_plus", "taipan", "llama")
LINES: tuple[tuple[int, tuple[int, ...], tuple[str, ...]], ...] = (
    (32, (16, 64), RECURRENT),  # Rodimus at 16 against SSD at 64
    (32, (64,), OTHERS),
    (16, (16,), (*RECURRENT, "mamba1")),
    (8, (16,), (*RECURRENT, "mamba1")),
    (32, (16,), OTHERS[:-1]),
    (16, (64,), (*RECURRENT, *OTHERS)),
    (8, (64,), (*RECURRENT, *OTHERS)),
    (32, (32,), RECURRENT),
    (32, (64,), ("mamba2",)),
    (64, (16, 64), RECURRENT),
    (64, (64,), OTHERS),
    (32, (128,), RECURRENT),
    (64, (32,), RECURRENT),
    (64, (16,), OTHERS[:-1]),
    (64, (128,), RECURRENT),
    (128, (64,), RECURRENT),  # of the paper's regime (256 pairs in 1024 tokens) what fits
)


def settings(model: str, pairs: int, state_size: int) -> dict:
    """Of a line: from 16 pairs on, a sequence is as short as the task allows; larger tasks get more steps and words."""
    return {
        "pairs": pairs,
        "length": max(4 * pairs, 64),
        "vocab_size": 256 if pairs <= 64 else 4 * pairs,
        "state_size": None if model in STATELESS else state_size,
        "parameters": PARAMETERS * (2 if state_size > 64 or pairs > 64 else 1),
        "steps": STEPS * (2 if pairs > 32 else 1),
        "batch_size": BATCH,
    }


def groups() -> Iterator[tuple[str, dict]]:
    """(model, settings) of every line."""
    for pairs, sizes, models in LINES:
        for state_size in sizes:
            for model in models:
                yield model, settings(model, pairs, state_size)


def score(result: dict) -> float:
    """What a rate is chosen by: accuracy to a hundredth, and of runs as good the earlier."""
    late = 1.0 if result["take_off"] is None else result["take_off"] / result["steps"]
    return round(result["accuracy"], 2) - 0.001 * late


TUNING = Tuning(rates=(1e-3, 3e-3, 1e-2, 3e-2), seeds=(100,), reported=(0, 1, 2), score=score)


def cells(records: Iterable[dict], *, guess: bool = False) -> list[Cell]:
    """All that are to run, as far as the records decide it."""
    records = list(records)
    return [cell for model, chosen in groups() for cell in TUNING.cells("recall", model, chosen, records, guess=guess)]


SMOKE = [Cell("recall", model, 0, 3e-3, settings(model, 8, 64) | {"steps": 4, "batch_size": 4}) for model in MAKERS]


def sizes_of(chosen: dict) -> Sizes:
    return Sizes(**{field.name: chosen[field.name] for field in fields(Sizes)})


def training_batch(chosen: dict, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of the task at its size, half or a quarter of it: the short ones are learned first and teach the long."""
    shift = int(rng.integers(min(3, chosen["pairs"].bit_length())))
    pairs, length = chosen["pairs"] >> shift, 2 * (chosen["length"] >> shift + 1)  # at least one pair, an even length
    inputs, labels = mqar_batch(chosen["batch_size"], length, pairs, chosen["vocab_size"], rng)
    return torch.from_numpy(inputs), torch.from_numpy(causal_labels(labels))


@torch.no_grad()
def selection(model: PreTrainedModel, inputs: np.ndarray) -> dict:
    """{"selected": share of tokens that attend in each selective layer}, for a model that has such layers."""
    rates = getattr(model(input_ids=torch.from_numpy(inputs), use_cache=False), "selection", None)
    return {} if rates is None else {"selected": [round(rate, 4) for rate in rates[:, 0].tolist()]}


def work(cell: Cell, *, every: int = EVERY, num_validation: int = 128, num_test: int = 1000) -> dict:
    """Train and test a cell."""
    with fast_mamba1() if cell.model == "mamba1" else nullcontext():
        return _work(cell, every, num_validation, num_test)


def _work(cell: Cell, every: int, num_validation: int, num_test: int) -> dict:
    chosen = cell.settings
    task = chosen["length"], chosen["pairs"], chosen["vocab_size"]
    # Three streams of examples from one seed: validation and test are the same for every model, and never trained on.
    train_rng, validation_rng, test_rng = (np.random.default_rng([cell.seed, stream]) for stream in range(3))
    model = build(cell.model, sizes_of(chosen), chosen.get("switches"))
    steps = chosen["steps"]
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=cell.rate, betas=(0.9, 0.98))
    scheduler = get_cosine_schedule_with_warmup(optimizer, max(steps // 10, 1), steps)
    validation = mqar_batch(num_validation, *task, validation_rng)
    curve: dict[str, list] = {"step": [], "loss": [], "accuracy": []}
    losses: list[float] = []
    stopped = None
    for step in range(1, steps + 1):
        model.train()
        inputs, labels = training_batch(chosen, train_rng)
        loss = model(input_ids=inputs, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            stopped = "diverged"
            break
        if step % every and step != steps:
            continue
        curve["step"].append(step)
        curve["loss"].append(round(statistics.fmean(losses), 4))
        curve["accuracy"].append(round(accuracy(model, *validation), 4))
        losses.clear()
        stopped = verdict(curve, chosen)
        if stopped:
            break
    test = mqar_batch(num_test, *task, test_rng)
    return {
        "accuracy": 0.0 if stopped == "diverged" else round(accuracy(model, *test), 4),
        "take_off": take_off(curve),
        "stopped": stopped,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "width": model.config.hidden_size,
        **selection(model, validation[0]),
        "steps": steps,
        "curve": curve,
    }


def verdict(curve: dict, chosen: dict) -> str | None:
    """Why a run ends before its last step: "solved", "hopeless", or None."""
    if curve["accuracy"][-1] >= SOLVED:
        return "solved"
    late = PATIENCE * chosen["steps"] <= curve["step"][-1] < chosen["steps"]
    return "hopeless" if late and max(curve["accuracy"]) < 2 / chosen["pairs"] else None


def take_off(curve: dict) -> int | None:
    """First step at which accuracy was one half; None: never."""
    found = zip(curve["step"], curve["accuracy"], strict=True)
    return next((step for step, reached in found if reached >= TAKEN_OFF), None)


def rows(records: Iterable[dict]) -> dict[tuple[str, int | None], dict[int, tuple[float, list[dict]]]]:
    """{(model, state size): {pairs: (rate, results of the reported seeds)}} of what is there."""
    records = list(records)
    found: dict[tuple[str, int | None], dict[int, tuple[float, list[dict]]]] = {}
    for model, chosen in groups():
        results = TUNING.results("recall", model, chosen, records)
        if results:
            rate = TUNING.best("recall", model, chosen, records)
            found.setdefault((model, chosen["state_size"]), {})[chosen["pairs"]] = rate, results
    order = list(NAMES)
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1] or 0)))


def title(model: str, state_size: int | None) -> str:
    return NAMES[model] + (f", n = {state_size}" if state_size else "")


def table(records: Iterable[dict]) -> str:
    """In Markdown: accuracy, the steps at which runs took off with the rates that were chosen, and the figure."""
    records = list(records)
    found = rows(records)
    if not found:
        return "Not run yet."
    columns = sorted({pairs for cells in found.values() for pairs in cells})
    head = "| {} | " + " | ".join(f"{pairs} pairs" for pairs in columns) + " |\n|" + "---|" * (len(columns) + 1)
    lines = [head.format("test accuracy: mean (lowest to highest)")]
    lines += [_line(key, cells, columns, _said_accuracy) for key, cells in found.items()]
    lines += ["", head.format("median step of taking off; learning rate")]
    lines += [_line(key, cells, columns, _said_take_off) for key, cells in found.items()]
    lines += ["", effort(records), "", "![Associative recall](../results/recall.png)"]
    return "\n".join(lines)


def _line(key, cells, columns, said) -> str:
    return f"| {title(*key)} | " + " | ".join(said(*cells[pairs]) if pairs in cells else "" for pairs in columns) + " |"


def _said_accuracy(rate: float, results: list[dict]) -> str:
    return ranged([result["accuracy"] for result in results], len(TUNING.reported))


def _said_take_off(rate: float, results: list[dict]) -> str:
    return f"{median_take_off(results)}; {rate:g}{'*' if rate in edges() else ''}"


def median_take_off(results: list[dict]) -> str:
    """Over seeds, as tables have it."""
    steps = statistics.median_high(sorted(result["take_off"] or math.inf for result in results))
    return "never" if steps == math.inf else f"{steps:.0f}"


def edges() -> tuple[float, float]:
    """Ends of the grid: a better rate may lie beyond."""
    return min(TUNING.rates), max(TUNING.rates)


def figure(records: Iterable[dict], path: Path) -> None:
    """Accuracy against pairs, a line for each model and state size; and at 32 pairs, a bar for each."""
    found = rows(records)
    if not found:
        return
    drawn, (left, right) = panels(2, width=6.4)
    for (model, state_size), cells in found.items():
        style = {16: ":", 32: "-.", 64: "-", 128: "--"}.get(state_size or 0, "-")
        points = {pairs: [result["accuracy"] for result in results] for pairs, (_, results) in cells.items()}
        draw_line(left, model, points, linestyle=style, label=title(model, state_size))
    left.set_xscale("log", base=2)
    left.set(xlabel="pairs", ylabel="test accuracy", ylim=(-0.02, 1.04), title="Multi-query associative recall")
    left.xaxis.set_major_formatter("{x:.0f}")
    left.legend(frameon=False, fontsize=7)
    at = max({pairs for cells in found.values() for pairs in cells}, key=lambda pairs: (pairs == 32, -pairs))
    states = sorted({state for (_, state), cells in found.items() if at in cells}, key=lambda state: state or 0)
    models = list(dict.fromkeys(model for (model, _), cells in found.items() if at in cells))
    bars = {
        model: [
            [result["accuracy"] for result in found.get((model, state), {}).get(at, (0, []))[1]] for state in states
        ]
        for model in models
    }
    draw_bars(right, [f"n = {state}" if state else "no state" for state in states], bars)
    right.set(ylabel="test accuracy", ylim=(0, 1.3), title=f"{at} pairs: mean, every seed, lowest to highest")
    drawn.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> list[dict]:
    """Run what the command line asks for; returns the records."""
    argv = sys.argv[1:] if argv is None else argv
    parser = study_parser("recall.py", __doc__, RESULTS)
    args = parser.parse_args(argv)
    laboratory = opened(args, command_line("examples/studies/recall.py", argv), VERSION)
    if args.smoke:
        return laboratory.run(SMOKE, partial(work, every=2, num_validation=8, num_test=8), args.minutes)
    if args.plan:
        print(laboratory.plan(cells(laboratory.records(), guess=True), cost))
        return []
    if args.table:
        text = table(laboratory.records())
        if args.out == args.results:
            write_between(GUIDE, "recall", text)
        figure(laboratory.records(), args.out.with_suffix(".png"))
        print(text)
        return laboratory.records()
    return laboratory.run(cells, work, args.minutes)


def cost(cell: Cell) -> float:
    """Tokens of a run."""
    return cell.settings["steps"] * cell.settings["batch_size"] * cell.settings["length"]


if __name__ == "__main__":
    main()
