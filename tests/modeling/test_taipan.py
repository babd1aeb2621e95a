"""Taipan against its recurrence (`recurrences_taipan.py`): every flag, every way through the model."""

from functools import cache

import pytest
import torch
from parity_cases import BOUND, error, gradient_errors, long_errors, mistaken_error, through, tokens
from recurrences_taipan import taipan_logits
from taipan_cases import CASES, build, margin, masks, recorded

LENGTH = 61  # 7.6 windows of 8: the ring wraps seven times
SPLITS = {
    "steps": [1] * LENGTH,
    "prefill": [40] + [1] * 21,
    "1 + 60": [1, 60],
    "pieces": [20, 1, 5, 35],
    "windows": [8, 7, 9, 8, 29],
}
MARGIN = 1e-6  # of every delta from its threshold; float64 rounding is below 1e-12


@cache
def case(name, batch=2, length=LENGTH):
    """Model in float64, ids, the recurrence's logits and its choices."""
    model, chosen = build(name), []
    ids = tokens(model.config.vocab_size, batch, length)
    want = taipan_logits(model.state_dict(), model.config, ids, chosen=chosen)
    return model, ids, want, chosen


def chosen_mask(model, ids, chosen, layer):
    at = model.config.selective_layers[layer]
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, b, t, _, selected in chosen:
        if i == at:
            mask[b, t] = selected
    return mask


@pytest.mark.parametrize("name", CASES)
def test_T1_one_pass_and_token_by_token_equal_the_recurrence_with_the_same_masks(name):
    model, ids, want, chosen = case(name)
    threshold = model.config.eval_threshold
    for pieces in (None, SPLITS["steps"]):
        logits, found = recorded(model, ids, pieces)
        assert margin(found, threshold) > MARGIN
        assert error(logits, want) < BOUND
        for layer in range(len(model.config.selective_layers)):
            mask = masks(found, layer, threshold)
            assert torch.equal(mask, chosen_mask(model, ids, chosen, layer))
            assert 0.2 < mask.double().mean() < 0.6  # both kinds of tokens are there


@pytest.mark.parametrize("split", list(SPLITS)[1:])
@pytest.mark.parametrize("name", CASES)
def test_T2_any_split_of_the_prompt_equals_the_recurrence(name, split):
    model, ids, want, _ = case(name)
    assert error(through(model, ids, SPLITS[split]), want) < BOUND


def rings(model, ids, pieces):
    past = None
    with torch.no_grad():
        for piece in ids.split(pieces, 1):
            past = model(piece, cache=past, use_cache=True).cache
    return [past.layers[i] for i in model.config.selective_layers]


@pytest.mark.parametrize("name", ["defaults", "selected keys", "selected keys by rank, cap of 3", "rope"])
def test_T2_rings_hold_the_same_whatever_the_split(name):
    model, ids, *_ = case(name)
    want = rings(model, ids, [LENGTH])
    for split in SPLITS.values():
        for got, ring in zip(rings(model, ids, split), want, strict=True):
            assert all(torch.equal(getattr(got, n), getattr(ring, n)) for n in ring.names if n in INTEGERS)
            assert (got.keys - ring.keys).abs().max() < BOUND
            assert (got.values - ring.values).abs().max() < BOUND


INTEGERS = ("counts", "written", "places")


@pytest.mark.parametrize("name", CASES)
def test_T3_a_left_padded_batch_equals_its_rows_alone(name):
    model, lengths, pad = build(name), (40, 17, 3), 5
    ids = tokens(model.config.vocab_size, 3, 60)
    mask = torch.stack([torch.arange(60) >= 40 - n for n in lengths]).long()
    ids = torch.where(mask.bool(), ids, pad)
    with torch.no_grad():
        past, logits = None, []
        for a, b in [(0, 40)] + [(i, i + 1) for i in range(40, 60)]:
            out = model(ids[:, a:b], attention_mask=mask[:, :b], cache=past, use_cache=True)
            past = out.cache
            logits.append(out.logits)
        logits = torch.cat(logits, 1)
        for row, n in enumerate(lengths):
            alone, found = recorded(model, ids[row : row + 1, 40 - n :])
            assert margin(found, model.config.eval_threshold) > MARGIN
            assert error(logits[row, 40 - n :], alone[0]) < BOUND


