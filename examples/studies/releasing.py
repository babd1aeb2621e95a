"""ADORE on a pretrained model: how much of its loss is the controller's, the rebuilding's, the tuning's.

    python examples/studies/releasing.py --model smollm2               all but the times, resumed where it stopped
    python examples/studies/releasing.py --model smollm2 --speed       times, on an idle machine
    python examples/studies/releasing.py --model A_FOLDER --lengths 512 1024
    python examples/studies/releasing.py --table                       no run: what is there

The decoder as it was published, tuned under the top-K mask (LoRA), and tuned alike with full attention. For each, two
controllers learn what it looks at, from the same labels. Then, after prompts that full attention has read, 128 tokens
of held-out text follow one by one, under caches that attend m + R tokens: the newest, the newest and four sinks, those
that a controller, or full attention itself (the oracle), ranks highest, R of them rebuilt in every step or none.
What is trained is kept in a folder of the user's cache, and made again where it is missing.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from scrubjay.examples.learning.adore_training import windows
from scrubjay.examples.studies.cells import Cell
from scrubjay.examples.studies.laboratory import command_line, opened, study_parser
from scrubjay.examples.studies.real_tasks import sample
from scrubjay.examples.studies.releasing_caches import Sample, compared
from scrubjay.examples.studies.releasing_models import DTYPES, Recipe, Workshop
from scrubjay.examples.studies.releasing_speed import speed, speed_cells
from scrubjay.examples.studies.releasing_tables import RESULTS, show, table  # noqa: F401, the study's own

VERSION = 1
ROWS = 8  # prompts of a cell
GIVEN = 128  # tokens of held-out text after a prompt
LENGTHS = (1024, 2048, 4096)
ORDER = ("none", "sparse", "full")
SMOKE = Recipe(
    length=96, label_k=8, train_bytes=1 << 15, heldout_bytes=1 << 14, eval_texts=1, tune_steps=2, tune_batch=1,
    teach_steps=2, teach_batch=1, queries=4,
)  # fmt: skip


def cells(model: str, dtype: str, recipe: Recipe, lengths=LENGTHS, cache_size=192, rebuild=8, seeds=1, kinds=None):
    """All of the study but its times, in the order in which they are done."""
    steps = {"dtype": dtype, "tune_steps": recipe.tune_steps, "teach_steps": recipe.teach_steps}

    def measured(tuning, kind, length, size, seed):
        settings = {"part": "measure", "tuning": tuning, "kind": kind, "length": length} | steps
        return Cell("releasing", model, seed, 0.0, settings | {"cache_size": size, "rebuild": rebuild})

    found = []
    for tuning in ORDER:
        found.append(Cell("releasing", model, 0, recipe.tune_lr, {"part": "tune", "tuning": tuning} | steps))
        found.append(Cell("releasing", model, 0, recipe.teach_lr, {"part": "teach", "tuning": tuning} | steps))
        found += [measured(tuning, "text", n, cache_size, seed) for n in lengths for seed in range(seeds)]
        found += [measured(tuning, kind, lengths[0], cache_size, 0) for kind in kinds or ("agree", "questions")]
    return found + [measured(tuning, "text", lengths[0], cache_size // 2, 0) for tuning in ORDER]


class Work:
    """Does a cell. Everything that is trained lies in `kept`."""

    def __init__(self, source: str, kept: Path, recipe: Recipe, rows: int = ROWS, given: int = GIVEN):
        self.source, self.kept, self.recipe, self.rows, self.given = source, kept, recipe, rows, given
        self.shop: Workshop | None = None

    def __call__(self, cell: Cell) -> dict:
        settings = cell.settings
        if self.shop is None:
            self.shop = Workshop(self.source, settings["dtype"], self.kept, self.recipe)
        if settings["part"] == "tune":
            return self.shop.tuning(settings["tuning"])
        if settings["part"] == "teach":
            return self.shop.teaching(settings["tuning"])
        if settings["part"] == "speed":
            return speed(self.shop, settings)
        controllers = self.shop.controllers(settings["tuning"])
        model = self.shop.decoder(settings["tuning"])
        samples = self.samples(settings["kind"], settings["length"], cell.seed)
        sizes = settings["cache_size"], settings["rebuild"], min(self.recipe.label_k, settings["cache_size"])
        return compared(model, self.shop.tokenizer, samples, controllers, *sizes)

    def samples(self, kind: str, length: int, seed: int) -> list[Sample]:
        """Prompts of `length` tokens: of held-out text, which goes on, or a kind of `real_tasks`."""
        if kind != "text":
            numbers = range(self.rows * seed, self.rows * (seed + 1))
            return [sample(kind, self.shop.tokenizer, length, number) for number in numbers]
        rng = np.random.default_rng([self.recipe.seed, 2, length, seed])
        texts = windows(self.shop.heldout, length + self.given, self.rows, rng, "cpu").tolist()
        return [Sample(text[:length], forced=text[length:]) for text in texts]


def of_recipe(record: dict, dtype: str | None, recipe: Recipe) -> bool:
    """Whether a record, of whatever model, is of this dtype (None: any) and of trainings like these; times are of
    none."""
    settings, steps = record["cell"]["settings"], (recipe.tune_steps, recipe.teach_steps)
    same = settings["part"] == "speed" or (settings["tune_steps"], settings["teach_steps"]) == steps
    return record["cell"]["study"] == "releasing" and dtype in (None, settings["dtype"]) and same


def cost(cell: Cell) -> float:
    """Tokens of prompts; trainings count as many."""
    return cell.settings.get("length", 8192)


def kept_in() -> Path:
    """Where what is trained lies, unless --kept says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scrubjay" / "releasing"


