"""Tune a decoder to attend few tokens, as ADORE's cache will let it (arXiv:2407.02328, by its second-hand description).

For each batch, one pass without gradient finds the K tokens that each query looks at most (mean over heads and layers);
a second pass sees only these, itself and the newest tokens, and adapts low-rank matrices (LoRA) on all linear layers.
Both passes are O(n^2): tuning is not what gets cheaper. With `--mask-scope per_head` each head keeps its own top K
instead, in a single pass, which is cheaper but is not what the cache does.

Where bitsandbytes and a CUDA device are there, the frozen weights are 4-bit (QLoRA: NF4, double quantisation);
elsewhere they keep their dtype, and the script says so. Settings that are not public are QLoRA's own.

    python examples/sparse_tune.py --model HuggingFaceTB/SmolLM2-135M --out adapter
    python examples/sparse_tune.py --smoke          the code path in seconds, a random model, learns nothing

Prints the held-out loss with sparse and full attention, before and after. Tuning on such text helps by itself, whatever
is attended; with `--control` the same adapters are then tuned with full attention on the same texts, and what they lose
under the mask is printed beside it. For the 5M-parameter model of `scrubjay demo --model llama --minutes 30`, about 15
minutes on two cores (62 steps of 14 seconds), without the control.
"""

import argparse
import importlib.util
import json
import shlex
import sys
import time
from pathlib import Path

import torch
from peft import prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from scrubjay import AdoreConfig
from scrubjay.examples.learning.adore_training import smoke_model, streams
from scrubjay.examples.learning.sparse_tuning import adapted, heldout_losses, tune


def can_quantise() -> bool:
    """Whether 4-bit weights can be had."""
    return torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes") is not None


def load(args: argparse.Namespace) -> PreTrainedModel:
    """The frozen decoder."""
    if args.model is None:
        return smoke_model()
    if not can_quantise() or args.no_4bit:
        print("Frozen weights keep their dtype (LoRA): 4 bit needs bitsandbytes and a CUDA device, or was not wanted.")
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", attn_implementation="sdpa")
        return model.to("cuda" if torch.cuda.is_available() else "cpu")
    print("Frozen weights: 4 bit (NF4, double quantisation).")
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype="auto", attn_implementation="sdpa", quantization_config=four_bit, device_map={"": 0}
    )
    return prepare_model_for_kbit_training(model)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="name or folder of a Llama, Qwen2, Qwen3 or Mistral model")
    parser.add_argument("--text", help="file or folder of UTF-8 text; default: Python's standard library")
    parser.add_argument("--out", type=Path, default=Path("adapter"), help="folder for the adapters")
    parser.add_argument("--mask-scope", default="uniform", choices=("uniform", "per_head"))
    parser.add_argument("--label-agg", default="mean", choices=("mean", "max_head", "vote"))
    parser.add_argument("--no-4bit", action="store_true", help="keep the weights' dtype where 4 bit would be possible")
    parser.add_argument("--control", action="store_true", help="tune with full attention as well, on the same texts")
    parser.add_argument("--smoke", action="store_true", help="seconds on a CPU, with a random model")
    # 1000 texts in one epoch: 62 steps of 16
    for name, default in (("length", 1024), ("steps", 62), ("batch-size", 16), ("eval-texts", 8), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("label-k", 96), ("cache-size", 192), ("recent", 1), ("rank", 64), ("alpha", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("lr", 2e-4), ("dropout", 0.1)):
        parser.add_argument(f"--{name}", type=float, default=default)
    args = parser.parse_args(argv)
    args.train_bytes, args.heldout_bytes = 1 << 24, 1 << 20
    if args.smoke:
        args.train_bytes, args.heldout_bytes = 1 << 17, 1 << 15
        vars(args).update(
            model=None, length=48, steps=3, batch_size=2, eval_texts=1, label_k=8, cache_size=16, rank=4, lr=1e-2
        )
    elif args.model is None:
        parser.error("--model is needed: a name or folder of a decoder. --smoke runs without one.")
    return args


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    args, started = parse(argv), time.perf_counter()
    base = load(args)
    train_stream, heldout_stream = streams(args.model, args.text, args.train_bytes, args.heldout_bytes)
    fields = ("cache_size", "recent", "label_k", "label_agg", "mask_scope")
    settings = {name: getattr(args, name) for name in fields}
    settings["cache_size"] = max(args.cache_size, args.label_k)  # so that full attention can be asked for as a baseline
    config = AdoreConfig(base_config=base.config, **settings)
    torch.manual_seed(args.seed)
    model = adapted(base, args)
    before = heldout_losses(model, heldout_stream, config, args)
    losses = tune(model, train_stream, config, args)
    found = {"before": before, "after": heldout_losses(model, heldout_stream, config, args)}
    model.save_pretrained(args.out)
    if args.control:
        torch.manual_seed(args.seed)
        control = adapted(load(args), args)
        tune(control, train_stream, config, args, full=True)
        found["control"] = heldout_losses(control, heldout_stream, config, args)
    told = {"before": "before", "after": "after", "control": "after tuning with full attention"}
    for kind in ("sparse", "full"):
        said = ", ".join(f"{numbers[kind]:.4f} {told[name]}" for name, numbers in found.items())
        print(f"held-out loss, {kind:6s} attention: {said}")
    record = {"command": shlex.join(["python", "examples/sparse_tune.py", *argv]), "losses": losses}
    record |= found | {"seconds": round(time.perf_counter() - started, 1)}
    (args.out / "report.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"In {args.out}: the adapters (peft) and report.json.")
    return record


if __name__ == "__main__":
    main()
