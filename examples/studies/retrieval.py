"""Multi-key retrieval: can a decoder that keeps or reads few keys still find what it is asked for, several times over?

A row lists records, each a key and its value of several tokens, and then asks for some of them, one after the other in
one output: the key is given, the value must follow. A small Llama learns it with full attention. Then the unmodified
model answers with every cache at one budget of keys, an eighth of the list or less: which of them could still see the
record?

    python examples/studies/retrieval.py            train, compare, write examples/results/retrieval.json and .png
    python examples/studies/retrieval.py --smoke    the code path in seconds, learns nothing

The answers before a token are given (teacher forcing), so that one miss does not spoil what follows it. A question and
its answer are 5 tokens: a stride of 5 looks at everything once a question, of 10 once in two, of 7 here and there.
K budget, L listed tokens, Q questions, V value tokens.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, get_constant_schedule_with_warmup

from scrubjay import AdoreCache, AdoreConfig, RecycledCache
from scrubjay.examples.learning.adore_training import descend, loss_of
from scrubjay.examples.measuring.run_report import FULL, GRAY, OURS, commit, machine, versions
from scrubjay.modeling.decoder.controller import Controller
from scrubjay.modeling.inputs.cache_argument import named

RESULTS = Path(__file__).resolve().parents[1] / "results" / "retrieval.json"
IGNORED = -100
SOLVED = 0.995  # validation accuracy at which training stops
LEARNED = 0.2  # mean loss at which lists become longer
WARMUP = 100  # steps


@dataclass(frozen=True)
class Task:
    """Sizes of the task, the model and its training. The list has records * (1 + values) tokens."""

    records: int = 64
    values: int = 4
    questions: int = 8
    keys: int = 128
    alphabet: int = 256
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    steps: int = 6000
    batch_size: int = 32
    lr: float = 1e-3
    budget: int = 32
    rebuild: int = 8
    controller_steps: int = 1500
    tested: int = 128
    seed: int = 0

    @property
    def listed(self) -> int:
        """L."""
        return self.records * (1 + self.values)


SMOKE = Task(
    records=8,
    values=3,
    questions=2,
    keys=16,
    alphabet=8,
    hidden_size=32,
    layers=2,
    steps=3,
    tested=2,
    rebuild=1,
    controller_steps=2,
    budget=4,
)


def draw(task: Task, rows: int, rng: np.random.Generator, records: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows and their labels, (rows, L + Q (1 + V)) int64. Token 0 is not used; keys come first, then values.

    Labels stand on the tokens to be predicted (models shift them inside) and only behind the list.
    """
    records = task.records if records is None else records
    keys = np.argsort(rng.random((rows, task.keys)), axis=1)[:, :records] + 1
    values = rng.integers(task.alphabet, size=(rows, records, task.values)) + 1 + task.keys
    pairs = np.concatenate([keys[..., None], values], axis=2)
    asked = np.argsort(rng.random((rows, records)), axis=1)[:, : task.questions]
    answers = np.take_along_axis(pairs, asked[..., None], axis=1)
    labels = answers.copy()
    labels[:, :, 0] = IGNORED
    listed = pairs.reshape(rows, -1)
    labels = np.concatenate([np.full_like(listed, IGNORED), labels.reshape(rows, -1)], axis=1)
    return np.concatenate([listed, answers.reshape(rows, -1)], axis=1), labels


