"""Keys and values of one layer under adaptive token release: m slots of each row, written where something leaves.

B batch, q new, r brought back, m slots, w slots in use, H key heads, P head size.
"""

from dataclasses import dataclass

import torch
from transformers.cache_utils import CacheLayerMixin

from scrubjay.kernels.rotary import turned, unturned
from scrubjay.kernels.slots import put_rows
from scrubjay.modeling.caches.buffers import appended, roomy, writable
from scrubjay.modeling.caches.host_rows import HostRows
from scrubjay.modeling.decoder.decoder_call import attendable, sizes_of


@dataclass
class Step:
    """What all layers do in one call. target: (B, c) slots of the last c entries, m where one is not stored.

    rebuilt: tokens in front of the q new ones that run through the model again. back: (B, r) numbers, on the host, of
    the rows that come back from there in their place; None where none do.
    own, held: compact positions only: (cos, sin) of the entries that run through the model and of what was held
    before, slots and rows from the host, (B, ., P) each.
    """

    rebuilt: int
    new: int
    width: int
    target: torch.Tensor
    back: torch.Tensor | None = None
    own: tuple[torch.Tensor, torch.Tensor] | None = None
    held: tuple[torch.Tensor, torch.Tensor] | None = None


class AdoreLayer(CacheLayerMixin):
    """m keys and values of each row, and one place for what is not stored. keys, values: (B, H, m + 1, P).

    Keys are stored as they are attended, or before their rotation where positions are compact. host: `HostRows` of all
    tokens, where released ones come back from host memory; None where they run through the model again. A token is
    written there when it comes, not when it is released: then nothing is left to move when it leaves its slot, and
    what a call writes is one piece.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, size: int, host: bool = False):
        super().__init__()
        self.size, self.seen = size, 0
        self.host = HostRows() if host else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate zeros for the batch, heads, dtype and device of (B, H, ., P) inputs."""
        batch, heads = key_states.shape[:2]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(batch, heads, self.size + 1, key_states.shape[-1])
        self.values = value_states.new_zeros(batch, heads, self.size + 1, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states, value_states, step: Step, **kwargs):
        """Entries to what this call attends, (B, H, w + r + q, P); stores those that stay.

        key_states, value_states: (B, H, r + q, P), or (B, H, q, P) where r rows come from the host.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        back = [] if step.back is None else [self._back()]
        new: tuple[torch.Tensor, ...] = key_states, value_states
        if step.own is not None:
            new = unturned(key_states, *(x.to(key_states.device) for x in step.own)), value_states
        if self.host is not None:
            self.host.append(*new)
        keys, values = key_states, value_states
        if step.width:
            old = [(self.keys[:, :, : step.width], self.values[:, :, : step.width]), *back]
            held = [key for key, _ in old]
            if step.held is not None:
                held = [turned(appended(*held), *(x.to(held[0].device) for x in step.held))]
            keys = appended(*held, key_states)
            values = appended(*(value for _, value in old), value_states)
        if back and step.target.shape[1] > step.new:  # they compete for the slots
            new = tuple(appended(*pair) for pair in zip(*back, new, strict=True))
        at = step.target.to(key_states.device)[:, None]
        self.keys = self._stored(self.keys, at, new[0])
        self.values = self._stored(self.values, at, new[1])
        self.seen += step.new
        return attendable(keys, values, like=value_states)

    def _back(self):
        """Keys and values (B, H, r, P) that were fetched from the host, as they are stored."""
        return self.host.fetched().split([self.keys.shape[-1], self.values.shape[-1]], -1)

    @staticmethod
    def _stored(held, at, entries):
        """Write the last entries to slots: in place, unless a gradient may need what was there."""
        held = roomy(held, entries)
        entries = entries[:, :, -at.shape[2] :].to(held.dtype)
        if torch.is_grad_enabled():
            return held.scatter(2, at[..., None].expand_as(entries), entries)
        return put_rows(writable(held), at, entries)

    def map(self, change) -> None:
        """Apply a change of rows."""
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask for `query_length` new columns."""
        return min(self.seen, self.size) + query_length, 0

    def get_seq_length(self) -> int:
        """Columns seen, not columns held."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def reset(self) -> None:
        """Forget every token and the batch's size."""
        self.keys = self.values = None  # type: ignore[assignment]
        self.host = None if self.host is None else HostRows()
        self.is_initialized, self.seen = False, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what was released to admit a token cannot be put back."""
        if tokens_to_remove != 0:
            raise ValueError(
                f"An AdoreCache cannot give {abs(tokens_to_remove)} tokens back: others were released to admit them. "
                "So assisted decoding and prompt look-up are not possible; to return to a point, keep a copy of the "
                "cache (copy.deepcopy(cache) or cache.save(path))."
            )


def row_bytes(config, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes of one row of a batch, bytes that each token adds) in an `AdoreCache` of an Adore model, without the table
    of distances that all rows share and the room ahead of the tokens.

    A row: keys and values, slots, the count and the state of the controller. A token: its position, whether it is one,
    the features of the controller, of which static scores keep the score alone, and where tokens are rebuilt its id or
    embedding, or its keys and values on the host and their number.
    """
    layers, heads, size = sizes_of(config)
    pair = layers * heads * 2 * size * dtype.itemsize
    token = 4 + 1 + (4 if config.score_mode == "static" else config.controller_hidden * dtype.itemsize)
    if config.rebuild and config.rebuild_from == "host":
        token += 4 + pair
    elif config.rebuild:
        token += 4 if config.store == "ids" else config.hidden_size * dtype.itemsize
    return pair * (config.cache_size + 1) + 8 * config.cache_size + 8 + 4 * config.controller_hidden, token
