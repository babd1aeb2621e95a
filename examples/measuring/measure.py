"""Measurements of a causal language model: bits per byte, tokens per second, bytes of cache."""

import math
import time
from collections.abc import Iterable

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from scrubjay.modeling.inputs.cache_argument import CACHE, named


@torch.no_grad()
def stream_bits(
    model: PreTrainedModel,
    stream: np.ndarray,
    length: int,
    batch_size: int = 16,
    *,
    bfloat16: bool = False,
    every: int = 1,
) -> float:
    """Bits of the T tokens after the first of a stream (T + 1,), each scored once.

    Windows of `length` overlap by a quarter, which only gives context: every token but the first few has at least
    length / 4 tokens before it, and none sees what comes after it.

    Args:
        bfloat16: run the model in autocast.
        every: score only one window in so many, spread evenly, and scale to T tokens: an estimate, exact at 1.
    """
    was_training = model.training
    model.eval()
    inputs, labels = (part[::every] for part in windows(stream, length, length // 4))
    nats = 0.0
    for start in range(0, len(inputs), batch_size):
        x = torch.from_numpy(inputs[start : start + batch_size]).to(model.device)
        y = torch.from_numpy(labels[start : start + batch_size]).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(input_ids=x, use_cache=False).logits.float()
        nats += cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum").item()
    model.train(was_training)
    return nats / math.log(2) * (len(stream) - 1) / int((labels != -100).sum())


def windows(stream: np.ndarray, length: int, overlap: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels (W, length) that cover a stream; labels are -100 where a token is context or padding."""
    total, step = len(stream) - 1, length - overlap
    starts = range(0, max(1, total - overlap), step)
    inputs = np.full((len(starts), length), stream[0])
    labels = np.full((len(starts), length), -100)
    for row, start in enumerate(starts):
        size = min(length, total - start)
        fresh = overlap if row else 0
        inputs[row, :size] = stream[start : start + size]
        labels[row, fresh:size] = stream[start + fresh + 1 : start + size + 1]
    return inputs, labels


def cache_nbytes(cache) -> int:
    """Bytes a cache holds: what it says, or the keys and values of every layer of a plain transformers cache."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def full_cache_nbytes(model: PreTrainedModel, num_tokens: int) -> int:
    """Bytes of the keys and values of an attention model of the same depth, width and dtype."""
    config = model.config
    return 2 * config.num_hidden_layers * config.hidden_size * num_tokens * model.dtype.itemsize


@torch.no_grad()
def cache_growth(model: PreTrainedModel, stream: np.ndarray, contexts: Iterable[int], chunk: int = 1000) -> dict:
    """Feed the stream (repeated where it is shorter) in chunks and weigh the cache at each context length.

    A model whose cache keeps every token is fed the first context only: its cache is that of `full_cache_nbytes`,
    and its time is quadratic. Returns {"nbytes": {tokens: bytes}, "prefill_tokens_per_second": ...}.
    """
    contexts = sorted(contexts)
    ids = torch.from_numpy(np.resize(stream, contexts[-1])).to(model.device)[None]
    cache, nbytes, done = None, {}, 0
    model(input_ids=ids[:, :chunk], use_cache=True, logits_to_keep=1)  # kernels are compiled before the clock starts
    _synchronize(model)
    start = time.perf_counter()
    for context in contexts:
        while done < context:
            end = min(done + chunk, context)
            cache = model(input_ids=ids[:, done:end], use_cache=True, logits_to_keep=1, **named(cache))[CACHE]
            done = end
        nbytes[context] = cache_nbytes(cache)
        if not hasattr(cache, "nbytes"):
            break
    _synchronize(model)
    return {"nbytes": nbytes, "prefill_tokens_per_second": done / (time.perf_counter() - start)}


@torch.no_grad()
def decode_rate(model: PreTrainedModel, stream: np.ndarray, context: int, num_tokens: int) -> float:
    """Greedy tokens per second, batch 1, one token a step, after `context` tokens."""
    ids = torch.from_numpy(np.resize(stream, context)).to(model.device)[None]
    cache, start = None, 0.0
    for step in range(num_tokens + 1):
        if step == 1:  # the first pass is the prompt
            _synchronize(model)
            start = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **named(cache))
        cache, ids = out[CACHE], out.logits[:, -1:].argmax(-1)
    _synchronize(model)
    return num_tokens / (time.perf_counter() - start)


def _synchronize(model: PreTrainedModel) -> None:
    """Wait for the device, so that the clock measures work and not its queueing."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
