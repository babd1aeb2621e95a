"""The cache of Recycled Attention (RefreshKV, arXiv:2411.05787) and of the policies that it is compared with.

It makes a layer for each of the decoder's (of `recycled_layer.py`, `choosing_layer.py`, `evicting_layer.py`) and takes
part in its calls.

B batch, H query heads, G key heads, P head size, T new columns, n columns held, K budget.
"""

import os
from dataclasses import fields
from statistics import fmean

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from scrubjay.configuration.configuration_recycled import HOLDING, RecycledConfig
from scrubjay.configuration.configuration_wrapped import WrappedConfig
from scrubjay.modeling.caches.calibration import Calibrated, share_of
from scrubjay.modeling.caches.choosing_layer import LowRankLayer, QuestLayer
from scrubjay.modeling.caches.evicting_layer import EvictingLayer
from scrubjay.modeling.caches.held_layer import HELD
from scrubjay.modeling.caches.holding_layer import HoldingLayer
from scrubjay.modeling.caches.kept_keys import TAIL, Call, Kept, row_bytes
from scrubjay.modeling.caches.recycled_layer import RecycledLayer
from scrubjay.modeling.caches.saved_tensors import read_tensors, write_tensors
from scrubjay.modeling.decoder.attached import AttachedCache, decoder_of
from scrubjay.modeling.decoder.attention_recycled import NAMES, stand_back, stand_in
from scrubjay.modeling.decoder.decoder_call import (
    check_layers,
    check_rows,
    device_of,
    mesh_of,
    one_text,
    remembered,
    shape_of,
    tokens_of,
)
from scrubjay.modeling.inputs.cache_argument import named

LAYERS = {"recycled": RecycledLayer, "full": HoldingLayer, "lowrank": LowRankLayer, "quest": QuestLayer}
BEST_FIRST = {
    "lowrank": ("rank", (64, 32, 16, 8)),
    "quest": ("page", (4, 8, 16, 32)),
    "fixed": ("stride", (2, 3, 5, 10, 20, 50)),
    "dynamic": ("threshold", (0.99, 0.95, 0.9, 0.85, 0.8, 0.7)),
}  # what `calibrate` searches beside the budget
SETTINGS = sorted({field.name for field in fields(RecycledConfig)} - {field.name for field in fields(WrappedConfig)})


