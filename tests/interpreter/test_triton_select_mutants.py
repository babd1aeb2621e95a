"""Deliberate errors in selective attention's Triton kernels: a comparison that the tests make has to find each."""

import pytest
import torch
from kernel_cases import F32
from select_cases import check, check_step, draw, narrowed, ring
from triton_mutation import must_be_found

from scrubjay.kernels import select_attention_triton
from scrubjay.kernels.select_attention import pack


def dense():
    """Every column a query: tiles in the middle of the band need no mask."""
    check(*draw(100, 1.0, 70, B=1, H=1), 70)


def spread():
    check(*draw(50, 0.5, 20, H=2, K=1), 20)


def groups():
    check(*draw(40, 0.5, 20, H=4, K=2), 20)


def past():
    check(*draw(60, 0.5, 40, past=50), 40)


def with_others():
    """Every query sees some of the past: without its own key it still has a softmax."""
    q, k, v, packed, _ = draw(60, 0.5, 40, past=50)
    readable = torch.rand(2, 110) < 0.5
    check(q, k, v, packed, 50 + torch.arange(60).expand(2, -1), 40, readable=readable)
    check(q, k, v, packed, 50 + torch.arange(60).expand(2, -1), 40)


def just_over():
    """A query at column 64 of a window of 65: the first of a tile of its own, of which it sees nothing else."""
    mask = torch.arange(65)[None] == 64
    q, k, v = (torch.randn(*shape) for shape in ((1, 1, 8), (1, 65, 1, 8), (1, 65, 1, 8)))
    check(q, k, v, pack(mask, 65), torch.arange(65)[None], 65)


def packed():
    operands, _ = narrowed()
    check(*operands)


def limited(way="all"):
    operands, ways = narrowed()
    check(*operands, **ways[way])


def by_one_limit():
    limited("limit")


def falling():
    q, k, v, packed, _ = draw(130, 0.7, 100)
    check(q, k, v, packed, torch.randint(0, 100, (2, 130)).clamp(max=torch.arange(130)), 100)


def empty_rows():
    mask = torch.zeros(3, 40, dtype=torch.bool)
    mask[1, ::2], mask[2, 30:] = True, True
    chosen = pack(mask, 20)
    q, k, v = (torch.randn(*shape) for shape in ((len(chosen.index), 2, 8), (3, 40, 1, 8), (3, 40, 1, 8)))
    check(q, k, v, chosen, torch.arange(40).expand(3, -1), 20)


def step():
    check_step(ring(3, 4, 2, 100, 8, F32))


def step_in_parts():
    """More than the PART slots of one program."""
    check_step(ring(2, 2, 1, 300, 8, F32), torch.tensor([False, True]))


