"""What 8 and 4 bits cost and save: loss on real text, bytes, and tokens a second on a CPU.

    python examples/few_bits.py                           trains an SSD and a Rodimus as the demo does, then weighs them
    python examples/few_bits.py --model FOLDER            weighs a model with a tokenizer that you have
    python examples/few_bits.py --smoke                   all of it in seconds, to see that it works

Prints nats per token of held-out text in float32, bfloat16, 8 bits and 4 bits with the embedding in 8 and in 4, and the
bytes of each folder; then, of the 130M shape of Mamba-2 with random weights, tokens a second at several batches, with
widths in turn and the best of several rounds. Close other programs: a step takes milliseconds.
"""

import argparse
import copy
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers.utils import logging

from scrubjay import FewBitsConfig, SSDConfig, SSDForCausalLM, quantize
from scrubjay.examples.data.corpus import encode, load_corpus, train_tokenizer
from scrubjay.examples.learning.recipe import MODELS, Recipe
from scrubjay.examples.learning.training import Windows, build_model, find_pace, plan_steps, save, train
from scrubjay.examples.measuring.measure import stream_bits
from scrubjay.examples.measuring.run_report import commit, machine, section, size, table, versions
from scrubjay.modeling.inputs.cache_argument import CACHE, named

MAMBA2_130M = {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50288}  # the published sizes
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WIDTHS: dict[str, dict] = {
    "8 bits": {"bits": 8},
    "4 bits, embedding in 8": {"bits": 4, "embedding_bits": 8},
    "4 bits": {"bits": 4},
}


@dataclass(frozen=True)
class Run:
    """What decides a run.

    Args:
        kinds, minutes: names of the demo's recipes, and how long each model is trained.
        shape: of the model whose speed is measured.
        batches: at which it decodes; the first column of a row is its prompt.
        prompt: tokens whose prefill is measured.
        rounds, steps: the best of `rounds` times `steps` steps of each width.
    """

    kinds: tuple[str, ...] = ("ssd", "rodimus")
    minutes: float = 3.0
    shape: tuple[tuple[str, int], ...] = tuple(MAMBA2_130M.items())
    batches: tuple[int, ...] = (1, 8, 32, 64)
    prompt: int = 512
    rounds: int = 8
    steps: int = 10
    seed: int = 0


def trained(kind: str, run: Run, recipe: Recipe, folder: Path) -> Path:
    """Train a model as the demo does; the folder that holds it with its tokenizer."""
    corpus = load_corpus().limited(recipe.train_bytes, recipe.heldout_bytes)
    tokenizer = train_tokenizer(corpus.train, recipe.vocab_size)
    windows = Windows(encode(tokenizer, corpus.train), recipe.length)
    network = build_model(kind, recipe, len(tokenizer), tokenizer.eos_token_id)
    pace = find_pace(network, windows, recipe, folder)
    plan = plan_steps(recipe, len(windows), run.minutes, pace.seconds, 0.0)
    train(network, windows, recipe, plan.steps, bfloat16=pace.bfloat16, output=folder, seed=run.seed)
    save(network, tokenizer, folder, training_data=corpus.name)
    return folder


def in_widths(folder: Path) -> Iterator[tuple[str, PreTrainedModel]]:
    """The model of a folder in each width, as a user loads it."""
    for name, dtype in FLOATS.items():
        yield name, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for name, settings in WIDTHS.items():
        config = FewBitsConfig(**settings)
        yield name, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)


