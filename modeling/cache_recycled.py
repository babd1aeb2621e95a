"""The cache of Recycled Attention (RefreshKV, arXiv:2411.05787): all keys are held, most steps read a few of them.

B batch, H query heads, G key heads, P head size, T new columns, n columns held, K budget.
"""

import os
from dataclasses import fields

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from scrubjay.configuration.configuration_recycled import RecycledConfig
from scrubjay.configuration.configuration_wrapped import WrappedConfig
from scrubjay.kernels.recycle import decode, decode_with_scores, top
from scrubjay.modeling.attention_recycled import NAMES, PREFIX
from scrubjay.modeling.cache import read_tensors, writable, write_tensors
from scrubjay.modeling.decoder_call import check_layers, check_rows, device_of, mean_over_devices, mesh_of, one_text
from scrubjay.modeling.evicting import EvictingLayer
from scrubjay.modeling.kept_keys import TAIL, Call, KeepingLayer, Kept, row_bytes
from scrubjay.modeling.wrapped import AttachedCache, decoder_of

GROWTH = 1.25  # of the full buffer when it is full
SETTINGS = sorted({field.name for field in fields(RecycledConfig)} - {field.name for field in fields(WrappedConfig)})


class RecycledLayer(KeepingLayer):
    """All keys and values in one buffer, and the K that partial steps attend.

    full_keys, full_values: (B, G, capacity, P), `seen` columns in use. tail: (B, H, 64, P), the query of column c at
    c mod 64; where c is padding, that of the token before it. waiting: (B, G, n) scores of the last full step, from
    which `kept` is chosen when a partial step needs it. Under the dynamic schedule, means: (B, 1, 64, P), the mean of
    `tail` over the heads, and reference: (B, P), that of the last full step.
    """

    names = ("full_keys", "full_values", "tail", "means", "waiting", "reference")
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
        settings, first = self.settings, self.tail is None
        short = self.exact_when_short and self.seen <= settings.budget
        self.note(query)
        if first or query.shape[2] > 1:
            self.renew()
            return None
        if settings.policy == "full" or self.layer_idx in settings.full_layers:
            return None if short else decode(query[:, :, 0], key, value, scaling, self.real_until(self.seen))[:, None]
        full = self.wants_all()
        self.full_steps += full
        self.partial_steps += not full
        if settings.schedule == "fixed" and settings.stride == 1 and settings.full_output:
            return None
        with torch.no_grad():
            if short:
                return self.short_step(full, key, scaling)
            step = self.full_step if full else self.partial_step
            return step(self.query_of(self.seen), key, value, scaling)[:, None]

    def note(self, query):
        """Remember the last queries, from which a later choice may have to be made."""
        last = self.call.last(query, TAIL).detach()
        start, new = self.seen - last.shape[2], {"tail": last}
        if self.settings.schedule == "dynamic":
            new["means"] = self.mean_of(last)[:, None]
        if self.tail is None:
            self.oldest = start
        columns = torch.arange(start, self.seen, device=last.device)
        for name, rows in new.items():
            held = getattr(self, name)
            if held is None:
                held = rows.new_zeros(*rows.shape[:2], TAIL, rows.shape[3])
            elif self.call.source is not None:  # no token in this call so far: the one before it
                before = held[:, :, (self.seen - query.shape[2] - 1) % TAIL, None]
                rows = torch.where(self.call.source[:, None, :, None] < 0, before, rows)
            held = writable(held)
            held[:, :, columns % TAIL] = rows
            setattr(self, name, held)
        self.oldest = max(self.oldest, self.seen - TAIL)

    def query_of(self, columns):
        """(B, H, P): of the last token of the first `columns`."""
        return self.tail[:, :, (columns - 1) % TAIL]

    def mean_of(self, queries):
        """(B, H, m, P) -> (B, m, P); where `qsim_space` is "pre", turned back to position 0, alike for all heads."""
        wide = torch.promote_types(queries.dtype, torch.float32)
        mean = queries.to(wide).mean(1)
        if queries.shape[1] < self.settings.num_attention_heads:  # tensor parallel: other devices have the others
            mean = mean_over_devices(mean, self.call.mesh)
        if self.settings.qsim_space == "post":
            return mean
        cos, sin = (x.to(wide) for x in self.call.rotary)
        a, b = mean.chunk(2, -1)
        return mean * cos + torch.cat([b, -a], -1) * sin

    def renew(self):
        """All keys were attended: what was kept is stale."""
        self.kept = self.waiting = None
        self.since = 0
        self.refer()

    def refer(self):
        """Later queries are compared with that of the last column."""
        if self.means is not None:
            self.reference = self.means[:, 0, (self.seen - 1) % TAIL].clone()

    def wants_all(self):
        """Whether this decode step is a full one."""
        self.since += 1
        if self.settings.schedule == "fixed":
            return self.since % self.settings.stride == 0
        if self.since % self.settings.qc:
            return False
        now = self.means[:, 0, (self.seen - 1) % TAIL]
        apart = torch.cosine_similarity(now, self.reference, dim=-1) <= self.settings.threshold
        return bool(apart.any() if self.settings.qsim_batch == "any" else apart.all())

    def short_step(self, full, k, scaling):
        """All keys fit the budget and are attended: only the order in which they will be evicted is noted."""
        if full:
            self.refer()
        if full or self.waiting is None:
            columns = self.seen - (not full)
            self.waiting = self.scored(self.query_of(columns), k[:, :, :columns], scaling, self.real_until(columns))

    def full_step(self, q, k, v, scaling):
        """Attend all keys and remember how; the K best are gathered when a partial step comes."""
        real = self.real_until(self.seen)
        out, logp = decode_with_scores(q, k, v, scaling, real)
        self.kept, self.waiting = None, self.pool(logp, k.shape[1], real)
        self.refer()
        if not self.settings.full_output:
            self.choose(k, v, scaling)
            keys, values, real = self.kept.held()
            out = decode(q, keys, values, scaling, real)
        return out

    def partial_step(self, q, k, v, scaling):
        """Attend what is kept, the new token among it."""
        if self.kept is None:
            self.choose(k[:, :, :-1], v[:, :, :-1], scaling)
        self.put_newest(k[:, :, -1:], v[:, :, -1:])
        keys, values, real = self.kept.held()
        return decode(q, keys, values, scaling, real)

    def choose(self, k, v, scaling):
        """Keep the K best of the keys (B, G, n, P), as the last token of the last full step attended them.

        Tokens since then, while all fitted the budget, follow.
        """
        settings, columns = self.settings, k.shape[2]
        real, scores = self.real_until(columns), self.waiting
        if scores is None:
            scores = self.scored(self.query_of(columns), k, scaling, real)
        known = scores.shape[2]
        index = top(scores, settings.budget, settings.recent, settings.sinks, self.real_until(known))
        if known < columns:
            since = torch.arange(known, columns, device=k.device).expand(*index.shape[:2], -1)
            index = torch.cat([index, since], 2)
        self.kept = Kept(k, v, index, self.capacity, real, self.pinned(columns, k))
        self.waiting = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns (a negative count, as transformers passes it)."""
        tokens_to_remove = int(tokens_to_remove)  # assisted generation counts with a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of columns to forget; got {tokens_to_remove}.")
        if tokens_to_remove == 0:
            return
        columns = self.seen + tokens_to_remove
        if columns <= self.oldest:
            raise ValueError(
                f"The queries of the last {self.seen - self.oldest} columns are remembered, and a crop needs one that "
                f"stays; got {tokens_to_remove}. Keep a copy (copy.deepcopy(cache)) to go further back."
            )
        self.seen = columns
        self.renew()


def _appended(buffer, new, used):
    """The buffer with new columns written behind `used` ones, in larger memory if they do not fit."""
    (B, G, _, P), needed = new.shape, used + new.shape[2]
    buffer = None if buffer is None else writable(buffer)
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
            model.generate(**inputs, cache=cache)  # before transformers 5.24: past_key_values=cache

    Args:
        model: Llama, Qwen2, Qwen3 or Mistral of transformers (with attention "sdpa" or "eager"), or a
            `RecycledForCausalLM`, whose settings are then the defaults.
        settings: fields of `RecycledConfig`.

    Steps that choose among the keys, or attend those chosen, have no gradient. A cache holds one text a row: a call of
    packed documents is refused.

    Raises:
        ValueError: a model, or a setting, that it was not built for.
    """

    row_bytes = staticmethod(row_bytes)

    def __init__(self, model: nn.Module, **settings):
        decoder, config = decoder_of(model), getattr(model, "config", None)
        if unknown := sorted(set(settings) - set(SETTINGS)):
            raise ValueError(f"RecycledCache has no setting {unknown}; it has {SETTINGS}.")
        if isinstance(config, RecycledConfig):
            settings = {name: getattr(config, name) for name in SETTINGS} | {"train_tail": 0} | settings
        try:
            config = RecycledConfig(base_config=decoder.config, **settings)
        except StrictDataclassError as error:  # is no ValueError, which a caller expects
            raise ValueError(str(error.__cause__ or error)) from error
        self._build(config)
        self.attach(model)

    def _build(self, settings):
        kind = RecycledLayer if settings.policy in ("recycled", "full") else EvictingLayer
        self.settings, self.call = settings, Call()
        super().__init__(layers=[kind(settings, i, self.call) for i in range(settings.num_hidden_layers)])

    def enter(self, decoder, kwargs):
        """Note padding and positions, and make the decoder run `recycled_attention` for this call."""
        check_layers(decoder, self)
        stock = decoder.config._attn_implementation
        stock = stock.rpartition("_")[2] if stock.startswith(PREFIX) else stock
        if stock not in NAMES:
            raise ValueError(
                f"RecycledCache needs the attention implementation {' or '.join(map(repr, NAMES))}, which it can "
                f"stand in for; the model has {stock!r}. Call model.set_attn_implementation('sdpa')."
            )
        x = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        (batch, columns), seen = x.shape[:2], self.get_seq_length()
        self._check(batch, seen, columns, kwargs.get("attention_mask"))
        kwargs = one_text(kwargs, self, seen)
        self.call.real = real = self._real(kwargs.get("attention_mask"), batch, seen, columns)
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
        config, call = decoder.config, self.call
        config._attn_implementation_internal, call.active, call.table = NAMES[stock], True, decoder.rotary_emb
        call.mesh = mesh_of(decoder)

        def undo():
            config._attn_implementation_internal, call.active, call.table, call.mesh = stock, False, None, None

        self._undo.append(undo)
        if seen and isinstance(self.layers[0], EvictingLayer):
            kwargs = kwargs | {"attention_mask": None}  # columns and slots no longer agree; the layers make their own
        return kwargs

    def real(self):
        """(B, seen) bool, which columns given so far are tokens; None: all."""
        return None if self.call.real is None else self.call.real[:, : self.get_seq_length()]

    def _check(self, batch, seen, columns, mask):
        layer = self.layers[0]
        if any(other.seen != seen for other in self.layers):
            raise ValueError("An earlier call failed between two layers; call cache.reset() and start again.")
        if layer.is_initialized and seen:
            check_rows(self, len(next(iter(layer.tensors().values()))), batch)
        if mask is not None and (mask.ndim != 2 or tuple(mask.shape) != (batch, seen + columns)):
            raise ValueError(
                f"attention_mask must have shape {(batch, seen + columns)}, 1 for tokens and 0 for padding, with the "
                f"{seen} columns in the cache; got {tuple(mask.shape)}."
            )

    def _real(self, mask, batch, seen, columns):
        """(B, n + T) bool, None without padding."""
        if mask is not None:
            return None if bool(mask.all()) else mask
        if self.call.real is None or not seen:
            return None
        return F.pad(self.call.real[:, :seen], (0, columns), value=True)  # new columns are tokens

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
        held = sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors().values())
        return held + (0 if self.call.real is None else self.call.real.nbytes)

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
        device = device_of(decoder_of(model)) if device is None else device
        tensors, about = read_tensors(path, cls, device)
        cache = cls(model, **about["settings"])
        if about["sizes"] != _sizes(cache.settings):
            cache.close()
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
            # a copy lies at an address that products take as they took the original's: the same bits
            cache.layers[int(index)].set(name, tensor.clone())
        return cache


def _sizes(config):
    """What a model must share with the one that a saved cache was made for."""
    names = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
    return [getattr(config.base_config, name, None) for name in names]