def parse(argv: list[str]):
    """The command line."""
    recipe, parser = Recipe(), study_parser("releasing.py", __doc__, RESULTS)
    parser.add_argument("--model", default="smollm2", help="name or folder of a Llama-like model, or smollm2 (default)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of frozen weights (default bfloat16)")
    parser.add_argument("--speed", action="store_true", help="measure times and nothing else: nothing else may run")
    parser.add_argument("--kept", type=Path, default=kept_in(), help="folder for adapters and controllers")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="of prompts")
    parser.add_argument("--cache-size", type=int, default=192, help="m; half of it is measured as well")
    parser.add_argument("--rebuild", type=int, default=8, help="R")
    parser.add_argument("--seeds", type=int, default=1, help=f"sets of {ROWS} held-out texts of each length")
    parser.add_argument("--tune-steps", type=int, default=recipe.tune_steps, help=f"of {recipe.tune_batch} texts")
    parser.add_argument("--teach-steps", type=int, default=recipe.teach_steps, help=f"of {recipe.teach_batch} texts")
    args = parser.parse_args(argv)
    if min(args.lengths) <= args.cache_size + args.rebuild:
        parser.error(f"--lengths must be beyond cache-size + rebuild, or nothing is released; got {args.lengths}.")
    return args


def main(argv: list[str] | None = None) -> list[dict]:
    """Run what the command line asks for; returns all records of the model."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    laboratory = opened(args, command_line("examples/studies/releasing.py", argv), VERSION)
    recipe = replace(Recipe(), tune_steps=args.tune_steps, teach_steps=args.teach_steps)
    name, sizes = Path(args.model).name, (args.cache_size, args.rebuild)
    if args.smoke:
        listed = cells(name, args.dtype, recipe := SMOKE, (192,), 24, 2, kinds=("agree",))
        work = Work(args.model, args.kept, recipe, rows=2, given=6)
    else:
        listed = cells(name, args.dtype, recipe, tuple(args.lengths), *sizes, args.seeds)
        work = Work(args.model, args.kept, recipe)
    if args.speed:
        listed = speed_cells(name, args.dtype, args.lengths, *sizes, args.smoke)
    if args.plan:
        print(laboratory.plan(listed, cost))
    elif not args.table:
        torch.manual_seed(0)
        laboratory.run(listed, work, args.minutes)
    records = [
        record for record in laboratory.records() if of_recipe(record, None if args.table else args.dtype, recipe)
    ]
    if not args.plan:
        show(records, args.table and args.out == args.results)
    return records


if __name__ == "__main__":
    main()
