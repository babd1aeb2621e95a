"""Caches of few keys on a pretrained model: which of them still answer, and at what loss.

    python examples/studies/real.py --model smollm2 --workers 2 --minutes 5    the first figure
    python examples/studies/real.py --model smollm2 --workers 2     all of it
    python examples/studies/real.py --model meta-llama/Llama-3.2-1B-Instruct --dtype bfloat16
    python examples/studies/real.py --model smollm2 --controller FOLDER     ADORE too, by a controller for this model

Each cell is eight samples of a kind (real_tasks.py) at a length: the prompt is read once, with full attention, and each
cache goes on from there (`RecycledCache.fork`), with a budget of a share of the prompt. A cell is done for all caches
at once, so that all of them answer the same questions. B rows.
"""

import sys
from functools import cache, partial
from statistics import fmean

import torch
import torch.nn.functional as F

from scrubjay import AdoreCache, RecycledCache
from scrubjay.examples.data.real_model import DTYPES, load
from scrubjay.examples.studies.cells import Cell, cell_of
from scrubjay.examples.studies.laboratory import command_line, opened, study_parser
from scrubjay.examples.studies.real_policies import ABLATIONS, ADORE, HELD, LAYERS, OWN_PROMPT, POLICIES, named_by
from scrubjay.examples.studies.real_tables import RESULTS, show, table  # noqa: F401, the study's own
from scrubjay.examples.studies.real_tasks import RULER, Sample, sample
from scrubjay.modeling.decoder.controller import Controller
from scrubjay.modeling.inputs.cache_argument import named

VERSION = 1
ROWS = 8  # samples of a cell
# kind, length, budget as a share of the length, cells, group of caches; in the order in which they are done
PLAN = [
    ("questions", 1024, 1 / 8, 3, "policies"),
    ("text", 1024, 1 / 8, 3, "policies"),
    ("questions", 1024, 1 / 8, 3, "ablations"),
    ("text", 1024, 1 / 8, 3, "ablations"),
    ("questions", 4096, 1 / 8, 2, "policies"),
    ("questions", 1024, 1 / 8, 3, "held"),
    ("text", 1024, 1 / 8, 3, "held"),
    *((kind, 1024, 1 / 8, 3, "layers") for kind in ("questions", "text")),
    *((kind, 4096, 1 / 8, 2, "layers") for kind in ("questions", "text")),
    *((kind, 1024, 1 / 8, 3, "adore") for kind in ("questions", "text")),
    *((kind, 4096, 1 / 8, 2, "adore") for kind in ("questions", "text")),
    ("text", 4096, 1 / 8, 2, "policies"),
    ("copy", 1024, 1 / 8, 2, "policies"),
    ("agree", 1024, 1 / 8, 3, "policies"),
    *((kind, 1024, 1 / 8, 13, "policies") for kind in RULER),
    *(("questions", 1024, share, 2, "policies") for share in (1 / 16, 1 / 4)),
    ("text", 4096, 0.15, 2, "policies"),
    *((kind, length, 1 / 8, 3, "policies") for length in (2048, 512) for kind in ("questions", "text")),
    *((kind, 8192, 1 / 8, 2, "policies") for kind in ("questions", "text")),
    *((kind, 4096, 1 / 8, 4, "policies") for kind in ("multivalue", "multiquery")),  # of four answers each
]
SMOKE = [("text", 256, 1 / 8, 1, "policies"), ("multikey", 512, 1 / 8, 1, "policies")]
GROUPS = {"policies": POLICIES, "ablations": ABLATIONS, "held": HELD, "layers": LAYERS, "adore": ADORE}


def cells(model: str, dtype: str, plan=PLAN, controller: str | None = None) -> list[Cell]:
    """Of all the study; those of ADORE where a controller is named."""
    found = []
    for kind, length, share, count, group in plan:
        settings = {"kind": kind, "length": length, "budget": int(length * share), "caches": group, "dtype": dtype}
        if group == "layers" and model != "smollm2":  # the layers are those of this model
            continue
        if group == "adore":
            if controller is None:
                continue
            settings["controller"] = controller
        found += [Cell("real", model, number, 0.0, settings) for number in range(count)]
    return found


loaded = cache(load)


def work(cell: Cell, controller: str | None = None) -> dict:
    """{cache: {"scores": a number in [0, 1] of each row, "losses": nats per token given, "nbytes": at the end}}."""
    settings = dict(cell.settings)
    model, tokenizer = loaded(cell.model, DTYPES[settings["dtype"]])
    numbers = range(ROWS * cell.seed, ROWS * (cell.seed + 1))
    samples = [sample(settings["kind"], tokenizer, settings["length"], number) for number in numbers]
    caches = GROUPS[settings["caches"]]
    if settings["caches"] == "adore":
        scorer = Controller.load(controller)
        caches = {name: one | {"controller": scorer} for name, one in caches.items()}
    return compared(model, tokenizer, samples, caches, settings["budget"])


def alone(model, settings: dict, budget: int):
    """A cache that reads its prompt by itself: ADORE's where `settings` name a controller."""
    if "controller" in settings:
        return AdoreCache(model, cache_size=budget - settings["rebuild"], **settings)
    return RecycledCache(model, budget=budget, **settings)


