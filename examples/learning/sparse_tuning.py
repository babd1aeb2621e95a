"""Tuning of a decoder that attends few tokens: LoRA, the mask of each batch, the loss under it, and the loop.

`args` has length, batch_size, steps, seed, lr, eval_texts, and of LoRA rank, alpha and dropout; where it has `kept`, a
file, the training goes on from there.
"""

from argparse import Namespace
from contextlib import nullcontext

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, get_constant_schedule_with_warmup

from scrubjay import AdoreConfig
from scrubjay.examples.learning.adore_training import descend, windows
from scrubjay.examples.learning.attention_capture import PER_HEAD, Request, answering, attention_rows
from scrubjay.examples.learning.importance import top, tuning_mask


def adapted(model: PreTrainedModel, args: Namespace) -> PeftModel:
    """LoRA on every linear layer but the head."""
    settings = LoraConfig(
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)


def mask_for(model, ids: torch.Tensor, config: AdoreConfig) -> torch.Tensor:
    """(B, T, T) bool that all heads and layers share: top K of full attention by the model as it is, self, newest."""
    at, was_training = torch.arange(ids.shape[1], device=ids.device), model.training
    model.eval()  # no dropout in what labels are made from
    a = attention_rows(model, ids, at, config.num_labelled, (config.label_agg,), config.label_layers)[config.label_agg]
    model.train(was_training)
    return tuning_mask(top(a, at, config.num_labelled), at, config.recent)


def base_of(model) -> PreTrainedModel:
    """The decoder with its adapters in it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def scope(model, config: AdoreConfig):
    """In it, heads attend their own top K where config.mask_scope is "per_head"."""
    if config.mask_scope == "uniform":
        return nullcontext()
    return answering(base_of(model), PER_HEAD, Request(None, config.num_labelled, recent=config.recent))


def sparse_loss(model, ids: torch.Tensor, config: AdoreConfig) -> torch.Tensor:
    """The language-model loss when each query sees its top K only. Queries with no more than K tokens see them all."""
    mask = mask_for(base_of(model), ids, config)[:, None] if config.mask_scope == "uniform" else None
    with scope(model, config):
        return model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss


def backward(model, ids: torch.Tensor, config: AdoreConfig, full: bool = False) -> float:
    """Add the gradients of `sparse_loss`, or of the loss with full attention; returns it."""
    if full:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.item()
    with scope(model, config):  # gradient checkpointing runs the layers again in the backward pass
        loss = sparse_loss(model, ids, config)
        loss.backward()
    return loss.item()


@torch.no_grad()
def heldout_losses(model, stream, config, args) -> dict[str, float]:
    """Mean loss in nats of held-out texts, under the mask and with full attention."""
    model.eval()
    rng, sums = np.random.default_rng([args.seed, 1]), {"sparse": 0.0, "full": 0.0}
    for _ in range(args.eval_texts):
        ids = windows(stream, args.length, 1, rng, model.device)
        sums["sparse"] += sparse_loss(model, ids, config).item() / args.eval_texts
        sums["full"] += model(input_ids=ids, labels=ids, use_cache=False).loss.item() / args.eval_texts
    return sums


def tune(model: PeftModel, stream: np.ndarray, config: AdoreConfig, args: Namespace, full=False) -> list[float]:
    """AdamW on the adapters at a constant rate, `full`: with full attention. Returns the loss of each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr)
    schedule = get_constant_schedule_with_warmup(optimizer, max(args.steps // 30, 1))
    rng = np.random.default_rng(args.seed)

    def step() -> float:
        model.train()
        return backward(model, windows(stream, args.length, args.batch_size, rng, model.device), config, full)

    return descend(step, optimizer, schedule, args.steps, 0.3, rng, getattr(args, "kept", None))
