"""How long a token takes with each cache on a pretrained model, at the level of generate(), on an idle machine.

    python examples/studies/real_speed.py --model smollm2        writes examples/results/real_speed_<processor>.json

One prompt is read for all caches (`RecycledCache.fork`), and generate() goes on from there; the caches take turns, and
medians over the turns are shown beside transformers' own DynamicCache, which copies all keys at each step, and beside
full attention in memory that does not ("full"). H2O and ADORE read the prompt themselves. Prompts are timed apart, each
cache reading one by itself. The budget is an eighth of the prompt. ADORE's controller is untrained: it takes as long.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from transformers import DynamicCache

from scrubjay import AdoreCache, RecycledCache
from scrubjay.examples.data.real_model import DTYPES, load
from scrubjay.examples.generate import Clock
from scrubjay.examples.measuring.processor import processor, slug
from scrubjay.examples.measuring.run_report import commit, machine, versions, write_whole
from scrubjay.examples.studies.drawing import write_between
from scrubjay.examples.studies.laboratory import command_line
from scrubjay.examples.studies.real_policies import HELD, LAYERS, OWN_PROMPT, POLICIES
from scrubjay.modeling.decoder.controller import Controller
from scrubjay.modeling.inputs.cache_argument import named

RESULTS = Path(__file__).resolve().parents[1] / "results"
GUIDE = Path(__file__).with_name("README.md")
STOCK = "DynamicCache of transformers"
PLAN = [(1024, 1), (4096, 1), (8192, 1), (1024, 8), (4096, 8)]  # tokens of the prompt, rows
PLACES = ("device", "host")
REBUILT = (0, 8)  # of ADORE, with as many tokens fewer in the cache


def owned(model, budget: int) -> dict:
    """{cache: one that reads its prompt by itself}."""
    torch.manual_seed(0)
    controller = Controller(model.config.hidden_size).to(model.device).eval()
    found = {"H2O": RecycledCache(model, policy="h2o", budget=budget)}
    for count in REBUILT:
        cache = AdoreCache(model, cache_size=budget - count, rebuild=count, controller=controller)
        found[f"ADORE, R = {count}"] = cache
    settings = {"cache_size": budget - 8, "rebuild": 8, "rebuild_from": "host"}
    found["ADORE, R = 8 from the host"] = AdoreCache(model, controller=controller, **settings)
    return found


@torch.no_grad()
def decoding(model, ids: torch.Tensor, budget: int, tokens: int, turns: int) -> tuple[dict, dict]:
    """{cache: seconds a token}, the median over turns of what generate() takes for all tokens but the first two; and
    {cache: its bytes at the end by place, {"device", "host"}}."""
    names = {name: settings for name, settings in (POLICIES | HELD).items() if name not in OWN_PROMPT}
    if model.config.num_hidden_layers == 30:
        names |= LAYERS
    own = owned(model, budget)
    for cache in own.values():
        model(ids[:, :-1], **named(cache), logits_to_keep=1)
    places: dict[str, dict[str, int]] = {}
    times: dict[str, list[float]] = {name: [] for name in (STOCK, *names, *own)}
    with RecycledCache(model, budget=budget, schedule="dynamic") as read:
        model(ids[:, :-1], **named(read), logits_to_keep=1)
        for _ in range(turns):
            stock = DynamicCache()
            for i, layer in enumerate(read.layers):
                keys, values = (x[:, :, : layer.seen].clone() for x in (layer.full_keys, layer.full_values))
                stock.update(keys, values, i)
            times[STOCK].append(rate(model, ids, stock, tokens))
            for name, settings in names.items():
                with read.fork(**{"schedule": "fixed"} | settings) as cache:
                    times[name].append(rate(model, ids, cache, tokens))
                    places[name] = cache.nbytes_by_place
            for name, begun in own.items():
                with copy.deepcopy(begun) as cache:
                    times[name].append(rate(model, ids, cache, tokens))
                    places[name] = cache.nbytes_by_place
    for cache in own.values():
        cache.close()
    return {name: median(each) for name, each in times.items()}, places


def rate(model, ids, cache, tokens) -> float:
    """Seconds a token of generate() that goes on after ids, of which the cache has read all but the last."""
    clock = Clock()
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "stopping_criteria": [clock]}
    model.generate(ids, attention_mask=torch.ones_like(ids), **named(cache), **options)
    return (clock.times[-1] - clock.times[1]) / (tokens - 2)


@torch.no_grad()
def reading(model, ids: torch.Tensor, budget: int) -> dict[str, float]:
    """{cache: seconds of a prompt and the first step after it}."""
    found = {}
    others = {name: RecycledCache(model, **{"budget": budget} | settings) for name, settings in POLICIES.items()}
    for name, cache in (others | owned(model, budget)).items():
        start = time.perf_counter()
        with cache:
            model(ids[:, :-1], **named(cache), logits_to_keep=1)
            model(ids[:, -1:], **named(cache))
        found[name] = time.perf_counter() - start
    return found


def row(name: str, dtype: str, length: int, rows: int, tokens: int, turns: int, prompts: bool) -> dict:
    """One line of the plan, as it is recorded: milliseconds."""
    model, _ = load(name, DTYPES[dtype])
    torch.manual_seed(0)
    ids = torch.randint(100, min(40_000, model.config.vocab_size), (rows, length))
    about = {"length": length, "rows": rows, "dtype": dtype, "budget": length // 8}
    times, about["bytes"] = decoding(model, ids, length // 8, tokens, turns)
    about["token"] = {name: round(1e3 * seconds, 2) for name, seconds in times.items()}
    if prompts:
        about["prompt"] = {name: round(1e3 * s, 1) for name, s in reading(model, ids, length // 8).items()}
    return about


def _key(row: dict) -> tuple:
    return list(DTYPES).index(row["dtype"]), row["rows"], row["length"]


def table(record: dict) -> str:
    """Milliseconds a token, a row for each cache."""
    rows = record["rows"]
    heads = [f"{one['dtype']}, {one['length']} tokens, batch {one['rows']}" for one in rows]
    lines = ["| ms a token | " + " | ".join(heads) + " |", "|---" * (len(rows) + 1) + "|"]
    for name in rows[0]["token"]:
        lines.append(f"| {name} | " + " | ".join(f"{one['token'][name]:.1f}" for one in rows) + " |")
    parts = ["\n".join(lines)]
    if timed := [one for one in rows if "prompt" in one]:
        heads = [f"{one['dtype']}, {one['length']} tokens" for one in timed]
        lines = ["| seconds of a prompt and a step | " + " | ".join(heads) + " |", "|---" * (len(timed) + 1) + "|"]
        for name in timed[0]["prompt"]:
            lines.append(f"| {name} | " + " | ".join(f"{one['prompt'][name] / 1e3:.1f}" for one in timed) + " |")
        parts.append("\n".join(lines))
        if "bytes" in timed[0]:
            parts.append(bytes_table(timed))
    where = record["machine"]
    return "\n\n".join([*parts, f"{where['cpu']}, {where['capability']}, {where['torch_threads']} threads."])


def bytes_table(rows: list[dict]) -> str:
    """MiB of each cache, where they lie."""
    heads = [f"MiB on the {place}, {one['dtype']}, {one['length']} tokens" for one in rows for place in PLACES]
    lines = ["| cache | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in rows[0]["bytes"]:
        cells = [f"{one['bytes'][name][place] / 2**20:.1f}" for one in rows for place in PLACES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    """Measure what the command line asks for; returns the record."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="name or folder of a Llama-like model, or smollm2 (default)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", type=int, default=24, help="that are written in each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--lengths", nargs="+", type=int, help="of the prompt; the record keeps its other rows")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to check that everything runs")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args(argv)
    out = args.out or (None if args.smoke else RESULTS / f"real_speed_{slug(processor())}.json")
    record: dict = {"command": command_line("examples/studies/real_speed.py", argv)}
    record |= {"machine": machine() | processor(), "versions": versions(), "rows": []}
    if args.lengths and out and out.is_file():
        record["rows"] = json.loads(out.read_text(encoding="utf-8"))["rows"]
    made_by = {"commit": commit()}  # before the record is written beside the code
    plan = [(256, 1)] if args.smoke else [line for line in PLAN if not args.lengths or line[0] in args.lengths]
    for dtype in args.dtypes:
        for length, rows in plan:
            prompts = (length, rows) == (256 if args.smoke else 4096, 1)
            new = row(args.model, dtype, length, rows, args.tokens, args.turns, prompts) | made_by
            print(json.dumps(new), flush=True)
            kept = [one for one in record["rows"] if _key(one) != _key(new)]
            record["rows"] = sorted([*kept, new], key=_key)
            if out:
                write_whole(out, json.dumps(record, indent=1) + "\n")
    print(table(record))
    if args.out is None and out:
        write_between(GUIDE, "real_speed", table(record))
    return record


if __name__ == "__main__":
    main()
