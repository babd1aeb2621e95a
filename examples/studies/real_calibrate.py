"""What `cache.calibrate` promises on a pretrained model, and what it is worth on text that decided nothing.

    python examples/studies/real_calibrate.py --model smollm2 --workers 2
    python examples/studies/real_calibrate.py --model smollm2 --controller FOLDER     ADORE too

Three texts: documentation and source of Python's standard library, in rows that follow each other, and eight questions
about a text (real_tasks.py), of which the answers among the last 63 tokens count. Of 32 rows of 1024 tokens half decide
and half check. For each policy the candidates are those that `calibrate` tries by itself.
"""

import sys
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean

import torch

from scrubjay import AdoreCache, RecycledCache
from scrubjay.examples.data.corpus import load_corpus
from scrubjay.examples.data.real_model import load
from scrubjay.examples.studies.cells import Cell, cell_of
from scrubjay.examples.studies.drawing import write_between
from scrubjay.examples.studies.laboratory import command_line, effort, opened, study_parser
from scrubjay.examples.studies.real import DTYPES
from scrubjay.examples.studies.real_policies import named_by
from scrubjay.examples.studies.real_tasks import sample
from scrubjay.modeling.caches.calibration import IGNORED
from scrubjay.modeling.decoder.controller import Controller

VERSION = 2
RESULTS = Path(__file__).resolve().parents[1] / "results" / "real_calibrate.json"
GUIDE = Path(__file__).with_name("README.md")
TEXTS = ("documentation", "source", "questions")
PROMISES = (0.02, 0.05)  # nats a token
ROWS, LENGTH = 32, 1024
POLICIES = {
    "Recycled, a stride": {"policy": "recycled"},
    "Recycled, dynamic": {"policy": "recycled", "schedule": "dynamic"},
    "Low rank": {"policy": "lowrank"},
    "Low rank in some layers": {"policy": "lowrank", "layers": True},
    "TOVA": {"policy": "tova"},
    "SnapKV": {"policy": "snapkv"},
}
ADORE = "ADORE"
loaded = cache(load)


def cells(model: str, dtype: str, rows: int = ROWS, length: int = LENGTH, controller: str | None = None) -> list[Cell]:
    """Of all the study; those of ADORE where a controller is named."""
    settings = {"dtype": dtype, "rows": rows, "length": length}
    named = {name: {"cache": name} for name in POLICIES}
    named |= {ADORE: {"cache": ADORE, "controller": controller}} if controller else {}
    return [
        Cell("calibrate", model, 0, 0.0, settings | {"text": text, "promise": promise} | named[name])
        for promise in PROMISES
        for text in TEXTS
        for name in named
    ]


