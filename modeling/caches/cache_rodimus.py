"""The cache of Rodimus and Rodimus+: a recurrent state and, for Rodimus+, a ring of the last W keys and values.

B batch, W ring size, K key heads, V value heads, P head size.
"""

import torch
from transformers.cache_utils import CacheLayerMixin

from scrubjay.kernels.dispatch import traced
from scrubjay.modeling.caches.cache_state import StateCache, StateLayer
from scrubjay.modeling.caches.ring import last_steps, put_slots, take_slots


class WindowStateLayer(StateLayer):
    """A recurrent state and a ring of the last W keys and values (SW-SKA). O(1) bytes.

    keys: (B, K, W, P), positions already encoded. values: (B, V, W, P). The token with count c is at slot c mod W.

    Args:
        keys, values: shapes without the batch.
    """

    names = ("conv", "state", "counts", "keys", "values")

    def __init__(self, conv: list[int], state: list[int], keys: list[int], values: list[int]):
        super().__init__(conv, state)
        self.shapes |= {"keys": tuple(keys), "values": tuple(values)}
        self.window = keys[1]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Allocate zeros for the batch, dtype and device of (B, ...) inputs."""
        super().lazy_initialization(key_states)
        self.keys = key_states.new_zeros(key_states.shape[0], *self.shapes["keys"])
        self.values = key_states.new_zeros(key_states.shape[0], *self.shapes["values"])

    def past(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """The last S < W steps in order: (B, S, K, P), (B, S, V, P) and which are real, (B, S); None before any."""
        if self.seen == 0 or self.window == 1:
            return None
        steps = self.window - 1 if traced() else min(self.window - 1, self.seen)
        at = self.counts[:, None] + torch.arange(-steps, 0, device=self.counts.device)
        slots = at % self.window
        return take_slots(self.keys, slots).transpose(1, 2), take_slots(self.values, slots).transpose(1, 2), at >= 0

    def hold(self, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor) -> None:
        """Write what `past` gives, of steps that `skip` counted."""
        slots = (self.counts[:, None] + torch.arange(-k.shape[1], 0, device=k.device)) % self.window
        self.keys = put_slots(self.keys, slots, k.transpose(1, 2), real)
        self.values = put_slots(self.values, slots, v.transpose(1, 2), real)

    def append(self, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor | None) -> None:
        """Write the last W real steps of k (B, T, K, P) and v (B, T, V, P); `lengths` (B,) are real, None: all T."""
        if k.shape[1] == 1 and lengths is None:
            slots = (self.counts % self.window)[:, None]
            self.keys = put_slots(self.keys, slots, k.transpose(1, 2), None)
            self.values = put_slots(self.values, slots, v.transpose(1, 2), None)
            return
        steps, real = last_steps(k, lengths, self.window)
        slots = (self.counts[:, None] + steps) % self.window
        self.keys = put_slots(self.keys, slots, take_slots(k.transpose(1, 2), steps.clamp(min=0)), real)
        self.values = put_slots(self.values, slots, take_slots(v.transpose(1, 2), steps.clamp(min=0)), real)

    def held(self, new: int = 0) -> torch.Tensor:
        """(B, W): slots that hold a token once `new` more have been written."""
        return torch.arange(self.window, device=self.counts.device) < self.counts[:, None] + new

    def written(self, new: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """keys, values and `held` of the slots, first ones first, that may hold a token once `new` more are written."""
        slots = slice(min(self.seen + new, self.window))
        return self.keys[:, :, slots], self.values[:, :, slots], self.held(new)[:, slots]


class RodimusCache(StateCache):
    """Convolution window and recurrent state of each block; for Rodimus+ also the window of keys and values.

    Bytes a row: layers * (window * m * itemsize + n * m * 4 + 8), where the convolution's window is K - 1, or 0 without
    one; Rodimus+ also layers * W * (key heads + value heads) * head_dim * itemsize.
    """

    @staticmethod
    def layout(config) -> dict:
        shapes = {"conv": [config.conv_window, config.inner_size], "state": [config.state_size, config.inner_size]}
        if config.has_attention:
            shapes["keys"] = [config.num_key_heads, config.sliding_window, config.head_dim]
            shapes["values"] = [config.num_value_heads, config.sliding_window, config.head_dim]
        return {"num_layers": config.num_hidden_layers, "shapes": shapes}

    @staticmethod
    def make_layers(layout: dict) -> list[CacheLayerMixin]:
        """Empty layers for a `layout`."""
        kind = WindowStateLayer if "keys" in layout["shapes"] else StateLayer
        return [kind(**layout["shapes"]) for _ in range(layout["num_layers"])]
