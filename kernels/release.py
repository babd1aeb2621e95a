"""Which tokens stay, which come back, and who sees whom (ADORE, adaptive token release, arXiv:2407.02328).

    rank_i = (score_i, pos_i), compared in this order: of two equal scores the newer token wins     ranking
    rebuilt = the R released tokens of the highest rank                                             highest
    kept = the protected tokens, then those of the highest rank, m in all                           survivors
    slot of what enters = the free slots in ascending order                                         placement
    query a sees key b  iff  b is real and pos_b <= pos_a, or b is a itself                         visibility

B batch, C candidates, m budget, Q queries, K keys, H heads, P head size.
score: (B, C) float   pos: (B, C) int, below 2^31   real: (B, C) bool
Positions of a row's real tokens are pairwise distinct, so ranks are too, on every device.
"""

import torch

from scrubjay.kernels.dispatch import choose
from scrubjay.kernels.release_triton import (
    ranking_fits,
    ranking_triton,
    release_step_fits,
    release_step_triton,
)

PROTECTED = 1 << 62  # above the rank of every finite or infinite score
UNREAL = -(1 << 63)
COLUMN = (1 << 31) - 1  # the bits of a rank that hold the position


def ordered(score: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    """int64 that orders (score, pos) as the pairs order. score: without NaN, taken in float32. pos: below 2^31.

    A float's bits, read as an integer with the lower 31 flipped where it is negative, order as the float does.
    """
    bits = (score.float() + 0.0).view(torch.int32)  # -0 is 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long().mul_(1 << 31).add_(pos)


def ranking(
    score: torch.Tensor,
    pos: torch.Tensor,
    real: torch.Tensor,
    protected: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """(B, C) int64 that orders candidates as (score, pos) does; the protected above all, what is not real below.

    NaN ranks as the smallest score. backend: None chooses by device; "torch" and "triton" are obeyed or refused.
    """
    if choose(backend, "ranking", score, fused=ranking_fits(score, pos)) == "triton":
        return ranking_triton(score, pos, real, protected)
    rank = ordered(torch.nan_to_num(score.float(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), pos)
    if protected is not None:
        rank = torch.where(protected, PROTECTED + pos.long(), rank)
    return rank.masked_fill(~real, UNREAL)


def highest(rank: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (B, count) of the highest ranks, the highest first, and which of them are real, (B, count) bool."""
    found = rank.topk(count, dim=1)
    return found.indices, found.values != UNREAL


def survivors(rank: torch.Tensor, budget: int) -> torch.Tensor:
    """(B, C) bool: the `budget` real candidates of the highest rank, or all where there are no more."""
    real = rank != UNREAL
    excess = rank.shape[1] - budget
    if excess <= 0:
        return real
    if excess == 1:  # one decode step: the lowest leaves
        return real & (rank > rank.amin(1, keepdim=True))
    return real & (rank >= rank.topk(budget, dim=1).values[:, -1:])


def placement(taken: torch.Tensor, enters: torch.Tensor) -> torch.Tensor:
    """(B, C) slots for what enters, (B, C) bool: the free ones in order; m for what does not.

    taken: (B, m) bool, slots that keep what they hold. At most as many may enter a row as it has free slots.
    """
    slots = taken.shape[1]
    free = taken.int().argsort(dim=1, stable=True)
    turn = (enters.cumsum(1) - 1).clamp(0, slots - 1)
    return free.gather(1, turn).masked_fill(~enters, slots)


def release_step(
    score: torch.Tensor,
    pos: torch.Tensor,
    real: torch.Tensor,
    columns: torch.Tensor,
    slots: torch.Tensor,
    width: int,
    counts: torch.Tensor,
    sinks: int,
    recent: int,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Let the entries of a row compete for its m slots: `ranking`, `survivors` and `placement`.

    Args:
        score, pos, real, columns: (B, C), of what the first w slots hold and then of what may enter; columns: int64,
            what a slot notes of its entry.
        slots: (B, m) int64, -1 where a slot is free. width: w.
        counts: (B,) int64, tokens of the row. Positions below `sinks` and the last `recent` are protected.

    Returns:
        Which of the first w stay, (B, w) bool; slots for the others, (B, C - w), m for what does not stay; the slots
        afterwards, (B, m).
    """
    if choose(backend, "release_step", score, fused=release_step_fits(score, pos, slots, width)) == "triton":
        return release_step_triton(score, pos, real, columns, slots, width, counts, sinks, recent)
    budget = slots.shape[1]
    protected = (pos < sinks) | (pos >= counts[:, None] - recent)
    kept = survivors(ranking(score, pos, real, protected, backend=backend), budget)
    stays = torch.nn.functional.pad(kept[:, :width], (0, budget - width))
    target = placement(stays, kept[:, width:])
    after = torch.nn.functional.pad(slots.masked_fill(~stays, -1), (0, 1)).scatter(1, target, columns[:, width:])
    return kept[:, :width], target, after[:, :-1]


def visibility(query_pos: torch.Tensor, key_pos: torch.Tensor, key_real: torch.Tensor) -> torch.Tensor:
    """(B, Q, K) bool: what each query sees. The queries (B, Q) are the last Q keys, in the same order."""
    seen = key_real[:, None] & (key_pos[:, None] <= query_pos[:, :, None])
    queries = query_pos.shape[1]
    seen[:, :, -queries:] |= torch.eye(queries, dtype=torch.bool, device=seen.device)
    return seen


def compacted(pos: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """(B, K) positions numbered from 0 among the real ones of each row, in their order; 0 for the others."""
    last = torch.iinfo(pos.dtype).max
    order = pos.masked_fill(~real, last).argsort(dim=1, stable=True).argsort(dim=1)
    return order.masked_fill(~real, 0)
