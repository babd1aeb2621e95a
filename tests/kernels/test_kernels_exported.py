"""What torch.export writes down of each kernel, run without it: against the reference, and whole models against
themselves. `test_export.py` exports."""

import pytest
import torch
from kernel_cases import BF16, F32, F64, KERNELS, VARIANTS, bound_of, draw, error, widened
from parity_cases import tokens as words
from select_cases import narrowed
from taipan_cases import CASES, build
from zoo import relative, tokens

from scrubjay.kernels import recurrence
from scrubjay.kernels.select_attention import Packed, pack, select_attention, select_attention_reference

FORMS = 7e-13  # logits in float64 of the two forms: five times the worst of all cases, 1.4e-13


@pytest.fixture
def as_exported(monkeypatch):
    """Calls after `as_exported()` take the paths that torch.export writes down."""
    return lambda value=True: monkeypatch.setattr(torch.compiler, "is_exporting", lambda: value)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize(
    ("kernel", "arguments", "options"),
    VARIANTS,
    ids=lambda x: x if isinstance(x, str) else "-".join(f"{k}={v}" for k, v in x.items()) or "default",
)
def test_the_exported_form_of_a_kernel_equals_the_reference(kernel, arguments, options, dtype, as_exported):
    for T in KERNELS[kernel].lengths:
        inputs, options = draw(kernel, T, dtype, seed=T, **arguments), KERNELS[kernel].options | options
        kept = {name: x.clone() for name, x in inputs.items()}
        want = KERNELS[kernel].reference(**widened(inputs), **options)
        as_exported()
        got = KERNELS[kernel].fast(**inputs, **options)
        as_exported(False)
        pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
        for name, (g, w) in zip(("y", "state"), pairs, strict=False):
            assert g.shape == w.shape
            assert error(g, w) <= bound_of(kernel, name, inputs), (T, name)
        assert all(torch.equal(x, kept[name]) for name, x in inputs.items())


@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_the_exported_form_stays_exact_where_decays_are_strong_and_chunks_many(kernel, as_exported):
    """Decays of e^-100 a step beside steps without any; 40 chunks and more."""
    for scale in (1, 25):
        inputs = draw(kernel, 700, F64)
        inputs["a"] = torch.where(torch.rand_like(inputs["a"]) < 0.1, scale * inputs["a"], 0.001 * inputs["a"])
        want = KERNELS[kernel].reference(**inputs)
        as_exported()
        got = KERNELS[kernel].fast(**inputs)
        as_exported(False)
        assert max(error(g, w) for g, w in zip(got, want, strict=True)) < KERNELS[kernel].bound(F64)


@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_an_exported_step_leaves_the_state_that_it_is_given(kernel, as_exported):
    inputs = draw(kernel, 1)
    kept, want = inputs["initial_state"].clone(), KERNELS[kernel].reference(**widened(inputs))
    as_exported()
    got = KERNELS[kernel].fast(**inputs, overwrite=True)
    assert torch.equal(inputs["initial_state"], kept)
    assert max(error(g, w) for g, w in zip(got, want, strict=True)) < KERNELS[kernel].bound(F32)


@pytest.mark.parametrize("way", ["documents", "limit", "readable", "all"])
def test_exported_selected_attention_equals_its_reference_at_every_column(way, as_exported):
    (_, k, v, _, before, window), ways = narrowed()
    every = Packed(torch.arange(130), (1, 130), 130, False)
    q = torch.randn(130, *k.shape[2:])
    want = select_attention_reference(q.double(), k.double(), v.double(), every, before, window, **ways[way])
    as_exported()
    packed = pack(torch.zeros(1, 130, dtype=torch.bool), window)
    assert torch.equal(packed.index, every.index)
    assert error(select_attention(q, k, v, packed, before, window, **ways[way]), want) < 1.6e-6  # `select_cases.BOUND`


def _calls(model, ids, mask, as_exported, exported):
    """Logits of a padded call, of one without a mask, and of a prompt that is continued by pieces and steps."""
    as_exported(exported)
    whole = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    out = model(ids[:, :30], attention_mask=mask[:, :30], use_cache=True)
    logits = [whole, model(ids, use_cache=False).logits, out.logits[mask[:, :30].bool()]]
    for piece in ids[:, 30:].split([4, 1, 1, 1, 12, 1, 3], 1):
        logits.append(model(piece, cache=out.cache, use_cache=True).logits)
    as_exported(False)
    return torch.cat([x.flatten(0, -2) for x in logits])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_exported_selection_gives_what_eager_selection_gives(case, as_exported):
    """Every option of the selective layer. In float64, where no gate is near enough to a tie to turn."""
    model = build(case)
    ids, mask = words(model.config.vocab_size, 2, 53), torch.ones(2, 53, dtype=torch.long)
    mask[0, :7], mask[1, 11:15], mask[1, 25:30] = 0, 0, 0
    eager, exported = (_calls(model, ids, mask, as_exported, value) for value in (False, True))
    assert relative(exported, eager) < FORMS


@torch.no_grad()
def test_the_exported_form_gives_what_eager_gives(recurrent, as_exported):
    model, ids, mask = recurrent.build(dtype=torch.float64), tokens(2, 53), torch.ones(2, 53, dtype=torch.long)
    mask[0, :7], mask[1, 11:15], mask[1, 25:30] = 0, 0, 0
    eager, exported = (_calls(model, ids, mask, as_exported, value) for value in (False, True))
    assert relative(exported, eager) < FORMS


def test_packed_documents_are_refused_by_a_kernel_that_is_exported(as_exported):
    as_exported()
    with pytest.raises(ValueError, match="cannot write down packed documents"):
        recurrence.documents(torch.tensor([0, 5]), 1, 5)
