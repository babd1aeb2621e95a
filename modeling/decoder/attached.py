"""Caches of the zoo that take part in the calls of an unmodified decoder of transformers.

Such a cache attaches itself by two hooks that do nothing for any other cache, and is gone from the model when it is
closed or no longer referred to. B batch.
"""

import copy
import inspect
import threading
import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from scrubjay.configuration.configuration_wrapped import BASES
from scrubjay.modeling.decoder.forks import Detached
from scrubjay.modeling.inputs.cache_argument import CACHE, by_its_name
from scrubjay.modeling.training.adapters import prefix_tuned


def decoder_of(model) -> nn.Module:
    """The stack of layers inside a causal language model, adapters and wrappers taken off.

    Raises:
        ValueError: a model that these caches were not built for, with the reason.
    """
    refuse_prefixes(model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    kind = getattr(getattr(decoder, "config", None), "model_type", type(decoder).__name__)
    if kind not in BASES:
        raise ValueError(f"This cache works with decoders of type {', '.join(BASES)}; got {kind!r}.")
    types = set(getattr(decoder.config, "layer_types", None) or ["full_attention"])
    window = getattr(decoder.config, "sliding_window", None)
    if types != {"full_attention"} or (window is not None and kind == "mistral"):
        ways = [f"layer_types=['full_attention'] * {decoder.config.num_hidden_layers}"]
        if types == {"full_attention"}:
            ways.clear()
        if kind == "mistral":
            ways.append("sliding_window=None")
        raise ValueError(
            f"This cache chooses among all tokens, and this {kind} has layers that see a window only ({sorted(types)}, "
            f"sliding_window {window}). Load it with {', '.join(ways)}, or use transformers' own cache."
        )
    return decoder


def refuse_prefixes(model) -> None:
    """Refuse a model to which peft gives keys from in front of the text: they are in a cache of peft's own.

    Raises:
        ValueError: what to do instead.
    """
    if prefix_tuned(model):
        raise ValueError(
            "Prefix tuning brings a cache of its own, transformers' DynamicCache with the keys that were trained, and "
            "takes no other beside it. Call the model without this cache; or tune a prompt, or use LoRA."
        )


class Hooks:
    """The two hooks of a decoder: they hand calls that are given an `AttachedCache` to it, and do nothing for others.

    One pair serves all caches, however many threads call the decoder at once: what belongs to a call is on its cache.
    living: the caches' kinds, by what stands for each cache; kinds that stay stand for themselves.
    """

    def __init__(self, decoder: nn.Module):
        self.names = list(inspect.signature(decoder.forward).parameters)
        self.living: dict[object, type[AttachedCache]] = {}

    @classmethod
    def of(cls, decoder: nn.Module) -> "Hooks | None":
        """Those that the decoder has."""
        hooks = (getattr(hook, "hooks", None) for hook in decoder._forward_pre_hooks.values())
        return next((hook for hook in hooks if isinstance(hook, cls)), None)

    @classmethod
    def on(cls, decoder: nn.Module) -> "Hooks":
        """Those of the decoder, which gets them now if it has none."""
        hooks = cls.of(decoder)
        if hooks is None:
            hooks = cls(decoder)
            decoder.register_forward_pre_hook(Hook(hooks, "before"), with_kwargs=True)
            decoder.register_forward_hook(Hook(hooks, "after"), with_kwargs=True, always_call=True)
        return hooks

    def off(self, decoder: nn.Module) -> None:
        """Take them off, out of the very dictionaries that torch keeps them in.

        No copies are put in their place, for handles of others' hooks know these alone and would take nothing off a
        copy. So where others' hooks remain, and another thread's call fails at this very moment, torch, which walks
        over them then, may report that they changed, with the call's own error as the context.
        """
        kinds = ("_forward_pre_hooks", "_forward_hooks")
        marks = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
        for hooks in (getattr(decoder, kind) for kind in kinds):
            for number in [number for number, hook in hooks.items() if getattr(hook, "hooks", None) is self]:
                del hooks[number]
                for mark in marks:
                    getattr(decoder, mark).pop(number, None)

    def before(self, decoder, args, kwargs=None):
        """Let the cache of this call say what the decoder is to be given.

        Without kwargs: torch is being told by another thread, just now, that the hook takes them. Then this call began
        before there was a cache that it could have been given, or ends after the last one.
        """
        kwargs = self.named(args, kwargs)
        cache = kwargs.get(CACHE)
        if isinstance(cache, AttachedCache) and cache.belongs_to(decoder):
            return (), cache.begin(decoder, kwargs)
        return None

    def after(self, decoder, args, *kwargs_and_output):
        """Let it see the output (None if the decoder failed)."""
        if len(kwargs_and_output) != 2:  # as above
            return None
        kwargs, output = kwargs_and_output
        cache = self.named(args, kwargs).get(CACHE)
        if isinstance(cache, AttachedCache) and cache.belongs_to(decoder):
            return cache.end(decoder, output)
        return None

    def named(self, args, kwargs):
        """All arguments by name."""
        kwargs = kwargs or {}
        return by_its_name(dict(zip(self.names, args, strict=False)) | kwargs if args else kwargs)

    @property
    def stays(self) -> bool:
        """Whether a copy of the decoder needs them, which has no cache."""
        return any(isinstance(kind, type) for kind in self.living)

    def __getstate__(self):
        """A copy of a decoder has hooks, and no cache."""
        return self.__dict__ | {"living": {kind: kind for kind in self.living if isinstance(kind, type)}}


class Hook:
    """One of two, as torch is given it. A copy or a pickle of a decoder has in its place what does nothing and needs no
    line of this library, unless a kind of cache stays with the decoder."""

    def __init__(self, hooks: Hooks, name: str):
        self.hooks, self.name = hooks, name

    def __call__(self, *args):
        return getattr(self.hooks, self.name)(*args)

    def __reduce__(self):
        return (Hook, (self.hooks, self.name)) if self.hooks.stays else (getattr, (nullcontext(), "__exit__"))


class AttachedCache(Cache):
    """A cache that sees a decoder's calls. Subclasses give `enter` and `leave`, and call `attach` when they are built.

    Use it as a context manager, or `close` it, or drop it. With the last cache the hooks leave the decoder, which is
    then as it was; its configuration is never touched. Any number of threads may call one model, each with a cache of
    its own, with one of transformers', or with none; one cache serves one call at a time.

    A pickle holds the state alone: what comes of it belongs to no model until it is told which, by `attach`.
    """

    _decoder: Any = None  # a weak reference
    _model: Any = None  # another, to what the decoder was found in
    _detach: Any = None  # and what ends with the cache
    _on = False  # asked in every call, which torch.compile may trace: it cannot guard on what Python finalizes
    _caller: threading.Thread | None = None  # whose call is in progress
    _ahead = False  # whether it has made calls of its own meanwhile
    _outside = ("_detach", "_decoder", "_model", "_on", "_caller", "_ahead")  # of no meaning to a copy

    def attach(self, model: nn.Module) -> None:
        """Take part in the calls of `model` that are given this cache."""
        self.close()
        decoder, kind, token = decoder_of(model), type(self), object()
        self._decoder, self._model = weakref.ref(decoder), weakref.ref(model)
        with _LOCK:
            hooks = kind._join(decoder, token)
        self._detach = weakref.finalize(self, _take_off, self._decoder, hooks, token)
        self._detach.atexit = False
        self._on = True

    @classmethod
    def stay(cls, decoder: nn.Module) -> None:
        """Give a decoder for good what caches of this kind need."""
        with _LOCK:
            cls._join(decoder, cls)

    @classmethod
    def _join(cls, decoder, token):
        while True:
            hooks = Hooks.on(decoder)
            hooks.living[token] = cls
            if Hooks.of(decoder) is hooks:  # or the collector, in between, has ended the last other cache
                cls.prepare(decoder)
                return hooks

    @staticmethod
    def prepare(decoder: nn.Module) -> None:
        """Give the decoder what caches of this kind need beside hooks: nothing that other calls could notice."""

    @staticmethod
    def restore(decoder: nn.Module) -> None:
        """Undo `prepare`, when the last cache of the kind has gone."""

    def belongs_to(self, decoder: nn.Module) -> bool:
        """Whether this is a cache for the decoder."""
        return self.attached and self._decoder() is decoder

    @torch.compiler.disable  # which thread calls is nothing that a program can hold
    def begin(self, decoder: nn.Module, kwargs: dict) -> dict:
        """`enter`, if no other call is in progress.

        Raises:
            ValueError: another thread's is; the call is one of peft's that brings keys of its own.
        """
        refuse_prefixes(self._model())
        me = threading.current_thread()
        with _LOCK:
            caller = self._caller
            if caller not in (None, me) and caller.is_alive():
                raise ValueError(
                    f"A call with this {type(self).__name__} is in progress in another thread ({caller.name}), and a "
                    "cache serves one call at a time. Give each thread a cache of its own; if that call was broken "
                    "off, reset() this one."
                )
            self._caller = me
        return self.enter(decoder, kwargs)

    @torch.compiler.disable
    def end(self, decoder: nn.Module, output):
        """`leave`, if it was this thread's call."""
        if self._caller is not threading.current_thread():
            return None
        try:
            return self.leave(decoder, output)
        finally:
            if not self._ahead:
                self._caller = None

    def enter(self, decoder: nn.Module, kwargs: dict) -> dict:
        """Called before the decoder with its keyword arguments; returns those that it is to have."""
        return kwargs

    def leave(self, decoder: nn.Module | None, output):
        """Called after the decoder (with None if it failed); returns what replaces its output, or None."""

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """As transformers calls it, within a call that `enter` has prepared."""
        if self._caller is None:
            name = type(self).__name__
            if self._decoder is None:
                raise ValueError(
                    f"This {name} comes from a pickle and belongs to no model yet. Call cache.attach(model) first."
                )
            raise ValueError(
                f"This {name} takes part in the calls of the model that it was made for, and only until it is closed. "
                f"Make one with {name}(model, ...) and pass it by name: as cache=, or past_key_values= before "
                "transformers 5.24."
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def real(self) -> torch.Tensor | None:
        """(B, seen) bool, which columns given so far are tokens; None: all."""
        return None

    def held(self, mask: torch.Tensor | None, columns: int) -> torch.Tensor | None:
        """(B,) bool, the rows of which there are tokens; None: all, or as the mask of a call of `columns` says, if it
        speaks of what was seen as well."""
        before = self.real() if self.get_seq_length() else None
        if before is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] > columns):
            return None
        return before.any(1)

    def _map(self, change):
        """Apply a change of rows to all that is held."""
        for layer in self.layers:
            layer.map(change)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        self._map(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times in place."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Forget every token, and a call that was broken off."""
        super().reset()
        self._abandon()

    def _abandon(self):
        """Forget a call in progress: after Ctrl-C torch runs no hooks."""
        if self._caller is not None:
            self._caller = None
            self.leave(None, None)

    def close(self) -> None:
        """Leave the model. The cache cannot be used afterwards, unless it is attached again."""
        if self._detach is not None:
            self._on = False
            self._detach()
            self._abandon()

    @property
    def attached(self) -> bool:
        """Whether the cache takes part in its model's calls."""
        return self._on and self._decoder() is not None

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name not in self._outside}

    def __deepcopy__(self, memo):
        """A copy takes part in the same model's calls, so that a prompt's cache can be forked. It has no gradient."""
        if self._decoder is not None and not self.attached:
            raise ValueError("A closed cache cannot be copied: its model is gone, or it was taken off it.")
        new = memo[id(self)] = type(self).__new__(type(self))
        with Detached():
            new.__dict__ |= copy.deepcopy(AttachedCache.__getstate__(self), memo)
        if self._decoder is not None:
            AttachedCache.attach(new, self._model() or self._decoder())
        return new


_LOCK = threading.RLock()  # taken again where the collector ends another cache inside


def _take_off(decoder, hooks, token) -> None:
    """What ends with a cache."""
    with _LOCK:
        kind = hooks.living.pop(token)
        decoder = decoder()
        if decoder is None:
            return
        if kind not in hooks.living.values():
            kind.restore(decoder)
        if not hooks.living:
            hooks.off(decoder)
