"""Rows written into slots of a buffer, in place: PyTorch alone.

B batch, G heads, C slots, c rows, P head size.
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