def weigh(folder: Path, recipe: Recipe) -> dict[str, dict]:
    """Loss on held-out text, in nats per token, and bytes of the saved weights of each width."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    heldout = load_corpus().limited(recipe.train_bytes, recipe.heldout_bytes).heldout
    stream = encode(tokenizer, heldout)
    found = {}
    for name, model in in_widths(folder):
        bits = stream_bits(model, stream, 2 * recipe.length)
        with tempfile.TemporaryDirectory() as place:
            model.save_pretrained(place)
            nbytes = sum(file.stat().st_size for file in Path(place).glob("*.safetensors"))
        found[name] = {"loss": bits * math.log(2) / (len(stream) - 1), "bytes": nbytes}
    return found


@torch.no_grad()
def step_seconds(model: PreTrainedModel, batch: int, steps: int) -> float:
    """The quickest of some decode steps."""
    ids = torch.arange(batch)[:, None] % model.config.vocab_size
    cache, best = model(ids, use_cache=True)[CACHE], math.inf
    for _ in range(steps):
        started = time.perf_counter()
        model(ids, **named(cache), use_cache=True)
        best = min(best, time.perf_counter() - started)
    return best


@torch.no_grad()
def prefill_seconds(model: PreTrainedModel, length: int) -> float:
    """A prompt of random tokens, once."""
    ids = torch.randint(model.config.vocab_size, (1, length))
    started = time.perf_counter()
    model(ids, logits_to_keep=1)
    return time.perf_counter() - started


def speed(run: Run) -> dict[str, dict]:
    """Tokens a second of random weights: "decode", a list in the order of `batches`, and "prefill"."""
    set_seed(run.seed)
    whole = SSDForCausalLM(SSDConfig(**dict(run.shape))).eval()
    models = {name: copy.deepcopy(whole).to(dtype) for name, dtype in FLOATS.items()}
    models |= {name: quantize(copy.deepcopy(whole), **settings) for name, settings in WIDTHS.items()}
    best = {name: {"decode": [math.inf] * len(run.batches), "prefill": math.inf} for name in models}
    for _ in range(run.rounds):
        for name, model in models.items():
            held = best[name]
            held["prefill"] = min(held["prefill"], prefill_seconds(model, run.prompt))
            times = [step_seconds(model, batch, run.steps) for batch in run.batches]
            held["decode"] = [min(pair) for pair in zip(held["decode"], times, strict=True)]
    return {
        name: {
            "decode": [batch / seconds for batch, seconds in zip(run.batches, held["decode"], strict=True)],
            "prefill": run.prompt / held["prefill"],
        }
        for name, held in best.items()
    }


def few_bits(run: Run, recipes: dict[str, Recipe], output: Path, model: str | None = None) -> dict:
    """Everything, in order; a JSON-ready record."""
    started = time.perf_counter()
    logging.disable_progress_bar()
    folders = {} if model is None else {Path(model).name: Path(model)}
    for kind in run.kinds if model is None else ():
        with section(f"a model: {kind}"):
            folders[kind] = trained(kind, run, recipes[kind], output / kind)
    with section("loss and bytes"):
        weighed = {name: weigh(folder, recipes[run.kinds[0]]) for name, folder in folders.items()}
    with section("speed"):
        rates = speed(run)
    record = {"run": asdict(run), "weighed": weighed, "tokens_per_second": rates}
    return record | {"seconds": round(time.perf_counter() - started, 1)}


def summary(record: dict) -> str:
    """Tables for the terminal."""
    lines = []
    for name, widths in record["weighed"].items():
        rows = [(width, f"{held['loss']:.4f}", size(held["bytes"])) for width, held in widths.items()]
        lines += [table(name, ["nats per token", "weights"], rows), ""]
    rates = record["tokens_per_second"]
    base = rates["float32"]["decode"]
    header = [f"batch {batch}" for batch in record["run"]["batches"]] + ["prefill"]
    rows = [
        (
            width,
            *(f"{rate:,.0f} ({rate / of:.1f}x)" for rate, of in zip(held["decode"], base, strict=True)),
            f"{held['prefill']:,.0f} ({held['prefill'] / rates['float32']['prefill']:.1f}x)",
        )
        for width, held in rates.items()
    ]
    return "\n".join([*lines, table("tokens a second", header, rows)])


def main(argv: list[str] | None = None) -> dict:
    """Run what the command line asks for; returns the record."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model with a tokenizer; left out, two are trained")
    parser.add_argument("--kinds", nargs="+", choices=[name for name in MODELS if name != "llama"], help="to train")
    parser.add_argument("--minutes", type=float, help="of training each")
    parser.add_argument("--output", type=Path, default=Path("runs/few_bits"), help="folder for models")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to check that everything runs")
    options = parser.parse_args(argv)
    run = Run()
    if options.smoke:
        shape = (("hidden_size", 64), ("num_hidden_layers", 2), ("vocab_size", 512))
        run = replace(run, kinds=("ssd",), shape=shape, batches=(1, 2), prompt=32, rounds=1, steps=2)
    if options.kinds:
        run = replace(run, kinds=tuple(options.kinds))
    if options.minutes is not None:
        run = replace(run, minutes=options.minutes)
    recipes = {kind: Recipe.of(kind) for kind in run.kinds}
    if options.smoke:
        recipes = {kind: recipe.smoke() for kind, recipe in recipes.items()}
    record = few_bits(run, recipes, options.output, options.model)
    command = shlex.join(["python", "examples/few_bits.py", *argv])
    record |= {"command": command, "commit": commit(), "machine": machine(), "versions": versions()}
    print(f"\n{summary(record)}\n\n{record['seconds']:.0f} s in all.")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main()
