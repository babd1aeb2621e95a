"""Language: what do models of equal size learn of real text, and what are they worth, and cost, far beyond it?

Llama, SSD, SSD with MLP, the hybrid of SSD and attention, Rodimus, Rodimus+ and Taipan with equally many parameters
(equal_models.py) read equally many tokens of the standard library's source, in windows of 128. For each of them the
same learning rates are tried in runs of a quarter of the tokens, on a seed that is not reported and by held-out text
that is not reported either; the best one is run on three seeds.

    python examples/studies/language.py              trains and scores what is missing; goes on where it stopped
    python examples/studies/language.py --plan       what is missing, and its time by what is there
    python examples/studies/language.py --decode     time of a decode step and bytes of a cache; on an idle machine
    python examples/studies/language.py --table      tables and figure of what is there, into the guide too
    python examples/studies/language.py --smoke      the code path in seconds, learns nothing

What is compared: cross-entropy in training; bits per byte of one held-out text, read in contexts of 1, 4, 16 and 64
times the training length, each from an empty cache on; time and memory. Llama and the hybrid's attention have rotary
positions as they are, of which training has seen the first 128: nothing is rescaled. Rodimus+ and Taipan attend a
window of half the training length, so that their states have something to do.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from transformers import PreTrainedModel, StaticCache

from scrubjay.examples.measuring.measure import cache_nbytes
from scrubjay.examples.measuring.run_report import size
from scrubjay.examples.studies.cells import Cell, Tuning
from scrubjay.examples.studies.drawing import COLORS, NAMES, draw_line, ranged, write_between
from scrubjay.examples.studies.equal_models import FAMILIES, Sizes, build, configured
from scrubjay.examples.studies.laboratory import command_line, effort, opened, study_parser
from scrubjay.examples.studies.language_runs import (
    PIECE,
    Budget,
    ShortTrials,
    queue,
    read_settings,
    read_text,
    settings_of,
    train_cell,
)
from scrubjay.modeling.inputs.cache_argument import CACHE, named

HERE = Path(__file__).resolve().parent
RESULTS, GUIDE = HERE.parent / "results" / "language.json", HERE / "README.md"
VERSION = 1  # raised when records of an older one are worth nothing beside new ones


@dataclass(frozen=True)
class Study:
    """What the command line decides.

    Args:
        steps: decode steps that are timed at each length.
    """

    sizes: Sizes
    budget: Budget
    tuning: Tuning
    steps: int = 64

    @property
    def settings(self) -> dict:
        return settings_of(self.sizes, self.budget)

    @property
    def variants(self) -> dict[str, tuple[str, dict]]:
        return {name: (name, self.settings) for name in FAMILIES}

    def trainings(self, records: list[dict], guess: bool = False) -> list[Cell]:
        return queue(self.tuning, "language", self.variants, records, guess)

    def decodes(self, records: list[dict]) -> list[Cell]:
        return [Cell("decode", name, 0, 0.0, self.settings | {"steps": self.steps}) for name in FAMILIES]


STUDY = Study(
    Sizes(),
    Budget(),
    ShortTrials(
        rates=(2e-3, 4e-3, 8e-3, 16e-3),
        seeds=(100,),
        reported=(0, 1, 2),
        score=lambda result: -result["validation"],
        short={"tokens": 1 << 17, "scored": []},
    ),
)
SMOKE = Study(
    Sizes(hidden_size=32, blocks=2, vocab_size=300, state_size=16, head_dim=16, window=8),
    Budget(tokens=512, batch_size=2, length=16, scored=[16, 64], rows=2, validation=64, train_bytes=1 << 17),
    ShortTrials((1e-3, 1e-2), (100,), (0, 1), lambda result: -result["validation"], {"tokens": 256, "scored": []}),
    steps=3,
)


def work(cell: Cell) -> dict:
    """A training, or a measurement of decoding."""
    return decode_cell(cell) if cell.study == "decode" else train_cell(cell)


def decode_cell(cell: Cell) -> dict:
    """{"nbytes", "milliseconds"} by length, of a model that is not trained: neither depends on the weights but through
    the tokens that Taipan selects, whose share is set to its capacity as after a training."""
    sizes, budget = read_settings(cell.settings)
    text = read_text(sizes.vocab_size, budget.train_bytes)
    model = build(configured(cell.model, sizes)).eval()
    ids = torch.from_numpy(np.resize(text.heldout, max(budget.scored) + cell.settings["steps"]))[None]
    if hasattr(model, "calibrate"):
        model.calibrate(ids[:, : min(4096, max(budget.scored))])
    found: dict = {"parameters": model.num_parameters(), "dtype": str(model.dtype).removeprefix("torch.")}
    found |= {"threads": torch.get_num_threads(), "nbytes": {}, "milliseconds": {}}
    for length in budget.scored:
        tries = [decode(model, ids[:, : length + cell.settings["steps"]], length)]
        if cell.model == "llama":  # memory from the start costs no copy a step, and reads what is not written yet
            room = StaticCache(config=model.config, max_cache_len=length + cell.settings["steps"])
            tries.append(decode(model, ids[:, : length + cell.settings["steps"]], length, room))
        found["nbytes"][str(length)] = tries[0][0]
        found["milliseconds"][str(length)] = round(min(milliseconds for _, milliseconds in tries), 4)
    return found


@torch.no_grad()
def decode(model: PreTrainedModel, ids: torch.Tensor, length: int, cache=None) -> tuple[int, float]:
    """Bytes of the cache after `length` tokens of ids (1, T), and the median milliseconds of the T - length steps after
    them. None makes the model's own cache."""
    for piece in ids[:, :length].split(PIECE, 1):
        cache = model(input_ids=piece, use_cache=True, logits_to_keep=1, **named(cache))[CACHE]
    held, times = cache_nbytes(cache), []
    for token in ids[:, length:].split(1, 1):
        started = time.perf_counter()
        cache = model(input_ids=token, use_cache=True, **named(cache))[CACHE]
        times.append(1e3 * (time.perf_counter() - started))
    return held, median(times)


