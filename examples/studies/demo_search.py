"""How the demo's recipe was found: what learns most in two minutes of two cores.

Optimizer and rates are searched for every model alike; sizes, batches and schedule with Rodimus+, for all.

    python examples/studies/demo_search.py                all of examples/results/demo_search.json; goes on if stopped
    python examples/studies/demo_search.py --plan         what is missing
    python examples/studies/demo_search.py --table        the tables, of what is there, into the guide too
    python examples/studies/demo_search.py --smoke        the code path in a minute

Nothing is judged by the clock, so that it can run beside other work. First a step of each setting is measured: seconds
of one processor in one thread, the fastest of some. Two idle minutes are worth `BUDGET` of them, and a trial trains for
as many steps as fit into its share of that. Its score is bits per byte of held-out text; less is better. One file in
eight of that chooses, and the others, on which the trigram is scored too, report what was chosen. One thread says
nothing of how a model gains from a second one: in the demo's own two minutes the steps are a little other.

    sizes    Rodimus+ at several sizes, with AdamW and with Muon, a third of the budget; the small ones also all of it
    changes  Rodimus+ at the size that the demo has: batches, lengths, vocabularies, schedules, a third of the budget
    rates    every model at its size of the demo, both optimizers, the same rates, a third of the budget
    whole    every model at the best of its rates, the whole budget, other seeds; Muon, of which there is more to
             explain, only where it is better by more than `MARGIN`, and then the best of AdamW beside it
"""

import math
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import set_seed

from scrubjay.examples.data.corpus import encode, load_corpus, num_bytes, train_tokenizer
from scrubjay.examples.learning.recipe import QUICK, Recipe
from scrubjay.examples.learning.training import Windows, build_model, train
from scrubjay.examples.measuring.baselines import NGram
from scrubjay.examples.measuring.measure import stream_bits
from scrubjay.examples.studies.cells import Cell, cell_of
from scrubjay.examples.studies.drawing import ranged, write_between
from scrubjay.examples.studies.laboratory import command_line, effort, opened, study_parser
from scrubjay.examples.studies.language import markdown

HERE = Path(__file__).resolve().parent
RESULTS, GUIDE = HERE.parent / "results" / "demo_search.json", HERE / "README.md"
# Two cores of an AMD EPYC with AVX2: the demo's 114 seconds between its looks at held-out text, of which a step of the
# 5M Rodimus+ (8 windows of 128 tokens) takes 0.44 in two threads; in one it takes 0.78 of one processor.
BUDGET = 200.0
TIMED = 8
CHOOSING = 8  # of the held-out files one in so many chooses; the others report what was chosen (`whole`)
TIMELESS = ("share", "steps", "matrix_rate", "decay", "warmup")  # settings that change no step's time
SIZED = ("hidden_size", "num_hidden_layers", "vocab_size", "batch_size", "length")
# (width, blocks, vocabulary, rate)
SIZES = [(256, 4, 4096, 0.004), (128, 3, 4096, 0.008), (128, 2, 4096, 0.012), (128, 1, 4096, 0.012)]
SIZES += [(128, 2, 2048, 0.012), (128, 1, 2048, 0.012), (96, 1, 2048, 0.012), (192, 1, 2048, 0.012)]
CHANGES: list[dict] = [
    {},
    {"batch_size": 4},
    {"batch_size": 16},
    {"batch_size": 16, "length": 64},
    {"vocab_size": 1024},
]
CHANGES += [{"decay": 0.4}, {"decay": 0.95}, {"warmup": 0.02}, {"warmup": 0.2}]
# (optimizer, learning rate, Muon's over it). The last lines: of those before, some model's best was at an end.
CHOICES = [("adamw", 0.003, 1.0), ("adamw", 0.006, 1.0), ("adamw", 0.012, 1.0), ("adamw", 0.024, 1.0)]
CHOICES += [("muon", rate, matrix_rate) for rate in (0.006, 0.012) for matrix_rate in (0.25, 0.5)]
CHOICES += [("muon", 0.012, 1.0), ("muon", 0.024, 0.5)]
CHOICES += [("muon", 0.024, 0.25), ("muon", 0.048, 0.25), ("muon", 0.096, 0.25), ("adamw", 0.0015, 1.0)]
MARGIN = 0.02  # bits per byte; seeds differ by about as much
SEEDS = (1, 2, 3)
TITLES = {
    "whole": "Two minutes, of three seeds",
    "sizes": "Rodimus+ at other sizes, one seed",
    "changes": "Rodimus+ with other batches, lengths, vocabularies and schedules, one seed",
}


@cache
def text(vocab_size: int, train_bytes: int, heldout_bytes: int, whole: bool) -> tuple[np.ndarray, np.ndarray, int, int]:
    """(training stream, held-out stream that chooses or, if `whole`, that reports, bytes of that, end-of-text id)."""
    corpus = load_corpus().limited(train_bytes, heldout_bytes)
    heldout = [each for i, each in enumerate(corpus.heldout) if bool(i % CHOOSING) == whole]
    tokenizer = train_tokenizer(corpus.train, vocab_size)
    streams = [encode(tokenizer, part) for part in (corpus.train, heldout)]
    return *streams, num_bytes(heldout), tokenizer.eos_token_id


