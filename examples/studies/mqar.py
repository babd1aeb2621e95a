"""Multi-query associative recall (MQAR, arXiv:2312.04927): what can a fixed-size state remember?

A sequence lists key-value pairs once, then asks for every key again. Attention looks the answer up; a recurrent model
must have put all pairs into its state, so accuracy over (pairs, state_size) measures the state and the rule that writes
to it. Two layers of width 64 are trained from scratch on sequences that are never repeated, and tested on fresh ones.

    python examples/studies/mqar.py --model ssd     one run, printed; --out FILE keeps it
    python examples/studies/mqar.py --sweep         all of examples/results/mqar.json; continues if interrupted
    python examples/studies/mqar.py --smoke         the code path in seconds, learns nothing

Own generator after the description in the paper; zeros between the queries are the setting of its figure 2.
The same task in words, for any model with a tokenizer, is in examples/lm_eval_tasks.
"""

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedModel, get_cosine_schedule_with_warmup

from scrubjay import (
    RodimusConfig,
    RodimusForCausalLM,
    SSDConfig,
    SSDForCausalLM,
    TaipanConfig,
    TaipanForCausalLM,
)
from scrubjay.examples.measuring.run_report import FULL, OURS, commit, machine, versions

RESULTS = Path(__file__).resolve().parents[1] / "results" / "mqar.json"
MODELS = ("ssd", "rodimus", "rodimus_plus", "taipan", "mamba2")
IGNORED = -100  # the label that transformers' loss skips
HEAD_DIM = 64  # value width of one head: the same in SSD and in transformers' Mamba2, so that they are the same model
WINDOW = 16  # keys that Rodimus+'s attention sees: fewer than list and queries span, so the state has to do the rest
SPARE = 1.25  # tokens that Taipan may attend, for each question asked: the gate errs, too
COLORS = {"ssd": OURS, "rodimus": FULL, "rodimus_plus": "#6a4c93", "taipan": "#1b7f5c", "mamba2": "#8a8a8a"}
SOLVED = 0.999  # validation accuracy at which training stops


@dataclass(frozen=True)
class Run:
    """One training run: everything that decides its result, and the key under which a sweep knows it is done."""

    model: str = "ssd"
    pairs: int = 8
    length: int = 64
    state_size: int = 64
    hidden_size: int = 64
    layers: int = 2
    vocab_size: int = 256
    steps: int = 2000
    batch_size: int = 32
    lr: float = 1e-2
    seed: int = 0


