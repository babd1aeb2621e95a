"""Triton kernels of `release.py`: the order of candidates, and all that one decode step decides, in one launch each.

    rank_i = (score_i, pos_i) as one integer                                                        _rank_kernel
    the lowest rank leaves, until m are left; each that stays and has no slot takes the first free one     _step_kernel

B batch, C candidates: what the first w slots hold, then c that may enter. m slots.
"""

import torch

from scrubjay.kernels.triton_tools import jit, launch, tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOST_CANDIDATES = 8192  # one program holds those of a row
MOST_MOVES = 64  # that leave or enter, one after the other


def ranking_fits(score, pos):
    """Whether `ranking_triton` covers the call."""
    return score.dtype in DTYPES and pos.dtype in (torch.int32, torch.int64) and score.ndim == 2 and score.numel() > 0


def ranking_triton(score, pos, real, protected=None):
    """(B, C) int64, to the bit what `ranking` gives."""
    B, C = score.shape
    rank = torch.empty(B, C, dtype=torch.int64, device=score.device)
    pairs = [(0, 0) if x is None else x.stride() for x in (score, pos, real, protected)]
    operands = (score, pos, real, protected, rank, C, *(s for pair in pairs for s in pair))
    launch(_rank_kernel, (B, triton.cdiv(C, 1024)), *operands, BLOCK=1024, num_warps=4)
    return rank


def release_step_fits(score, pos, slots, width):
    """Whether `release_step_triton` covers the call."""
    C, m = score.shape[1], slots.shape[1]
    return (
        ranking_fits(score, pos)
        and max(C, m) <= MOST_CANDIDATES
        and C - m <= MOST_MOVES
        and 0 < C - width <= MOST_MOVES
        and slots.dtype == torch.int64
    )


def release_step_triton(score, pos, real, columns, slots, width, counts, sinks, recent):
    """As `release_step`, to the bit."""
    (B, C), m = score.shape, slots.shape[1]
    kept = torch.empty(B, width, dtype=torch.bool, device=score.device)
    target = torch.empty(B, C - width, dtype=torch.int64, device=score.device)
    after = torch.empty(B, m, dtype=torch.int64, device=score.device)
    strides = [s for x in (score, pos, real, columns, slots) for s in x.stride()]
    operands = (score, pos, real, columns, slots, counts, kept, target, after, C, m, width, sinks, recent, *strides)
    size = triton.next_power_of_2(max(C, m, 32))
    launch(_step_kernel, (B,), *operands, SIZE=size, num_warps=min(16, max(1, size // 256)))
    return kept, target, after


@jit
def _rank_of(score, pos):
    """As `ranking`, of real candidates that nothing protects."""
    x = score.to(tl.float32)
    x = tl.where(x != x, float("-inf"), x)
    x = tl.where(x == 0.0, 0.0, x)  # -0 is 0
    bits = x.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 31) + pos


@jit
def _rank_kernel(score, pos, real, protected, rank, C, s_b, s_c, p_b, p_c, r_b, r_c, o_b, o_c, BLOCK: tl.constexpr):
    """BLOCK candidates of a row."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < C
    at = tl.load(pos + b * p_b + i * p_c, mask=inside, other=0).to(tl.int64)
    order = _rank_of(tl.load(score + b * s_b + i * s_c, mask=inside, other=0.0), at)
    if protected is not None:
        above = tl.load(protected + b * o_b + i * o_c, mask=inside, other=0).to(tl.int1)
        order = tl.where(above, at + 4611686018427387904, order)  # PROTECTED
    there = tl.load(real + b * r_b + i * r_c, mask=inside, other=0).to(tl.int1)
    tl.store(rank + b * C + i, tl.where(there, order, -9223372036854775808), mask=inside)  # UNREAL


@jit
def _step_kernel(
    score,
    pos,
    real,
    columns,
    slots,
    counts,
    kept,
    target,
    after,
    C,
    m,
    width,
    sinks,
    recent,
    s_b,
    s_c,
    p_b,
    p_c,
    r_b,
    r_c,
    c_b,
    c_c,
    h_b,
    h_m,
    SIZE: tl.constexpr,
):
    """One row. Tiles of SIZE hold candidates, and slots: slot i holds candidate i where i < width."""
    LARGEST: tl.constexpr = 9223372036854775807
    b, i = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    inside = i < C
    there = tl.load(real + b * r_b + i * r_c, mask=inside, other=0).to(tl.int1)
    at = tl.load(pos + b * p_b + i * p_c, mask=inside, other=0).to(tl.int64)
    rank = _rank_of(tl.load(score + b * s_b + i * s_c, mask=inside, other=0.0), at)
    rank = tl.where((at < sinks) | (at >= tl.load(counts + b) - recent), at + 4611686018427387904, rank)  # PROTECTED
    stays = there
    leaving = tl.sum(there.to(tl.int32), 0) - m
    for _ in range(leaving):
        lowest = tl.min(tl.where(stays, rank, LARGEST), 0)
        stays = stays & (rank != lowest)
    tl.store(kept + b * width + i, stays, mask=i < width)
    free = (i < m) & ((i >= width) | ~stays)
    held = tl.load(slots + b * h_b + i * h_m, mask=i < m, other=-1)
    held = tl.where(free, -1, held)
    last = -1
    for e in range(width, C):
        enters = tl.sum((stays & (i == e)).to(tl.int32), 0) > 0
        slot = tl.min(tl.where(free & (i > last), i, m), 0)
        slot = tl.where(enters, slot, m)
        last = tl.where(enters, slot, last)
        held = tl.where(i == slot, tl.load(columns + b * c_b + e * c_c), held)
        tl.store(target + b * (C - width) + e - width, slot.to(tl.int64))
    tl.store(after + b * m + i, held, mask=i < m)
