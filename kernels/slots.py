"""Rows written into slots of a buffer, in place, and rows read from it: PyTorch alone.

B batch, G heads, C slots, n columns, c or M rows, P head size.
"""

import torch

from scrubjay.kernels.dispatch import traced

NARROW = (torch.bfloat16, torch.float16)


def put_rows(buffer, slots, rows):
    """Write rows (B, G, c, ...) to `slots` (B or 1, G or 1, c) of a buffer (B, G, C, ...) of their dtype, in place.

    Where a slot is named twice, it gets one of its rows. On a CPU `scatter_` copies all of a buffer of 16 bits.
    """
    if buffer.dtype in NARROW and buffer.device.type == "cpu" and not traced():
        batch, heads = (torch.arange(size) for size in buffer.shape[:2])
        buffer[batch[:, None, None], heads[:, None], slots] = rows
        return buffer
    return buffer.scatter_(2, slots.view(*slots.shape, *(1,) * (rows.ndim - 3)).expand_as(rows), rows)


def take_rows(buffers, index, outs):
    """Rows `index` (B, G, M) of each of the buffers (B, G, n, P), on a CPU, into its own of `outs` (B, G, M, P)."""
    flat, of = None, None
    for x, out in zip(buffers, outs, strict=True):
        (B, G), P, strides = x.shape[:2], x.shape[3], x.stride()
        if not (out.is_contiguous() and strides[3] == 1 and strides[2] == P and strides[0] % P == strides[1] % P == 0):
            for b in range(B):
                for g in range(G):
                    torch.index_select(x[b, g], 0, index[b, g], out=out[b, g])
            continue
        if flat is None or of != strides:  # among the rows of all heads, and so one call
            first = torch.arange(B)[:, None] * (strides[0] // P) + torch.arange(G) * (strides[1] // P)
            flat, of = (index + first[..., None]).view(-1), strides
        count = 1 + sum((size - 1) * stride for size, stride in zip(x.shape[:3], strides[:3], strict=True)) // P
        torch.index_select(x.as_strided((count, P), (P, 1)), 0, flat, out=out.view(-1, P))
    return outs
