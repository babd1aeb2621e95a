"""Deliberate errors in the Triton kernels of window attention: a comparison that the tests make has to find each.

None makes a kernel reach beyond its tensors: the interpreter would follow it there.
"""

from functools import partial

import pytest
import torch
from kernel_cases import F32, F64, against_reference, assert_within, draw, flat_past
from triton_mutation import must_be_found

from scrubjay.kernels import window, window_triton
from scrubjay.kernels.window import window_attention, window_attention_step

fast = flat_past(partial(window_attention, backend="triton"))


def check(inputs, **options):
    assert_within("window_attention", *against_reference("window_attention", inputs, fast, **options), inputs, 5e-6)


def band():
    """Tiles inside the band of every query, and at both of its edges; each head has its own value."""
    check(draw("window_attention", 130, batch=1, heads=2, values=2, head_dim=5), window=100)


def shared():
    """Heads that share a key and heads that share a value, in no common order."""
    check(draw("window_attention", 5, batch=1, heads=4, keys=2, values=1), window=3)


def one_program():
    """One program for all heads of a key."""
    kernels = window.window_triton.__globals__
    usual, kernels["PROGRAMS"] = kernels["PROGRAMS"], 1
    try:
        shared()
        check(draw("window_attention", 5, batch=1, heads=2, values=2), window=3)
    finally:
        kernels["PROGRAMS"] = usual


def past():
    real = (torch.arange(40) >= 5)[None]
    check(draw("window_attention", 5, batch=1, heads=1, values=1, states=40), window=100, real=real)


def packed():
    check(draw("window_attention", 20, batch=1, heads=1, values=1), window=15, cu_seqlens=torch.tensor([0, 7, 7, 20]))


def step():
    """More entries than one split holds, six heads on two keys and three values, a scale and some entries not held."""
    sizes, held = ((2, 12), (2, 1, 600), (2, 2, 600)), torch.rand(2, 600) < 0.7
    inputs = [torch.randn(*size, 20, dtype=F32) for size in sizes]
    want = window_attention_step(*(x.to(F64) for x in inputs), held, 0.5)
    got = window_attention_step(*inputs, held, 0.5, backend="triton")
    assert_within("window_attention", {"y": got}, {"y": want}, {"q": inputs[0]}, 5e-6)


# name: (the line as it is, the line with the error, the comparison that finds it)
MUTATIONS = {
    "one key too many": ("S + t - window + 1, 0)", "S + t - window, 0)", band),
    "a query sees the next key": ("j[None, :] <= i[:, None]", "j[None, :] <= i[:, None] + 1", band),
    "sum not corrected when the maximum grows": ("total * kept + tl.sum", "total + tl.sum", band),
    "values not corrected when the maximum grows": ("acc * kept[:, None]", "acc", band),
    "last tile of the band forgotten": ("tl.cdiv(tl.maximum(right - hi, 0), SIZE)", "(right - hi) // SIZE", band),
    "first tile of the band visited twice": ("    lo = left + before * SIZE\n", "    lo = left\n", past),
    "padding in the past is seen": (
        "    if real is not None:\n        seen = seen &",
        "    if False:\n        seen =",
        past,
    ),
    "past taken for real inside the band": ("lo = tl.maximum(lo, S)", "lo = lo", past),
    "documents see each other": ("tl.maximum(low, tl.load(starts + t))", "low", packed),
    "neighbouring heads share keys": (
        "they start first\n    last = tl.minimum(first + BT, T) - 1\n    k += b * skb + h % K * skh",
        "they start first\n    last = tl.minimum(first + BT, T) - 1\n    k += b * skb + h // (H // K) * skh",
        shared,
    ),
    "dq: probabilities not normalised": ("tl.exp2(s * scale - sums[:, None])", "tl.exp2(s * scale)", band),
    "dq: derivative of the softmax's sum forgotten": ("PRECISION) - dots[:, None])", "PRECISION))", band),
    "dq without scale": ("P, acc * scale, last", "P, acc, last", band),
    "dk: derivative of the softmax's sum forgotten": ("PRECISION) - dot[None, :])", "PRECISION))", band),
    "dk with log2 e": ("key_acc * scale, last", "key_acc * log_scale, last", band),
    "dk, dv: last query of a window forgotten": ("i <= high[:, None]", "i < high[:, None]", band),
    "dk, dv: a key has gradients from queries before it": ("(i >= j[:, None]) &", "(i >= j[:, None] - 1) &", band),
    "dk, dv: first queries of the past's keys forgotten": ("tl.maximum(first - S, 0), _h", "first, _h", past),
    "dk, dv: padding in the past has gradients": (
        "mask=j < S, other=True), high, -1)",
        "mask=j < 0, other=True), high, -1)",
        past,
    ),
    "dk, dv: documents have gradients from later ones": (
        "tl.minimum(high, tl.load(ends + tl.minimum(j, N - 1)))",
        "high",
        packed,
    ),
    "dk: heads that share both key and value forgotten": (
        "tl.range(same, H, CLASSES,",
        "tl.range(same, same + 1, 1,",
        shared,
    ),
    "dv: not begun anew for each value": (
        "        value_acc = tl.zeros((BN, BP), tl.float32)\n",
        "        value_acc = key_acc\n",
        one_program,
    ),
    "dk: partial sums not added": ("x[0] if len(x) == 1", "x[0] if len(x)", band),
    "dk, dv: every program does the first classes": (
        "same = key + K * c ",
        "same = key + K * (c - part * share) ",
        band,
    ),
    "step: entries not held are seen": ("tl.where(seen, tl.sum(tile", "tl.where(entry < W, tl.sum(tile", step),
    "step: splits not brought to one maximum": ("weight * tl.load(sums", "tl.load(sums", step),
    "step: scale without log2 e": ("scale * LOG2_E, W,", "scale, W,", step),
    "step: neighbouring heads share values": ("(head % V).to", "(head // (H // V)).to", step),
    "step: only the first heads of a key": ("key + K * (group * HEADS + n)", "key + K * n", step),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_deliberate_error_exceeds_the_bound(name, monkeypatch, tmp_path):
    """That the comparisons can fail."""
    old, new, comparison = MUTATIONS[name]
    must_be_found(monkeypatch, tmp_path, window_triton, old, new, comparison)