def build(task: Task) -> LlamaForCausalLM:
    """A Llama of transformers, as it comes."""
    torch.manual_seed(task.seed)
    config = LlamaConfig(
        vocab_size=1 + task.keys + task.alphabet,
        hidden_size=task.hidden_size,
        intermediate_size=2 * task.hidden_size,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        num_key_value_heads=task.kv_heads,
        max_position_embeddings=4 * task.listed,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def accuracy(model: PreTrainedModel, rows: np.ndarray, labels: np.ndarray, batch_size: int = 32) -> float:
    """Share of value tokens predicted with full attention over whole rows."""
    model.eval()
    right = 0
    for start in range(0, len(rows), batch_size):
        logits = model(torch.from_numpy(rows[start : start + batch_size]), use_cache=False).logits
        right += (logits[:, :-1].argmax(-1).numpy() == labels[start : start + batch_size, 1:]).sum()
    return float(right / (labels != IGNORED).sum())


def train(task: Task, eval_every: int = 200) -> tuple[LlamaForCausalLM, list[dict]]:
    """Learn the task with full attention: an eighth of the records first, twice as many each time those are found."""
    model, started, curve = build(task), time.perf_counter(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = get_constant_schedule_with_warmup(optimizer, WARMUP)
    rng, held_out = (np.random.default_rng([task.seed, stream]) for stream in range(2))
    validation, halvings, recent = draw(task, min(64, task.tested), held_out), 3, []
    for step in range(1, task.steps + 1):
        model.train()
        records = max(task.records >> halvings, task.questions)
        rows, labels = (torch.from_numpy(x) for x in draw(task, task.batch_size, rng, records))
        loss = model(rows, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        recent = [*recent[-19:], loss.item()]
        if halvings and len(recent) == 20 and np.mean(recent) < LEARNED:
            halvings, recent = halvings - 1, []
        if step % eval_every == 0 or step == task.steps:
            point = {"step": step, "records": records, "loss": round(loss.item(), 4)}
            point |= {"accuracy": round(accuracy(model, *validation), 4)}
            point |= {"seconds": round(time.perf_counter() - started, 1)}
            line = (
                "  step {step:5d}  {records:3d} records  loss {loss:7.4f}  accuracy {accuracy:6.4f}  {seconds:7.1f} s"
            )
            print(line.format(**point), flush=True)
            curve.append(point)
            if point["accuracy"] >= SOLVED:
                break
    return model.eval(), curve


@torch.no_grad()
def answer(model: PreTrainedModel, make_cache: Callable, rows: np.ndarray, labels: np.ndarray, task: Task) -> dict:
    """Accuracy of value tokens when the list and the first key are the prompt and all else comes token by token.

    `make_cache(model)` gives a fresh cache. Returns the accuracy by question (Q) and over all but the first, whose
    answer starts in the prompt's own, full pass.
    """
    right = np.zeros((task.questions, task.values))
    for start in range(0, len(rows), task.batch_size):
        ids, wanted = (torch.from_numpy(x[start : start + task.batch_size]) for x in (rows, labels))
        cache, prompt = make_cache(model), task.listed + 1
        out = model(ids[:, :prompt], **named(cache), logits_to_keep=1)
        predicted = [out.logits[:, -1].argmax(-1)]
        for column in range(prompt, ids.shape[1] - 1):
            out = model(ids[:, column : column + 1], **named(cache), logits_to_keep=1)
            predicted.append(out.logits[:, -1].argmax(-1))
        hits = (torch.stack(predicted, 1) == wanted[:, prompt:]).numpy()
        hits = np.pad(hits, ((0, 0), (1, 0))).reshape(len(ids), task.questions, 1 + task.values)
        right += hits[:, :, 1:].sum(0)
    by_question = right.sum(1) / (len(rows) * task.values)
    return {
        "accuracy": round(float(by_question[1:].mean() if task.questions > 1 else by_question[0]), 4),
        "by_question": by_question.round(4).tolist(),
        "by_value_token": (right[1:].sum(0) / (len(rows) * max(task.questions - 1, 1))).round(4).tolist(),
        "nbytes": getattr(cache, "nbytes", None),
    }


def train_controller(model: PreTrainedModel, task: Task) -> Controller:
    """ADORE's controller for this decoder, taught on fresh rows what full attention looks at."""
    sizes = {
        "cache_size": task.budget - task.rebuild,
        "rebuild": task.rebuild,
        "label_k": min(8, task.budget // 2),
        "label_agg": "max_head",
    }
    config = AdoreConfig(base_config=model.config, **sizes)
    torch.manual_seed(task.seed)
    made = config.score_mode, config.controller_pos, config.controller_mlp_layers
    controller = Controller(config.hidden_size, config.controller_hidden, *made, "", config.num_labelled)
    optimizer = torch.optim.AdamW(controller.parameters(), lr=2e-3)
    schedule = get_constant_schedule_with_warmup(optimizer, WARMUP)
    rng = np.random.default_rng([task.seed, 3])

    def step() -> float:
        ids = torch.from_numpy(draw(task, 4, rng)[0])
        asked = np.arange(task.listed, ids.shape[1])  # where an answer is looked for
        at = torch.from_numpy(np.sort(rng.choice(asked, min(16, len(asked)), False)))
        loss = loss_of(controller, model, ids, at, config, 1.0)
        loss.backward()
        return loss.item()

    descend(step, optimizer, schedule, task.controller_steps, 1.0)
    return controller.eval()


def caches(task: Task, controller: Controller | None = None) -> dict[str, Callable]:
    """The caches compared, all of one budget: a name, and how to make one."""
    budget, kept = task.budget, task.budget - task.rebuild
    return {
        "full": lambda model: RecycledCache(model, budget=budget, policy="full"),
        "StreamingLLM": lambda model: RecycledCache(
            model, budget=budget, policy="streaming", n_sink=min(4, budget - 2)
        ),
        "H2O": lambda model: RecycledCache(model, budget=budget, policy="h2o"),
        "one choice": lambda model: RecycledCache(model, budget=budget, stride=10**9),
        "Recycled, S = 5": lambda model: RecycledCache(model, budget=budget, stride=5),
        "Recycled, S = 7": lambda model: RecycledCache(model, budget=budget, stride=7),
        "Recycled, S = 10": lambda model: RecycledCache(model, budget=budget, stride=10),
        "Recycled, dynamic": lambda model: RecycledCache(model, budget=budget, schedule="dynamic", qc=5),
        "ADORE, recency": lambda model: AdoreCache(model, cache_size=budget, rebuild=0, controller="recency"),
        "ADORE, R = 0": lambda model: AdoreCache(model, cache_size=budget, rebuild=0, controller=controller),
        f"ADORE, R = {task.rebuild}": lambda model: AdoreCache(
            model, cache_size=kept, rebuild=task.rebuild, controller=controller
        ),
    }


def compare(model: PreTrainedModel, task: Task) -> dict[str, dict]:
    """Every cache on the same fresh rows."""
    rows, labels = draw(task, task.tested, np.random.default_rng([task.seed, 2]))
    results = {}
    for name, make_cache in caches(task, train_controller(model.requires_grad_(False), task)).items():
        results[name] = answer(model, make_cache, rows, labels, task)
        print(f"  {name:20s} {results[name]['accuracy']:6.4f}", flush=True)
    return results


def plot(record: dict, path: Path) -> None:
    """A bar for each cache: the share of value tokens found."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    names = list(record["results"])
    colors = [FULL if name == "full" else OURS if name[0] in "RA" else GRAY for name in names]
    bars = axes.barh(names, [record["results"][name]["accuracy"] for name in names], color=colors)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08)
    task = Task(**record["task"])
    axes.set_xlabel(f"value tokens found, {task.questions} questions to {task.listed} tokens, budget {task.budget}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to check that everything runs")
    parser.add_argument("--steps", type=int, help="training steps at most")
    parser.add_argument("--budget", type=int, help="K, keys that each cache may keep")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default 0)")
    parser.add_argument("--model", type=Path, help="folder: load the trained model from it, or save it there")
    parser.add_argument("--out", type=Path, help=f"JSON to write, a PNG beside it (default: results/{RESULTS.name})")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    given = {name: value for name in ("steps", "budget", "seed") if (value := getattr(options, name)) is not None}
    task = replace(SMOKE if options.smoke else Task(), **given)
    if options.model and options.model.exists():
        model, curve = LlamaForCausalLM.from_pretrained(options.model).eval(), []
    else:
        model, curve = train(task)
        if options.model:
            model.save_pretrained(options.model)
    record = {"task": asdict(task), "curve": curve, "results": compare(model, task)}
    record |= {"command": shlex.join(["python", "examples/studies/retrieval.py", *argv]), "commit": commit()}
    record |= {"machine": machine(), "versions": versions()}
    out = options.out if options.out or options.smoke else RESULTS
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
        plot(record, out.with_suffix(".png"))
    return record


if __name__ == "__main__":
    main()
