"""The largest numbers of each row, in any order: PyTorch's `topk`, or numpy's choice on a CPU.

numpy's has no branches where the processor has AVX2 or AVX-512.
"""

import numpy as np
import torch

from scrubjay.kernels.dispatch import traced
from scrubjay.kernels.slots import NARROW


def largest(x: torch.Tensor, count: int) -> torch.Tensor:
    """(..., n) -> (..., count) of its numbers. NaN is larger than all."""
    if _by_torch(x, count):
        return x.topk(count, sorted=False).values
    return torch.from_numpy(np.partition(x.detach().numpy(), -count, axis=-1)[..., -count:])


def largest_columns(x: torch.Tensor, count: int) -> torch.Tensor:
    """(..., n) -> (..., count) int64: where its largest numbers stand. Of equal ones any is taken."""
    if _by_torch(x, count):
        return x.topk(count, sorted=False).indices
    x = x.float() if x.dtype in NARROW else x  # numpy has no bfloat16
    return torch.from_numpy(np.argpartition(x.detach().numpy(), -count, axis=-1)[..., -count:].copy())


def _by_torch(x, count):
    return x.device.type != "cpu" or traced() or not count