@torch.no_grad()
def compared(model, tokenizer, samples: list[Sample], caches: dict[str, dict], budget: int) -> dict:
    """Every cache on the same samples, from one prompt where it can be."""
    ids = torch.tensor([one.prompt for one in samples])
    found = {}
    with RecycledCache(model, budget=budget, policy="recycled", schedule="dynamic") as prompt:
        first = model(ids, **named(prompt), logits_to_keep=1).logits[:, -1]
        if not (samples[0].answers or samples[0].forced):
            with prompt.fork(policy="full") as full:
                wrote = written(model, full, first, samples[0].new).tolist()
            every = [(i, i + 1) for i in range(samples[0].new)]
            samples = [Sample(one.prompt, forced=row, spans=every) for one, row in zip(samples, wrote, strict=True)]
        for name, settings in caches.items():
            if name in OWN_PROMPT or "controller" in settings:
                own = alone(model, settings, budget)
                start = model(ids, **named(own), logits_to_keep=1).logits[:, -1]
            else:
                own, start = prompt.fork(**{"schedule": "fixed", "budget": budget} | settings), first
            with own:
                found[name] = answered(model, tokenizer, own, start, samples)
                found[name]["nbytes"] = own.nbytes
                if any(getattr(own, "full_steps", ())):
                    found[name]["full_steps"] = round(fmean(own.full_steps), 2)
    return found


def written(model, cache, logits, count: int) -> torch.Tensor:
    """(B, count) tokens that the model writes greedily after `logits` (B, V)."""
    found = [logits.argmax(-1)]
    while len(found) < count:
        found.append(model(found[-1][:, None], **named(cache)).logits[:, -1].argmax(-1))
    return torch.stack(found, 1)


def answered(model, tokenizer, cache, logits, samples: list[Sample]) -> dict:
    """Scores and losses of a cache that has read the prompts, after which `logits` (B, V) follow."""
    if samples[0].answers:
        rows = written(model, cache, logits, samples[0].new).tolist()
        texts = [tokenizer.decode(_until(row, tokenizer.eos_token_id)) for row in rows]
        return {
            "scores": [
                round(fmean(a in text for a in one.answers), 4) for one, text in zip(samples, texts, strict=True)
            ]
        }
    given = given_to(samples)
    likely, losses = [], []
    for t in range(count := given.shape[1]):
        likely.append(logits.argmax(-1))
        losses.append(F.cross_entropy(logits.float(), given[:, t], reduction="none"))
        if t + 1 < count:
            logits = model(given[:, t : t + 1], **named(cache)).logits[:, -1]
    return judged(samples, torch.stack(likely, 1) == given, torch.stack(losses, 1))


def judged(samples: list[Sample], right: torch.Tensor, losses: torch.Tensor) -> dict:
    """Scores and losses of texts that were given: which tokens were the most likely (B, N), and their losses (B, N)."""
    found: dict = {"scores": [], "losses": []}
    for one, hits, each in zip(samples, right, losses, strict=True):
        counted = [i for start, end in one.spans for i in range(start, end)] or range(len(one.forced))
        found["losses"].append(round(each[list(counted)].mean().item(), 4))
        if one.spans:
            found["scores"].append(round(fmean(hits[start:end].all().item() for start, end in one.spans), 4))
    return found


def given_to(samples: list[Sample]) -> torch.Tensor:
    """(B, N) tokens that follow the prompts, zeros where a row has fewer."""
    count = max(len(one.forced) for one in samples)
    return torch.tensor([one.forced + [0] * (count - len(one.forced)) for one in samples])


def _until(row: list[int], end: int | None) -> list[int]:
    return row[: row.index(end)] if end in row else row


def cost(cell: Cell) -> float:
    """Tokens of prompts."""
    return cell.settings["length"]


def parse(argv: list[str]):
    """The command line."""
    parser = study_parser("real.py", __doc__, RESULTS)
    parser.add_argument("--model", default="smollm2", help="name or folder of a Llama-like model, or smollm2 (default)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and caches (default bfloat16)")
    parser.add_argument(
        "--controller",
        metavar="FOLDER",
        help="of ADORE for this model, as examples/train_adore_controller.py writes it: ADORE is compared as well",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict]:
    """Run what the command line asks for; returns all records of the study."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    laboratory = opened(args, command_line("examples/studies/real.py", argv), VERSION)
    plan, scorer = SMOKE if args.smoke else PLAN, named_by(args.controller) if args.controller else None
    listed = cells(args.model, args.dtype, plan, scorer)
    if args.plan:
        print(laboratory.plan(listed, cost))
        return laboratory.records()
    if not args.table:
        loaded(args.model, DTYPES[args.dtype])  # fetched once, before there are several processes
        laboratory.run(listed, partial(work, controller=args.controller), args.minutes)
    known = [record["cell"]["settings"].get("controller") for record in laboratory.records()]
    mine = {cell.key for cell in cells(args.model, args.dtype, plan, scorer or ([None] + [x for x in known if x])[-1])}
    records = [record for record in laboratory.records() if cell_of(record).key in mine]
    show(records, laboratory.out, args.table and args.out == args.results)
    return records


if __name__ == "__main__":
    main()
