"""Train a small model on real text in minutes, load it where scrubjay is absent, hold it against baselines.

    scrubjay demo                    Rodimus+ on the source of Python's standard library, two minutes
    scrubjay demo --model llama      plain attention of the same size, for comparison
    scrubjay demo --text notes/      your own text
    scrubjay demo --smoke            all of it in seconds, to see that it works

Prints what each part does and takes, three completions, and a table; 3 to 5 minutes on two cores. Writes into
--output: the model with its tokenizer, demo.json (every number and the command that made it) and demo.png. Needs no
network. `python examples/demo.py` is the same command.
"""

import subprocess
import sys

if __name__ == "__main__":  # up here: this process imports nothing more, and waits
    with subprocess.Popen([sys.executable, "-m", "scrubjay_cli", "demo", *sys.argv[1:]]) as child:
        while True:
            try:
                code = child.wait()
                sys.exit(code if code >= 0 else 128 - code)
            except KeyboardInterrupt:  # a terminal sends it to both; the command says so and ends
                continue

import importlib.util
import json
import math
import os
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed
from transformers.utils import logging

from scrubjay.examples.data.corpus import Corpus, encode, joined, load_corpus, num_bytes, train_tokenizer
from scrubjay.examples.learning.recipe import Recipe
from scrubjay.examples.learning.training import Log, Windows, build_model, find_pace, plan_steps, save, train
from scrubjay.examples.measuring.baselines import NGram, lzma_bits
from scrubjay.examples.measuring.measure import cache_growth, decode_rate, full_cache_nbytes, stream_bits
from scrubjay.examples.measuring.run_report import commit, figure, machine, section, summary, versions

PROMPTS = ("def ", "import ", "class ")


