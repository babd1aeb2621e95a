"""The cache of Recycled Attention (RefreshKV, arXiv:2411.05787): all keys are held, most steps read a few of them.

B batch, H query heads, G key heads, P head size, T new columns, n columns held, K budget.
"""

import copy
import os
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import nn

from scrubjay.configuration.configuration_recycled import RecycledConfig
from scrubjay.configuration.configuration_wrapped import WrappedConfig
from scrubjay.kernels.recycle import decode, decode_with_scores, top
from scrubjay.modeling.attention_recycled import NAMES
from scrubjay.modeling.cache import read_tensors, write_tensors
from scrubjay.modeling.evicting import EvictingLayer
from scrubjay.modeling.kept_keys import Call, KeepingLayer, Kept
from scrubjay.modeling.wrapped import AttachedCache, decoder_of

GROWTH = 1.25  # of the full buffer when it is full
TAIL = 64  # queries remembered, and so columns that `crop` may take back
SETTINGS = sorted({field.name for field in fields(RecycledConfig)} - {field.name for field in fields(WrappedConfig)})


class RecycledLayer(KeepingLayer):
    """All keys and values in one buffer, and the K that partial steps attend.

    full_keys, full_values: (B, G, capacity, P), `seen` columns in use. tail: (B, H, 64, P), the query of column c at
    c mod 64. waiting: (B, G, n) scores of the last full step, from which `kept` is chosen when a partial step needs it.
    reference: (B, P), mean query of the last full step.
    """

    names = ("full_keys", "full_values", "tail", "waiting", "reference")
    counters = ("seen", "since", "oldest", "full_steps", "partial_steps")
    is_croppable = True

    def clear(self) -> None:
        super().clear()
        self.since = self.oldest = self.full_steps = self.partial_steps = 0
        self.exact_when_short = True  # attend the buffer itself while it holds no more than K

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask for `query_length` new columns."""
        return self.seen + query_length, 0

    def extend(self, k, v):
        """Append to the buffer; returns views of all columns."""
        used = self.seen - k.shape[2]
        if torch.is_grad_enabled() and k.requires_grad:  # a graph may need what is there: no writing in place
            old = (x[:, :, :used] for x in (self.full_keys, self.full_values)) if used else (k[:, :, :0], v[:, :, :0])
            self.full_keys, self.full_values = (torch.cat(pair, 2) for pair in zip(old, (k, v), strict=True))
            return self.full_keys.view_as(self.full_keys), self.full_values
        self.full_keys, self.full_values = (
            _appended(buffer, new, used) for buffer, new in ((self.full_keys, k), (self.full_values, v))
        )
        return self.full_keys[:, :, : self.seen], self.full_values[:, :, : self.seen]

    def attend(self, query, key, value, scaling):
        """(B, T, H, P), or None to attend all keys as the model always does."""
        first = self.tail is None
        self.note(query)
        short = self.exact_when_short and self.seen <= self.settings.budget
        if first or short or query.shape[2] > 1:
            self.renew(query[:, :, -1])
            return None
        q = query[:, :, 0]
        if self.settings.policy == "full" or self.layer_idx in self.settings.full_layers:
            return decode(q, key, value, scaling, self.real_until(self.seen))[:, None]
        step = self.full_step if self.wants_all(q) else self.partial_step
        with torch.no_grad():
            return step(q, key, value, scaling)[:, None]

    def note(self, query):
        """Remember the last queries, from which a later choice may have to be made."""
        last = query[:, :, -TAIL:].detach()
        if self.tail is None:
            self.tail, self.oldest = last.new_zeros(*last.shape[:2], TAIL, last.shape[3]), self.seen - last.shape[2]
        columns = torch.arange(self.seen - last.shape[2], self.seen, device=last.device)
        self.tail[:, :, columns % TAIL] = last
        self.oldest = max(self.oldest, self.seen - TAIL)

    def renew(self, q):
        """All keys were attended: what was kept is stale."""
        self.kept = self.waiting = None
        self.since = 0
        self.reference = self.mean_query(q) if self.settings.schedule == "dynamic" else None

    def wants_all(self, q):
        """Whether this decode step is a full one."""
        self.since += 1
        if self.settings.schedule == "fixed":
            return self.since % self.settings.stride == 0
        if self.since % self.settings.qc:
            return False
        now = self.mean_query(q)
        apart = torch.cosine_similarity(now, self.reference, dim=-1) <= self.settings.threshold
        return bool(apart.any() if self.settings.qsim_batch == "any" else apart.all())

    def mean_query(self, q):
        """(B, H, P) -> (B, P); where `qsim_space` is "pre", turned back to position 0, alike for all heads."""
        mean = q.mean(1).float()
        if self.settings.qsim_space == "post":
            return mean
        cos, sin = (x[:, -1].float() for x in self.call.rotary)
        a, b = mean.chunk(2, -1)
        return mean * cos + torch.cat([b, -a], -1) * sin

    def full_step(self, q, k, v, scaling):
        """Attend all keys and remember how; the K best are gathered when a partial step comes."""
        self.full_steps += 1
        real = self.real_until(self.seen)
        out, logp = decode_with_scores(q, k, v, scaling, real)
        self.kept, self.waiting = None, self.pool(logp, k.shape[1], real)
        if self.settings.schedule == "dynamic":
            self.reference = self.mean_query(q)
        if not self.settings.full_output:
            self.choose(k, v, scaling)
            keys, values, real = self.kept.held()
            out = decode(q, keys, values, scaling, real)
        return out

    def partial_step(self, q, k, v, scaling):
        """Attend what is kept, the new token among it."""
        self.partial_steps += 1
        if self.kept is None:
            self.choose(k[:, :, :-1], v[:, :, :-1], scaling)
        self.put_newest(k[:, :, -1:], v[:, :, -1:])
        keys, values, real = self.kept.held()
        return decode(q, keys, values, scaling, real)

    def choose(self, k, v, scaling):
        """Keep the K best of the keys (B, G, n, P), as the query of the last of these columns attended them."""
        settings, columns = self.settings, k.shape[2]
        real, scores = self.real_until(columns), self.waiting
        if scores is None:
            scores = self.scored(self.tail[:, :, (columns - 1) % TAIL], k, scaling, real)
        index = top(scores, settings.budget, settings.keep_recent, settings.sinks, real)
        self.kept = Kept(k, v, index, self.capacity, real, self.pinned(columns, k))
        self.waiting = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns (a negative count, as transformers passes it)."""
        columns = self.seen - abs(tokens_to_remove)
        if columns == self.seen:
            return
        if columns <= self.oldest:
            raise ValueError(
                f"The queries of the last {self.seen - self.oldest} columns are remembered, and a crop needs one that "
                f"stays; got {tokens_to_remove}. Keep a copy (copy.deepcopy(cache)) to go further back."
            )
        self.seen, self.since = columns, 0
        self.kept = self.waiting = None


