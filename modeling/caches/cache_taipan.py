"""The cache of Taipan: a recurrent state for each Mamba-2 block, a ring of keys for each selective attention layer.

B batch, W ring size, K key heads, P head size.
"""

import torch
from transformers.cache_utils import CacheLayerMixin

from scrubjay.kernels.dispatch import traced
from scrubjay.modeling.caches.cache_ssd import SSDCache
from scrubjay.modeling.caches.cache_state import StateCache, StateLayer
from scrubjay.modeling.caches.ring import last_steps, put_slots, take_slots


class RingLayer(StateLayer):
    """The last W keys and values of one selective attention layer. O(1) bytes, whatever the number of tokens.

    keys, values: (B, K, W, P), positions already encoded. counts: (B,) int64, real tokens seen by each row. Where only
    selected tokens write: written (B,) int64, how many did; places (B, W) int64, the position of what a slot holds.
    The c-th token that a row wrote is at slot c mod W. A slot is written again W writes later, and those span at least
    W positions, so what it held is out of every later query's window.

    Args:
        keys: shape of keys and of values without the batch.
        selected: whether only selected tokens write.
    """

    keys: torch.Tensor
    values: torch.Tensor
    written: torch.Tensor
    places: torch.Tensor

    def __init__(self, keys: list[int], selected: bool):
        super().__init__([], [])
        self.shapes = {"keys": tuple(keys)}
        self.window, self.selected = keys[1], selected
        self.names = ("counts", "keys", "values", *(("written", "places") if selected else ()))

    @property
    def writes(self) -> torch.Tensor:
        """(B,) tokens that each row has written."""
        return self.written if self.selected else self.counts

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Allocate zeros for the batch, dtype and device of (B, ...) inputs."""
        batch, device = key_states.shape[0], key_states.device
        self.counts = torch.full((batch,), self.seen, dtype=torch.int64, device=device)
        self.keys = key_states.new_zeros(batch, *self.shapes["keys"])
        self.values = key_states.new_zeros(batch, *self.shapes["keys"])
        if self.selected:
            self.written = torch.zeros_like(self.counts)
            self.places = torch.zeros(batch, self.window, dtype=torch.int64, device=device)
        self.is_initialized = True

    def prepare(self, like: torch.Tensor) -> None:
        """Be allocated, on the device and, when new, in the dtype of (B, ...) `like`."""
        if not self.is_initialized:
            self.lazy_initialization(like)
        if self.keys.device != like.device:
            self._map(lambda tensor: tensor.to(like.device))

    def past(self, device: torch.device):
        """The last S < W writes in order: k, v (B, S, K, P), positions (B, S) and which are real, (B, S); or None.

        Positions that are not real mean nothing.
        """
        if self.seen == 0 or self.window == 1:
            return None
        steps = self.window - 1 if traced() else min(self.window - 1, self.seen)
        at = self.writes[:, None] + torch.arange(-steps, 0, device=device)
        slots = at % self.window
        places = self.places.gather(1, slots) if self.selected else at
        return (
            take_slots(self.keys, slots).transpose(1, 2),
            take_slots(self.values, slots).transpose(1, 2),
            places,
            at >= 0,
        )

    def hold(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        real: torch.Tensor,
        places: torch.Tensor | None = None,
        written: torch.Tensor | None = None,
    ) -> None:
        """Write what `past` gives, of columns that `skip` counted; `written` (B,) of them were selected."""
        if written is not None:
            self.written = written.to(k.device)
        slots = (self.writes[:, None] + torch.arange(-k.shape[1], 0, device=k.device)) % self.window
        self.keys = put_slots(self.keys, slots, k.transpose(1, 2), real)
        self.values = put_slots(self.values, slots, v.transpose(1, 2), real)
        if places is not None:
            self.places = self.places.scatter(1, slots, torch.where(real, places, self.places.gather(1, slots)))

    def append(self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor | None) -> None:
        """Write the last W real columns of k, v (B, T, K, P), which have positions (B, T).

        `lengths` (B,) columns of a row are real, None: all T.
        """
        steps, real = last_steps(k, lengths, self.window)
        slots, held = (self.writes[:, None] + steps) % self.window, steps.clamp(min=0)
        self.keys = put_slots(self.keys, slots, take_slots(k.transpose(1, 2), held), real)
        self.values = put_slots(self.values, slots, take_slots(v.transpose(1, 2), held), real)
        if self.selected:
            new = positions.gather(1, held)
            new = new if real is None else torch.where(real, new, self.places.gather(1, slots))
            self.places = self.places.scatter(1, slots, new)
            self.written = self.written + (k.shape[1] if lengths is None else lengths)

    def held(self, new: int = 0) -> torch.Tensor:
        """(B, W): slots that hold a token once `new` more have been written."""
        return torch.arange(self.window, device=self.counts.device) < self.writes[:, None] + new


class TaipanCache(StateCache):
    """Convolution window and recurrent state of each Mamba-2 block, ring of keys and values of each selective layer.

    Bytes a row: blocks * ((conv_kernel - 1) * (d_inner + 2 G N) * itemsize + H * N * P * 4 + 8) for the Mamba-2 blocks,
    and selective layers * (2 * W * key heads * attention_head_dim * itemsize + 8), W = sliding_window or kv_cap,
    whichever is smaller; with kv_scope="selected" 8 * (W + 1) more for each selective layer.
    """

    @staticmethod
    def layout(config) -> dict:
        ring = [config.num_key_value_heads, config.ring_size, config.attention_head_dim]
        return SSDCache.layout(config) | {
            "selective_layers": list(config.selective_layers),
            "ring": ring,
            "selected": config.kv_scope == "selected",
        }

    @staticmethod
    def make_layers(layout: dict) -> list[CacheLayerMixin]:
        """A `RingLayer` for each selective layer, a `StateLayer` for each other one."""
        return [
            RingLayer(layout["ring"], layout["selected"])
            if i in layout["selective_layers"]
            else StateLayer(**layout["shapes"])
            for i in range(layout["num_layers"])
        ]
