"""Train a small language model for a number of minutes with transformers' Trainer.

The clock becomes a number of steps before the run starts: a few real steps are timed on a copy of the model, so the
progress bar is right and the learning rate reaches zero when the time is over.
"""

import math
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from scrubjay import (
    RodimusConfig,
    RodimusForCausalLM,
    SSDConfig,
    SSDForCausalLM,
    TaipanConfig,
    TaipanForCausalLM,
)
from scrubjay.examples.learning.optimizer import make_optimizer
from scrubjay.examples.learning.recipe import Recipe

TIMED_STEPS = 16  # the first two also build the optimiser's state and are left out


class Windows(Dataset):
    """Windows of `length` consecutive ids of a stream, end to end."""

    def __init__(self, stream: np.ndarray, length: int):
        self.ids = torch.from_numpy(stream[: (len(stream) // length) * length]).view(-1, length)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


@dataclass
class Log:
    """What a run did: seconds and nats per token of each step, and (seconds, value) of each look at held-out text."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    evals: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Pace:
    """The fastest way that was found to take a training step, and its seconds."""

    seconds: float
    bfloat16: bool
    threads: int


@dataclass(frozen=True)
class Plan:
    """How long to train, and which limit says so."""

    steps: int
    reason: str


def build_model(name: str, recipe: Recipe, vocab_size: int, eos_token_id: int) -> PreTrainedModel:
    """A freshly initialised model of the zoo, or the plain Llama of the same size."""
    sizes = {"vocab_size": vocab_size, "tie_word_embeddings": True}
    sizes |= {"hidden_size": recipe.hidden_size, "num_hidden_layers": recipe.num_hidden_layers}
    sizes |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eos_token_id)
    if name == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                num_attention_heads=max(1, recipe.hidden_size // 64),
                intermediate_size=recipe.hidden_size * 11 // 4,
                max_position_embeddings=max(recipe.contexts),
                initializer_range=0.02 * max(1, 2048 / recipe.hidden_size) ** 0.5,  # as Rodimus; 0.02 learns later
                **sizes,
            )
        )
    if name == "ssd":
        return SSDForCausalLM(SSDConfig(**sizes))
    if (
        name == "ssd-hybrid"
    ):  # attention in the place of a mixer in the middle: of its layers the paper has about a tenth
        return SSDForCausalLM(SSDConfig(attn_layer_idx=[recipe.num_hidden_layers // 2], **sizes))
    if name == "rodimus":
        return RodimusForCausalLM(RodimusConfig(block_type="rodimus", **sizes))
    # half of what is seen in training, so that the state has to carry what the window forgets
    window = recipe.length // 2
    if name == "taipan":  # a selective layer after every two blocks: with six it would have one
        return TaipanForCausalLM(TaipanConfig(attention_every=2, sliding_window=window, **sizes))
    return RodimusForCausalLM(RodimusConfig(block_type="rodimus_plus", sliding_window=window, **sizes))


def find_pace(model: PreTrainedModel, data: Windows, recipe: Recipe, output: Path) -> Pace:
    """Time a few steps of a copy of the model in each precision, then with ever more threads while that is faster.

    Torch takes a thread for each core. For a model this small fewer can be faster, and where another program keeps a
    core busy, far faster. The number of threads is left at the best one, never above what it was.
    """
    on_gpu, most = torch.cuda.is_available(), torch.get_num_threads()
    precisions = {"bfloat16": [True], "float32": [False], "fastest": [True] if on_gpu else [False, True]}
    best, limit = Pace(math.inf, False, most), math.inf

    def faster(bfloat16: bool, threads: int) -> bool:
        """A processor without bfloat16 emulates it, very slowly: a trial ends when it has taken as long as the best."""
        nonlocal best, limit
        torch.set_num_threads(threads)
        trial = deepcopy(model)
        log = train(trial, data, recipe, TIMED_STEPS, bfloat16=bfloat16, output=output, show=False, limit=limit)
        pace = Pace(statistics.median(np.diff(log.seconds)[1:].tolist() or [math.inf]), bfloat16, threads)
        if len(log.seconds) < TIMED_STEPS or pace.seconds >= best.seconds:
            return False
        best, limit = pace, log.seconds[-1]
        return True

    for bfloat16 in precisions[recipe.precision]:
        faster(bfloat16, most if on_gpu else 1)
    while best.threads < most and faster(best.bfloat16, min(most, 2 * best.threads)):
        pass
    torch.set_num_threads(best.threads)
    return best


def plan_steps(recipe: Recipe, num_windows: int, minutes: float, step_seconds: float, eval_seconds: float) -> Plan:
    """The steps that fit in `minutes`, looks at held-out text included, or that another limit allows."""
    limits = {
        f"{minutes:g} minutes": (60 * minutes - recipe.num_evals * eval_seconds) / step_seconds,
        f"{recipe.max_epochs:g} epochs": recipe.max_epochs * num_windows / recipe.batch_size,
        "max_steps": recipe.max_steps or float("inf"),
    }
    reason = min(limits, key=limits.get)
    return Plan(max(1, int(limits[reason])), reason)


def train(
    model: PreTrainedModel,
    data: Windows,
    recipe: Recipe,
    steps: int,
    *,
    bfloat16: bool,
    output: Path,
    seed: int = 0,
    evaluate: Callable[[PreTrainedModel], float] | None = None,
    show: bool = True,
    limit: float = math.inf,
) -> Log:
    """Train `model` in place.

    Args:
        output: folder that the Trainer makes; nothing is saved there.
        evaluate: called `recipe.num_evals` times, evenly spaced, the last time at the end.
        show: draw a progress bar.
        limit: stop after the first step that ends later than so many seconds.
    """
    args = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=recipe.batch_size,
        max_steps=steps,
        max_grad_norm=recipe.max_grad_norm,
        bf16=bfloat16,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        logging_strategy="steps" if show else "no",
        logging_steps=max(1, steps // 100),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,  # _Bar below is the progress bar
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
    )
    args._n_gpu = min(1, args.n_gpu)  # several GPUs would mean DataParallel, slower than one for a model this small
    log = Log()
    optimizer = make_optimizer(model, recipe)
    at = {round(steps * (i + 1) / recipe.num_evals) for i in range(recipe.num_evals)} if evaluate else set()
    trainer = _RecordingTrainer(
        model=model,
        args=args,
        train_dataset=data,
        callbacks=[_Clock(log, at, evaluate, limit), *([_Bar()] if show else [])],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(recipe, steps))),
    )
    trainer.remove_callback(PrinterCallback)
    use_cache = model.config.use_cache
    trainer.train()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # else autocast stays, in what is measured too
    model.config.use_cache = use_cache  # the Trainer turns it off, and it would be saved so
    log.losses = torch.stack(trainer.losses).tolist()
    return log


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, **notes) -> None:
    """Write a model with its tokenizer. notes: for the card of a model of the zoo, as its `describe` takes them."""
    tokenizer.save_pretrained(folder)  # first: the card says whether there is one
    if hasattr(model, "describe"):
        model.describe(**notes)
    model.save_pretrained(folder)


def schedule(recipe: Recipe, steps: int) -> Callable[[int], float]:
    """Share of the peak learning rate at each step: up, flat, down to 0 after the last one."""
    warmup, decay = max(1.0, recipe.warmup * steps), max(1.0, recipe.decay * steps)
    return lambda step: max(0.0, min(1.0, (step + 1) / warmup, (steps - step) / decay))


class _RecordingTrainer(Trainer):
    """Keeps the loss of every step, which the Trainer would average over its logging interval."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses: list[torch.Tensor] = []

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.detach().float())
        return loss


class _Bar(ProgressCallback):
    """The Trainer's bar with the loss beside it, where the Trainer would print a line for each."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f} nats per token")


class _Clock(TrainerCallback):
    """Notes when each step ended, looks at held-out text at the given steps, and stops a run that is over its limit."""

    def __init__(self, log: Log, at: set[int], evaluate: Callable[[PreTrainedModel], float] | None, limit: float):
        self.log, self.at, self.evaluate, self.limit = log, at, evaluate, limit

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        seconds = time.perf_counter() - self.start
        self.log.seconds.append(seconds)
        control.should_training_stop |= seconds > self.limit
        if state.global_step in self.at:
            self.log.evals.append((seconds, self.evaluate(model)))
