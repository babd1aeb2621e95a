"""Keys and values kept in slots, and the cache layers that keep them.

B batch, H query heads, G key heads, P head size, T new columns, n columns held, K budget. Keys carry their rotary
encoding, so the order of the slots means nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers.cache_utils import CacheLayerMixin

from scrubjay.configuration.configuration_recycled import HOLDING, RecycledConfig
from scrubjay.kernels.dispatch import traced
from scrubjay.kernels.pages import GROUP, channels
from scrubjay.kernels.recycle import gather_pair, pooled, put_row, scores_of
from scrubjay.modeling.caches.buffers import roomy, writable
from scrubjay.modeling.decoder.decoder_call import sizes_of

TAIL = 64  # queries remembered, and so columns that `crop` may take back


@dataclass
class Call:
    """What all layers need to know of the call in progress.

    real: (B, n + T) bool, None without padding. source: (B, m) for the last m = min(T, 64) of its columns, which of the
    T is the last token up to there, -1: none; None if all T are. rotary: cos and sin (B or 1, m, P) at those. table:
    the decoder's own function from a tensor of the device and positions (B, T) to (cos, sin), during the call. mesh:
    the devices that hold parts of the decoder's weights, during the call, None: one device. answered: the layers that
    have attended by themselves, in this call. counted: whether positions, given where there is padding, are of tokens.
    probabilities: whether the model's own attention may have to tell its probabilities. spare: memory that steps on a
    CPU write into one after the other, by name; memory that is new each time is zeroed by the system first.
    """

    real: torch.Tensor | None = None
    source: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    table: Callable | None = None
    mesh: DeviceMesh | None = None
    answered: set[int] = field(default_factory=set)
    counted: bool = False
    probabilities: bool = False
    spare: dict[str, torch.Tensor] = field(default_factory=dict)

    def __getstate__(self):
        return self.__dict__ | {"table": None, "mesh": None, "spare": {}}

    def memory(self, name, shape, like):
        """A tensor of that shape, with the dtype and device of `like`, of which anything may be the content. On a CPU
        it shares memory with the last one of that name. Nothing that has a gradient or is kept may be written here."""
        if like.device.type != "cpu" or traced():
            return like.new_empty(shape)
        size, held = math.prod(shape), self.spare.get(name)
        if held is None or held.dtype != like.dtype or len(held) < size or held is not writable(held):
            held = self.spare[name] = like.new_empty(size)
        return held[:size].view(shape)

    def last(self, query, count):
        """(B, H, m, P) queries of the last `count` columns of (B, H, T, P), or of the token before, if in this call."""
        if self.source is None:
            return query[:, :, -count:]
        at = self.source[:, -count:].clamp(min=0)
        return query.gather(2, at[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))


class Kept:
    """At most `capacity` keys and values of each key head, in slots; when all are taken, the lowest rank goes.

    keys, values: (B, G, capacity, P). index: (B, G, capacity) int64, the columns they came from. rank: (B, G, capacity)
    float64. real: (B, G, capacity) bool, None if all are tokens. The first `filled` slots are taken.
    """

    names = ("keys", "values", "index", "rank", "real")

    def __init__(self, keys, values, index, capacity, real, pinned, rows=None):
        """From rows `index` (B, G, M), lowest score first, of keys and values (B, G, n, P).

        real, pinned: (B, n) or (B, G, n) bool, which rows are tokens (None: all) and which must never be evicted.
        rows: (B, G, M), where they stand in keys and values, if not at `index`.
        """
        (B, G, M), P = index.shape, keys.shape[3]
        self.filled = M
        self.keys, self.values = (x.new_empty(B, G, capacity, P) for x in (keys, values))
        gather_pair(keys, values, index if rows is None else rows, out=(self.keys, self.values))
        self.index = index.new_full((B, G, capacity), -1)
        self.index[:, :, :M] = index
        # below any column number that comes later; padding goes first, pinned tokens never
        order = torch.arange(-M, 0, dtype=torch.float64, device=keys.device).expand(B, G, M)
        self.rank = order.new_full((B, G, capacity), -torch.inf)
        self.rank[:, :, :M] = order.masked_fill(pick(pinned, index), torch.inf)
        self.real = None
        if real is not None and not bool((kept := pick(real, index)).all()):
            self.real = torch.ones(B, G, capacity, dtype=torch.bool, device=keys.device)
            self.real[:, :, :M] = kept
            self.rank[:, :, :M].masked_fill_(~kept, -torch.inf)

    def put(self, k, v, column, rank, real):
        """Write one new column, k and v (B, G, 1, P), rank (B,) and real (B,) bool, None: a token in all rows.

        In a row where it is padding nothing is evicted for it. Returns its slots, (B, G, 1).
        """
        if real is not None and self.real is None:
            self.real = torch.ones_like(self.index, dtype=torch.bool)
        self.keys, self.values = roomy(self.keys, k), roomy(self.values, v)
        held = [None if (x := getattr(self, name)) is None else writable(x) for name in self.names]
        for name, x in zip(self.names, held, strict=True):
            setattr(self, name, x)
        at = put_row(held, k, v, column, rank, real, self.filled)
        self.filled = min(self.filled + 1, self.keys.shape[2])
        return at

    def enlarge(self, more):
        """Have `more` empty slots."""
        for name in self.names:
            if (held := getattr(self, name)) is not None:
                new = held.new_empty(*held.shape[:2], more, *held.shape[3:])
                new.fill_({"index": -1, "rank": -torch.inf, "real": True}.get(name, 0))
                setattr(self, name, torch.cat([held, new], 2))

    def sort(self):
        """Put the slots into the order of the text; returns what was moved where, (B, G, filled)."""
        order = self.index[:, :, : self.filled].argsort(-1)
        for name in self.names:
            if (held := getattr(self, name)) is not None:
                rows = order[..., None].expand(-1, -1, -1, held.shape[3]) if held.ndim == 4 else order
                held = writable(held)
                held[:, :, : self.filled] = held.gather(2, rows)
                setattr(self, name, held)
        return order

    def held(self):
        """keys, values (B, G, filled, P) and which are real (B, G, filled), None: all."""
        m = self.filled
        return self.keys[:, :, :m], self.values[:, :, :m], None if self.real is None else self.real[:, :, :m]


def pick(mask, index):
    """(B, n) or (B, G, n) at index (B, G, M)."""
    mask = mask[:, None] if mask.ndim == 2 else mask
    return mask.expand(-1, index.shape[1], -1).gather(2, index)


class KeepingLayer(CacheLayerMixin):
    """What layers share that keep K keys: counting, rows that move together, the choice."""

    is_compileable = False
    is_sliding = False
    names: tuple[str, ...] = ()
    counters: tuple[str, ...] = ("seen",)

    def __init__(self, settings: RecycledConfig, layer_idx: int, call: Call):
        super().__init__()
        self.settings, self.layer_idx, self.call = settings, layer_idx, call
        self.clear()

    def clear(self) -> None:
        self.seen, self.kept = 0, None
        self.is_initialized = False
        for name in self.names:
            setattr(self, name, None)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the layer holds, by name."""
        own = {name: getattr(self, name) for name in self.names}
        kept: dict = {} if self.kept is None else {f"kept.{name}": getattr(self.kept, name) for name in Kept.names}
        return {name: tensor for name, tensor in (own | kept).items() if tensor is not None}

    def set(self, name: str, tensor: torch.Tensor) -> None:
        """Replace one of `tensors`."""
        owner, name = (self.kept, name[5:]) if name.startswith("kept.") else (self, name)
        setattr(owner, name, tensor)

    def map(self, change) -> None:
        """Replace each tensor by `change` of it."""
        for name, tensor in self.tensors().items():
            self.set(name, change(tensor))

    def lazy_initialization(self, key_states, value_states) -> None:
        """Note dtype and device of (B, G, T, P) keys."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def get_seq_length(self) -> int:
        """Columns given so far, whatever is still held."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def reset(self) -> None:
        """Forget every token."""
        self.clear()

    def update(self, key_states, value_states, *args, **kwargs):
        """Take new keys and values (B, G, T, P); returns those that the attention function is to be given."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        keys, values = self.extend(key_states, value_states)
        keys.scrubjay_layer = self  # the way to `attend`: attention functions see no cache
        return keys, values

    def real_until(self, columns):
        """(B, columns) bool, or None without padding."""
        return None if self.call.real is None else self.call.real[:, :columns]

    def pinned(self, columns, like):
        """(B, columns) bool: the first `sinks` tokens of each row."""
        real = self.real_until(columns)
        if real is None:
            first = torch.arange(columns, device=like.device) < self.settings.sinks
            return first.expand(len(like), -1)
        return real & (real.cumsum(1) <= self.settings.sinks)

    def put_newest(self, k, v):
        """Write the last column into `kept`; returns its slots (B, G, 1)."""
        column, sinks, known = self.seen - 1, self.settings.sinks, self.real_until(self.seen)
        rank = math.inf if known is None and column < sinks else float(column)
        rank = torch.full((len(k),), rank, dtype=torch.float64, device=k.device)
        if sinks and known is not None:
            rank.masked_fill_(known.sum(1) <= sinks, torch.inf)
        real = None if self.call.source is None else self.call.real[:, column]
        return self.kept.put(k, v, column, rank, real)

    def attended(self):
        """(B, G, M), the columns that the last step attended; None: all."""
        return None if self.kept is None else self.kept.index[:, :, : self.kept.filled]

    def reads(self, columns):
        """Keys that a step reads of so many; what choosing reads counts as keys of the same bytes."""
        return columns if self.kept is None else min(columns, self.kept.filled)

    def scored(self, q, k, scaling, real):
        """Pooled scores (B, G, n) of keys for one query (B, H, P)."""
        return self.pool(scores_of(q, k, scaling, real), k.shape[1], real)

    @property
    def capacity(self) -> int:
        """Slots of `kept`."""
        return self.settings.budget + (not self.settings.evict_first)

    def pool(self, logp, groups, real):
        """The paper's score of each key, from log-probabilities."""
        return pooled(logp, groups, self.settings.group_reduce, self.settings.pool_kernel, real)


