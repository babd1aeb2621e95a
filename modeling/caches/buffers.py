"""Tensors of keys and values that grow, or are written again: dtypes and inference mode that they must outlive."""

import torch


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
