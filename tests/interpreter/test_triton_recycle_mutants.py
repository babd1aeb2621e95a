"""Deliberate errors in the Triton kernels of recycle.py and release.py: each has to be found by a comparison that tests
make. None of them reads or writes outside of a tensor: the interpreter would do that too."""

from functools import partial

import pytest
import torch
from recycled_cases import padded
from recycled_triton_cases import (
    check_decode,
    check_gather,
    check_holes,
    check_long,
    check_pooled,
    check_put,
    check_ranking,
    check_release_step,
    check_top,
)
from triton_mutation import must_be_found

from scrubjay.kernels import recycle_triton, release_triton

decode = partial(check_decode, 8, 2)
hidden = partial(check_decode, 8, 2, real=padded((70, 5), 70))
half_real = partial(check_put, real=torch.tensor([True, False, True]))

RECYCLE = {
    # _part_kernel
    "decode: no scale": ("input_precision=PRECISION) * scale", "input_precision=PRECISION)", decode),
    "decode: another head's query": ("(g * R + r[:, None]) * q_h", "(g + r[:, None]) * q_h", decode),
    "decode: keys of a tile's neighbour": (
        "j = start + tl.arange(0, BLOCK)",
        "j = start + 1 + tl.arange(0, BLOCK)",
        decode,
    ),
    "decode: last part's last tile dropped": (
        "tl.minimum((c + 1) * size, n), BLOCK",
        "tl.minimum(c * size + BLOCK, n), BLOCK",
        check_long,
    ),
    "decode: sum not rescaled": (
        "weight = weight * decay + tl.sum(e, 1)",
        "weight = weight + tl.sum(e, 1)",
        check_long,
    ),
    "decode: output not rescaled": ("o * decay[:, None], input", "o, input", check_long),
    "decode: padding attended": (
        's = tl.where(there[None, :], s, float("-inf"))',
        's = tl.where(inside[None, :], s, float("-inf"))',
        hidden,
    ),
    "decode: the first key head for all": (
        "        if real is not None:",
        "        g = g * 0\n        if real is not None:",
        check_holes,
    ),
    "decode: values by the keys' mask": (
        "            value = tl.load(",
        "            seen = inside[:, None] & (p < P)[None, :]\n            value = tl.load(",
        check_holes,
    ),
    "decode: head size padded": (
        "PADDED=padded,\n        BLOCK=block,\n        DOT",
        "PADDED=16,\n        BLOCK=block,\n        DOT",
        partial(check_decode, 2, 1, P=20),
    ),
    # _whole_kernel
    "parts: one left out": ('mask=c < parts, other=float("-inf"))', 'mask=c < parts - 1, other=float("-inf"))', decode),
    "parts: not weighted": ("o * (weight / whole)[:, None]", "o / whole", decode),
    "parts: sum not taken off": ("s - (highest + tl.log(whole))", "s - highest", decode),
    "parts: only the first piece of the scores": (
        "_whole_kernel,\n            (B * H, triton.cdiv(n, block) if scored else 1)",
        "_whole_kernel,\n            (B * H, 1)",
        check_long,
    ),
    # _pool_kernel
    "pool: off by one": ("i = at + step - KERNEL // 2", "i = at + step - KERNEL // 2 + 1", check_pooled),
    "pool: narrower": ("for step in range(KERNEL):", "for step in range(1, KERNEL):", check_pooled),
    "pool: one head left out": ("for h in tl.static_range(1, R):", "for h in tl.static_range(1, R - 1):", check_pooled),
    "pool: without the last": (
        "near = there & (i >= 0) & (i < last)",
        "near = there & (i >= 0) & (i < last - 1)",
        check_pooled,
    ),
    "pool: mean of three heads": (
        "for h in tl.static_range(R):",
        "for h in tl.static_range(R - 1):",
        partial(check_pooled, "mean"),
    ),
    "pool: columns for tokens": (
        "at = tl.load(counts + first + j, mask=there, other=1) - 1",
        "at = j.to(tl.int64)",
        partial(check_pooled, side="inner"),
    ),
    "pool: padding scored": ("near = there & (i >= 0)", "near = inside & (i >= 0)", partial(check_pooled, side="left")),
    # _column_kernel
    "columns: one before": (
        "j.to(tl.int64), mask=there)",
        "tl.maximum(j - 1, 0).to(tl.int64), mask=there)",
        partial(check_pooled, side="inner"),
    ),
    "columns: from the end": (
        "j.to(tl.int64), mask=there)",
        "(n - 1 - j).to(tl.int64), mask=there)",
        partial(check_pooled, side="inner"),
    ),
    "columns: padding too": (
        "j.to(tl.int64), mask=there)",
        "j.to(tl.int64), mask=j < n)",
        partial(check_pooled, side="right"),
    ),
    # _order_kernel
    "order: zeros of two kinds": ("x = tl.where(x == 0.0, 0.0, x)", "x = x", check_top),
    "order: NaN highest": ('x = tl.where(x != x, float("-inf"), x)', "x = x", check_top),
    "order: one recent too few": ("number > last - recent", "number > last - recent + 1", partial(check_top, 3)),
    "order: one sink too few": ("number <= sinks", "number < sinks", partial(check_top, 0, 4)),
    "order: recent above sinks": (
        "LARGEST: tl.constexpr = 3.4028234663852886e38",
        'LARGEST: tl.constexpr = float("inf")',
        partial(check_top, 20, 4),
    ),
    "order: earlier of equal scores": (
        "(bits.to(tl.int64) << 31) + j",
        "(bits.to(tl.int64) << 31) + n - 1 - j",
        check_top,
    ),
    "order: negative numbers by their bits": ("bits ^ ((bits >> 31) & 0x7FFFFFFF)", "bits", check_top),
    "order: padding as it scores": ('x = tl.where(there, x, float("-inf"))', "x = x", partial(check_top, side="left")),
    # _rows_kernel
    "rows: values of the keys": (
        "tl.load(v + b * v_b + g * v_g + j[:, None] * v_n",
        "tl.load(k + b * v_b + g * v_g + j[:, None] * v_n",
        check_gather,
    ),
    "rows: one row on": ("other=0)\n    mask = (m < M)", "other=0) + 1\n    mask = (m < M)", check_gather),
    "rows: not the last": (
        "mask = (m < M)[:, None] & (p < P)[None, :]",
        "mask = (m < M - 1)[:, None] & (p < P)[None, :]",
        check_gather,
    ),
    "rows: as if contiguous": ("keys + b * keys_b + g * keys_g", "keys + row * M * P", check_gather),
    # _put_kernel
    "put: last of the lowest": (
        "tl.min(tl.where(lowest == least, where, C), 0)",
        "tl.max(tl.where(lowest == least, where, 0), 0)",
        check_put,
    ),
    "put: of equal ranks the later": (
        "tl.where(ranks < lowest, c, where)",
        "tl.where(ranks <= lowest, c, where)",
        partial(check_put, 1500, 1500, sealed=True),
    ),
    "put: only the first tile is searched": (
        "for start in range(0, C, BLOCK):",
        "for start in range(0, 1, BLOCK):",
        partial(check_put, 1500, 1500, ties=False),
    ),
    "put: padding evicts": ("if ROOM or there:", "if ROOM or C > 0:", half_real),
    "put: padding keeps its rank": (
        'order = tl.where(there, order, float("-inf"))',
        "order = tl.where(there, order, order)",
        partial(half_real, 4),
    ),
    "put: padding is a token": (
        "tl.store(reals + row * C + at, there)",
        "tl.store(reals + row * C + at, True)",
        partial(half_real, 4),
    ),
    "put: behind what is filled": ("at = row * 0 + filled", "at = row * 0 + filled + 1", partial(check_put, 4)),
    "put: values of another head": (
        "tl.load(v + b * v_b + g * v_g + p, mask=p < P)",
        "tl.load(v + b * v_b + p, mask=p < P)",
        check_put,
    ),
}
RELEASE = {
    # _rank_of, _rank_kernel
    "rank: zeros of two kinds": ("x = tl.where(x == 0.0, 0.0, x)", "x = x", check_ranking),
    "rank: NaN not lowest": ('x = tl.where(x != x, float("-inf"), x)', "x = x", check_ranking),
    "rank: position left out": (
        "0x7FFFFFFF)).to(tl.int64) << 31) + pos",
        "0x7FFFFFFF)).to(tl.int64) << 31)",
        check_ranking,
    ),
    "rank: protected as they score": (
        "order = tl.where(above, at + 4611686018427387904, order)",
        "order = tl.where(above, order, order)",
        check_ranking,
    ),
    "rank: padding ranks": (
        "tl.where(there, order, -9223372036854775808)",
        "tl.where(inside, order, -9223372036854775808)",
        check_ranking,
    ),
    # _step_kernel
    "step: one too many stays": (
        "leaving = tl.sum(there.to(tl.int32), 0) - m",
        "leaving = tl.sum(there.to(tl.int32), 0) - m - 1",
        check_release_step,
    ),
    "step: padding counts as leaving": (
        "leaving = tl.sum(there.to(tl.int32), 0) - m",
        "leaving = C - m",
        check_release_step,
    ),
    "step: recent left unprotected": (
        "(at < sinks) | (at >= tl.load(counts + b) - recent)",
        "at < sinks",
        check_release_step,
    ),
    "step: sinks left unprotected": ("(at < sinks) | (at >=", "(at < 0) | (at >=", check_release_step),
    "step: unused slots not free": (
        "free = (i < m) & ((i >= width) | ~stays)",
        "free = (i < m) & (i < width) & ~stays",
        partial(check_release_step, 5, 9, 3),
    ),
    "step: one slot twice": (
        "last = tl.where(enters, slot, last)",
        "last = tl.where(enters, last, last)",
        check_release_step,
    ),
    "step: a slot for what does not stay": ("slot = tl.where(enters, slot, m)", "slot = slot", check_release_step),
    "step: what left stays noted": (
        "held = tl.where(free, -1, held)",
        "held = tl.where(free, held, held)",
        check_release_step,
    ),
    "step: another entry's column": ("b * c_b + e * c_c", "b * c_b + (e - 1) * c_c", check_release_step),
}


@pytest.mark.parametrize("name", RECYCLE)
def test_an_error_in_a_kernel_of_recycle_is_found(name, monkeypatch, tmp_path):
    old, new, comparison = RECYCLE[name]
    must_be_found(monkeypatch, tmp_path, recycle_triton, old, new, comparison)


@pytest.mark.parametrize("name", RELEASE)
def test_an_error_in_a_kernel_of_release_is_found(name, monkeypatch, tmp_path):
    old, new, comparison = RELEASE[name]
    must_be_found(monkeypatch, tmp_path, release_triton, old, new, comparison)