# name: (the line as it is, the line with the error, the comparison that finds it)
MUTATIONS = {
    "a window one key short": ("clamp(max=window - 1)", "clamp(max=window - 2)", spread),
    "a window one key long": ("clamp(max=window - 1)", "clamp(max=window)", spread),
    "columns of the past not counted": ("at = column + (N - T)", "at = column", past),
    "a limit one further": ("c[row, at] - reach)", "c[row, at] - reach - 1)", limited),
    "keys after the query are seen": ("seen = (j <= at) & (j >= low)", "seen = (j <= at + 1) & (j >= low)", spread),
    "the query's own key is not": ("seen = (j <= at) & (j >= low)", "seen = (j < at) & (j >= low)", with_others),
    "what is before the document is seen": ("seen = (j <= at) & (j >= low)", "seen = j <= at", packed),
    "own key only where it is readable": ("!= 0) | (j == at))", "!= 0))", with_others),
    "the second limit forgotten": ("if c1 is not None:\n        seen = ", "if c1 is not None:\n        _ = ", limited),
    "the first limit one column off": (
        "tl.load(c0 + base + j, mask=j < N, other=0)",
        "tl.load(c0 + base + j + 1, mask=j < N - 1, other=0)",
        by_one_limit,
    ),
    "tiles of the middle begin where not all see": (
        "left = start + tl.cdiv(tl.max(tl.where(live, low, 0)) - start, BN) * BN",
        "left = start",
        dense,
    ),
    "tiles of the middle end where not all see": (
        "tl.maximum(tl.min(tl.where(live, at, N)) + 1 - left, 0)",
        "tl.maximum(tl.max(tl.where(live, at, -1)) + 1 - left, 0)",
        dense,
    ),
    "the last column of a block is not visited": (
        "tl.max(tl.where(live, at, -1)) + 1",
        "tl.max(tl.where(live, at, -1))",
        just_over,
    ),
    "the right edge forgotten": (
        "tl.where(t < before, start + t * BN, middle + (t - before) * BN)",
        "start + t * BN",
        dense,
    ),
    "values of the former maximum are not scaled": (
        "values.to(DOT), o * factor[:, None], input_precision=PRECISION)\n    return higher",
        "values.to(DOT), o, input_precision=PRECISION)\n    return higher",
        spread,
    ),
    "neither is their sum": (
        "return higher, mass * factor + tl.sum(p, 1), o",
        "return higher, mass + tl.sum(p, 1), o",
        spread,
    ),
    "every head reads the first key head": (
        "k += row * stride_kb + (head // GROUP) * stride_kh\n    v += row * stride_vb + (head // GROUP) * stride_vh\n"
        "    own = (i.to(tl.int64) * H + head) * P",
        "k += row * stride_kb\n    v += row * stride_vb\n    own = (i.to(tl.int64) * H + head) * P",
        groups,
    ),
    "the kept sum without its maximum": ("peak + tl.log2(mass), mask=live)", "tl.log2(mass), mask=live)", spread),
    "rows begin too early": (
        "torch.arange(B + 1, device=device) * T)",
        "torch.arange(B + 1, device=device) * (T - 1))",
        empty_rows,
    ),
    "dq without the softmax's own term": ("- dot[:, None])\n    return", ")\n    return", spread),
    "dq not scaled": ("_store(dq + own, gradient * factor, live", "_store(dq + own, gradient, live", spread),
    "dots without o": (
        "tl.sum(given.to(tl.float32) * _load(o + own",
        "tl.sum(given.to(tl.float32) * _load(do + own",
        spread,
    ),
    "dk without the softmax's own term": ("- dot[None, :])", ")", spread),
    "dk and dv of one head of a group": ("for member in range(GROUP):", "for member in range(1):", spread),
    "dk not scaled": ("_store(dk + own, of_keys * factor, inside", "_store(dk + own, of_keys, inside", spread),
    "dv of unseen pairs too": (
        "p = tl.exp2(tl.where(seen, s, float(\"-inf\")))\n            of_values",
        "p = tl.exp2(tl.minimum(s, 0.0))\n            of_values",
        spread,
    ),
    "the last queries that see a tile are left out": (
        "(starts + size).clamp(max=N)",
        "(starts + size // 2).clamp(max=N)",
        spread,
    ),
    "columns are watched by the queries of row 0": (
        "rows = torch.arange(B, device=sight.at.device)[:, None] * N",
        "rows = torch.zeros(B, 1, dtype=torch.int64)",
        empty_rows,
    ),
    "before taken to rise": (".flip(0).cummin(0).values.flip(0)", "", falling),
    "the step counts what is not seen": (
        "s = tl.where(there[None, :], s, float(\"-inf\"))",
        "s = tl.where((j < W)[None, :], s, float(\"-inf\"))",
        step,
    ),
    "the step does not scale what it found": ("tile, o * shrunk[:, None]", "tile, o", step),
    "the step of another key head": (
        "keys += row * stride_kb + key_head * stride_kh\n    values += row",
        "keys += row * stride_kb\n    values += row",
        step,
    ),
    "parts joined by the first maximum": (
        "weight = tl.exp2(peak - tl.max(peak, 0))",
        "weight = tl.exp2(peak - peak)",
        step_in_parts,
    ),
    "only a part of the ring": ("parts, constants = -(-W // PART)", "parts, constants = W // PART", step_in_parts),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_deliberate_error_is_found(name, monkeypatch, tmp_path):
    old, new, comparison = MUTATIONS[name]
    must_be_found(monkeypatch, tmp_path, select_attention_triton, old, new, comparison)
