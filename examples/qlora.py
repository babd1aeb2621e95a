"""QLoRA: fine-tune a model in 4 bits on instructions made of the standard library's docstrings.

    python examples/qlora.py                          trains a base model as the demo does, then fine-tunes it
    python examples/qlora.py --model FOLDER           fine-tunes a model with a tokenizer that you have
    python examples/qlora.py --push OWNER/NAME        and publishes the merged model, the base and the adapter
    python examples/qlora.py --smoke                  all of it in seconds, to see that it works

Prints what each part does and takes, and losses before and after: nats per token of the docstrings of files that
neither the base model nor the adapter was trained on. Ten minutes on two cores with `--minutes 5` for the base. Into
--output: base/ (if it was trained), adapter/ and merged/.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset
from huggingface_hub import create_repo, upload_folder
from peft import LoraConfig, PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from scrubjay import SSDConfig, SSDForCausalLM, adapter_report
from scrubjay.examples.data.corpus import Corpus, encode, load_corpus, train_tokenizer
from scrubjay.examples.data.docstrings import pairs_of
from scrubjay.examples.learning.recipe import MODELS, Recipe
from scrubjay.examples.learning.training import Windows, build_model, find_pace, plan_steps, save, train
from scrubjay.examples.measuring.qlora_memory import load, measured_apart
from scrubjay.examples.measuring.run_report import FULL, GRAY, OURS, commit, machine, section, size, table, versions
from scrubjay.modeling.pretrained import ZooPreTrainedModel

MAMBA2_130M = {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50288}  # the published sizes


@dataclass(frozen=True)
class Run:
    """What decides a run.

    Args:
        kind, minutes: of the base model, a name of the demo's recipes, where none is given.
        rank, steps, batch_size, learning_rate: of the adapter.
        length: tokens of a packed row; a longer example is left out.
        tested: held-out examples.
        memory_length: tokens of the step whose memory is measured.
        published: measure the memory of the 130M shape, too.
    """

    kind: str = "rodimus_plus"
    minutes: float = 3.0
    rank: int = 16
    steps: int = 200
    batch_size: int = 4
    learning_rate: float = 2e-3
    length: int = 256
    tested: int = 200
    memory_length: int = 256
    published: bool = True
    seed: int = 0


def make_base(run: Run, corpus: Corpus, recipe: Recipe, folder: Path) -> None:
    """Train a model as the demo does, and save it with its tokenizer."""
    tokenizer = train_tokenizer(corpus.train, recipe.vocab_size)
    windows = Windows(encode(tokenizer, corpus.train), recipe.length)
    network = build_model(run.kind, recipe, len(tokenizer), tokenizer.eos_token_id)
    pace = find_pace(network, windows, recipe, folder)
    plan = plan_steps(recipe, len(windows), run.minutes, pace.seconds, 0.0)
    train(network, windows, recipe, plan.steps, bfloat16=pace.bfloat16, output=folder, seed=run.seed)
    save(network, tokenizer, folder, training_data=corpus.name)


def instructions(documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, str]]:
    """Pairs that fit into a row, with room for the end."""
    found = pairs_of(documents)
    return [p for p in found if len(tokenizer(p["prompt"] + p["completion"]).input_ids) < length]


@torch.no_grad()
def docstring_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[dict[str, str]]) -> float:
    """Nats per token of the completions and of the end that follows each."""
    model.eval()
    nats, count = 0.0, 0
    for pair in pairs:
        prompt = tokenizer(pair["prompt"]).input_ids
        answer = [*tokenizer(pair["completion"]).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer], device=model.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
        nats += float(cross_entropy(logits.float(), ids[0, -len(answer) :], reduction="sum"))
        count += len(answer)
    return nats / count


def fine_tune(run: Run, base: str, tokenizer: PreTrainedTokenizerBase, pairs: list[dict], folder: Path) -> dict:
    """LoRA on every projection of a base in 4 bits, with packed rows; saves the adapter."""
    trainer = SFTTrainer(
        model=load(base, 4),
        args=SFTConfig(
            output_dir=str(folder),
            max_steps=run.steps,
            per_device_train_batch_size=run.batch_size,
            learning_rate=run.learning_rate,
            warmup_steps=max(1, run.steps // 20),
            packing=True,
            max_length=run.length,
            gradient_checkpointing=False,
            logging_steps=max(1, run.steps // 10),
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            seed=run.seed,
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            target_modules="all-linear",
            r=run.rank,
            lora_alpha=2 * run.rank,
            lora_dropout=0.05,
        ),
    )
    report = adapter_report(trainer.model)
    print(report)
    trainer.train()
    trainer.save_model(str(folder))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    file = folder / "adapter_model.safetensors"
    return {"losses": losses, "adapter": {"parameters": report.total("trained"), "bytes": file.stat().st_size}}


def publish(
    name: str,
    base: str,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Path,
) -> None:
    """The merged model as `name`, the adapter as `name`-lora, and its base, where that is a folder, as `name`-base."""
    push_whole(name, network, tokenizer)
    model = load(base, 32)
    if Path(base).is_dir():
        base = f"{name}-base"
        push_whole(base, model, tokenizer)
    model.name_or_path = model.config.name_or_path = base  # the adapter's card has it, and a Hub takes no path there
    tuned = PeftModel.from_pretrained(model, adapter)
    for config in tuned.peft_config.values():
        config.base_model_name_or_path = base  # not this machine's folder: who loads the adapter needs it
    with tempfile.TemporaryDirectory() as folder:  # peft's push_to_hub writes an empty card over that of the adapter
        tuned.save_pretrained(folder)
        create_repo(f"{name}-lora", exist_ok=True)
        upload_folder(repo_id=f"{name}-lora", folder_path=folder)


def push_whole(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A model with its tokenizer: in one commit and with a card, where the model knows how to."""
    if isinstance(model, ZooPreTrainedModel):
        model.push_to_hub(name, tokenizer=tokenizer)
    else:
        model.push_to_hub(name)
        tokenizer.push_to_hub(name)


