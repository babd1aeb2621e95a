"""Where all keys and values of a layer lie that a cache does not hold on the device in their own dtype: in host memory,
in few bits, or both. They are read in pages of columns, and by rows.

B batch, G key heads, P head size, T new columns, n columns held, M chosen.
"""

import torch

from scrubjay.kernels.pages import (
    GROUP,
    dequantize_keys,
    dequantize_rows,
    dequantize_values,
    quantize_keys,
    quantize_values,
)
from scrubjay.kernels.recycle import gather
from scrubjay.modeling.caches.buffers import appended, written
from scrubjay.modeling.caches.kept_keys import TAIL

PAGE = 1024  # columns that are on the device at a time, a multiple of the columns of a group


class HostKeys:
    """Exact keys and values in host memory, pinned where the text is on a CUDA device.

    keys, values: (B, G, capacity, P).
    """

    names = ("keys", "values")

    def __init__(self):
        self.keys = self.values = None

    def append(self, k, v, used):
        """Write columns (B, G, T, P) behind `used` ones."""
        empty = pinned_empty if k.device.type == "cuda" else torch.empty
        self.keys, self.values = (
            written(held, new.detach().to("cpu"), used, empty=empty) for held, new in ((self.keys, k), (self.values, v))
        )

    def crop(self, columns):
        """Later columns are written over."""

    def pages(self, start, columns, device):
        """Keys and values (B, G, m, P) from `start` up to `columns`, on the device; the next is on its way there."""
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        following = self._fetch(start, columns, device, stream)
        for at in range(start, columns, PAGE):
            pair, done = following
            if at + PAGE < columns:
                following = self._fetch(at + PAGE, columns, device, stream)
            if done is not None:
                now = torch.cuda.current_stream(device)
                now.wait_event(done)
                for x in pair:
                    x.record_stream(now)
            yield pair

    def _fetch(self, start, columns, device, stream):
        """A page's copies, and the event that follows them on the stream (None without one)."""
        stop = min(start + PAGE, columns)
        with torch.cuda.stream(stream):
            pair = [self._copied(x, start, stop, device) for x in (self.keys, self.values)]
            return pair, None if stream is None else stream.record_event()

    @staticmethod
    def _copied(x, start, stop, device):
        """Columns of x, each head's in one piece: what is not is copied on the host before it travels."""
        page = x.new_empty(*x.shape[:2], stop - start, x.shape[3], device=device)
        for b in range(len(x)):
            for g in range(x.shape[1]):
                page[b, g].copy_(x[b, g, start:stop], non_blocking=True)
        return page

    def rows(self, index):
        """Keys and values (B, G, M, P) at index (B, G, M), gathered on the host."""
        at = index.to("cpu")
        return tuple(gather(x, at).to(index.device) for x in (self.keys, self.values))


