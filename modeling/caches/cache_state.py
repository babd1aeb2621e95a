"""The caches of the zoo: they hold state and move it; what is computed from it stays in kernels.

B batch. Every tensor has the batch first, so that beams reorder by one index_select. Each row counts the real tokens
that it has seen, so that padding on any side leaves no trace.
"""

import copy
import os

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from scrubjay.modeling.caches.saved_tensors import read_tensors, write_tensors
from scrubjay.modeling.decoder.forks import Detached


class StateLayer(CacheLayerMixin):
    """The state of one recurrent block. O(1) bytes, whatever the number of tokens.

    conv: (B, K - 1, C) last inputs of the convolution, in the model's dtype. state: (B, ...) recurrent state, float32.
    counts: (B,) int64, real tokens seen by each row. `seen`: columns given so far, padding included.

    Args:
        conv, state: shapes without the batch.
    """

    names: tuple[str, ...] = ("conv", "state", "counts")
    grows: dict[str, int] = {}  # which of them gets longer with the text, and along which axis
    conv: torch.Tensor
    state: torch.Tensor
    counts: torch.Tensor

    def __init__(self, conv: list[int], state: list[int]):
        super().__init__()
        self.shapes = {"conv": tuple(conv), "state": tuple(state)}
        self.seen = 0

    def memory(self) -> dict[str, torch.Tensor]:
        """All tensors, by name, with the room that some may have ahead of the tokens; empty before the first token."""
        return {name: getattr(self, name) for name in self.names} if self.is_initialized else {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the layer holds, by name; empty before the first token."""
        return self.memory()

    def fill(self, tensors: dict[str, torch.Tensor], seen: int) -> None:
        """Hold what `tensors` gave of a layer that had seen as many columns."""
        for name in self.names:
            setattr(self, name, tensors[name])
        self.seen, self.is_initialized = seen, True

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that each token of a row adds."""
        return 0

    def _map(self, change) -> None:
        for name, tensor in self.memory().items():
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


class StateCache(Cache):
    """A `StateLayer` for each block. Make one of the subclasses: SSDCache, RodimusCache, TaipanCache.

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
        return [StateLayer(**layout["shapes"]) for _ in range(layout["num_layers"])]

    @staticmethod
    def layout(config) -> dict:
        """{"num_layers": int, "shapes": {name: shape without the batch}} for a configuration."""
        raise ValueError("StateCache is a base class; use the cache of a model, for example SSDCache(model).")

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """Refused: only attention calls it, of a model that this cache is not for."""
        raise ValueError(
            f"A {type(self).__name__} holds recurrent states, and this model's attention has keys and values to keep. "
            "Pass the model's own cache, or DynamicCache(config=model.config)."
        )

    def __deepcopy__(self, memo):
        """A fork, which has no gradient."""
        new = memo[id(self)] = type(self).__new__(type(self))
        with Detached():
            new.__dict__ |= copy.deepcopy(self.__dict__, memo)
        return new

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.memory().values())

    @classmethod
    def row_bytes(cls, config, dtype: torch.dtype) -> tuple[int, int]:
        """(bytes of one row of a batch, bytes that each token adds, room ahead of the tokens left out)."""
        cache = cls(config)
        for layer in cache.layers:
            layer.lazy_initialization(torch.empty(1, dtype=dtype, device="meta"))
        return cache.nbytes, sum(layer.token_bytes(dtype) for layer in cache.layers)

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
        if needed != self.shape:
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
            layer.fill({name: tensors[f"{i}.{name}"] for name in layer.names}, about["seen"])
        return cache