@pytest.mark.parametrize("name", ["defaults", "selected keys", "selected keys by rank", "rope"])
def test_T4_steps_with_random_beam_reorders_equal_the_reordered_history(name):
    """Rows of different lengths, so that what a beam takes over includes its counters."""
    model, random = build(name), torch.Generator().manual_seed(4)
    history = tokens(model.config.vocab_size, 4, 12)
    mask = torch.stack([torch.arange(12) >= 12 - n for n in (12, 11, 7, 2)]).long()
    with torch.no_grad():
        past = model(history, attention_mask=mask, use_cache=True).cache
        for _ in range(25):
            order = torch.randint(0, 4, (4,), generator=random)
            past.reorder_cache(order)
            new = torch.randint(0, model.config.vocab_size, (4, 1), generator=random)
            history = torch.cat([history[order], new], 1)
            mask = torch.cat([mask[order], torch.ones(4, 1, dtype=torch.long)], 1)
            got = model(new, attention_mask=mask, cache=past).logits[:, 0]
            assert error(got, model(history, attention_mask=mask).logits[:, -1]) < BOUND


@pytest.mark.parametrize("name", ["defaults", "selected keys", "cap of 3", "gate network"])
def test_gradients_equal_those_of_the_recurrence(name):
    model, ids, *_ = case(name)
    errors = gradient_errors(model, taipan_logits, ids[:, :30])
    assert max(errors.values()) < BOUND, errors


@pytest.mark.parametrize("name", ["defaults", "selected keys"])
def test_a_long_prompt_equals_the_recurrence(name):
    """Longer than a segment of a prefill on a CPU and than several tiles of queries."""
    model, ids, want, _ = case(name, batch=1, length=530)
    assert max(long_errors(model, ids, want)) < BOUND
    assert error(through(model, ids, [520] + [1] * 10), want) < BOUND


MISTAKES = [
    ("a exchanged", "defaults"),
    ("all selected", "defaults"),
    ("cap ignored", "cap of 3"),
    ("cap ignored", "selected keys, cap of 3"),
    ("cap one key long", "cap of 3"),
    ("cap one key long", "selected keys by rank, cap of 3"),
    ("decay not applied", "defaults"),
    ("feed-forward network for selected tokens alone", "defaults"),
    ("gate reads the other stream", "defaults"),
    ("gate reads the other stream", "gate of the stream"),
    ("heads tiled", "defaults"),
    ("no network after a Mamba-2 block", "network in every block"),
    ("no norm after attention", "norm after attention"),
    ("other positions", "rope"),
    ("other refinement", "defaults"),
    ("other refinement", "residual"),
    ("other window axis", "selected keys"),
    ("other window axis", "selected keys by rank"),
    ("own key not seen", "defaults"),
    ("queries not refined", "refined first"),
    ("scores not scaled", "defaults"),
    ("threshold ignored", "threshold 0.7"),
    ("threshold ignored", "a threshold for each layer"),
    ("threshold of the first layer", "a threshold for each layer"),
    ("unselected tokens write nothing", "defaults"),
    ("up and gate exchanged", "defaults"),
    ("v of h before the norm", "defaults"),
    ("window one key long", "defaults"),
    ("window one key long", "selected keys"),
    ("window one key short", "defaults"),
    ("window one key short", "window 2, one head"),
]


@pytest.mark.parametrize(("wrong", "name"), MISTAKES)
def test_a_wrong_recurrence_is_found(wrong, name):
    model, ids, *_ = case(name)
    assert mistaken_error(model, taipan_logits, ids, wrong) > 100 * BOUND