@dataclass(frozen=True)
class Text:
    """A corpus as a model sees it. Streams are (T + 1,) ids, the held-out one of `heldout_bytes` bytes of text."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    train: np.ndarray
    heldout: np.ndarray
    heldout_bytes: int

    @property
    def bytes_per_token(self) -> float:
        return num_bytes(self.corpus.train) / (len(self.train) - 1)


def demo(
    model: str,
    *,
    recipe: Recipe,
    text: Path | None = None,
    minutes: float = 2.0,
    output: Path = Path("runs/demo"),
    seed: int = 0,
    command: str | None = None,
) -> dict:
    """Everything, in order. Returns what is written into `output`/demo.json."""
    check(recipe, minutes)
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()  # of saving; the Trainer's stays
    set_seed(seed)
    with ThreadPoolExecutor(1) as pool:
        with section("text"):
            corpus, compression = read(recipe, text, pool)
            data = tokenize(corpus, recipe)
        with section("baselines: n-grams and lzma"):
            bits = {**score_ngrams(data), **score_lzma(data, compression)}
    network, training, bits[model] = fit(model, data, recipe, minutes, output, seed)
    with section("save, and load where scrubjay is absent"):
        about = {"training_data": corpus.name, "training_command": command}
        save(
            network, data.tokenizer, output, **about, evaluation={"bits per byte, held-out text": round(bits[model], 3)}
        )
        completions = complete_in_isolation(output, recipe.new_tokens, seed)
    with section("cache and speed"):
        cache, speed = weigh(network.eval(), data, recipe)
    result = {
        "command": command,
        "model": model,
        "seed": seed,
        "minutes": minutes,
        "parameters": network.num_parameters(),
        "bits_per_byte": bits,
        "tokens_per_second": speed,
        "cache": cache,
        "completions": completions,
        "corpus": describe(data),
        "recipe": asdict(recipe),
        "training": training,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "seconds": time.perf_counter() - started,
    }
    write(result, output)
    return result


def check(recipe: Recipe, minutes: float) -> None:
    """Say what is wrong before minutes are spent."""
    missing = [name for name in ("accelerate", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"the demo needs {' and '.join(missing)}. Install with: pip install 'scrubjay[demo]'")
    for name, value, least in (
        ("--minutes", minutes, 0.01),
        ("--batch-size", recipe.batch_size, 1),
        ("--length", recipe.length, 16),
    ):
        if not least <= value < math.inf:
            raise ValueError(f"{name} is {value}, at least {least} is needed.")


def read(recipe: Recipe, text: Path | None, pool: ThreadPoolExecutor) -> tuple[Corpus, Future]:
    """The corpus, and the compressor already at work on it: it is slow and runs beside the rest."""
    whole = load_corpus(text)
    corpus = whole.limited(recipe.train_bytes, recipe.heldout_bytes)
    for part, before in (("train", whole.train), ("heldout", whole.heldout)):
        used = getattr(corpus, part)
        print(f"   {part:8} {num_bytes(used):,} bytes of {num_bytes(before):,}, {len(used)} of {len(before)} documents")
    return corpus, pool.submit(lzma_bits, joined(corpus.train), joined(corpus.heldout))


def tokenize(corpus: Corpus, recipe: Recipe) -> Text:
    """Train the vocabulary on the training part and turn both parts into streams."""
    tokenizer = train_tokenizer(corpus.train, recipe.vocab_size)
    streams = encode(tokenizer, corpus.train), encode(tokenizer, corpus.heldout)
    data = Text(corpus, tokenizer, *streams, num_bytes(corpus.heldout))
    print(f"   {len(tokenizer)} tokens in the vocabulary, {data.bytes_per_token:.2f} bytes a token")
    if len(data.train) < recipe.batch_size * recipe.length:
        raise ValueError(
            f"the training text is {len(data.train):,} tokens, one batch of {recipe.batch_size} windows of "
            f"{recipe.length} needs more. Pass a larger --text, or smaller --batch-size and --length."
        )
    return data


def score_ngrams(data: Text) -> dict[str, float]:
    """Held-out bits per byte of each order."""
    ngram = NGram(data.train, len(data.tokenizer))
    names = ("unigram", "bigram", "trigram")
    return {name: ngram.bits(data.heldout, order) / data.heldout_bytes for order, name in enumerate(names, 1)}


def score_lzma(data: Text, compression: Future) -> dict[str, float]:
    """Bits per byte of the compressor, once it is done."""
    return {name: value / data.heldout_bytes for name, value in compression.result().items()}


def fit(name: str, data: Text, recipe: Recipe, minutes: float, output: Path, seed: int) -> tuple:
    """Build, time and train a model. Returns it, what it did, and the held-out bits per byte of all of it."""
    network = build_model(name, recipe, len(data.tokenizer), data.tokenizer.eos_token_id)
    if torch.cuda.is_available():
        network.cuda()
    windows = Windows(data.train, recipe.length)

    with section(f"time a few steps of {name}, {network.num_parameters() / 1e6:.2f}M parameters"):
        pace = find_pace(network, windows, recipe, output)
        how = f"{'bfloat16 autocast' if pace.bfloat16 else 'float32'}, {pace.threads} CPU thread(s)"
        rate = recipe.batch_size * recipe.length / pace.seconds
        print(f"   {pace.seconds:.3f} s a step in {how}: {rate:,.0f} tokens/s")

        def evaluate(model: PreTrainedModel, every: int = recipe.glance) -> float:
            bits = stream_bits(model, data.heldout, recipe.length, bfloat16=pace.bfloat16, every=every)
            return bits / data.heldout_bytes

        started = time.perf_counter()
        untrained = evaluate(network)
        plan = plan_steps(recipe, len(windows), minutes, pace.seconds, time.perf_counter() - started)

    with section(f"train {plan.steps} steps ({plan.reason})"):
        log = train(
            network, windows, recipe, plan.steps, bfloat16=pace.bfloat16, seed=seed, output=output, evaluate=evaluate
        )
    log.evals.insert(0, (0.0, untrained))
    training = {"plan": asdict(plan), "pace": asdict(pace), **curve(log, data)}
    with section("held-out text"):
        return network, training, evaluate(network, every=1)


def complete_in_isolation(folder: Path, new_tokens: int, seed: int) -> dict:
    """Run isolated.py on the saved folder from an empty working directory, offline; its text goes to our terminal."""
    script = Path(__file__).resolve().parent / "isolated.py"
    with tempfile.TemporaryDirectory() as empty:
        result = Path(empty, "completions.json")
        child = subprocess.run(
            [sys.executable, str(script), str(folder.resolve()), str(result), str(new_tokens), str(seed), *PROMPTS],
            cwd=empty,
            env={**os.environ, "HF_MODULES_CACHE": empty, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        if child.returncode:
            raise RuntimeError(
                f"{folder} was saved but did not load in a process without scrubjay (exit code {child.returncode}, "
                "its message is above). The folder should hold config.json, model.safetensors and the model's code."
            )
        return json.loads(result.read_text())


def weigh(network: PreTrainedModel, data: Text, recipe: Recipe) -> tuple[dict, dict]:
    """Cache bytes, ours and a full cache's, at each context length; tokens per second."""
    grown = cache_growth(network, data.train, recipe.contexts)
    decode = decode_rate(network, data.train, min(recipe.contexts), recipe.new_tokens)
    full = {tokens: full_cache_nbytes(network, tokens) for tokens in recipe.contexts}
    cache = {"dtype": str(network.dtype).removeprefix("torch."), "ours": grown["nbytes"], "full": full}
    return cache, {"prefill": grown["prefill_tokens_per_second"], "decode": decode}


def describe(data: Text) -> dict:
    """Sizes of what was read."""
    return {
        "name": data.corpus.name,
        "train_bytes": num_bytes(data.corpus.train),
        "train_tokens": len(data.train) - 1,
        "heldout_bytes": data.heldout_bytes,
        "heldout_tokens": len(data.heldout) - 1,
        "bytes_per_token": data.bytes_per_token,
    }


def curve(log: Log, data: Text) -> dict:
    """The log in bits per byte: of training text by its average token, of held-out text exactly."""
    per_byte = math.log(2) * data.bytes_per_token
    return {
        "seconds": [round(value, 3) for value in log.seconds],
        "bits_per_byte": [round(loss / per_byte, 4) for loss in log.losses],
        "heldout": log.evals,
    }


def write(result: dict, output: Path) -> None:
    """demo.json, demo.png, and the table on the terminal."""
    (output / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    figure(result, output / "demo.png")
    print(f"\n{summary(result)}\n\nIn {output}: the model, demo.json, demo.png. {result['seconds']:.0f} s in all.")