def row_bytes(config: RecycledConfig, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes of one row of a batch, bytes that each token adds) in a `RecycledCache` of a Recycled model between full
    steps, room ahead of the tokens and what a step gathers left out.

    A row: keys, values, columns and ranks of the budget, and what the policy remembers beside them (queries, mass, or
    directions). A token: its keys and values, under the policies that forget none, wherever they lie and in however
    many bits (the newest are exact, which counts to the row); under "snapkv" those after the prompt.
    """
    layers, heads, size = sizes_of(config)
    pair = heads * 2 * size * dtype.itemsize
    held, recent = pair, 0  # bytes of a token, and what the newest exact ones take beyond them
    if config.hold_bits:
        few = heads * size * config.hold_bits // 4 + heads * 4 * size // GROUP + heads * 4 * (size // channels(size))
        held, recent = few + (pair if config.hold == "host" else 0), TAIL * (pair - few)
    slots = config.budget + (not config.evict_first)
    kept = 0 if config.policy in ("full", "lowrank", "quest") else slots * (pair + heads * 16)
    mass, low = slots * heads * 4, heads * min(config.rank, size) * dtype.itemsize
    directions = heads * (2 * min(config.rank, size) + 1) * size * max(dtype.itemsize, 4)
    beside = {"h2o": mass, "tova": mass, "lowrank": directions}.get(config.policy, 0)
    if config.policy in HOLDING:
        beside += config.num_attention_heads * TAIL * size * dtype.itemsize + recent
    if config.policy == "lowrank" and config.choosing_layers is not None:  # the others are those of "recycled"
        count = len(set(config.choosing_layers))
        others = (layers - count) * (slots * (pair + heads * 16) + beside - directions)
        return count * beside + others, layers * held + count * low
    each = {"lowrank": held + low, "quest": pair + pair // config.page, "snapkv": pair + heads * 16}
    return layers * (kept + beside), layers * each.get(config.policy, held if config.policy in HOLDING else 0)
