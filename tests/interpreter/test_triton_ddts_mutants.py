"""Deliberate errors in the Triton kernels of DDTS and Rodimus' gates: a comparison that tests make finds each."""

import pytest
from kernel_cases import F16, F32
from rodimus_cases import (
    check_ddts,
    check_gates,
    check_products_in_16_bits,
    check_step,
    documents,
    draw_gates,
    drawn,
    step_inputs,
)
from triton_mutation import must_be_found

from scrubjay.kernels import ddts_triton, rodimus_gates_triton


def whole():
    """One chunk of four blocks and a step."""
    check_ddts(drawn(65, F16))


def packed():
    inputs, options = documents(F32)
    check_ddts(inputs, **options)


def batch():
    check_ddts(drawn(20, batch=2, states=2))


def wide():
    check_ddts(drawn(3, width=250))


def many_keys():
    check_ddts(drawn(3, size=20))


def step():
    check_step(*step_inputs())


def gates():
    check_gates(draw_gates(T=70), backend="triton")


def untempered():
    check_gates(draw_gates(T=70, tempered=False), backend="triton")


def short_keys():
    inputs = draw_gates()
    inputs["qk"] *= 2e-6  # some just shorter than eps
    check_gates(inputs, backend="triton")


# name: (module, the line as it is, the line with the error, the comparison that finds it)
MUTANTS = {
    "prepare: no score of a step with itself": (
        ddts_triton,
        "lower = tl.arange(0, SUB)[:, None] >= tl.arange(0, SUB)[None, :]",
        "lower = tl.arange(0, SUB)[:, None] > tl.arange(0, SUB)[None, :]",
        whole,
    ),
    "prepare: a pair's decay counts its key's step": (
        ddts_triton,
        "later = (i[:, None] > i[None, :])[:, :, None]",
        "later = (i[:, None] >= i[None, :])[:, :, None]",
        whole,
    ),
    "prepare: earlier blocks not decayed up to the block": (
        ddts_triton,
        "earlier_scores += tl.dot(q_own * tl.exp2(reached), tl.trans(keys), input_precision=PRECISION)",
        "earlier_scores += tl.dot(q_own, tl.trans(keys), input_precision=PRECISION)",
        whole,
    ),
    "prepare: state not decayed by earlier blocks": (
        ddts_triton,
        "_store(into, to, q_own * tl.exp2(before[None, :] + reached), part, SPLIT)",
        "_store(into, to, q_own * tl.exp2(reached), part, SPLIT)",
        whole,
    ),
    "prepare: last key channels of a padded state left out": (
        ddts_triton,
        "for at in range(0, NP, NB):",
        "for at in range(0, NB, NB):",
        many_keys,
    ),
    "advance: state not decayed at a chunk's border": (
        ddts_triton,
        "s = s * tl.load(total + c * NP + n)[:, None]",
        "s = s * 1.0",
        whole,
    ),
    "advance: state not reset at a document": (
        ddts_triton,
        "s = tl.load(state + row * N * M + n[:, None] * M + m[None, :], mask=in_state, other=0)",
        "s = tl.load(state + n[:, None] * M + m[None, :], mask=in_state, other=0)",
        packed,
    ),
    "advance: a document's last step left out": (
        ddts_triton,
        "return c.to(tl.int64), after - c, begin.to(tl.int64), tl.load(stop + after - 1, mask=c < after, other=0)",
        "return c.to(tl.int64), after - c, begin.to(tl.int64), tl.load(stop + after - 1, mask=c < after, other=0) - 1",
        batch,
    ),
    "advance: states kept after the chunk": (
        ddts_triton,
        "s = tl.dot(tl.trans(leaving), values, s, input_precision=PRECISION)",
        "s = tl.dot(tl.trans(leaving), values, s, input_precision=PRECISION)\n"
        "        if kept is not None:\n"
        "            tl.store(kept + c * NP * M + n[:, None] * M + m[None, :], s, mask=(m < M)[None, :])",
        whole,
    ),
    "prepare: nothing kept of what is rounded off": (
        ddts_triton,
        "tl.store(to + part + at, x - rounded.to(tl.float32))",
        "tl.store(to + part + at, 0 * x)",
        check_products_in_16_bits,
    ),
    "advance: what is rounded off left out": (
        ddts_triton,
        "s = tl.dot(tl.trans(tl.load(out_of + part + c * C * NP + key)), values, s)",
        "s = tl.dot(tl.trans(tl.load(out_of + part + c * C * NP + key)), 0 * values, s)",
        check_products_in_16_bits,
    ),
    "reverse: what is rounded off left out": (
        ddts_triton,
        "d = tl.dot(tl.trans(tl.load(into + part + c * C * NP + key)), gradient, d)",
        "d = tl.dot(tl.trans(tl.load(into + part + c * C * NP + key)), 0 * gradient, d)",
        check_products_in_16_bits,
    ),
    "reverse: chunks in the wrong order": (
        ddts_triton,
        "at = count - 1 - back",
        "at = back",
        whole,
    ),
    "reverse: scores not transposed": (
        ddts_triton,
        "out = tl.dot(tl.trans(here), gradient, input_precision=PRECISION)",
        "out = tl.dot(here, gradient, input_precision=PRECISION)",
        whole,
    ),
    "reverse: gradient of the state not decayed": (
        ddts_triton,
        "d = d * tl.load(total + c * NP + n)[:, None]",
        "d = d * 1.0",
        whole,
    ),
    "contract: the last part of the channels left out": (
        ddts_triton,
        '"TILES": triton.cdiv(tiles, parts)',
        '"TILES": tiles // parts - 1',
        wide,
    ),
    "contract: parts all the first": (
        ddts_triton,
        "m = (part * TILES + tile) * BM + tl.arange(0, BM)",
        "m = tile * BM + tl.arange(0, BM)",
        wide,
    ),
    "contract: gradients of queries and keys exchanged": (
        ddts_triton,
        "do = tl.dot(values, tl.trans(d), do, input_precision=PRECISION)",
        "do = tl.dot(gradient, tl.trans(d), do, input_precision=PRECISION)",
        whole,
    ),
    "finish: pairs around the block do not reach its decays": (
        ddts_triton,
        "later_part = by_both + tl.load(dinto + key_all) * before[None, :]",
        "later_part = tl.load(dinto + key_all) * before[None, :]",
        whole,
    ),
    "finish: a key decays with its own step": (
        ddts_triton,
        "decayed = tl.sum(tl.where((x[:, None] > x[None, :])[:, :, None], pairs, 0.0), 1)",
        "decayed = tl.sum(tl.where((x[:, None] >= x[None, :])[:, :, None], pairs, 0.0), 1)",
        whole,
    ),
    "finish: state that passes a chunk does not reach its decays": (
        ddts_triton,
        "rest += tl.load(dtotal + c * NP + n) * before * after",
        "rest += 0.0",
        whole,
    ),
    "finish: block left out of the rest's decay": (
        ddts_triton,
        "decayed += (rest * across)[None, :]",
        "decayed += rest[None, :]",
        whole,
    ),
    "finish: later queries include the own block": (
        ddts_triton,
        "earlier, later = (j < first)[:, None], (j >= last)[:, None]",
        "earlier, later = (j < first)[:, None], (j >= first)[:, None]",
        whole,
    ),
    "step: value added before the decay": (
        ddts_triton,
        "s = tl.load(state + at, mask=mask, other=0) * decay[:, None] + key[:, None] * value[None, :]",
        "s = (tl.load(state + at, mask=mask, other=0) + key[:, None] * value[None, :]) * decay[:, None]",
        step,
    ),
    "step: rows share a state": (
        ddts_triton,
        "at, mask = row * N * M + n[:, None] * M + m[None, :], (n < N)[:, None] & (m < M)[None, :]",
        "at, mask = n[:, None] * M + m[None, :], (n < N)[:, None] & (m < M)[None, :]",
        step,
    ),
    "step: the last channels left out": (
        ddts_triton,
        "grid = (triton.cdiv(width, tile), rows)\n    launch(_step",
        "grid = (width // tile, rows)\n    launch(_step",
        step,
    ),
    "gates: q and k exchanged": (
        rodimus_gates_triton,
        "    query = tl.load(qk + at, mask=real, other=0).to(tl.float32)\n"
        "    key = tl.load(qk + at + N, mask=real, other=0).to(tl.float32)",
        "    query = tl.load(qk + at + N, mask=real, other=0).to(tl.float32)\n"
        "    key = tl.load(qk + at, mask=real, other=0).to(tl.float32)",
        gates,
    ),
    "gates: eps added to the length": (
        rodimus_gates_triton,
        "length = tl.maximum(tl.sqrt(tl.sum(key * key, 1)), eps)",
        "length = tl.sqrt(tl.sum(key * key, 1)) + eps",
        gates,
    ),
    "gates: decay without temperature": (
        rodimus_gates_triton,
        "tl.store(a + to, -gate * temperature, mask=real)",
        "tl.store(a + to, -gate, mask=real)",
        gates,
    ),
    "gates: the last steps left out": (
        rodimus_gates_triton,
        "launch(_forward, (triton.cdiv(steps, rows),),",
        "launch(_forward, (steps // rows,),",
        gates,
    ),
    "gates' backward: bias of the first program alone": (
        rodimus_gates_triton,
        "parts.sum(0)",
        "parts[0]",
        gates,
    ),
    "gates' backward: a short key's length differentiated": (
        rodimus_gates_triton,
        "along = tl.where(norm < eps, 0.0, tl.sum(dunit * unit, 1)[:, None])",
        "along = tl.sum(dunit * unit, 1)[:, None]",
        short_keys,
    ),
    "gates' backward: selection without its decay": (
        rodimus_gates_triton,
        "dselection = dexponent * temperature * relative - ddecay * temperature * slope",
        "dselection = dexponent * temperature * relative",
        gates,
    ),
    "gates' backward: temperature with the sign of its decay turned": (
        rodimus_gates_triton,
        "dtemperature = (dexponent * log - ddecay * gate)",
        "dtemperature = (dexponent * log + ddecay * gate)",
        gates,
    ),
    "gates without a temperature: one of 1/2": (
        rodimus_gates_triton,
        "temperature = tl.full([1, 1], 1.0, tl.float32)",
        "temperature = tl.full([1, 1], 0.5, tl.float32)",
        untempered,
    ),
    "gates' backward without a temperature: selection without its decay": (
        rodimus_gates_triton,
        "dselection = (dkey * unit - ddecay) * slope",
        "dselection = dkey * unit * slope",
        untempered,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_deliberate_error_is_found(name, monkeypatch, tmp_path):
    module, old, new, comparison = MUTANTS[name]
    must_be_found(monkeypatch, tmp_path, module, old, new, comparison)
