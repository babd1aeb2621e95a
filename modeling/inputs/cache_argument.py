"""The one place that knows by which name a cache travels: `cache` since transformers 5.24, `past_key_values` before.

Models of the zoo take either on every version, and their outputs have both. `CACHE` is the name that the installed
transformers itself gives and takes: what is handed to it, or to a decoder of its own, goes by that one.
"""

import inspect
from dataclasses import dataclass
from functools import wraps
from operator import attrgetter

from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import ModelOutput

from scrubjay.configuration.cache_names import CACHE_NAMES

CACHE = next(
    name for name in CACHE_NAMES if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


def pop_cache(kwargs: dict):
    """Take the cache out of a call's keyword arguments, by whichever name it came; None: there is none.

    Raises:
        ValueError: two caches.
    """
    given = [kwargs.pop(name) for name in CACHE_NAMES if name in kwargs]
    given = [cache for cache in given if cache is not None]
    if len(given) > 1 and given[0] is not given[1]:
        raise ValueError(
            f"One call was given two caches, by the names {' and '.join(CACHE_NAMES)}, which mean the same. Pass one. "
            "Prefix tuning brings one of its own: with it, pass none."
        )
    return given[0] if given else None


def named(cache) -> dict:
    """{name: cache}, as the installed transformers calls it."""
    return {CACHE: cache}


def by_its_name(kwargs: dict) -> dict:
    """Keyword arguments in which the cache, if there is one, goes by the installed transformers' name."""
    if not any(name in kwargs for name in CACHE_NAMES):
        return kwargs
    kwargs = dict(kwargs)
    cache = pop_cache(kwargs)
    return kwargs | named(cache)


def takes_cache(forward):
    """Let a method that has a parameter `cache` take it by the other name as well.

    transformers reads what a model takes off its signature, which has both.
    """
    own = inspect.signature(forward)
    others = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in CACHE_NAMES
        if name not in own.parameters
    ]

    @wraps(forward)
    def call(self, *args, **kwargs):
        if any(name in kwargs for name in CACHE_NAMES[1:]):
            kwargs["cache"] = pop_cache(kwargs)
        return forward(self, *args, **kwargs)

    parameters = list(own.parameters.values())
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    call.__signature__ = own.replace(parameters=[*parameters[:at], *others, *parameters[at:]])
    return call


class WithCache:
    """Mixin of outputs: the cache that they hold by either name."""


for _name in CACHE_NAMES:
    if _name != CACHE and not hasattr(ModelOutput, _name):
        setattr(WithCache, _name, property(attrgetter(CACHE)))


@dataclass
class ZooModelOutput(WithCache, BaseModelOutputWithPast):
    """What a model of the zoo without head returns, on every version."""


@dataclass
class ZooCausalLMOutput(WithCache, CausalLMOutputWithPast):
    """What a language model of the zoo returns, on every version."""


@dataclass
class ZooClassifierOutput(WithCache, SequenceClassifierOutputWithPast):
    """What a classifier of the zoo returns, on every version."""
