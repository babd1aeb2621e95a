"""Attention over keys that come in pages, of which no two need be held at once; and keys and values in few bits.

    s_j = scale q . k_j     m = max_j s_j     l = sum_j exp(s_j - m)     o = sum_j exp(s_j - m) v_j / l

m, l and o are kept up over the pages (the online softmax, arXiv:1805.02867), in float32 (float64 for float64).

    key[c, p]   = low[g, p] + step[g, p] * code[c, p]     g: of GROUP columns     (KIVI, arXiv:2402.02750)
    value[c, p] = low[c, g] + step[c, g] * code[c, p]     g: of GROUP channels; where P is no multiple, of all

`low` and `step` are bfloat16, rounded outwards: every number of a group lies between the lowest code and the highest,
and is off by half a step at most, before it is rounded to its dtype. Outwards is by up to 0.4 % of the largest number
of a group, so a step is larger than the range alone would have it where numbers lie far from zero and close together.
Weights (`kernels/bits.py`) are rounded otherwise: their codes are what products of integers take.

B batch, H query heads, G key heads, T queries, n columns, m of a page, P head size.
"""

import torch

from scrubjay.kernels.dispatch import without_autocast

GROUP = 32  # columns of keys, or channels of values, that share `low` and `step`
QUERIES = 64  # whose scores are held at a time
OUTWARDS = 2**-8  # more than bfloat16 loses by rounding


@without_autocast
def attend_pages(q, pages, n, scale, real=None, scores=False):
    """(B, T, H, P) in q's dtype, of the last T of n columns, each of which sees those up to its own.

    Args:
        q: (B, H, T, P). pages: (keys, values) (B, G, m, P) each, together the n columns in their order.
        real: (B, n) bool, None: all are tokens. A query that sees none gets zeros.
        scores: return the log-probabilities (B, H, n) of a single query as well, else None.
    """
    (B, H, T, P), wide, start, found = q.shape, torch.promote_types(q.dtype, torch.float32), 0, []
    top, total = q.new_full((B, H, T, 1), -torch.inf, dtype=wide), q.new_zeros(B, H, T, 1, dtype=wide)
    out = q.new_zeros(B, H, T, P, dtype=wide)
    for keys, values in pages:
        k, v, m = keys.to(wide), values.to(wide), keys.shape[2]
        for first in range(0, T, QUERIES):
            at = slice(first, min(T, first + QUERIES))
            s = torch.matmul(_by_group(q[:, :, at].to(wide), k), k.mT).view(B, H, -1, m) * scale
            if (hidden := _hidden(start, m, range(n - T + at.start, n - T + at.stop), real, q.device)) is not None:
                s.masked_fill_(hidden, -torch.inf)
            if scores:
                found.append(s[:, :, 0])
            new = torch.maximum(top[:, :, at], s.amax(-1, keepdim=True))
            level = new.nan_to_num(neginf=0.0)  # of a query that has seen none
            p, less = (s - level).exp(), (top[:, :, at] - level).exp()
            total[:, :, at] = total[:, :, at] * less + p.sum(-1, keepdim=True)
            out[:, :, at] = out[:, :, at] * less + torch.matmul(_by_group(p, k), v).view(B, H, -1, P)
            top[:, :, at] = new
        start += m
    out = (out / total.clamp(min=torch.finfo(wide).tiny)).transpose(1, 2).to(q.dtype)
    return out, (torch.cat(found, -1) - top[:, :, 0] - total.log()[:, :, 0]) if scores else None


def _by_group(x, k):
    """(B, H, T, .) -> (B, G, H / G * T, .): the heads that share a key are its rows."""
    return x.reshape(*k.shape[:2], -1, x.shape[3])


def _hidden(start, m, queries, real, device):
    """(B or 1, 1, T, m) bool, which columns from `start` the queries at others do not see; None: they see all."""
    columns, hidden = torch.arange(start, start + m, device=device), None
    if start + m - 1 > queries.start:
        hidden = (columns > torch.arange(queries.start, queries.stop, device=device)[:, None])[None, None]
    if real is not None:
        padding = ~real[:, None, None, start : start + m]
        hidden = padding if hidden is None else hidden | padding
    return hidden


def quantize_keys(k, bits):
    """Codes and scales of k (B, G, n, P), n a multiple of GROUP.

    Codes: uint8 (B, G, n, P), of 4 bits (B, G, n, P / 2). Scales: bfloat16 (B, G, n / GROUP, 2 P), `low`, then `step`.
    """
    codes, low, step = _quantize(k.unflatten(2, (-1, GROUP)), bits, 3)
    return _packed(codes.flatten(2, 3), bits), torch.cat([low, step], -1).squeeze(3)


def dequantize_keys(codes, scales, bits, dtype):
    """What `quantize_keys` stands for, (B, G, n, P)."""
    low, step = scales[:, :, :, None].chunk(2, -1)
    return _dequantize(_unpacked(codes, bits).unflatten(2, (-1, GROUP)), low, step, dtype).flatten(2, 3)


def dequantize_rows(codes, scales, bits, dtype):
    """Keys (B, G, M, P) that were chosen, with the scales (B, G, M, 2 P) of the group of each."""
    return _dequantize(_unpacked(codes, bits), *scales.chunk(2, -1), dtype)


def quantize_values(v, bits):
    """Codes as of keys, and bfloat16 (B, G, n, 2 P / GROUP): `low` of each group of channels, then `step`. Any n."""
    codes, low, step = _quantize(v.unflatten(3, (-1, channels(v.shape[3]))), bits, 4)
    return _packed(codes.flatten(3), bits), torch.cat([low, step], 3).squeeze(4)


def dequantize_values(codes, scales, bits, dtype):
    """What `quantize_values` stands for, (B, G, n, P)."""
    codes = _unpacked(codes, bits)
    low, step = scales[..., None].chunk(2, 3)
    return _dequantize(codes.unflatten(3, (-1, channels(codes.shape[3]))), low, step, dtype).flatten(3)


def channels(size):
    """Channels of a value that share `low` and `step`."""
    return GROUP if size % GROUP == 0 else size


def _quantize(x, bits, dim):
    """Codes, and bfloat16 `low` and `step` of the numbers along `dim`."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    low = (low - low.abs() * OUTWARDS).bfloat16()
    step = ((high - low) / (2**bits - 1) * (1 + OUTWARDS)).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    codes = ((x - low.to(x.dtype)) / step.to(x.dtype)).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), low, step


def _dequantize(codes, low, step, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * step.to(wide) + low.to(wide)).to(dtype)


def _packed(codes, bits):
    """Of 4 bits an even channel in the lower half of a byte, the next in the upper, as in `kernels/bits.py`."""
    return codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4


def _unpacked(codes, bits):
    return codes if bits == 8 else torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