class RecycledCache(Calibrated, AttachedCache):
    """Keys and values of an unmodified decoder, of which most steps read `budget` a layer and key head.

        with RecycledCache(model, budget=2048, stride=10) as cache:
            model.generate(**inputs, cache=cache)  # before transformers 5.24: past_key_values=cache

    Args:
        model: Llama, Qwen2, Qwen3 or Mistral of transformers (with attention "sdpa" or "eager"), or a
            `RecycledForCausalLM`, whose settings are then the defaults.
        settings: fields of `RecycledConfig`.

    All keys may lie on the host, or in few bits (`hold`, `hold_bits`): then no call after the first has a gradient.

    Steps that choose among the keys, or attend those chosen, have no gradient. A cache holds one text a row: a call of
    packed documents is refused. Padding is remembered: a mask may be (B, T), of the new columns, or (B, seen + T), of
    which those before say nothing new; what was padding stays padding. Positions are the caller's (position_ids): where
    they were those of tokens and in a later call count padding too, as those of generate() do when it is given no mask,
    they are counted anew.

    With attention "eager" and output_attentions, a layer that attends a few keys itself has None in the place of its
    probabilities.

    Raises:
        ValueError: a model, or a setting, that it was not built for.
    """

    row_bytes = staticmethod(row_bytes)
    size, searched = "budget", ("budget", *(name for name, _ in BEST_FIRST.values()))
    prepare, restore = staticmethod(stand_in), staticmethod(stand_back)

    def __init__(self, model: nn.Module, **settings):
        decoder, config = decoder_of(model), getattr(model, "config", None)
        if unknown := sorted(set(settings) - set(SETTINGS)):
            raise ValueError(f"RecycledCache has no setting {unknown}; it has {SETTINGS}.")
        if _is_recycled(config):
            settings = {name: getattr(config, name) for name in SETTINGS} | {"train_tail": 0} | settings
        try:
            config = RecycledConfig(base_config=decoder.config, **settings)
        except StrictDataclassError as error:  # is no ValueError, which a caller expects
            raise ValueError(str(error.__cause__ or error)) from error
        self._build(config)
        self.attach(model)

    def _build(self, settings):
        self.settings, self.call = settings, Call()
        layers = HELD if settings.hold == "host" or settings.hold_bits else LAYERS
        kinds = [layers.get(settings.policy, EvictingLayer)] * settings.num_hidden_layers
        if settings.policy == "lowrank" and settings.choosing_layers is not None:
            kinds = [kind if i in settings.choosing_layers else layers["recycled"] for i, kind in enumerate(kinds)]
        super().__init__(layers=[kind(settings, i, self.call) for i, kind in enumerate(kinds)])

    def attach(self, model):
        """Take part in the calls of `model` that are given this cache: the model that it was made for, or its equal.

        Raises:
            ValueError: a model of other sizes.
        """
        config = decoder_of(model).config
        if _sizes(config) != _sizes(self.settings.base_config):
            raise ValueError(
                f"This cache was made for {_sizes(self.settings.base_config)}; the model has {_sizes(config)}. Make "
                "one with RecycledCache(model, ...)."
            )
        super().attach(model)

    def enter(self, decoder, kwargs):
        """Note padding and positions."""
        check_layers(decoder, self)
        stock = decoder.config._attn_implementation
        if stock not in NAMES:
            raise ValueError(
                f"RecycledCache needs the attention implementation {' or '.join(map(repr, NAMES))}, which it can "
                f"stand in for; the model has {stock!r}. Call model.set_attn_implementation('sdpa')."
            )
        self.call.probabilities = stock == "eager"
        (batch, columns), seen = shape_of(decoder, kwargs), self.get_seq_length()
        x = tokens_of(kwargs)
        self._check(batch, seen)
        kwargs = self._padded(one_text(kwargs, self, seen), seen)
        self.call.real, self.call.answered = kwargs["attention_mask"], set()
        real = self.call.real
        at = torch.arange(columns, device=x.device)
        self.call.source = None
        if real is not None and not bool(real[:, seen:].all()):
            self.call.source = torch.where(real[:, seen:], at, -1).cummax(1).values[:, -TAIL:]
        if self.settings.schedule == "dynamic" and self.settings.qsim_space == "pre":
            positions = kwargs.get("position_ids")
            positions = (seen + at)[None] if positions is None else positions
            if self.call.source is not None:
                positions = positions.expand(batch, -1).gather(1, self.call.source.clamp(min=0))
            self.call.rotary = decoder.rotary_emb(torch.empty(0, device=x.device), positions[:, -TAIL:])
        stand_in(decoder)  # its layers may be others than they were
        self.call.table, self.call.mesh = decoder.rotary_emb, mesh_of(decoder)
        if seen and isinstance(self.layers[0], EvictingLayer):
            kwargs = kwargs | {"attention_mask": None}  # columns and slots no longer agree; the layers make their own
        return kwargs

    def leave(self, decoder, output):
        """Let go of the decoder's parts, and give the layers that attended by themselves a place in `attentions`."""
        self.call.table = self.call.mesh = None
        layers, answered = range(len(self.layers)), self.call.answered
        if output is None or not answered or decoder.config._attn_implementation != "eager":
            return None
        known = output[-1] if isinstance(output, tuple) else output.get("attentions")
        if not isinstance(known, tuple) or len(known) != len(layers) - len(answered):
            return None
        known = iter(known)
        attentions = tuple(None if i in answered else next(known) for i in layers)
        if isinstance(output, tuple):
            return (*output[:-1], attentions)
        return type(output)(**dict(output) | {"attentions": attentions})

    def real(self):
        """(B, seen) bool, which columns given so far are tokens; None: all."""
        return None if self.call.real is None else self.call.real[:, : self.get_seq_length()]

    def _check(self, batch, seen):
        layer = self.layers[0]
        if any(other.seen != seen for other in self.layers):
            raise ValueError("An earlier call failed between two layers; call cache.reset() and start again.")
        if layer.is_initialized and seen:
            check_rows(self, len(next(iter(layer.tensors().values()))), batch)

    def fork(self, **settings) -> "RecycledCache":
        """A cache with other settings that has read the same text: one prompt serves many policies. This one stays.

        Args:
            settings: fields of `RecycledConfig`; those not named are this cache's.

        Raises:
            ValueError: this cache has forgotten keys, or the new policy needs what it has not remembered: "h2o" the
                queries of the whole text, the dynamic schedule those that were compared.
        """
        if self.settings.policy not in HOLDING:
            raise ValueError(f"policy={self.settings.policy!r} has forgotten keys; fork a cache with one of {HOLDING}.")
        new = type(self)(self._model(), **self._own() | settings)
        try:
            if self.get_seq_length():
                new.call.real, new.call.counted = self.real(), self.call.counted
                for layer, other in zip(new.layers, self.layers, strict=True):
                    layer.take(other)
        except ValueError:
            new.close()
            raise
        return new

    def best_first(self):
        """See `Calibrated`."""
        settings = self.settings
        if settings.policy == "full":
            raise ValueError("policy='full' reads all keys: there is nothing to calibrate. Choose another policy.")
        return BEST_FIRST.get(settings.schedule if settings.policy == "recycled" else settings.policy, (None, (None,)))

    def refuses(self, settings):
        """See `Calibrated`."""
        try:
            RecycledConfig(base_config=self.settings.base_config, **self._own() | settings)
        except (ValueError, StrictDataclassError) as error:
            return error
        return None

    def read(self, prompt):
        """See `Calibrated`."""
        plain = {"policy": "recycled", "schedule": "dynamic", "qsim_space": self.settings.qsim_space}
        plain |= {
            "hold": "device",
            "hold_bits": None,
            "rope_mode": "absolute",
        }  # whatever the model's configuration says
        cache = type(self)(self._model(), **plain)
        self._model()(prompt, **named(cache), logits_to_keep=1)
        return cache

    def begun(self, settings, read, prompt):
        """See `Calibrated`."""
        settings = self._own() | settings
        if settings["policy"] != "h2o" and settings["rope_mode"] == "absolute" and self.settings.recent <= TAIL:
            return read.fork(**settings)
        cache = type(self)(self._model(), **settings)
        self._model()(prompt, **named(cache), logits_to_keep=1)
        return cache

    def looked(self, prompt, rest, read):
        """See `Calibrated`."""
        with read.fork(policy="full") as full:
            logits = self._model()(rest, **named(full)).logits
        return logits, full.look

    def look(self, layer, columns):
        """(B, G, columns): see `Calibrated.looked`; one of the last 64 columns, under a policy that holds all keys."""
        held = self.layers[layer]
        return share_of(held.query_of(columns), held.full_keys[:, :, :columns], held.scaling)

    def attended(self):
        """See `Calibrated`."""
        return [layer.attended() for layer in self.layers]

    def reads(self, columns):
        """See `Calibrated`."""
        return fmean(self._read_by(layer, columns) for layer in self.layers)

    def _read_by(self, layer, columns):
        """Keys that a layer reads at a step."""
        full = isinstance(layer, HoldingLayer) and layer.layer_idx in self.settings.full_layers
        return columns if full or columns <= self.settings.budget else min(columns, layer.reads(columns))

    @property
    def stride_found(self) -> float | None:
        """Decode steps from one at which a layer attends all keys, itself choosing, to the next, mean of the layers
        that did; None: none did."""
        own = [layer for layer in self.layers if isinstance(layer, RecycledLayer)]
        own = [layer for layer in own if layer.layer_idx not in self.settings.full_layers]
        if own and self.settings.schedule == "fixed":
            return float(self.settings.stride)
        steps = [(x.full_steps + x.partial_steps) / x.full_steps for x in own if x.full_steps]
        return fmean(steps) if steps else None

    def adopt(self, settings):
        """See `Calibrated`."""
        self._build(RecycledConfig(base_config=self.settings.base_config, **self._own() | settings))
        if _is_recycled(config := getattr(self._model(), "config", None)):
            own = self._own()
            if config.train_tail and own["policy"] == "recycled":  # which other policies have no use for
                own.pop("train_tail")
            for name, value in own.items():
                setattr(config, name, value)

    def _own(self):
        return {name: getattr(self.settings, name) for name in SETTINGS}

    def _padded(self, kwargs, seen):
        """A call's arguments with the mask of all columns so far, (B, n + T) bool, None without padding."""
        before = self.real() if seen else None
        real = remembered(before, kwargs.get("attention_mask"), tokens_of(kwargs).shape[:2], seen)
        if real is None or (before is None and bool(real.all())):
            return kwargs | {"attention_mask": None}
        positions = self._positions(kwargs.get("position_ids"), real, seen)
        return kwargs | {"attention_mask": real, "position_ids": positions}

    def _positions(self, positions, real, seen):
        """(B, T) for columns that are tokens where `real` (B, n + T) is."""
        if positions is None:  # a decoder counts columns
            self.call.counted = False
            return None
        counted = (real.long().cumsum(1) - 1).clamp(min=0)[:, seen:].to(positions.device)
        same = bool(((positions == counted) | ~real[:, seen:].to(positions.device)).all())
        columns = torch.arange(seen, real.shape[1], device=positions.device)
        if self.call.counted and not same and bool((positions == columns).all()):
            return counted
        self.call.counted = same
        return positions

    def _map(self, change):
        super()._map(change)
        if self.call.real is not None:
            self.call.real = change(self.call.real)

    def reset(self) -> None:
        """Forget every token; the settings stay."""
        super().reset()
        self.call.real, self.call.counted, self.call.spare = None, False, {}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, memory not yet in use included."""
        return sum(self.nbytes_by_place.values())

    @property
    def nbytes_by_place(self) -> dict[str, int]:
        """`nbytes` of "device", where the model is, and of "host", where hold="host" puts keys and values."""
        own = [*self.call.spare.values(), *([] if self.call.real is None else [self.call.real])]
        places = {"device": sum(tensor.nbytes for tensor in own), "host": 0}
        for layer in self.layers:
            for name, tensor in layer.tensors().items():
                places["host" if name.startswith("held.host.") else "device"] += tensor.nbytes
        return places

    @property
    def full_steps(self) -> list[int]:
        """Decode steps at which each layer attended all keys, itself choosing; of `partial_steps` others."""
        return [getattr(layer, "full_steps", 0) for layer in self.layers]

    def save(self, path: str | os.PathLike) -> None:
        """Write the cache to one safetensors file, all of it or nothing. It can be loaded again and again."""
        if not self.get_seq_length():
            raise ValueError("This cache is empty: run the model on a prompt before saving it.")
        tensors = {f"{i}.{name}": t for i, layer in enumerate(self.layers) for name, t in layer.tensors().items()}
        if self.call.real is not None:
            tensors["real"] = self.call.real
        counters = [{name: getattr(layer, name) for name in layer.counters} for layer in self.layers]
        filled = [None if layer.kept is None else layer.kept.filled for layer in self.layers]
        about = {
            "settings": self._own(),
            "sizes": _sizes(self.settings.base_config),
            "counters": counters,
            "filled": filled,
            "counted": self.call.counted,
        }
        write_tensors(path, tensors, type(self), about)

    @classmethod
    def load(cls, path: str | os.PathLike, model: nn.Module, device: str | torch.device | None = None):
        """Read what `save` wrote, for a model of the same sizes.

        Raises:
            ValueError: a file of another kind of cache, or of a model of other sizes.
        """
        device = device_of(decoder_of(model)) if device is None else device
        tensors, about = read_tensors(path, cls, device)
        cache = cls(model, **about["settings"])
        if about["sizes"] != (sizes := _sizes(cache.settings.base_config)):
            cache.close()
            raise ValueError(f"{path} was written for {about['sizes']}; the model has {sizes}.")
        cache.call.real, cache.call.counted = tensors.pop("real", None), about.get("counted", False)
        for layer, counters, filled in zip(cache.layers, about["counters"], about["filled"], strict=True):
            layer.is_initialized = True
            for name, value in counters.items():
                setattr(layer, name, value)
            if filled is not None:
                layer.kept = Kept.__new__(Kept)
                layer.kept.filled, layer.kept.real = filled, None
        for name, tensor in tensors.items():
            index, _, name = name.partition(".")
            # a copy lies at an address that products take as they took the original's: the same bits
            cache.layers[int(index)].set(name, tensor.clone())
        return cache


def _is_recycled(config):
    """Whether it has our settings. Not by its class: of a folder's own code transformers makes one copy for the
    configuration and another for the model."""
    return getattr(config, "model_type", None) == RecycledConfig.model_type


def _sizes(config):
    """What a model must share with the one that a saved cache was made for."""
    names = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
    return [getattr(config, name, None) for name in names]
