"""Keys and values of a layer in 8 or 4 bits, after KIVI (arXiv:2402.02750).

    x is held as  low + step * code,  code in 0 .. 2^bits - 1,  low = min x,  step = (max x - min x) / (2^bits - 1)

Of keys, whose channels differ more than their columns do, 32 columns of a channel share low and step; of values, 32
channels of a column. So a number is off by half a step, and by what rounding low and step to the dtype adds. The newest
columns stay exact until none of a group may be taken back any more.

B batch, G key heads, P head size, n columns held, T new ones, M rows, C codes of a row in bytes: P * bits / 8.
"""

import math
from typing import Any

import torch

from scrubjay.kernels.recycle import gather, gather_pair
from scrubjay.modeling.caches.buffers import appended, writable

GROUP = 32  # columns, or channels, of a low and a step
ROOM = 8  # groups of columns by which buffers grow at least


class FewBits:
    """What a layer holds of its keys and values; how many columns it has seen is said with each call.

    key_codes, value_codes: (B, G, ., C) uint8. key_low, key_step: (B, G, . / 32, P). value_low, value_step:
    (B, G, ., P / 32). new_keys, new_values: (B, G, m, P), the last m columns of all, exact.
    """

    names = (
        *("key_codes", "key_low", "key_step", "value_codes", "value_low", "value_step"),
        *("new_keys", "new_values"),
    )

    new_keys: Any
    new_values: Any

    def __init__(self, bits: int, exact: int):
        """bits: 8 or 4. exact: newest columns that are exact whatever comes."""
        self.bits, self.exact = bits, exact
        for name in self.names:
            setattr(self, name, None)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is held, by name."""
        return {name: x for name in self.names if (x := getattr(self, name)) is not None}

    def coded(self, seen: int) -> int:
        """Columns in few bits, of so many seen."""
        return 0 if self.new_keys is None else seen - self.new_keys.shape[2]

    def append(self, k, v, seen: int) -> None:
        """Take keys and values (B, G, T, P), after which `seen` columns are seen."""
        done = self.coded(seen - k.shape[2])
        keys, values = (k, v) if self.new_keys is None else (appended(self.new_keys, k), appended(self.new_values, v))
        ready = max(0, (seen - self.exact) // GROUP * GROUP - done)
        if ready:
            self._write(keys[:, :, :ready], values[:, :, :ready], done)
        self.new_keys, self.new_values = (x[:, :, ready:].clone() for x in (keys, values))

    def _write(self, keys, values, done):
        key = quantized(keys.unflatten(2, (-1, GROUP)), 3, self.bits)
        value = quantized(values.unflatten(3, (-1, channels(values.shape[3]))), 4, self.bits)
        codes, low, step = (x.flatten(2, 3) for x in key)
        self.key_codes = grown(self.key_codes, packed(codes, self.bits), done, GROUP)
        self.key_low, self.key_step = (
            grown(held, x, done // GROUP, 1) for held, x in ((self.key_low, low), (self.key_step, step))
        )
        codes, low, step = (x.flatten(3, 4) for x in value)
        self.value_codes = grown(self.value_codes, packed(codes, self.bits), done, GROUP)
        self.value_low, self.value_step = (
            grown(held, x, done, GROUP) for held, x in ((self.value_low, low), (self.value_step, step))
        )

    def whole(self, seen: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, G, seen - start, P) of the columns from `start` on."""
        done = self.coded(seen)
        if start >= done:
            return self.new_keys[:, :, start - done :], self.new_values[:, :, start - done :]
        first = start // GROUP * GROUP
        columns = torch.arange(first, done, device=self.key_codes.device).expand(*self.key_codes.shape[:2], -1)
        keys, values = self._coded_rows(columns, slice(first, done))
        keys, values = keys[:, :, start - first :], values[:, :, start - first :]
        return appended(keys, self.new_keys), appended(values, self.new_values)

    def rows(self, index, seen: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, G, M, P) of the columns `index` (B, G, M)."""
        done = self.coded(seen)
        new = gather_pair(self.new_keys, self.new_values, (index - done).clamp(min=0))
        if not done:
            return new
        coded = self._coded_rows(index.clamp(max=done - 1), None)
        is_new = (index >= done)[..., None]
        return torch.where(is_new, new[0], coded[0]), torch.where(is_new, new[1], coded[1])

    def _coded_rows(self, index, part: slice | None):
        """Of columns `index` (B, G, M), which are those of the slice where one is given: it reads them in place."""

        def of(x, every=1):
            if part is None:
                return gather(x, index // every)
            return x[:, :, part.start // every : part.stop // every].repeat_interleave(every, 2)

        wide = torch.promote_types(self.key_low.dtype, torch.float32)
        low, step = (of(x, GROUP).to(wide) for x in (self.key_low, self.key_step))
        keys = low + step * unpacked(of(self.key_codes), self.bits)
        low, step = (of(x)[..., None].to(wide) for x in (self.value_low, self.value_step))
        codes = unpacked(of(self.value_codes), self.bits)
        values = (low + step * codes.unflatten(3, (-1, channels(codes.shape[3])))).flatten(3)
        return keys.to(self.new_keys.dtype), values.to(self.new_values.dtype)

    def crop(self, columns: int, seen: int) -> None:
        """Have seen `columns`, none of which is to be coded."""
        keep = columns - self.coded(seen)
        self.new_keys, self.new_values = self.new_keys[:, :, :keep], self.new_values[:, :, :keep]


def channels(size: int) -> int:
    """Channels of a value that share low and step: 32, or fewer that divide the head."""
    return math.gcd(size, GROUP)


def quantized(x, dim: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes of x's shape, uint8, and low and step, 1 along `dim`, in x's dtype: what is coded is what these say."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = wide.amin(dim, keepdim=True), wide.amax(dim, keepdim=True)
    low, step = low.to(x.dtype), ((high - low) / (2**bits - 1)).to(x.dtype)
    codes = (wide - low) / torch.where(step > 0, step, 1)
    return codes.round_().clamp_(0, 2**bits - 1).to(torch.uint8), low, step


def packed(codes, bits: int):
    """(..., C) bytes of codes (..., P): two of 4 bits in one, the even channel in the lower half."""
    return codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4


def unpacked(held, bits: int):
    """The inverse of `packed`."""
    return held if bits == 8 else torch.stack([held & 15, held >> 4], -1).flatten(-2)


def few_bits_bytes(heads: int, size: int, bits: int, dtype: torch.dtype) -> int:
    """Of a column: a key and a value of P = size numbers for each head, low and step among them."""
    of_keys, of_values = 2 * size / GROUP, 2 * (size // channels(size))
    return round(heads * (2 * size * bits / 8 + (of_keys + of_values) * dtype.itemsize))


def grown(held, new, used: int, unit: int):
    """The buffer (B, G, ., X) with new rows behind `used` ones, in memory larger by a quarter if they do not fit."""
    needed = used + new.shape[2]
    if held is None or held.shape[2] < needed:
        larger = new.new_empty(*new.shape[:2], needed + max(ROOM * unit, needed // 4), new.shape[3])
        if used:
            larger[:, :, :used] = held[:, :, :used]
        held = larger
    held = writable(held)
    held[:, :, used:needed] = new
    return held
