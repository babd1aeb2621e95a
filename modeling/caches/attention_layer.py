"""The cache layer of full attention: keys and values that are kept for good, in memory that grows in steps.

B batch, T new columns, S slots, K key heads, P head size, C convolved channels.
"""

import torch
import torch.nn.functional as F

from scrubjay.kernels.dispatch import traced
from scrubjay.kernels.slots import put_rows
from scrubjay.modeling.caches.buffers import roomy, writable
from scrubjay.modeling.caches.cache_state import StateLayer

LEAST = 64  # slots


def room(size: int) -> int:
    """Slots that are taken for `size` columns: more of them by an eighth at most, or up to a multiple of 64.

    They depend on the number of columns alone. So a step copies nothing but what it writes; each time that the room is
    used up, after an eighth of the text or less, all of it is copied once, as a single step reads it.
    """
    step = max(LEAST, 2 ** ((size - 1).bit_length() - 1) // 8) if size > 1 else LEAST
    return -(-size // step) * step


class AttentionLayer(StateLayer):
    """All keys and values of one attention layer: bytes grow with the text.

    keys, values: (B, K, room, P), positions already encoded; the c-th token of a row is at slot c, and zeros are in the
    slots beyond a row's count. conv: (B, taps - 1, C) last inputs of the convolution over queries, keys and values,
    from before it; none without. counts: (B,) int64, real tokens seen by each row.

    Args:
        conv: shape without the batch. keys: [K, P].
    """

    keys: torch.Tensor
    values: torch.Tensor
    grows = {"keys": 2, "values": 2}

    def __init__(self, conv: list[int], keys: list[int]):
        super().__init__(conv, [])
        self.shapes = {"conv": tuple(conv), "keys": tuple(keys)}
        self.names = (*(("conv",) if conv[0] else ()), "counts", "keys", "values")

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the layer holds, without the room ahead of the tokens."""
        return {name: x.narrow(2, 0, self.seen) if name in self.grows else x for name, x in self.memory().items()}

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Allocate for the batch, dtype and device of (B, ...) inputs: no room yet."""
        batch, (heads, size) = key_states.shape[0], self.shapes["keys"]
        if "conv" in self.names:
            self.conv = key_states.new_zeros(batch, *self.shapes["conv"])
        self.counts = torch.full((batch,), self.seen, dtype=torch.int64, device=key_states.device)
        self.keys = key_states.new_zeros(batch, heads, 0, size)
        self.values = key_states.new_zeros(batch, heads, 0, size)
        self.is_initialized = True

    def fill(self, tensors: dict[str, torch.Tensor], seen: int) -> None:
        """Hold what `tensors` gave; the columns that it had seen are the slots of its keys."""
        super().fill(tensors, tensors["keys"].shape[2])
        if not traced():
            self._enlarge(room(self.seen))

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the key and the value of one token."""
        heads, size = self.shapes["keys"]
        return 2 * heads * size * dtype.itemsize

    def prepare(self, like: torch.Tensor) -> None:
        """Be allocated, on the device and, when new, in the dtype of (B, ...) `like`."""
        if not self.is_initialized:
            self.lazy_initialization(like)
        if self.counts.device != like.device:
            self._map(lambda tensor: tensor.to(like.device))

    def append(
        self, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v (B, T, K, P) to the slots that follow each row's count; `count` says later that they are there.

        real: (B, T, 1) bool, the first columns of each row; None: all.
        Returns: keys and values up to the last slot in use, (B, K, seen + T, P).
        """
        if real is not None:
            k, v = (torch.where(real[..., None], x, 0) for x in (k, v))
        size, k, v = self.seen + k.shape[1], k.transpose(1, 2), v.transpose(1, 2)
        slots = None
        if self.seen:
            slots = self.counts[:, None] + torch.arange(k.shape[2], device=k.device)
        if torch.is_grad_enabled() or traced():  # what was held may be needed as it was
            self.keys, self.values = self._extended(self.keys, k, slots), self._extended(self.values, v, slots)
        else:
            self.keys, self.values = roomy(self.keys, k), roomy(self.values, v)
            if size > self.keys.shape[2]:
                self._enlarge(room(size))
            self.keys, self.values = writable(self.keys), writable(self.values)
            for held, new in ((self.keys, k), (self.values, v)):
                if slots is None:
                    held[:, :, :size] = new
                else:
                    put_rows(held, slots[:, None], new.to(held.dtype))
        return self.keys.narrow(2, 0, size), self.values.narrow(2, 0, size)

    def hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take the keys and values (B, n, K, P) of all n columns so far, those that `skip` counted among them."""
        self.keys, self.values = (x.transpose(1, 2).contiguous() for x in (keys, values))

    def _extended(self, held, new, slots):
        if slots is None:
            return new.contiguous()
        longer = F.pad(roomy(held.narrow(2, 0, self.seen), new), (0, 0, 0, new.shape[2]))
        at = slots[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
        return longer.scatter(2, at, new.to(longer.dtype))

    def _enlarge(self, slots):
        for name in self.grows:
            held = getattr(self, name)
            larger = held.new_zeros(*held.shape[:2], slots, held.shape[3])
            larger[:, :, : held.shape[2]] = held
            setattr(self, name, larger)
