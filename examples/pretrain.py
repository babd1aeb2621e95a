"""Train a language model from scratch on text, on one device or many, with transformers' Trainer.

    python examples/pretrain.py --smoke                                                      seconds on a CPU
    accelerate launch --config_file examples/accelerate/1_gpu.yaml examples/pretrain.py
    accelerate launch --config_file examples/accelerate/8_gpus.yaml examples/pretrain.py --model taipan
    accelerate launch --config_file examples/accelerate/64_gpus.yaml ... examples/pretrain.py --checkpointing
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/pretrain.py --smoke         two processes of a CPU

Text is the source of Python's standard library, or --text. --out gets the tokenizer, the configuration, checkpoints,
and in the end `model`, a folder that `from_pretrained` loads anywhere. The same command goes on from the last
checkpoint; where all steps are done, it evaluates and writes `model` again. How many devices there are, how they share
the work and in which precision is the launcher's business: see examples/accelerate/. Prints the loss on the way, and
bits per byte of held-out text in the end. On two cores of a CPU the default, 1000 steps of Rodimus+ with 5M parameters,
takes about twelve minutes.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from scrubjay.examples.data.corpus import Corpus, encode, load_corpus, num_bytes, train_tokenizer
from scrubjay.examples.learning.optimizer import make_optimizer
from scrubjay.examples.learning.recipe import MODELS, Recipe
from scrubjay.examples.learning.training import Windows, build_model, schedule
from scrubjay.modeling.training.sharding import mixed_precision


def tokenizer_of(corpus: Corpus, vocab_size: int, folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that the folder holds, or a new one for the text, which the folder then holds.

    Raises:
        ValueError: the folder holds one of another size.
    """
    if not (folder / "tokenizer_config.json").is_file():
        train_tokenizer(corpus.train, vocab_size).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{folder} holds a tokenizer of {len(tokenizer)} tokens and {vocab_size} were asked for. Name another "
            f"--out, or pass --vocab-size {len(tokenizer)}."
        )
    return tokenizer


def checkpoint_of(config: PreTrainedConfig, folder: Path, writes: bool = True) -> str | None:
    """The last checkpoint in the folder of a run. Without one the run starts, and the process that writes leaves the
    configuration in `config`.

    Raises:
        ValueError: the checkpoints are of another model or configuration.
    """
    last, asked = get_last_checkpoint(folder), json.loads(config.to_json_string())
    file = folder / "config" / "config.json"
    if last is None and writes:
        config.save_pretrained(file.parent)
    elif last is not None and file.is_file():
        held = json.loads(file.read_text(encoding="utf-8"))
        names = {name for name in held.keys() | asked.keys() if held.get(name) != asked.get(name)}
        names -= {"transformers_version"}
        if names:
            names = {"model_type"} if "model_type" in names else names
            was, now = (", ".join(f"{name} {of.get(name)!r}" for name in sorted(names)) for of in (held, asked))
            raise ValueError(
                f"{last} is of a run with {was}; asked for is one with {now}. Name another --out, or repeat the "
                "arguments of that run."
            )
    return last


def arguments(args: argparse.Namespace, recipe: Recipe) -> TrainingArguments:
    """The Trainer's settings; the launcher adds devices and precision to them."""
    return TrainingArguments(
        output_dir=str(args.out),
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=args.accumulate,
        max_steps=args.steps,
        max_grad_norm=recipe.max_grad_norm,
        save_strategy="steps",
        save_steps=args.save_every,
        save_total_limit=2,
        logging_steps=max(1, args.steps // 20),
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,  # every parameter has a gradient in every step
        remove_unused_columns=False,
        report_to="none",
    )


class Finished(Exception):
    """A checkpoint has all the steps that were asked for."""


class NoStepTooMany(TrainerCallback):
    """Ends a training that goes on from its last step, when weights are loaded: a Trainer would take one more."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise Finished


class Pretrainer(Trainer):
    """A Trainer with the recipe's optimizer and schedule, made when the weights are where they stay."""

    def __init__(self, *args, recipe: Recipe, **kwargs):
        super().__init__(*args, callbacks=[NoStepTooMany()], **kwargs)
        self.recipe = recipe

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model if model is None else model, self.recipe)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.lr_scheduler is None:
            rates = schedule(self.recipe, num_training_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, rates)
        return self.lr_scheduler