def _appended(buffer, new, used):
    """The buffer with new columns written behind `used` ones, in larger memory if they do not fit."""
    (B, G, _, P), needed = new.shape, used + new.shape[2]
    if buffer is None or buffer.shape[2] < needed:
        larger = new.new_empty(B, G, max(256, needed + int(needed * (GROWTH - 1)) if used else needed + 256), P)
        if used:
            larger[:, :, :used] = buffer[:, :, :used]
        buffer = larger
    buffer[:, :, used:needed] = new
    return buffer


class RecycledCache(AttachedCache):
    """Keys and values of an unmodified decoder, of which most steps read `budget` a layer and key head.

        with RecycledCache(model, budget=2048, stride=10) as cache:
            model.generate(**inputs, past_key_values=cache)

    Args:
        model: Llama, Qwen2, Qwen3 or Mistral of transformers (with attention "sdpa" or "eager"), or a
            `RecycledForCausalLM`, whose settings are then the defaults.
        settings: fields of `RecycledConfig`.

    Raises:
        ValueError: a model, or a setting, that it was not built for.
    """

    def __init__(self, model: nn.Module, **settings):
        decoder, config = decoder_of(model), getattr(model, "config", None)
        if unknown := sorted(set(settings) - set(SETTINGS)):
            raise ValueError(f"RecycledCache has no setting {unknown}; it has {SETTINGS}.")
        if isinstance(config, RecycledConfig):
            settings = {name: getattr(config, name) for name in SETTINGS} | settings
        self._build(RecycledConfig(base_config=copy.deepcopy(decoder.config), **settings))
        self.attach(model)

    def _build(self, settings):
        kind = RecycledLayer if settings.policy in ("recycled", "full") else EvictingLayer
        self.settings, self.call = settings, Call()
        super().__init__(layers=[kind(settings, i, self.call) for i in range(settings.num_hidden_layers)])

    def enter(self, decoder, kwargs):
        """Note padding and positions, and make the decoder run `recycled_attention` for this call."""
        stock = decoder.config._attn_implementation
        stock = next((name for name, ours in NAMES.items() if ours == stock), stock)
        if stock not in NAMES:
            raise ValueError(
                f"RecycledCache needs the attention implementation {' or '.join(map(repr, NAMES))}, which it can "
                f"stand in for; the model has {stock!r}. Call model.set_attn_implementation('sdpa')."
            )
        given = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        (batch, columns), seen = given.shape[:2], self.get_seq_length()
        self._check(batch, seen, columns, kwargs.get("attention_mask"))
        self.call.real = self._real(kwargs.get("attention_mask"), batch, seen, columns, given.device)
        if self.settings.schedule == "dynamic" and self.settings.qsim_space == "pre":
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = torch.arange(seen, seen + columns, device=given.device)[None]
            self.call.rotary = decoder.rotary_emb(torch.empty(0, device=given.device), positions[:, -1:])
        self._stock, self.call.active = stock, True
        decoder.config._attn_implementation_internal = NAMES[stock]
        if seen and isinstance(self.layers[0], EvictingLayer):
            kwargs = kwargs | {"attention_mask": None}  # columns and slots no longer agree; the layers make their own
        return kwargs

    def leave(self, decoder, output):
        """The decoder is as it was."""
        if self.call.active:
            decoder.config._attn_implementation_internal, self.call.active = self._stock, False

    def _check(self, batch, seen, columns, mask):
        layer = self.layers[0]
        if any(other.seen != seen for other in self.layers):
            raise ValueError("An earlier call failed between two layers; call cache.reset() and start again.")
        if layer.is_initialized and seen and (held := len(next(iter(layer.tensors().values())))) != batch:
            raise ValueError(
                f"This cache holds {held} rows, the input has {batch}. Use a new RecycledCache(model), or "
                "cache.batch_repeat_interleave / cache.batch_select_indices to change its rows."
            )
        if mask is not None and (mask.ndim != 2 or tuple(mask.shape) != (batch, seen + columns)):
            raise ValueError(
                f"attention_mask must have shape {(batch, seen + columns)}, 1 for tokens and 0 for padding, with the "
                f"{seen} columns in the cache; got {tuple(mask.shape)}."
            )

    def _real(self, mask, batch, seen, columns, device):
        """(B, n + T) bool, None without padding."""
        if mask is not None:
            return None if bool(mask.all()) else mask.bool()
        if self.call.real is None or not seen:
            return None
        return F.pad(self.call.real[:, :seen], (0, columns), value=True)

    def _map_real(self, change):
        if self.call.real is not None:
            self.call.real = change(self.call.real)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        super().reorder_cache(beam_idx)
        self._map_real(lambda real: real[beam_idx.to(real.device)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        super().batch_select_indices(indices)
        self._map_real(lambda real: real[indices.to(real.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times in place."""
        super().batch_repeat_interleave(repeats)
        self._map_real(lambda real: real.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        """Forget every token; the settings stay."""
        super().reset()
        self.call.real = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, memory not yet in use included."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors().values())

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
        settings = {name: getattr(self.settings, name) for name in SETTINGS}
        about = {"settings": settings, "sizes": _sizes(self.settings), "counters": counters, "filled": filled}
        write_tensors(path, tensors, type(self), about)

    @classmethod
    def load(cls, path: str | os.PathLike, model: nn.Module, device: str | torch.device | None = None):
        """Read what `save` wrote, for a model of the same sizes.

        Raises:
            ValueError: a file of another kind of cache, or of a model of other sizes.
        """
        device = next(model.parameters()).device if device is None else device
        tensors, about = read_tensors(path, cls, device)
        cache = cls(model, **about["settings"])
        if about["sizes"] != _sizes(cache.settings):
            raise ValueError(f"{path} was written for {about['sizes']}; the model has {_sizes(cache.settings)}.")
        cache.call.real = tensors.pop("real", None)
        for layer, counters, filled in zip(cache.layers, about["counters"], about["filled"], strict=True):
            layer.is_initialized = True
            layer.__dict__.update(counters)
            if filled is not None:
                layer.kept = Kept.__new__(Kept)
                layer.kept.filled, layer.kept.real = filled, None
        for name, tensor in tensors.items():
            index, _, name = name.partition(".")
            cache.layers[int(index)].set(name, tensor)
        return cache


def _sizes(config):
    """What a model must share with the one that a saved cache was made for."""
    return [config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.hidden_size]