def draw_distinct(
    rng: np.random.Generator, num_rows: int, population: int, count: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """`count` distinct numbers below `population` for each row, in the order drawn: (num_rows, count) int64.

    Sorting log-weights plus Gumbel noise is drawing one after the other without replacement, for all rows at once.
    """
    scores = rng.gumbel(size=(num_rows, population))
    if weights is not None:
        scores += np.log(weights)
    return np.argsort(-scores, axis=1)[:, :count]


def mqar_batch(
    num_examples: int,
    length: int,
    pairs: int,
    vocab_size: int,
    rng: np.random.Generator,
    *,
    power: float = 0.01,
    random_fill: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences and the answers expected in them, as two (num_examples, length) int64 arrays.

    `length=16, pairs=2, vocab_size=12` gives rows like this one, with 1..5 for keys and 6..11 for values:

                key val key val             query       query
        inputs   4   9   2   6   0   0   0   0   2   0   4   0   0   0   0   0
        labels   -   -   -   -   -   -   -   -   6   -   9   -   -   -   -   -        (- is -100: not scored)

    The label stands at the query's own position: what the model must say there is the value, which is not shown again.
    A key is listed once and asked once. Its query stands 2 * gap after the list, gaps drawn without replacement with
    p(gap) ~ power * (gap + 1) ** (power - 1): near queries are common, far ones rare, `power=1` is uniform.

    Args:
        rng: numpy Generator, the only source of chance.
        random_fill: fill the positions that are no pair and no query with any token instead of 0.
    """
    num_keys = vocab_size // 2 - 1
    if length % 2 or 4 * pairs > length:
        raise ValueError(f"length must be even and at least 4 * pairs = {4 * pairs}, got {length}.")
    if pairs > num_keys:
        raise ValueError(f"pairs = {pairs} needs as many keys, vocab_size = {vocab_size} has {num_keys}.")
    listed, space = 2 * pairs, length // 2 - pairs
    keys = 1 + draw_distinct(rng, num_examples, num_keys, pairs)
    values = vocab_size // 2 + draw_distinct(rng, num_examples, vocab_size - vocab_size // 2, pairs)
    gaps = draw_distinct(rng, num_examples, space, pairs, power * np.arange(1.0, space + 1) ** (power - 1))

    shape = (num_examples, length)
    inputs = rng.integers(vocab_size, size=shape) if random_fill else np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    inputs[:, 0:listed:2], inputs[:, 1:listed:2] = keys, values
    np.put_along_axis(inputs, listed + 2 * gaps, keys, axis=1)
    np.put_along_axis(labels, listed + 2 * gaps, values, axis=1)
    return inputs, labels


def causal_labels(labels: np.ndarray) -> np.ndarray:
    """Labels moved one step later, (B, T): models shift them back inside, so that the query itself predicts the value.

    Nothing is lost: queries stand at even positions, so the last label of a row is never one.
    """
    return np.concatenate([np.full_like(labels[:, :1], IGNORED), labels[:, :-1]], axis=1)


def build_model(run: Run) -> PreTrainedModel:
    """The model of a run, freshly initialised in float32 on the CPU."""
    sizes = {
        "hidden_size": run.hidden_size,
        "num_hidden_layers": run.layers,
        "vocab_size": run.vocab_size,
        "state_size": run.state_size,
    }
    if run.model == "ssd":
        return SSDForCausalLM(SSDConfig(**sizes, head_dim=HEAD_DIM, tie_word_embeddings=False))
    if run.model == "mamba2":
        heads = 2 * run.hidden_size // HEAD_DIM
        config = Mamba2Config(**sizes, head_dim=HEAD_DIM, num_heads=heads, n_groups=1, chunk_size=64)
        return Mamba2ForCausalLM(config)
    if run.model == "rodimus_plus":
        attention = {"num_attention_heads": 2, "sliding_window": WINDOW}
        return RodimusForCausalLM(RodimusConfig(**sizes, block_type="rodimus_plus", **attention))
    if run.model == "taipan":
        # Keys of the whole sequence, queries of few tokens more than there are questions: the gate has to find them.
        # The cross-entropy is a mean over few labels: a budget of weight 1 lets twice as many tokens through as that.
        attention = {"attention_every": 1, "sliding_window": run.length, "capacity": SPARE * run.pairs / run.length}
        attention |= {"budget_lambda": 5.0}
        width = {"intermediate_size": feed_forward_width(run), "head_dim": HEAD_DIM, "tie_word_embeddings": False}
        # From 0.02, which suits widths of a thousand, attention at 64 learned nothing in 2000 steps.
        start = {"initializer_range": run.hidden_size**-0.5}
        return TaipanForCausalLM(TaipanConfig(**sizes, **attention, **width, **start))
    if run.model == "rodimus":
        return RodimusForCausalLM(RodimusConfig(**sizes, block_type="rodimus"))
    raise ValueError(f"model must be one of {MODELS}, got {run.model!r}.")


def feed_forward_width(run: Run) -> int:
    """Width with which Taipan's selective layer has as many parameters as the Mamba-2 block of `ssd` in its place."""
    d, inner = run.hidden_size, 2 * run.hidden_size
    block = d * (3 * inner + 2 * run.state_size + inner // HEAD_DIM)  # of both projections, nearly all there is
    return max((block - 4 * d * d) // (3 * d), 8)


def build_optimizer(model: PreTrainedModel, run: Run):
    """AdamW, warmup over a tenth of the steps, cosine to zero. Matrices decay; norms, gates and biases do not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.98))
    scheduler = get_cosine_schedule_with_warmup(optimizer, max(run.steps // 10, 1), run.steps)
    return optimizer, scheduler


@torch.no_grad()
def accuracy(model: PreTrainedModel, inputs: np.ndarray, labels: np.ndarray, batch_size: int = 256) -> float:
    """Share of queries answered right, over int64 arrays as `mqar_batch` returns them."""
    model.eval()
    right = 0
    for start in range(0, len(inputs), batch_size):
        logits = model(input_ids=torch.from_numpy(inputs[start : start + batch_size]), use_cache=False).logits
        right += (logits.argmax(-1).numpy() == labels[start : start + batch_size]).sum()
    return float(right / (labels != IGNORED).sum())


@torch.no_grad()
def selection(model: PreTrainedModel, inputs: np.ndarray) -> dict:
    """{"selected": share of tokens that attend in each selective layer}, for a model that has such layers."""
    rates = getattr(model(input_ids=torch.from_numpy(inputs), use_cache=False), "selection", None)
    return {} if rates is None else {"selected": [round(rate, 4) for rate in rates[:, 0].tolist()]}


def training_batch(run: Run, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of the task at its size, half or a quarter of it: the short ones are learned first and teach the long."""
    shift = int(rng.integers(min(3, run.pairs.bit_length())))
    pairs, length = run.pairs >> shift, 2 * (run.length >> shift + 1)  # at least one pair, an even length
    inputs, labels = mqar_batch(run.batch_size, length, pairs, run.vocab_size, rng)
    return torch.from_numpy(inputs), torch.from_numpy(causal_labels(labels))


def train(run: Run, *, eval_every: int = 100, num_validation: int = 256, num_test: int = 1000) -> dict:
    """Train and test one run; returns a JSON-ready record with the curve."""
    torch.manual_seed(run.seed)
    # Three streams of examples from one seed: validation and test are the same for every model, and never trained on.
    train_rng, validation_rng, test_rng = (np.random.default_rng([run.seed, stream]) for stream in range(3))
    model = build_model(run)
    optimizer, scheduler = build_optimizer(model, run)
    validation = mqar_batch(num_validation, run.length, run.pairs, run.vocab_size, validation_rng)
    curve, losses, started = [], [], time.perf_counter()
    for step in range(1, run.steps + 1):
        model.train()
        inputs, labels = training_batch(run, train_rng)
        loss = model(input_ids=inputs, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % eval_every and step != run.steps:
            continue
        point = {
            "step": step,
            "loss": round(float(np.mean(losses)), 4),
            "accuracy": round(accuracy(model, *validation), 4),
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(
            "  step {step:5d}  loss {loss:7.4f}  accuracy {accuracy:6.4f}  {seconds:6.1f} s".format(**point), flush=True
        )
        curve.append(point)
        losses.clear()
        if point["accuracy"] >= SOLVED:
            break
    test = mqar_batch(num_test, run.length, run.pairs, run.vocab_size, test_rng)
    return {
        "settings": asdict(run),
        "test_accuracy": round(accuracy(model, *test), 4),
        **selection(model, validation[0]),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - started, 1),
        "curve": curve,
    }


def sweep_runs(base: Run) -> list[Run]:
    """The table: recall over (pairs, state size), SSD beside Rodimus; a sequence is as long as 32 pairs or 8 need."""
    return [
        replace(base, model=model, pairs=pairs, length=length, state_size=state_size)
        for pairs, length in ((8, 64), (32, 128))
        for state_size in (16, 64)
        for model in ("ssd", "rodimus")
    ]


def run_all(runs: list[Run], out: Path | None, command: str, **options: int) -> list[dict]:
    """Do every run that `out` (a JSON path, or None to keep nothing) does not hold yet; returns their records."""
    stored = json.loads(out.read_text()) if out and out.exists() else []
    records = []
    for run in runs:
        known = [record for record in stored if record["settings"] == asdict(run)]
        if known:
            print(f"{describe(run)}: already in {out.name}, accuracy {known[0]['test_accuracy']:.4f}")
            records.append(known[0])
            continue
        print(describe(run), flush=True)
        record = train(run, **options)
        record |= {"command": command, "commit": commit(), "machine": machine(), "versions": versions()}
        print(f"  test accuracy {record['test_accuracy']:.4f} in {record['seconds']:.0f} s", flush=True)
        records.append(record)
        stored.append(record)
        if out:  # after every run, so that an interrupted sweep continues where it stopped
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(stored, indent=1) + "\n")
    return records


def describe(run: Run) -> str:
    return f"{run.model}, {run.pairs} pairs in {run.length} tokens, state size {run.state_size}, seed {run.seed}"


def plot(records: list[dict], path: Path) -> None:
    """Left: validation accuracy against steps. Right: test accuracy, a bar per run, by pairs and state size."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    runs = [(Run(**record["settings"]), record) for record in records]
    cells = sorted({(run.pairs, run.state_size) for run, _ in runs})
    models = [model for model in MODELS if any(run.model == model for run, _ in runs)]
    width = 0.8 / len(models)
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = ("-", "--", "-.", ":", (0, (1, 3)), (0, (6, 2, 1, 2, 1, 2)))
    for run, record in runs:
        color, cell = COLORS[run.model], cells.index((run.pairs, run.state_size))
        steps = [point["step"] for point in record["curve"]]
        values = [point["accuracy"] for point in record["curve"]]
        label = f"{run.model}, {run.pairs} pairs, state {run.state_size}"
        left.plot(steps, values, linestyle=styles[cell % len(styles)], color=color, label=label)
        at = cell + width * (models.index(run.model) - (len(models) - 1) / 2)
        bar = right.bar(at, record["test_accuracy"], width, color=color, label=run.model)
        right.bar_label(bar, fmt="%.3f", fontsize=7, rotation=90, padding=2)
    left.set(xlabel="step", ylabel="validation accuracy", ylim=(0, 1.02), title="Multi-query associative recall")
    labels = [f"{pairs} pairs\nstate {state_size}" for pairs, state_size in cells]
    right.set(ylabel="test accuracy", ylim=(0, 1.2), xticks=range(len(cells)), xticklabels=labels)
    right.set_title(f"{runs[0][0].layers} layers of width {runs[0][0].hidden_size}")
    left.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    named = dict(zip(*reversed(right.get_legend_handles_labels()), strict=True))  # one entry a model, not a bar
    right.legend(named.values(), named.keys(), frameon=False, fontsize=8, ncols=len(named), loc="upper center")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mqar.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in fields(Run):
        choices, flag = MODELS if field.name == "model" else None, "--" + field.name.replace("_", "-")
        note = f"default {field.default}"
        parser.add_argument(flag, type=field.type, default=field.default, choices=choices, help=note)
    parser.add_argument("--threads", type=int, help="torch threads; torch's own choice by default")
    parser.add_argument(
        "--sweep", action="store_true", help="instead of one --model, --pairs, --length, --state-size: the table"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes and three steps, to check that everything runs"
    )
    parser.add_argument("--out", type=Path, help="JSON to append to, a PNG beside it (--sweep: results/mqar.json)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict]:
    """Run what the command line asks for; returns the records."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    command = shlex.join(["python", "examples/studies/mqar.py", *argv])
    base = Run(**{field.name: getattr(args, field.name) for field in fields(Run)})
    options = {}
    if args.smoke:
        base = replace(base, hidden_size=32, steps=3, batch_size=4)
        options = {"eval_every": 2, "num_validation": 8, "num_test": 8}
    if args.threads:
        torch.set_num_threads(args.threads)
    runs = sweep_runs(base) if args.sweep else [base]
    out = args.out or (RESULTS if args.sweep and not args.smoke else None)
    records = run_all(runs, out, command, **options)
    if out:
        plot(json.loads(out.read_text()), out.with_suffix(".png"))  # earlier commands' runs too
    return records


if __name__ == "__main__":
    main()