def memory(run: Run, base: str) -> dict:
    """Bytes of both ways to load, for the base and for a published shape with random weights."""
    found = {"base": measured_apart(base, run.memory_length)}
    if run.published:
        with tempfile.TemporaryDirectory() as folder:
            SSDForCausalLM(SSDConfig(**MAMBA2_130M)).save_pretrained(folder)
            found["Mamba-2 130M"] = measured_apart(folder, run.memory_length)
    return found


def qlora(
    run: Run,
    recipe: Recipe,
    output: Path,
    model: str | None = None,
    push: str | None = None,
    command: str | None = None,
) -> dict:
    """Everything, in order; a JSON-ready record."""
    started = time.perf_counter()
    logging.disable_progress_bar()
    set_seed(run.seed)
    output.mkdir(parents=True, exist_ok=True)
    adapter, merged = output / "adapter", output / "merged"
    corpus = load_corpus().limited(recipe.train_bytes, recipe.heldout_bytes)
    base = model or str(output / "base")
    if model is None:
        with section(f"base model: {run.kind}"):
            make_base(run, corpus, recipe, output / "base")
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=True)
    pairs = instructions(corpus.train, tokenizer, run.length)
    heldout = instructions(corpus.heldout, tokenizer, run.length)[: run.tested]
    if not pairs or not heldout:
        raise ValueError(
            f"{len(pairs)} examples to train on and {len(heldout)} to test on fit into {run.length} tokens."
        )
    loss = {}
    with section(f"before: {len(pairs)} examples to train on, {len(heldout)} to test on"):
        loss["base in float32"] = docstring_loss(load(base, 32), tokenizer, heldout)
        loss["base in 4 bits"] = docstring_loss(load(base, 4), tokenizer, heldout)
    with section(f"{run.steps} steps on the base in 4 bits"):
        tuned = fine_tune(run, base, tokenizer, pairs, adapter)
    with section("after: the adapter as it was saved, and merged"):
        loaded = PeftModel.from_pretrained(load(base, 4), adapter)
        loss["adapter on 4 bits"] = docstring_loss(loaded, tokenizer, heldout)
        loss["merged into 4 bits"] = docstring_loss(loaded.merge_and_unload(), tokenizer, heldout)
        network = PeftModel.from_pretrained(load(base, 32), adapter).merge_and_unload()
        loss["merged into float32"] = docstring_loss(network, tokenizer, heldout)
        about = f"{len(pairs)} docstrings of {corpus.name}, by LoRA of rank {run.rank} on 4 bits"
        measured = {"nats per token of held-out docstrings": round(loss["merged into float32"], 3)}
        save(network, tokenizer, merged, training_data=about, training_command=command, evaluation=measured)
    with section("memory, each in a process of its own"):
        bytes_of = memory(run, base)
    if push:
        with section(f"push to {push}, its base and its adapter beside it"):
            publish(push, base, network, tokenizer, adapter)
    record = {"run": asdict(run), "parameters": network.num_parameters(), "loss": loss, **tuned, "memory": bytes_of}
    record["examples"] = {"trained": len(pairs), "tested": len(heldout)}
    return record | {"seconds": round(time.perf_counter() - started, 1)}


