"""The caches of the zoo: they hold state and move it; what is computed from it stays in kernels.

B batch. Every tensor has the batch first, so that beams reorder by one index_select. Each row counts the real tokens
that it has seen, so that padding on any side leaves no trace.
"""

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.cache_utils import Cache, CacheLayerMixin

from scrubjay.kernels.dispatch import exported


class StateLayer(CacheLayerMixin):
    """The state of one recurrent block. O(1) bytes, whatever the number of tokens.

    conv: (B, K - 1, C) last inputs of the convolution, in the model's dtype. state: (B, ...) recurrent state, float32.
    counts: (B,) int64, real tokens seen by each row. `seen`: columns given so far, padding included.

    Args:
        conv, state: shapes without the batch.
    """

    names: tuple[str, ...] = ("conv", "state", "counts")
    conv: torch.Tensor
    state: torch.Tensor
    counts: torch.Tensor

    def __init__(self, conv: list[int], state: list[int]):
        super().__init__()
        self.shapes = {"conv": tuple(conv), "state": tuple(state)}
        self.seen = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the layer holds; empty before the first token."""
        return {name: getattr(self, name) for name in self.names} if self.is_initialized else {}

    def _map(self, change) -> None:
        for name, tensor in self.tensors().items():
            setattr(self, name, change(tensor))

    @property
    def batch_size(self) -> int:
        """Rows held; -1 before the first token, as transformers' caches answer."""
        return self.counts.shape[0] if self.is_initialized else -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Allocate zeros for the batch, dtype and device of (B, ...) inputs."""
        batch, device = key_states.shape[0], key_states.device
        wide = torch.promote_types(key_states.dtype, torch.float32)
        self.conv = key_states.new_zeros(batch, *self.shapes["conv"])
        self.state = torch.zeros(batch, *self.shapes["state"], dtype=wide, device=device)
        self.counts = torch.full((batch,), self.seen, dtype=torch.int64, device=device)
        self.is_initialized = True

    def read(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(conv, state) for a block whose input is `like`, on its device; zeros before the first token."""
        if not self.is_initialized:
            self.lazy_initialization(like)
        if self.conv.device != like.device:
            self._map(lambda tensor: tensor.to(like.device))
        return self.conv, self.state

    def write(self, conv: torch.Tensor, state: torch.Tensor) -> None:
        """Replace the block's state. `count` follows when the whole block is done."""
        self.conv, self.state = conv, state

    def skip(self, columns: int) -> None:
        """Start, empty, after `columns` columns that other ranks of a sharded sequence have."""
        self.seen = columns
        if self.is_initialized:
            self.counts = torch.full_like(self.counts, columns)

    def count(self, columns: int, lengths: torch.Tensor | None) -> None:
        """Count `columns` new columns, of which `lengths` (B,) are real in each row; None: all."""
        self.seen += columns
        self.counts = self.counts + (columns if lengths is None else lengths)

    def update(self, key_states, value_states, *args, **kwargs):
        """Not how a recurrent state advances."""
        raise ValueError(f"{type(self).__name__} has no keys and values to append to; its block calls read and write.")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask for `query_length` new columns."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Columns given so far."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def reset(self) -> None:
        """Forget every token, keep the memory."""
        self._map(torch.zeros_like)
        self.seen = 0

    def offload(self) -> None:
        """Move to the CPU; `read` brings it back."""
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Nothing to do ahead of `read`: a few MB."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times in place."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a sum cannot give tokens back."""
        if tokens_to_remove != 0:
            raise ValueError(
                f"A recurrent state cannot give {abs(tokens_to_remove)} tokens back: they are summed into it. Keep a "
                "copy (copy.deepcopy(cache) or cache.save(path)) at the point that you want to return to."
            )


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
        steps = self.window - 1 if exported() else min(self.window - 1, self.seen)
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
        steps, real = last_steps(k, lengths, self.window)
        slots = (self.counts[:, None] + steps) % self.window
        self.keys = put_slots(self.keys, slots, take_slots(k.transpose(1, 2), steps.clamp(min=0)), real)
        self.values = put_slots(self.values, slots, take_slots(v.transpose(1, 2), steps.clamp(min=0)), real)

    def held(self, new: int = 0) -> torch.Tensor:
        """(B, W): slots that hold a token once `new` more have been written."""
        return torch.arange(self.window, device=self.counts.device) < self.counts[:, None] + new


def last_steps(x: torch.Tensor, lengths: torch.Tensor | None, window: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which steps of x (B, T, ...) a window ends with, (B, S) in order, and which of them are real (None: all).

    S = min(T, W); in an exported program, whose T may be any, W.
    """
    (B, T), any_length = x.shape[:2], exported() and x.shape[1] != 1
    ends = torch.full((B,), T, dtype=torch.int64, device=x.device) if lengths is None else lengths
    steps = ends[:, None] + torch.arange(-(window if any_length else min(T, window)), 0, device=x.device)
    return steps, None if lengths is None and not any_length else steps >= 0


