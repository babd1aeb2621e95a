"""Deliberate errors in SSD's Triton kernels: a comparison that the tests make has to find each.

None makes a kernel write beyond its tensors: the interpreter would write there.
"""

from functools import partial

import pytest
from ssd_cases import (
    check_chunks,
    check_decays,
    check_documents_of_ssd,
    check_forgetting_of_ssd,
    check_no_number,
    check_step,
    check_tiles,
)
from triton_mutation import must_be_found

from scrubjay.kernels import ssd_triton

check_large = partial(check_forgetting_of_ssd, -1e14)

# name: (the code as it is, the code with the error, the comparison that finds it)
MUTATIONS = {
    "sums: in float32": (
        "c = tl.cumsum(decay.to(tl.float64) * SCALE, 0)",
        "c = tl.cumsum(decay * SCALE, 0).to(tl.float64)",
        check_decays,
    ),
    "sums: what was rounded off is lost": ("(c - high.to(tl.float64)).to(tl.float32)", "(0 * high)", check_decays),
    "sums: of decays as large as they come": (
        "decay = tl.where(decay < FORGETS, FORGETS, decay)",
        "decay = tl.where(decay < FORGETS, decay, decay)",
        check_large,
    ),
    "sums: what is no number taken for a small one": (
        "decay = tl.where(decay < FORGETS, FORGETS, decay)",
        "decay = tl.maximum(decay, FORGETS)",
        check_no_number,
    ),
    "sums: one step late": (
        "step, here = _wide(start) + t,",
        "step, here = _wide(start) + tl.maximum(t - 1, 0),",
        check_chunks,
    ),
    "states: no decay across a chunk's border": ("s *= tl.exp2(tl.load(base + Q - 1))", "s *= 1.0", check_chunks),
    "states: decayed to the wrong step": (
        "s *= tl.exp2(tl.load(base + Q - 1))",
        "s *= tl.exp2(tl.load(base + Q - 2))",
        check_chunks,
    ),
    "states: kept across documents": (
        "s = _load(initial + (_wide(row) * H + h) * size",
        "s = _load(initial + h * size",
        check_documents_of_ssd,
    ),
    "states: documents begin where the row does": (
        "first, begin, end = tl.load(firsts + row), tl.load(bounds + row), tl.load(bounds + row + 1)",
        "first, begin, end = tl.load(firsts + row), 0, tl.load(bounds + row + 1)",
        check_documents_of_ssd,
    ),
    "states: gradient of the state not decayed to its step": (
        "weight = tl.exp2(_vector(base + j, BQ))",
        "weight = 1.0 + 0.0 * _vector(base + j, BQ)",
        check_chunks,
    ),
    "states: no gain": (
        "weight = _to_end(base, plane, Q, j, BQ) * _vector(base + 2 * plane + j, BQ)",
        "weight = _to_end(base, plane, Q, j, BQ)",
        check_chunks,
    ),
    "states: the chunks of the backward pass in order": (
        "at = number - 1 - step if REVERSE else step",
        "at = step",
        check_chunks,
    ),
    "outputs: a step does not see itself": (
        "scores = tl.where(t[:, None] >= t[None, :], scores, 0.0)",
        "scores = tl.where(t[:, None] > t[None, :], scores, 0.0)",
        check_chunks,
    ),
    "outputs: nothing of the state before": ("acc * tl.exp2(_vector(base, Q))[:, None]", "acc * 0.0", check_chunks),
    "outputs: the state's part not decayed": ("acc * tl.exp2(_vector(base, Q))[:, None]", "acc", check_chunks),
    "gradients of a group: dq without the state's part": (
        "query_acc = tl.dot(received, tl.trans(s.to(DOT)), query_acc",
        "query_acc = tl.dot(0 * received, tl.trans(s.to(DOT)), query_acc",
        check_chunks,
    ),
    "gradients of a group: dk without the gain": (
        "_to_end(base, plane, Q, 0, Q) * _vector(base + 2 * plane, Q)",
        "_to_end(base, plane, Q, 0, Q)",
        check_chunks,
    ),
    "gradients of a group: scores not causal": (
        "dscores = tl.where(t[:, None] >= t[None, :], dscores, 0.0).to(DOT)",
        "dscores = dscores.to(DOT)",
        check_chunks,
    ),
    "gradients of a group: dk of pairs the other way round": (
        "key_acc = tl.dot(tl.trans(dscores), queries",
        "key_acc = tl.dot(dscores, queries",
        check_chunks,
    ),
    "gradients of a head: dv without what leaves the chunk": (
        "of_value *= _to_end(base, plane, Q, 0, Q)[:, None]",
        "of_value *= 0.0",
        check_chunks,
    ),
    "gradients of a head: dv without the gain": (
        "of_value *= _vector(base + 2 * plane, Q)[:, None]",
        "of_value *= 1.0",
        check_chunks,
    ),
    "gradients of a head: da one step late": (
        "[:, None] < t[None, :]  # plus",
        "[:, None] <= t[None, :]  # plus",
        check_chunks,
    ),
    "gradients of a head: da without the state": (
        "from_state = tl.load(kept",
        "from_state = 0.0 * tl.load(kept",
        check_chunks,
    ),
    "gradients of a head: da counted in every tile": (
        "        if tile == 0:\n",
        "        if tile >= 0:\n",
        check_tiles,
    ),
    "step: no decay": (
        "s += tl.load(at, mask=real, other=0.0) * decay",
        "s += tl.load(at, mask=real, other=0.0)",
        check_step,
    ),
    "step: no gain": (
        "s = keys[:, None] * (values * gain)[None, :]",
        "s = keys[:, None] * values[None, :]",
        check_step,
    ),
    "step: another group's queries": ("sqb + group * sqg + n", "sqb + h % (H // R) * sqg + n", check_step),
    "step: the state of the row before": (
        "at = state + b * ssb",
        "at = state + tl.maximum(b - 1, 0) * ssb",
        check_step,
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_deliberate_error_is_found(name, monkeypatch, tmp_path):
    old, new, comparison = MUTATIONS[name]
    must_be_found(monkeypatch, tmp_path, ssd_triton, old, new, comparison)