def summary(record: dict) -> str:
    """Tables for the terminal."""
    losses = [(name, f"{value:.3f}") for name, value in record["loss"].items()]
    lines = [table("held-out docstrings", ["nats per token"], losses), ""]
    for name, sides in record["memory"].items():
        rows = [(field.replace("_", " "), *(size(sides[side][field]) for side in sides)) for field in sides["float32"]]
        lines += [table(f"memory, {name}", list(sides), rows), ""]
    adapter = record["adapter"]
    return "\n".join([*lines, f"adapter: {adapter['parameters']:,} parameters, {size(adapter['bytes'])}"])


def figure(record: dict, path: Path) -> None:
    """Two panels: loss before and after, and memory in float32 and in 4 bits."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    fig = Figure(figsize=(11, 3.4), layout="constrained")
    left, right = fig.subplots(1, 2)
    losses = dict(reversed(record["loss"].items()))
    colors = [GRAY if name.startswith("base") else OURS for name in losses]
    left.bar_label(left.barh(list(losses), list(losses.values()), color=colors), fmt="%.3f", padding=3)
    left.set(title="held-out docstrings", xlabel="nats per token", xlim=(0, 1.15 * max(losses.values())))
    kinds = {"weights": "weights", "peak_of_a_step": "peak of a LoRA step"}
    names = [f"{name}, {text}" for name in record["memory"] for text in kinds.values()]
    for i, (side, color) in enumerate((("float32", FULL), ("4 bits", OURS))):
        values = [record["memory"][name][side][kind] / 2**20 for name in record["memory"] for kind in kinds]
        bars = right.barh([len(names) - j - 0.4 * i for j in range(len(names))], values, 0.38, color=color, label=side)
        right.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    right.set_yticks([len(names) - j - 0.2 for j in range(len(names))], names)
    right.set(title="memory above the imports", xlabel="MiB", xscale="log", xlim=(1, None))
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> dict:
    """Run what the command line asks for; returns the record."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name of a model with a tokenizer; left out, one is trained")
    parser.add_argument("--kind", choices=[name for name in MODELS if name != "llama"], help="of the model to train")
    parser.add_argument("--minutes", type=float, help="of training it")
    parser.add_argument("--steps", type=int, help="of fine-tuning")
    parser.add_argument("--rank", type=int, help="of the adapter")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="publish the merged model there, base and adapter beside it"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/qlora"), help="folder for models")
    parser.add_argument("--out", type=Path, help="JSON to write, with a figure beside it")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to check that everything runs")
    options = parser.parse_args(argv)
    given = {name: getattr(options, name) for name in ("kind", "minutes", "steps", "rank")}
    run = Run()
    if options.smoke:
        run = replace(run, rank=4, steps=3, batch_size=2, tested=4, memory_length=32, published=False)
    run = replace(run, **{name: value for name, value in given.items() if value is not None})
    recipe = Recipe.of(run.kind)
    command = shlex.join(["python", "examples/qlora.py", *argv])
    recipe = recipe.smoke() if options.smoke else recipe
    record = qlora(run, recipe, options.output, options.model, options.push, command)
    record |= {"command": command, "commit": commit(), "machine": machine(), "versions": versions()}
    print(f"\n{summary(record)}\n\nIn {options.output}: adapter, merged. {record['seconds']:.0f} s in all.")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        figure(record, options.out.with_suffix(".png"))
    return record


if __name__ == "__main__":
    main()
