"""ADORE's cache against its law: the checks A to H, on decoders that know nothing of it."""

import pytest
import torch
from adore_cases import (
    EXACT,
    PIECES,
    TableScorer,
    decoder,
    dense,
    drawn_scores,
    follows,
    gap_after_reordering,
    mask_of,
    run,
    simulate,
    text,
)

from scrubjay import AdoreCache
from scrubjay.modeling.decoder.controller import Controller
from scrubjay.modeling.inputs.cache_argument import CACHE, named


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def model(request):
    return decoder(request.param)


def generated(model, ids, cache=None, **options):
    mask = mask_of((18, 11, 2), 18)
    options = dict(max_new_tokens=14, do_sample=False, attention_mask=mask) | options
    return model.generate(ids, **named(cache), **options)


@pytest.mark.parametrize("rebuild", [0, 3])
@pytest.mark.parametrize("beams", [1, 3])
def test_adore_A_a_cache_that_holds_every_token_is_full_attention(model, rebuild, beams):
    ids = text(3, 18)
    want = generated(model, ids, num_beams=beams)
    cache = AdoreCache(model, cache_size=32, rebuild=rebuild, controller="random")
    assert torch.equal(generated(model, ids, cache, num_beams=beams), want)
    ids = text(2)
    with torch.no_grad():
        full = model(ids).logits
    for pieces in ([18] + [1] * 22, [1] * 40, [5, 30, 5]):
        cache = AdoreCache(model, cache_size=40, rebuild=rebuild, controller="random")
        assert (run(model, ids, pieces, cache)[0] - full).abs().max() < EXACT


FLAGS = {
    "as published": {},
    "swap": {"rebuild_commit": "swap"},
    "full mask": {"rebuild_mask": "full"},
    "every third": {"rebuild_every": 3},
    "gate": {"rebuild_gate": True},
    "gate and swap": {"rebuild_gate": True, "rebuild_commit": "swap"},
    "release before": {"release_before": True},
    "recent and sinks": {"recent": 3, "sinks": 2},
    "all at once": dict(rebuild_commit="swap", release_before=True, rebuild_every=2, recent=2, sinks=1),
}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("pieces", [PIECES, [4, 1, 1, 9, 1, 6, 1, 1, 12]], ids=["steps", "turns"])
def test_adore_B_a_run_is_one_dense_pass_over_its_token_instances(model, flags, pieces):
    settings = dict(cache_size=7, rebuild=3) | FLAGS[flags]
    gap, rebuilt_gap, law = follows(model, text()[0], pieces, drawn_scores(), **settings)
    assert gap < EXACT
    assert rebuilt_gap < EXACT
    assert len(law.instances) > sum(pieces)  # some were rebuilt


def test_adore_B_each_flag_changes_the_run(model):
    """Or the check above would prove nothing about it."""
    ids, seen = text(), []
    for flags in FLAGS.values():
        cache = AdoreCache(model, controller=drawn_scores(), **dict(cache_size=7, rebuild=3) | flags)
        seen.append(run(model, ids, PIECES, cache)[0])
    for i, one in enumerate(seen):
        assert all((one - other).abs().max() > 1e-2 for other in seen[:i])


@pytest.mark.parametrize("cache_size", [1, 4, 16])
@pytest.mark.parametrize("commit", ["discard", "swap"])
def test_adore_C_rebuilding_every_released_token_is_full_attention(model, cache_size, commit):
    ids = text(3)
    mask = mask_of((40, 31, 24), 40)
    with torch.no_grad():
        full = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    for pieces in ([*PIECES, 2], [1] * 40, [3, 20, 17]):
        cache = AdoreCache(model, cache_size=cache_size, rebuild=40, rebuild_commit=commit, controller=drawn_scores())
        logits, _ = run(model, ids, pieces, cache, mask)
        assert (logits - full)[mask.bool()].abs().max() < EXACT


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cache_size", [1, 7])
def test_adore_C_generates_as_full_attention(model, cache_size, beams):
    ids = text(3, 18)
    cache = AdoreCache(model, cache_size=cache_size, rebuild=40, controller="random")
    assert torch.equal(generated(model, ids, cache, num_beams=beams), generated(model, ids, num_beams=beams))


