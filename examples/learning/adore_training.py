"""What trainings of ADORE share: a decoder to smoke-test with, real text as streams of ids, labels, loss, the loop."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from scrubjay.examples.data.corpus import encode, load_corpus, train_tokenizer
from scrubjay.examples.learning.attention_capture import attention_rows
from scrubjay.examples.learning.importance import later_share, top, within_horizon
from scrubjay.examples.learning.resuming import Resuming
from scrubjay.modeling.decoder.controller import Controller

SMOKE_VOCABULARY = 512


def smoke_model() -> LlamaForCausalLM:
    """A random Llama of two small layers, whose attention is peaked enough to tell tokens apart."""
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=SMOKE_VOCABULARY, initializer_range=0.2))


def streams(model: str | None, text: str | None, train_bytes: int, heldout_bytes: int) -> list[np.ndarray]:
    """[training, held-out] ids of about so many bytes of `text`, or of Python's standard library where it is None.

    model: whose tokenizer is used; None trains one for `smoke_model`.
    """
    corpus = load_corpus(text).limited(train_bytes, heldout_bytes)
    parts = (corpus.train, corpus.heldout)
    if model is None:
        own = train_tokenizer(corpus.train, SMOKE_VOCABULARY)
        return [encode(own, part) for part in parts]
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [
        np.concatenate([tokenizer(document, add_special_tokens=False)["input_ids"] for document in part])
        for part in parts
    ]


def windows(stream: np.ndarray, length: int, count: int, rng: np.random.Generator, device) -> torch.Tensor:
    """(count, length) texts that start anywhere in a stream of ids."""
    if len(stream) <= length:
        raise ValueError(f"The text has {len(stream)} tokens, more than length = {length} are needed. Pass more text.")
    starts = rng.integers(len(stream) - length, size=count)
    return torch.from_numpy(np.stack([stream[a : a + length] for a in starts])).long().to(device)


def labels_of(model, ids, at, config) -> torch.Tensor:
    """(B, Q, T) bool labels of the queries `at`, after `config`'s label_* fields."""
    horizon, T = config.label_horizon, ids.shape[1]
    rows = (at[:, None] + torch.arange(horizon, device=at.device)).clamp(max=T - 1).flatten()
    a = attention_rows(model, ids, rows, config.num_labelled, (config.label_agg,), config.label_layers)
    return within_horizon(top(a[config.label_agg], rows, config.num_labelled), at, horizon)


def loss_of(controller, model, ids, at, config, pos_weight: float) -> torch.Tensor:
    """Binary cross entropy of the scores of every token that a query sees."""
    labels = labels_of(model, ids, at, config)
    return loss_of_labels(controller, model.get_input_embeddings()(ids).detach(), labels, at, pos_weight)


def loss_of_labels(controller, embeds, labels, at, pos_weight: float) -> torch.Tensor:
    """`loss_of` for labels (B, Q, T) that are there, which several controllers may share. embeds: (B, T, D)."""
    weight = torch.tensor(pos_weight, device=embeds.device)
    if controller.score_mode == "static":
        share, count = later_share(labels, at)
        scores = controller(embeds, at[:1])[:, 0]
        known = (count > 0).expand_as(scores)
        return binary_cross_entropy_with_logits(scores[known], share[known].to(scores), pos_weight=weight)
    scores = controller(embeds, at)
    known = (torch.arange(embeds.shape[1], device=embeds.device) <= at[:, None]).expand_as(scores)
    return binary_cross_entropy_with_logits(scores[known], labels[known].to(scores), pos_weight=weight)


def train_controllers(
    controllers: Mapping[str, Controller], model, stream: np.ndarray, config, args: Namespace
) -> dict[str, list[float]]:
    """AdamW with a cosine on all controllers at once, which share the labels; the decoder learns nothing.

    args: length, batch_size, queries of each text, steps, seed, lr, pos_weight; where it has `kept`, a file, it goes on
    from there. Returns the loss of each step by name.
    """
    groups = [{"params": list(controller.parameters())} for controller in controllers.values()]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(args.steps // 20, 1), args.steps)
    rng = np.random.default_rng(args.seed)
    found: dict[str, list[float]] = {name: [] for name in controllers}

    def step() -> float:
        ids = windows(stream, args.length, args.batch_size, rng, model.device)
        # a query with no more than K tokens before it has all of them labelled and teaches nothing
        asked = np.arange(config.num_labelled, args.length)
        at = torch.from_numpy(np.sort(rng.choice(asked, min(args.queries, len(asked)), False))).to(model.device)
        labels, embeds = labels_of(model, ids, at, config), model.get_input_embeddings()(ids).detach()
        for name, controller in controllers.items():
            loss = loss_of_labels(controller, embeds, labels, at, args.pos_weight)
            loss.backward()
            found[name].append(loss.item())
        return float(np.mean([losses[-1] for losses in found.values()]))

    descend(step, optimizer, schedule, args.steps, 1.0, rng, getattr(args, "kept", None), found)
    return found


def descend(
    loss_of_step: Callable[[], float],
    optimizer,
    schedule,
    steps: int,
    clip: float,
    rng: np.random.Generator | None = None,
    kept: Path | None = None,
    lists: dict[str, list[float]] | None = None,
) -> list[float]:
    """`steps` updates; `loss_of_step` returns the loss of a fresh batch and leaves its gradients, whose norm is cut to
    `clip` in each group of parameters. Prints ten means on the way; returns the loss of each step.

    Args:
        kept: a file in which every tenth of the steps is kept, with `rng` and what `loss_of_step` adds to `lists`: the
            same call goes on from there. It is removed at the end.
    """
    losses: list[float] = []
    often, done = max(steps // 10, 1), 0
    resuming = kept and Resuming(kept, optimizer, schedule, rng, {"": losses} | (lists or {}))
    if resuming:
        done = resuming.step()
    for step in range(done + 1, steps + 1):
        losses.append(loss_of_step())
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % often == 0:
            print(f"  step {step:5d}  loss {np.mean(losses[-often:]):.4f}", flush=True)
            if resuming:
                resuming.keep(step)
    if resuming:
        resuming.done()
    return losses