def recipe_of(cell: Cell) -> Recipe:
    """The recipe of a cell: the demo's, changed as its settings say."""
    changes = {name: value for name, value in cell.settings.items() if name not in ("share", "steps", "smoke")}
    recipe = Recipe.quick(cell.model, learning_rate=cell.rate, **changes)
    return recipe.smoke() if cell.settings.get("smoke") else recipe


def pace_of(cell: Cell) -> Cell:
    """The cell that measures the step of a cell's setting."""
    settings = {name: value for name, value in cell.settings.items() if name not in TIMELESS}
    return Cell("pace", cell.model, 0, 0.001, settings)


def work(cell: Cell) -> dict:
    return measure_pace(cell) if cell.study == "pace" else learn(cell)


def prepared(cell: Cell):
    """(model, windows, recipe, held-out stream, bytes of it)."""
    recipe = recipe_of(cell)
    part = cell.study == "whole"
    stream, heldout, heldout_bytes, eos = text(recipe.vocab_size, recipe.train_bytes, recipe.heldout_bytes, part)
    set_seed(cell.seed)
    return (
        build_model(cell.model, recipe, recipe.vocab_size, eos),
        Windows(stream, recipe.length),
        recipe,
        heldout,
        heldout_bytes,
    )


def measure_pace(cell: Cell) -> dict:
    """Seconds of one processor that a step takes in one thread: the least of some."""
    model, windows, recipe, *_ = prepared(cell)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        clock = []
        with tempfile.TemporaryDirectory() as folder:
            train(
                model,
                windows,
                replace(recipe, num_evals=TIMED),  # what is called after each step looks at the clock alone
                TIMED,
                bfloat16=False,
                output=Path(folder),
                evaluate=lambda model: clock.append(time.process_time()) or 0.0,
                show=False,
            )
    finally:
        torch.set_num_threads(threads)
    return {"cpu_seconds": min(np.diff(clock)), "parameters": model.num_parameters()}