def rows_of(text: str, tokenizer, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(ids, labels), each (rows, length); labels None: every token counts."""
    if text == "questions":
        return _questions(tokenizer, rows, length)
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    if text == "source":
        whole = "\n\n".join(load_corpus().limited(16 * rows * length, 1).train)  # no token has as many letters
    ids = tokenizer(whole[: 16 * rows * length], add_special_tokens=False)["input_ids"][: rows * length]
    return torch.tensor(ids).view(rows, length), None


def _questions(tokenizer, rows, length):
    ids, labels = [], []
    for number in range(rows):
        forced = sample("questions", tokenizer, length, number).forced
        asked = sample("questions", tokenizer, length - len(forced), number)
        row = asked.prompt + asked.forced
        row += row[: length - len(row)]  # a number may have become a token shorter
        counts = [IGNORED] * length
        for start, end in asked.spans:
            at = len(asked.prompt) + start
            counts[at : at + end - start] = row[at : at + end - start]
        ids.append(row[:length])
        labels.append(counts[:length])
    return torch.tensor(ids), torch.tensor(labels)


def work(cell: Cell, controller: str | None = None) -> dict:
    """What was chosen, or why nothing was."""
    settings = dict(cell.settings)
    model, tokenizer = loaded(cell.model, DTYPES[settings["dtype"]])
    ids, labels = rows_of(settings["text"], tokenizer, settings["rows"], settings["length"])
    policy = dict(POLICIES.get(settings["cache"], {}))
    layers = policy.pop("layers", False)
    if settings["cache"] == ADORE:
        made = AdoreCache(model, controller=Controller.load(controller))
    else:
        made = RecycledCache(model, **policy)
    with made as one:
        try:
            found = one.calibrate(ids, settings["promise"], labels=labels, layers=layers)
        except ValueError as error:
            return {"refused": str(error)}
    return {
        "settings": found.settings,
        "loss": [round(found.found.loss, 5), round(found.found.error, 5)],
        "held_out": [round(found.held_out.loss, 5), round(found.held_out.error, 5)],
        "full_loss": round(found.full_loss, 4),
        "keys": round(found.found.keys, 1),
        "mass": [round(layer, 4) for layer in found.mass],
        "stride": found.stride,
        "trials": len(found.trials),
    }


def table(records: list[dict]) -> str:
    """A row for each text and policy, and how many promises were kept."""
    done = sorted((record for record in records if "result" in record), key=_place)
    if not done:
        return "Not run yet."
    heads = ("promise", "text", "cache", "chosen", "keys a step", "mass read", "deciding rows", "held-out rows", "kept")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    kept = []
    for record in done:
        settings, result = record["cell"]["settings"], record["result"]
        start = [str(settings["promise"]), settings["text"], settings["cache"]]
        if "refused" in result:
            lines.append("| " + " | ".join([*start, "none of the candidates"] + [""] * 5) + " |")
            continue
        kept.append(result["held_out"][0] <= settings["promise"])
        cells = [_said(result["settings"]), f"{result['keys']:.0f}", f"{fmean(result['mass']):.2f}"]
        cells += [f"{loss:+.3f} ± {error:.3f}" for loss, error in (result["loss"], result["held_out"])]
        lines.append("| " + " | ".join([*start, *cells, "yes" if kept[-1] else "no"]) + " |")
    one = done[0]["cell"]["settings"]
    said = f"{one['rows']} rows of {one['length']} tokens a text, half of them held out. "
    said += f"{sum(kept)} of {len(kept)} promises were kept on those. " if kept else ""
    return "\n".join([*lines, "", said + effort(done)])


def _place(record: dict) -> tuple:
    settings = record["cell"]["settings"]
    names = (*POLICIES, ADORE)
    return PROMISES.index(settings["promise"]), TEXTS.index(settings["text"]), names.index(settings["cache"])


def _said(settings: dict) -> str:
    layers = settings.get("choosing_layers")
    others = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "choosing_layers")
    return others if layers is None else f"{others}, {len(layers)} layers choose"


def main(argv: list[str] | None = None) -> list[dict]:
    """Run what the command line asks for; returns all records of the study."""
    argv = sys.argv[1:] if argv is None else argv
    parser = study_parser("real_calibrate.py", __doc__, RESULTS)
    parser.add_argument("--model", default="smollm2", help="name or folder of a Llama-like model, or smollm2 (default)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and caches (default bfloat16)")
    parser.add_argument("--controller", metavar="FOLDER", help="of ADORE for this model: its caches calibrate as well")
    args = parser.parse_args(argv)
    laboratory = opened(args, command_line("examples/studies/real_calibrate.py", argv), VERSION)
    sizes, scorer = (4, 448) if args.smoke else (ROWS, LENGTH), named_by(args.controller) if args.controller else None
    listed = cells(args.model, args.dtype, *sizes, scorer)
    if args.plan:
        print(laboratory.plan(listed))
        return laboratory.records()
    if not args.table:
        loaded(args.model, DTYPES[args.dtype])  # fetched once, before there are several processes
        laboratory.run(listed, partial(work, controller=args.controller), args.minutes)
    named = [record["cell"]["settings"].get("controller") for record in laboratory.records()]
    mine = set(cells(args.model, args.dtype, *sizes, scorer or ([None] + [name for name in named if name])[-1]))
    records = [record for record in laboratory.records() if cell_of(record) in mine]
    print(text := table(records))
    if args.table and args.out == args.results:
        write_between(GUIDE, "real_calibrate", text)
    return records


if __name__ == "__main__":
    main()
