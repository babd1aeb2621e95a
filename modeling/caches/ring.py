"""A ring of the last W keys and values: which steps end in it, and reading and writing its slots.

B batch, W ring size, S slots of a row, K key heads, P head size.
"""

import torch

from scrubjay.kernels.dispatch import exported, traced
from scrubjay.kernels.slots import put_rows
from scrubjay.modeling.caches.buffers import roomy, writable


def last_steps(x: torch.Tensor, lengths: torch.Tensor | None, window: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which steps of x (B, T, ...) a window ends with, (B, S) in order, and which of them are real (None: all).

    S = min(T, W); in an exported program, whose T may be any, W.
    """
    (B, T), any_length = x.shape[:2], exported() and x.shape[1] != 1
    ends = torch.full((B,), T, dtype=torch.int64, device=x.device) if lengths is None else lengths
    steps = ends[:, None] + torch.arange(-(window if any_length else min(T, window)), 0, device=x.device)
    return steps, None if lengths is None and not any_length else steps >= 0


def _at(slots: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return slots[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])


def take_slots(ring: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """(B, K, W, P), (B, S) -> (B, K, S, P)."""
    return ring.gather(2, _at(slots, ring))


def put_slots(ring: torch.Tensor, slots: torch.Tensor, new: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Write (B, K, S, P) to slots (B, S), distinct in a row. In place unless a gradient may need what was there, or it
    is the input of a program, of which a compiler does not see whether inference mode made it."""
    ring = roomy(ring, new)
    new = new.to(ring.dtype)
    if real is not None:
        new = torch.where(real[:, None, :, None], new, take_slots(ring, slots))
    if torch.is_grad_enabled() or traced():
        return ring.scatter(2, _at(slots, ring), new)
    return put_rows(writable(ring), slots[:, None], new)