class FewBitKeys:
    """Keys and values of 8 or 4 bits, as `kernels/pages.py` says; the newest are exact, 64 of them at least, so that
    what `crop` leaves was never rounded.

    key_codes, value_codes: (B, G, capacity, P or P / 2). key_scales: (B, G, groups, 2 P). value_scales: (B, G,
    capacity, 2 groups of channels). recent_keys, recent_values: (B, G, r, P), the columns behind the `coded` ones.
    """

    names = ("key_codes", "key_scales", "value_codes", "value_scales", "recent_keys", "recent_values")

    def __init__(self, bits):
        self.bits, self.coded = bits, 0
        for name in self.names:
            setattr(self, name, None)

    def append(self, k, v, used):
        """Write columns (B, G, T, P) behind `used` ones."""
        k, v = k.detach(), v.detach()
        if self.recent_keys is not None:
            k, v = appended(self.recent_keys, k), appended(self.recent_values, v)
        whole = max(0, k.shape[2] - TAIL) // GROUP * GROUP
        if whole:
            keys = quantize_keys(k[:, :, :whole], self.bits)
            values = quantize_values(v[:, :, :whole], self.bits)
            for name, new in zip(self.names, (*keys, *values), strict=False):
                before, least = self.coded, 256
                if name == "key_scales":
                    before, least = before // GROUP, 256 // GROUP
                setattr(self, name, written(getattr(self, name), new, before, least))
            self.coded += whole
        # a copy, which does not hold the memory of a whole prompt
        self.recent_keys, self.recent_values = (x[:, :, whole:].clone() for x in (k, v))

    def crop(self, columns):
        """Forget all but the first `columns`, which are never fewer than the coded ones."""
        self.recent_keys, self.recent_values = (
            x[:, :, : columns - self.coded] for x in (self.recent_keys, self.recent_values)
        )

    def pages(self, start, columns, device):
        """Keys and values (B, G, m, P) from `start` up to `columns`, in the dtype that was given."""
        coded = min(self.coded, columns)
        for at in range(start, coded, PAGE):
            yield self._columns(at, min(at + PAGE, coded))
        if (first := max(start, coded)) < columns:
            yield tuple(
                x[:, :, first - self.coded : columns - self.coded] for x in (self.recent_keys, self.recent_values)
            )

    def _columns(self, start, stop):
        """Keys and values of coded columns; whole groups of keys are read."""
        first, last = start // GROUP, -(-stop // GROUP)
        codes = self.key_codes[:, :, first * GROUP : last * GROUP]
        k = dequantize_keys(codes, self.key_scales[:, :, first:last], self.bits, self.recent_keys.dtype)
        v = dequantize_values(
            self.value_codes[:, :, start:stop], self.value_scales[:, :, start:stop], self.bits, self.recent_values.dtype
        )
        return k[:, :, start - first * GROUP : stop - first * GROUP], v

    def rows(self, index):
        """Keys and values (B, G, M, P) at index (B, G, M)."""
        recent = self.recent_keys.shape[2]
        newer = [gather(x, (index - self.coded).clamp(0, recent - 1)) for x in (self.recent_keys, self.recent_values)]
        if not self.coded:
            return tuple(newer)
        at, is_coded = index.clamp(max=self.coded - 1), (index < self.coded)[..., None]
        scales = gather(self.key_scales, at // GROUP)
        k = dequantize_rows(gather(self.key_codes, at), scales, self.bits, newer[0].dtype)
        v = dequantize_values(gather(self.value_codes, at), gather(self.value_scales, at), self.bits, newer[1].dtype)
        return torch.where(is_coded, k, newer[0]), torch.where(is_coded, v, newer[1])


class HeldKeys:
    """Both: what is read in pages is the few bits where there are any, and what is chosen is exact where it is held.

    Args:
        bits: 8, 4 or None. host: whether exact keys lie on the host.
    """

    def __init__(self, bits, host):
        self.parts = ({"few": FewBitKeys(bits)} if bits else {}) | ({"host": HostKeys()} if host else {})

    def append(self, k, v, used):
        """Write columns (B, G, T, P) behind `used` ones."""
        for part in self.parts.values():
            part.append(k, v, used)

    def crop(self, columns):
        """Forget all but the first `columns`."""
        for part in self.parts.values():
            part.crop(columns)

    def pages(self, columns, device, start=0):
        """(keys, values), (B, G, m, P) each, in turn: the columns from `start` up to `columns`."""
        return next(iter(self.parts.values())).pages(start, columns, device)

    def rows(self, index):
        """Keys and values (B, G, M, P) at index (B, G, M), where the index lies."""
        return list(self.parts.values())[-1].rows(index)

    def exact_pages(self, columns, device):
        """`pages` of what is exact, where there is any."""
        return list(self.parts.values())[-1].pages(0, columns, device)

    @property
    def coded(self):
        """Columns of which there are few bits."""
        return self.parts["few"].coded if "few" in self.parts else 0

    @coded.setter
    def coded(self, columns):
        if "few" in self.parts:
            self.parts["few"].coded = columns

    @property
    def rounded(self):
        """Whether columns are held in few bits alone."""
        return "host" not in self.parts and self.coded > 0

    def tensors(self):
        """What is held, by name: "host.keys"."""
        named = {f"{at}.{name}": getattr(part, name) for at, part in self.parts.items() for name in part.names}
        return {name: x for name, x in named.items() if x is not None}

    def set(self, name, tensor):
        """Replace one of `tensors`, where it belongs."""
        at, _, name = name.partition(".")
        before = getattr(self.parts[at], name)
        if at == "host" and (tensor.device.type == "cuda" or (before is not None and before.is_pinned())):
            tensor = tensor.to("cpu").pin_memory()
        setattr(self.parts[at], name, tensor)


def pinned_empty(*shape, dtype):
    """Host memory from which a CUDA device reads by itself."""
    return torch.empty(*shape, dtype=dtype, pin_memory=True)