def _at(slots: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return slots[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])


def writable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of what inference mode made and is now to be written outside of it, which torch refuses."""
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


def roomy(x: torch.Tensor, *new: torch.Tensor) -> torch.Tensor:
    """x in a dtype that holds what is in it and all `new` without rounding: under autocast, and before and after it,
    one layer's keys are of several."""
    dtype = x.dtype
    for tensor in new:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return x.to(dtype)


def appended(held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """(B, K, S, P) and (B, K, T, P) -> (B, K, S + T, P). Autocast's own `cat` takes two dtypes at most."""
    held = roomy(held, new)
    return torch.cat([held, new.to(held.dtype)], 2)


def take_slots(ring: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """(B, K, W, P), (B, S) -> (B, K, S, P)."""
    return ring.gather(2, _at(slots, ring))


def put_slots(ring: torch.Tensor, slots: torch.Tensor, new: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Write (B, K, S, P) to slots (B, S), distinct in a row. In place unless a gradient may need what was there, or it
    is the input of an exported program."""
    ring = roomy(ring, new)
    new = new.to(ring.dtype)
    if real is not None:
        new = torch.where(real[:, None, :, None], new, take_slots(ring, slots))
    if torch.is_grad_enabled() or exported():
        return ring.scatter(2, _at(slots, ring), new)
    return writable(ring).scatter_(2, _at(slots, ring), new)


class StateCache(Cache):
    """One `StateLayer` or `WindowStateLayer` for each block. Make one of the subclasses below.

    Args:
        config: the model's configuration, or the model.
        offload: keep each layer's state on the CPU while other layers run.
    """

    def __init__(self, config, offload: bool = False):
        self._build(self.layout(getattr(config, "config", config)), offload)

    def _build(self, layout: dict, offload: bool) -> None:
        super().__init__(layers=self.make_layers(layout))
        self.shape = layout
        self.offload_layers = offload

    @staticmethod
    def make_layers(layout: dict) -> list[CacheLayerMixin]:
        """Empty layers for a `layout`."""
        kind = WindowStateLayer if "keys" in layout["shapes"] else StateLayer
        return [kind(**layout["shapes"]) for _ in range(layout["num_layers"])]

    @staticmethod
    def layout(config) -> dict:
        """{"num_layers": int, "shapes": {name: shape without the batch}} for a configuration."""
        raise ValueError("StateCache is a base class; use the cache of a model, for example SSDCache(model).")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors().values())

    @classmethod
    def row_bytes(cls, config, dtype: torch.dtype) -> tuple[int, int]:
        """(bytes of one row of a batch, bytes that each token adds: none)."""
        cache = cls(config)
        for layer in cache.layers:
            layer.lazy_initialization(torch.empty(1, dtype=dtype, device="meta"))
        return cache.nbytes, 0

    def count(self, layer_idx: int, columns: int, lengths: torch.Tensor | None) -> None:
        """A block is done with `columns` columns, `lengths` (B,) of them real (None: all): count them."""
        self.layers[layer_idx].count(columns, lengths)
        if self.offload_layers:
            self.layers[layer_idx].offload()

    def check(self, config, batch: int) -> None:
        """Refuse a cache of another model or another batch size.

        Raises:
            ValueError: what came, what is needed, what to do.
        """
        needed = self.layout(config)
        if json.dumps(needed) != json.dumps(self.shape):
            raise ValueError(
                f"This cache was made for another model: it holds {self.shape}, the model needs {needed}. "
                f"Make one with {type(self).__name__}(model)."
            )
        held = self.layers[0].batch_size
        if held not in (-1, batch):
            raise ValueError(
                f"This cache holds {held} rows, the input has {batch}. Use a new {type(self).__name__}(model), or "
                "cache.batch_repeat_interleave / cache.batch_select_indices to change its rows."
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write the state to one safetensors file, all of it or nothing. It can be loaded again and again."""
        if not self.layers[0].is_initialized:
            raise ValueError("This cache is empty: run the model on a prompt before saving it.")
        tensors = {f"{i}.{n}": t for i, layer in enumerate(self.layers) for n, t in layer.tensors().items()}
        write_tensors(path, tensors, type(self), {"shape": self.shape, "seen": self.get_seq_length()})

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu"):
        """Read what `save` wrote.

        Raises:
            ValueError: a file of another kind of cache, or no cache at all.
        """
        tensors, about = read_tensors(path, cls, device)
        cache = cls.__new__(cls)
        cache._build(about["shape"], offload=False)
        for i, layer in enumerate(cache.layers):
            for name in layer.names:
                setattr(layer, name, tensors[f"{i}.{name}"])
            layer.seen, layer.is_initialized = about["seen"], True
        return cache


def write_tensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor], cls: type, about: dict) -> None:
    """Write a cache's tensors and what else it needs (anything JSON can say) to a file, all of it or nothing."""
    path = Path(path)
    metadata = {"class": cls.__name__, "about": json.dumps(about)}
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_tensors(path: str | os.PathLike, cls: type, device: str | torch.device = "cpu") -> tuple[dict, dict]:
    """(tensors, about) that `write_tensors` wrote for this class.

    Raises:
        ValueError: a file of another kind of cache, or no cache at all.
    """
    with safe_open(path, framework="pt", device=str(device)) as file:
        metadata = file.metadata() or {}
        if metadata.get("class") != cls.__name__:
            raise ValueError(
                f"{path} holds {metadata.get('class', 'no cache')}; {cls.__name__}.load needs its own kind."
            )
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["about"])  # noqa: SIM118


class SSDCache(StateCache):
    """Convolution window and recurrent state of each SSD block.

    Bytes a row: layers * ((K - 1) * (d_inner + 2 G N) * itemsize + H * N * P * 4 + 8).
    """

    @staticmethod
    def layout(config) -> dict:
        conv = [config.conv_kernel - 1, config.conv_size]
        state = [config.num_heads, config.state_size, config.head_dim]
        return {"num_layers": config.num_hidden_layers, "shapes": {"conv": conv, "state": state}}


class RodimusCache(StateCache):
    """Convolution window and recurrent state of each block; for Rodimus+ also the window of keys and values.

    Bytes a row: layers * ((K - 1) * m * itemsize + n * m * 4 + 8), Rodimus+ also layers * W * (key heads + value heads)
    * head_dim * itemsize.
    """

    @staticmethod
    def layout(config) -> dict:
        shapes = {"conv": [config.conv_kernel - 1, config.inner_size], "state": [config.state_size, config.inner_size]}
        if config.has_attention:
            shapes["keys"] = [config.num_key_heads, config.sliding_window, config.head_dim]
            shapes["values"] = [config.num_value_heads, config.sliding_window, config.head_dim]
        return {"num_layers": config.num_hidden_layers, "shapes": shapes}