def test_adore_C_few_slots_and_few_rebuilt_differ_from_full_attention(model):
    """Or equality with it would show nothing."""
    ids = text(3, 18)
    cache = AdoreCache(model, cache_size=7, rebuild=3, controller="random")
    assert not torch.equal(generated(model, ids, cache), generated(model, ids))


def test_adore_D_a_rebuilt_token_is_exact_where_its_whole_prefix_is(model):
    ids, scorer = text()[0], drawn_scores()
    law = simulate(scorer.scores, PIECES, cache_size=7, rebuild=16)
    _, layers = dense(model, ids, law)
    with torch.no_grad():
        full = model(ids[None], use_cache=True)[CACHE].layers[-1]
    exact = {}
    for instance in law.instances:  # in order: what an instance sees of other calls comes before it
        covered = {other.column for other in instance.sees} == set(range(instance.column + 1))
        exact[id(instance)] = covered and all(
            exact.get(id(other), True)
            for other in instance.sees
            if other is not instance and other.call < instance.call
        )
    changed = True
    while changed:  # within a call, rebuilt tokens see each other in the order of their positions
        changed = False
        for instance in law.instances:
            if exact[id(instance)] and not all(exact[id(other)] for other in instance.sees):
                exact[id(instance)], changed = False, True
    counts = {True: 0, False: 0}
    for row, instance in enumerate(law.instances):
        if instance.call == 0 or instance.column >= sum(PIECES[: instance.call]):
            continue
        gap = float((layers[-1][0][:, row] - full.keys[0, :, instance.column]).abs().max())
        assert (gap < EXACT) == exact[id(instance)], (instance.column, gap)
        counts[exact[id(instance)]] += 1
    assert min(counts.values()) > 5


def test_adore_E_padded_rows_equal_lone_rows_after_reordering(model):
    assert gap_after_reordering(model) < EXACT


def attended(model, scorer, cache_size, rebuild):
    """Columns that each step after the prompt attends."""
    cache = AdoreCache(model, cache_size=cache_size, rebuild=rebuild, controller=scorer)
    _, tables = run(model, text(), PIECES, cache)
    before = [slots[0].tolist() for slots, _ in tables[:-1]]
    return [{*held, *rebuilt[0].tolist()} - {-1} for held, (_, rebuilt) in zip(before, tables[1:], strict=True)]


def test_adore_F_with_fixed_scores_rebuilding_is_a_larger_cache(model):
    fixed = TableScorer(torch.rand(64, generator=torch.Generator().manual_seed(1)).expand(64, 64))
    assert attended(model, fixed, 7, 4) == attended(model, fixed, 11, 0)
    torch.manual_seed(4)
    static, query = (Controller(48, 16, score_mode=mode).double() for mode in ("static", "query"))
    assert attended(model, static, 7, 4) == attended(model, static, 11, 0)
    with torch.no_grad():
        query.query.weight.mul_(20)  # so that the order of two tokens turns on the current one
    assert attended(model, query, 7, 4) != attended(model, query, 11, 0)


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("cache_size", [5, 9])
def test_adore_H_recency_is_a_sliding_window_and_with_sinks_the_set_of_streaming(model, cache_size, sinks):
    ids, prompt = text(), 18
    cache = AdoreCache(model, cache_size=cache_size, rebuild=0, sinks=sinks, controller="recency")
    logits, _ = run(model, ids, [*PIECES, 1, 1], cache)
    at = torch.arange(40)
    window = (at[:, None] - at <= cache_size - sinks) | (at < sinks) | (at[:, None] < prompt)
    mask = window & (at <= at[:, None])
    with torch.no_grad():
        # a row of the mask as a whole: a later token does not change what an earlier one was computed from
        want = model(ids, attention_mask=mask[None, None], position_ids=at[None]).logits
    assert (logits - want).abs().max() < EXACT
    named = AdoreCache(model, cache_size=cache_size, rebuild=0, controller="streaming" if sinks else "recency")
    assert torch.equal(run(model, ids, [*PIECES, 1, 1], named)[0], logits)