def learn(cell: Cell) -> dict:
    """Train for the cell's steps and score."""
    model, windows, recipe, heldout, heldout_bytes = prepared(cell)
    steps = cell.settings["steps"]
    with tempfile.TemporaryDirectory() as folder:
        log = train(model, windows, recipe, steps, bfloat16=False, seed=cell.seed, output=Path(folder), show=False)
    bits = stream_bits(model, heldout, recipe.length) / heldout_bytes
    last = log.losses[-max(1, steps // 20) :]
    return {
        "bits_per_byte": bits if math.isfinite(bits) else 99.0,
        "training_nats": sum(last) / len(last),
        "tokens": steps * recipe.batch_size * recipe.length,
        "parameters": model.num_parameters(),
    }


def optimizer_settings(optimizer: str, matrix_rate: float) -> dict:
    """Settings of a cell; AdamW's does not name what it has no use for."""
    return {"optimizer": optimizer} | ({"matrix_rate": matrix_rate} if optimizer == "muon" else {})


def chosen(settings: Mapping) -> dict:
    """The optimizer's settings among a cell's."""
    return {name: settings[name] for name in ("optimizer", "matrix_rate") if name in settings}


class Search:
    """What is to be tried, by what is known so far."""

    def __init__(self, records: Iterable[dict], smoke: bool = False):
        self.known = {cell_of(record): record["result"] for record in records if "result" in record}
        self.smoke = smoke

    def cells(self) -> list[Cell]:
        """Every trial whose step has been measured, in the order of the header; before it the measurements."""
        trials = [*self.sizes(), *self.changes(), *self.rates(), *self.whole()]
        paces = list(dict.fromkeys(pace_of(trial) for trial in trials))
        return [*paces, *(self.timed(trial) for trial in trials if pace_of(trial) in self.known)]

    def timed(self, cell: Cell) -> Cell:
        """The cell with as many steps as its share of the budget holds."""
        seconds = self.known[pace_of(cell)]["cpu_seconds"]
        steps = 4 if self.smoke else round(BUDGET * cell.settings["share"] / seconds)
        return Cell(cell.study, cell.model, cell.seed, cell.rate, {**cell.settings, "steps": steps})

    def trial(self, study: str, model: str, rate: float, seed: int = 0, share: float = 1 / 3, **settings) -> Cell:
        recipe = Recipe.quick(model)
        settings = {name: getattr(recipe, name) for name in SIZED} | settings | {"share": round(share, 3)}
        return Cell(study, model, seed, rate, settings | ({"smoke": True} if self.smoke else {}))

    def sizes(self) -> list[Cell]:
        adamw, muon = optimizer_settings("adamw", 1.0), optimizer_settings("muon", 0.5)
        thirds = [self.sized(size, 1 / 3, choice) for size in SIZES for choice in (adamw, muon)]
        return [*thirds, *(self.sized(size, 1.0, adamw) for size in SIZES if size[2] == 2048)]

    def sized(self, size: tuple, share: float, choice: dict) -> Cell:
        width, blocks, words, rate = size
        sizes = {"hidden_size": width, "num_hidden_layers": blocks, "vocab_size": words}
        return self.trial("sizes", "rodimus_plus", rate, share=share, **sizes, **choice)

    def changes(self) -> list[Cell]:
        return [self.trial("changes", "rodimus_plus", 0.012, optimizer="adamw", **change) for change in CHANGES]

    def rates(self) -> list[Cell]:
        return [
            self.trial("rates", model, rate, **optimizer_settings(optimizer, matrix_rate))
            for optimizer, rate, matrix_rate in CHOICES
            for model in QUICK
        ]

    def best(self, model: str) -> list[Cell]:
        """Of `rates`, once all of the model's are done: AdamW's, before it Muon's where that is better by `MARGIN`."""
        trials = [trial for trial in self.rates() if trial.model == model]
        if not all(pace_of(trial) in self.known and self.timed(trial) in self.known for trial in trials):
            return []

        def loss(trial: Cell) -> float:
            return self.known[self.timed(trial)]["bits_per_byte"]

        muon, adamw = (
            min((trial for trial in trials if trial.settings["optimizer"] == name), key=loss)
            for name in ("muon", "adamw")
        )
        return [muon, adamw] if loss(muon) + MARGIN < loss(adamw) else [adamw]

    def whole(self) -> list[Cell]:
        return [
            self.trial("whole", best.model, best.rate, seed, 1.0, **chosen(best.settings))
            for best in (best for model in QUICK for best in self.best(model))
            for seed in SEEDS
        ]


def rows_of(search: Search, study: str) -> dict[tuple, list[dict]]:
    """Results of each setting of a study, over its seeds."""
    rows: dict[tuple, list[dict]] = {}
    for trial in getattr(search, study)():
        if pace_of(trial) in search.known and search.timed(trial) in search.known:
            timed = search.timed(trial)
            shown = {name: value for name, value in timed.settings.items() if name != "smoke"}
            shown = {"model": trial.model} | shown | {"rate": trial.rate}
            rows.setdefault(tuple(shown.items()), []).append(search.known[timed])
    return rows


def table_of(search: Search, study: str) -> str:
    """In Markdown, "" if there is nothing: a row a setting, of which is shown what differs; mean over seeds, range."""
    rows = rows_of(search, study)
    if not rows:
        return ""
    settings = [dict(row) for row in rows]
    names = list(dict.fromkeys(name for row in settings for name in row))
    names = [name for name in names if len({row.get(name) for row in settings}) > 1]
    lines = []
    for row, results in zip(settings, rows.values(), strict=True):
        found = [f"{results[0]['parameters'] / 1e6:.2f}M", f"{results[0]['tokens'] / 1000:.0f}k"]
        bits = ranged([result["bits_per_byte"] for result in results], len(SEEDS) if study == "whole" else 1)
        lines.append([*(f"{row.get(name, '')}" for name in names), *found, bits])
    return markdown([*names, "parameters", "tokens", "bits per byte"], lines)


def tables(search: Search) -> str:
    """What was found, of every study."""
    found = {study: table_of(search, study) for study in ("sizes", "changes", "rates", "whole")}
    return "\n\n".join(f"{study}\n\n{text}" for study, text in found.items() if text)


def table(records: Iterable[dict]) -> str:
    """What the guide shows: all but the single trials."""
    records = list(records)
    search = Search(records)
    found = {TITLES[study]: table_of(search, study) for study in TITLES}
    parts = [f"{title}:\n\n{text}" for title, text in found.items() if text]
    return "\n\n".join([*parts, effort(records)])


def trigram() -> float:
    """Bits per byte of the demo's trigram, of the text that `whole` reports."""
    recipe = Recipe.quick("llama")
    stream, heldout, heldout_bytes, _ = text(recipe.vocab_size, recipe.train_bytes, recipe.heldout_bytes, True)
    return NGram(stream, recipe.vocab_size).bits(heldout, 3) / heldout_bytes


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = study_parser("demo_search.py", __doc__, RESULTS)
    args = parser.parse_args(argv)
    laboratory = opened(args, command_line("examples/studies/demo_search.py", argv))

    def search(records: Iterable[dict]) -> Search:
        return Search(records, args.smoke)

    if args.table:
        print(tables(search(laboratory.records())))
        if args.out == args.results:
            write_between(GUIDE, "demo_search", table(laboratory.records()))
    elif args.plan:
        print(laboratory.plan(search(laboratory.records()).cells()))
    else:
        records = laboratory.run(lambda records: search(records).cells(), work, args.minutes)
        print(f"trigram {trigram():.4f}\n\n{tables(search(records))}")


if __name__ == "__main__":
    main()
