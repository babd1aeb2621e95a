"""Continue a prompt with a cache of few keys, and say what it cost: `scrubjay generate --cache lowrank`."""

import sys
import time
from contextlib import nullcontext

import torch
from transformers import set_seed

from scrubjay import AdoreCache, RecycledCache
from scrubjay.configuration.configuration_recycled import POLICIES
from scrubjay.examples.isolated import stream
from scrubjay.modeling.inputs.cache_argument import named

CACHES = (*POLICIES, "adore")


class Clock:
    """Asked by generate() after each token whether to stop; says no, and notes when it was asked."""

    def __init__(self):
        self.start, self.times = time.perf_counter(), []

    def __call__(self, input_ids, scores, **_):
        self.times.append(time.perf_counter() - self.start)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def said(self) -> str:
        """Seconds of the prompt with its first token, and tokens a second after it."""
        first, rate = self.times[0], ""
        if len(self.times) > 1:
            rate = f", then {(len(self.times) - 1) / (self.times[-1] - first):.1f} tokens a second"
        return f"{len(self.times)} tokens: the first after {first:.2f} s{rate}"


def make_cache(model, kind: str | None, budget: int | None = None, stride: int | None = None):
    """One of `CACHES` for a decoder of transformers; None, the model's own, where `kind` is None.

    Raises:
        ValueError: a setting that this cache does not have, or a model that it was not built for.
    """
    given = {"budget": budget, "stride": stride}
    settings = {name: value for name, value in given.items() if value is not None}
    if kind is None and settings:
        raise ValueError(f"--{next(iter(settings))} is of a cache: pass --cache too, one of {', '.join(CACHES)}.")
    if "stride" in settings and kind != "recycled":
        raise ValueError(f"--stride is of --cache recycled, which reads all keys at every such step; got {kind}.")
    if kind == "adore":
        sizes = {"cache_size": settings["budget"]} if settings else {}
        return AdoreCache(model, **sizes)
    return None if kind is None else RecycledCache(model, policy=kind, **settings)


def sampling(temperature: float, top_p: float, max_new_tokens: int) -> dict:
    """Options of `model.generate`; temperature 0 is greedy."""
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ValueError(
            f"got --temperature {temperature}, --top-p {top_p}, --max-new-tokens {max_new_tokens}; needed: temperature "
            ">= 0, 0 < top-p <= 1, max-new-tokens >= 1."
        )
    options = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
    return options | ({"temperature": temperature, "top_p": top_p} if temperature else {})


def generate(model, tokenizer, prompt: str, *, kind=None, budget=None, stride=None, chat=False, seed=0, **options):
    """Print prompt and continuation as it comes, and on stderr its time and the cache's bytes; returns both texts.

    Args:
        kind, budget, stride: see `make_cache`. chat: the prompt is what a user says to the model's chat template.
        seed: of the sampling. options: of `model.generate`.
    """
    set_seed(seed)
    if chat and not tokenizer.chat_template:
        raise ValueError("This model's tokenizer has no chat template: leave --chat out.")
    if chat:
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    cache, clock = make_cache(model, kind, budget, stride), Clock()
    with nullcontext() if cache is None else cache:
        options |= {} if cache is None else named(cache)
        text = stream(model, tokenizer, prompt, stopping_criteria=[clock], **options)
        held = "" if cache is None else f"; {kind} cache, {cache.nbytes:,} bytes"
    print(f"{clock.said()}{held}", file=sys.stderr)
    return text