def reported(study: Study, records: list[dict]) -> dict[str, list[dict]]:
    """Results of each model's reported seeds, as far as they are there."""
    return {name: study.tuning.results("language", name, study.settings, records) for name in FAMILIES}


def decoded(study: Study, records: list[dict]) -> dict[str, dict]:
    """Results of the measurements of decoding, as far as they are there."""
    known = {Cell(**record["cell"]): record["result"] for record in records if "result" in record}
    return {cell.model: known[cell] for cell in study.decodes(records) if cell in known}


def tables(study: Study, records: list[dict]) -> str:
    """What was learned, and what it costs, as Markdown. A cell is the mean over the seeds, and their range."""
    lengths = [str(length) for length in study.budget.scored]
    header = ["", "parameters", "rate", "training, last tenth", *(f"{length} tokens" for length in lengths)]
    rows = []
    for name, results in reported(study, records).items():
        if not results:
            continue
        best = study.tuning.best("language", name, study.settings, records)
        scores = [[last(result["curve"]) for result in results]]
        scores += [[result["bits_per_byte"][length] for result in results] for length in lengths]
        cells = [ranged(values, len(study.tuning.reported)) for values in scores]
        rows.append([NAMES[name], millions(results[0]["parameters"]), rate_in(study.tuning, best), *cells])
    parts = [markdown(header, rows)]
    cost = decoded(study, records)
    if cost:
        header = ["", *(f"cache, {length} tokens" for length in lengths), *(f"ms, {length}" for length in lengths)]
        rows = [
            [NAMES[name], *(size(found["nbytes"][length]) for length in lengths)]
            + [f"{found['milliseconds'][length]:.2f}" for length in lengths]
            for name, found in cost.items()
        ]
        parts.append(markdown(header, rows))
    return "\n\n".join(parts)


def table(records: list[dict]) -> str:
    """What the guide shows."""
    return f"{tables(STUDY, records)}\n\n{effort(records)}\n\n![Language](../results/language.png)"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as the guides have it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rate_in(tuning: Tuning, rate: float) -> str:
    """A rate, with a word if the grid ends there: the best may lie beyond it."""
    return f"{rate:g}" + (", the grid's end" if rate in (min(tuning.rates), max(tuning.rates)) else "")


