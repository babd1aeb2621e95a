"""Continued pre-training for Recycled Attention: teach a decoder to go on from the keys that its cache will keep.

A Llama is trained on text with full attention, then for a few more steps in two ways: as before, and with the last S
tokens of each row seeing only what the token before them would have kept (RefreshKV, "continued pre-training"). Both
then predict the last S tokens of held-out rows, with each cache. Real text: the source of Python's standard library.

    python examples/recycled_pretraining.py            five minutes on two cores; --out FILE keeps what is printed
    python examples/recycled_pretraining.py --smoke    the code path in seconds, learns nothing

Prints losses, then the perplexity of the tail for each model and cache.

L tokens before the tail, S tail, K budget.
"""

import argparse
import copy
import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from scrubjay import RecycledCache, RecycledConfig, RecycledForCausalLM
from scrubjay.examples.data.corpus import encode, load_corpus, train_tokenizer
from scrubjay.examples.measuring.run_report import commit, machine, versions
from scrubjay.modeling.inputs.cache_argument import named


@dataclass(frozen=True)
class Recipe:
    """Sizes of model, text and training."""

    vocab_size: int = 1024
    hidden_size: int = 128
    layers: int = 3
    prefix: int = 448
    tail: int = 64
    budget: int = 56
    first_steps: int = 600
    more_steps: int = 100
    batch_size: int = 8
    lr: float = 1e-3
    tested: int = 64
    text_bytes: int = 3_000_000
    seed: int = 0


SMOKE = Recipe(300, 32, 2, prefix=48, tail=16, budget=6, first_steps=2, more_steps=2, tested=4, text_bytes=200_000)


def rows_of(recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out rows of L + S tokens, int64."""
    corpus = load_corpus().limited(recipe.text_bytes, recipe.text_bytes // 8)
    tokenizer = train_tokenizer(corpus.train, recipe.vocab_size)
    length = recipe.prefix + recipe.tail
    streams = (encode(tokenizer, part) for part in (corpus.train, corpus.heldout))
    train, heldout = (stream[: len(stream) // length * length].reshape(-1, length) for stream in streams)
    return train, heldout[: recipe.tested]


def train(model: PreTrainedModel, rows: np.ndarray, steps: int, recipe: Recipe, stream: int, lr: float) -> None:
    """AdamW over rows drawn at random; loss on all tokens."""
    rng = np.random.default_rng([recipe.seed, stream])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(1, steps + 1):
        batch = torch.from_numpy(rows[rng.integers(len(rows), size=recipe.batch_size)])
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps:
            print(f"  step {step:4d}  loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def tail_perplexity(model: PreTrainedModel, rows: np.ndarray, recipe: Recipe, **settings) -> float:
    """Perplexity of the last S - 1 tokens, read one by one behind a prompt of L."""
    model.eval()
    nats, count = 0.0, 0
    for start in range(0, len(rows), recipe.batch_size):
        batch = torch.from_numpy(rows[start : start + recipe.batch_size])
        with RecycledCache(model, **settings) as cache:
            model(batch[:, : recipe.prefix], **named(cache), logits_to_keep=1)
            for column in range(recipe.prefix, batch.shape[1] - 1):
                logits = model(batch[:, column : column + 1], **named(cache)).logits[:, -1]
                nats += float(torch.nn.functional.cross_entropy(logits, batch[:, column + 1], reduction="sum"))
                count += len(batch)
    return float(np.exp(nats / count))


def run(recipe: Recipe) -> dict:
    """Train, continue in both ways, test every cache; a JSON-ready record."""
    torch.manual_seed(recipe.seed)
    train_rows, heldout = rows_of(recipe)
    sizes = {"hidden_size": recipe.hidden_size, "num_hidden_layers": recipe.layers, "vocab_size": recipe.vocab_size}
    model = RecycledForCausalLM(RecycledConfig(**sizes, num_attention_heads=4, budget=recipe.budget))
    print("full attention")
    train(model, train_rows, recipe.first_steps, recipe, 0, recipe.lr)
    models = {"before": model}
    for name, tail in (("continued as before", 0), ("continued with a recycled tail", recipe.tail)):
        print(name)
        models[name] = copy.deepcopy(model)
        models[name].config.train_tail = tail
        train(models[name], train_rows, recipe.more_steps, recipe, 1, recipe.lr / 10)
    caches = {"full": {"policy": "full"}, "streaming": {"policy": "streaming"}, "SnapKV": {"policy": "snapkv"}}
    caches |= {f"recycled, S = {stride}": {"stride": stride} for stride in (10, 25)}
    perplexity = {
        name: {kind: round(tail_perplexity(m, heldout, recipe, **more), 3) for kind, more in caches.items()}
        for name, m in models.items()
    }
    width = max(map(len, perplexity))
    print(f"\n{'perplexity of the tail':{width}s}  " + "  ".join(f"{kind:>16s}" for kind in caches))
    for name, found in perplexity.items():
        print(f"{name:{width}s}  " + "  ".join(f"{value:16.3f}" for value in found.values()))
    return {"recipe": asdict(recipe), "perplexity": perplexity}


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to check that everything runs")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args(argv)
    record = run(SMOKE if options.smoke else Recipe())
    command = shlex.join(["python", "examples/recycled_pretraining.py", *argv])
    record |= {"command": command, "commit": commit(), "machine": machine(), "versions": versions()}
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main()
