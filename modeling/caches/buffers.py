"""Tensors of keys and values that grow, or are written again: dtypes and inference mode that they must outlive."""

import torch

GROWTH = 1.25  # of a full buffer


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


def appended(held: torch.Tensor, *new: torch.Tensor) -> torch.Tensor:
    """(B, K, S, P) and (B, K, T, P), ... -> (B, K, S + T + ..., P). Autocast's own `cat` takes two dtypes at most."""
    held = roomy(held, *new)
    return torch.cat([held, *(x.to(held.dtype) for x in new)], 2)


def written(buffer, new, used, least=256, empty=None):
    """The buffer (B, G, ., P) with new columns written behind `used` ones, in larger memory if they do not fit.

    least: columns of the smallest buffer. empty: makes the memory (shape, dtype), None: the device of `new` has it.
    """
    (B, G, _, P), needed = new.shape, used + new.shape[2]
    buffer = None if buffer is None else roomy(writable(buffer), new)
    if buffer is None or buffer.shape[2] < needed:
        columns = max(least, needed + int(needed * (GROWTH - 1)) if used else needed + least)
        of = new if buffer is None else buffer
        larger = of.new_empty(B, G, columns, P) if empty is None else empty(B, G, columns, P, dtype=of.dtype)
        if used:
            larger[:, :, :used] = buffer[:, :, :used]
        buffer = larger
    buffer[:, :, used:needed] = new
    return buffer