def millions(parameters: int) -> str:
    return f"{parameters / 1e6:.2f}M"


def last(curve: Sequence[Sequence[float]]) -> float:
    """Mean of the last tenth of a curve's points."""
    return fmean(value for _, value in curve[-max(len(curve) // 10, 1) :])


def draw(study: Study, records: list[dict], path: Path) -> None:
    """Loss against tokens, bits per byte against length, and below each other time and bytes of decoding."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(16, 5), layout="constrained")
    axes = figure.subplot_mosaic([["loss", "length", "time"], ["loss", "length", "bytes"]])
    trained = {name: results for name, results in reported(study, records).items() if results}
    for name, results in trained.items():
        tokens = [point[0] / 1e6 for point in results[0]["curve"]]
        values = np.array([[value for _, value in result["curve"]] for result in results])
        axes["loss"].plot(tokens, values.mean(0), color=COLORS[name], linewidth=1.2, label=NAMES[name])
        axes["loss"].fill_between(tokens, values.min(0), values.max(0), color=COLORS[name], alpha=0.2, linewidth=0)
        points = {int(at): [result["bits_per_byte"][at] for result in results] for at in results[0]["bits_per_byte"]}
        draw_line(axes["length"], name, points)
    if trained:
        late = [value for results in trained.values() for result in results for _, value in result["curve"]]
        axes["loss"].set_ylim(min(late) * 0.95, float(np.quantile(late, 0.9)))
        axes["length"].legend(frameon=False, fontsize=8)
        scores = [
            value for results in trained.values() for found in results for value in found["bits_per_byte"].values()
        ]
        if max(scores) > 1.5 * min(scores):  # one that fails beyond its length would hide the others
            axes["length"].set_yscale("log")
            axes["length"].yaxis.set_major_formatter("{x:.1f}")
            axes["length"].yaxis.set_minor_formatter("{x:.1f}")
    axes["loss"].set(xlabel="million tokens read", ylabel="bits per byte", title="training text, before it is learned")
    axes["length"].set(xlabel="tokens of context", ylabel="bits per byte", title="held-out text")
    axes["length"].axvline(study.budget.length, color="#bbbbbb", linewidth=0.8, linestyle="--", zorder=0)
    for name, found in decoded(study, records).items():
        for which, what in (("time", "milliseconds"), ("bytes", "nbytes")):
            draw_line(axes[which], name, {int(at): [value] for at, value in found[what].items()})
    axes["time"].set(ylabel="ms a token", title="decoding one row")
    axes["bytes"].set(xlabel="tokens of context", ylabel="bytes of cache", yscale="log")
    for name, each in axes.items():
        each.spines[["top", "right"]].set_visible(False)
        if name != "loss":
            each.set_xscale("log", base=2)
        if name in ("time", "bytes") and not each.has_data():
            each.text(0.5, 0.5, "not measured yet: --decode", transform=each.transAxes, ha="center", fontsize=8)
    figure.savefig(path, dpi=150)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = study_parser("language.py", __doc__, RESULTS)
    parser.add_argument("--decode", action="store_true", help="time decoding, with one thread; train nothing")
    args = parser.parse_args(argv)
    if args.decode and args.workers > 1:
        parser.error("workers would time each other; take --workers 1")
    if args.decode:
        args.threads = args.threads or 1
    return args


def main(argv: list[str] | None = None) -> list[dict]:
    """Run what the command line asks for; returns all records of the study."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    study = SMOKE if args.smoke else STUDY
    laboratory = opened(args, command_line("examples/studies/language.py", argv), VERSION)
    if args.plan:
        cells = study.trainings(laboratory.records(), guess=True)
        print(laboratory.plan(cells, cost=lambda cell: cell.settings["tokens"]))
        return laboratory.records()
    if not args.table:
        laboratory.run(study.decodes if args.decode else study.trainings, work, args.minutes)
    records = laboratory.records()
    print(tables(study, records))
    if args.table and args.out == args.results:
        write_between(GUIDE, "language", table(records))
    if laboratory.out:
        draw(study, records, laboratory.out.with_suffix(".png"))
    return records


if __name__ == "__main__":
    main()