def keep_precision(accelerator: Accelerator) -> None:
    """Residual stream and sums of gradients in float32, where accelerate shards weights and computes in bfloat16."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and accelerator.mixed_precision == "bf16":
        plugin.mixed_precision_policy = mixed_precision(torch.bfloat16)


def pretrain(args: argparse.Namespace) -> dict:
    """Train, save, and return what there is to tell: processes, precision, tokens, losses in nats per token.

    Raises:
        ValueError: --out holds a run of another model, configuration or size of vocabulary.
    """
    recipe = Recipe.of(args.model, max_steps=args.steps)
    sizes = ("hidden_size", "num_hidden_layers", "vocab_size", "batch_size", "length", "learning_rate")
    given = {name: value for name in sizes if (value := getattr(args, name)) is not None}
    recipe = replace(recipe.smoke() if args.smoke else recipe, **given)
    settings = arguments(args, recipe)
    set_seed(args.seed)
    corpus = load_corpus(args.text).limited(recipe.train_bytes, recipe.heldout_bytes)
    with settings.main_process_first():
        tokenizer = tokenizer_of(corpus, recipe.vocab_size, args.out / "tokenizer")
    model = build_model(args.model, recipe, len(tokenizer), tokenizer.eos_token_id)
    last = checkpoint_of(model.config, args.out, settings.should_save)
    use_cache = model.config.use_cache
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    streams = [encode(tokenizer, part) for part in (corpus.train, corpus.heldout)]
    train, heldout = (Windows(stream, recipe.length) for stream in streams)
    trainer = Pretrainer(model=model, args=settings, train_dataset=train, eval_dataset=heldout, recipe=recipe)
    keep_precision(trainer.accelerator)
    try:
        found = {"training_loss": trainer.train(resume_from_checkpoint=last).training_loss}
    except Finished:
        found = {}
        trainer.accelerator.print(f"{last} has all of the {args.steps} steps that were asked for: nothing is trained.")
    loss = trainer.evaluate()["eval_loss"]
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.use_cache = use_cache  # training turns it off, and it would be saved so
    if settings.should_save:
        tokenizer.save_pretrained(args.out / "model")  # first: the model's card says whether there is one
    if hasattr(model, "describe"):  # of the zoo
        model.describe(training_data=corpus.name)
    model.save_pretrained(args.out / "model")
    trainer.accelerator.wait_for_everyone()
    bits = loss / math.log(2) * (len(streams[1]) - 1) / num_bytes(corpus.heldout)
    return {
        "processes": trainer.accelerator.num_processes,
        "precision": trainer.accelerator.mixed_precision,
        "tokens": args.steps * recipe.batch_size * args.accumulate * settings.world_size * recipe.length,
        **found,
        "heldout_loss": loss,
        "heldout_bits_per_byte": bits,
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="rodimus_plus", choices=MODELS)
    parser.add_argument("--text", help="file or folder of UTF-8 text; default: Python's standard library")
    parser.add_argument("--out", type=Path, default=Path("pretrained"), help="folder of the run, made or gone on with")
    parser.add_argument("--checkpointing", action="store_true", help="keep no activations but those between blocks")
    parser.add_argument("--smoke", action="store_true", help="seconds on a CPU")
    for name, default in (("steps", 1000), ("save-every", 200), ("accumulate", 1), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("hidden-size", "num-hidden-layers", "vocab-size", "batch-size", "length"):
        parser.add_argument(f"--{name}", type=int, help="default: the recipe's; batch-size is that of one process")
    parser.add_argument("--learning-rate", type=float)
    args = parser.parse_args(argv)
    if args.smoke:
        args.steps, args.save_every = min(args.steps, 4), min(args.save_every, 2)
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(sys.argv[1:] if argv is None else argv)
    found = pretrain(args)
    if int(os.environ.get("RANK", 0)) == 0:
        for name, value in found.items():
            print(f"{name}: {value}")
        print(f"In {args.out}: model (a folder to load), tokenizer, config, checkpoints.")
    return found


if __name__ == "__main__":
    main()
