"""Policies that choose at every step, and caches forked from one prompt."""

import copy

import pytest
import torch
from recycled_cases import Oracle, assert_close, compare, decoder, drive, gap, padded, tokens

from scrubjay import RecycledCache
from scrubjay.modeling.inputs.cache_argument import named

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

PROMPT, NEW = 40, 12
PIECES = [PROMPT] + [1] * NEW
SETTINGS = [
    {"policy": "recycled", "stride": 4},
    {"policy": "recycled", "schedule": "dynamic", "qc": 3},
    {"policy": "lowrank", "rank": 3},
    {"policy": "quest", "page": 4},
    {"policy": "snapkv"},
    {"policy": "tova"},
    {"policy": "streaming"},
    {"policy": "full"},
]


@pytest.fixture(scope="module")
def model():
    return decoder()


def test_lowrank_directions_lose_the_least_of_the_scores(model):
    """Of the weighted error that the docstring names; the law are singular values, by another square root."""
    ids, rank = tokens(1, PROMPT + 1), 3
    with RecycledCache(model, policy="lowrank", budget=8, rank=rank) as cache:
        drive(model, ids, [PROMPT, 1], cache)
        layer = cache.layers[0]
        keys, queries = layer.full_keys[0, :, : layer.seen], layer.remembered()[0].unflatten(0, (2, -1)).flatten(1, 2)
        for g in range(2):
            q, k = queries[g], keys[g] - keys[g].mean(0)
            moments = q.T @ q
            moments = moments / moments.diagonal().mean() + 0.1 * torch.eye(8, dtype=q.dtype)
            values, vectors = torch.linalg.eigh(moments)
            weighted = k @ (vectors * values.sqrt()) @ vectors.T  # another square root than Cholesky's
            least = torch.linalg.svdvals(weighted)[rank:].square().sum()
            down, up = layer.to_low[0, g]
            error = k - k @ down @ up.T
            assert_close((error @ moments @ error.T).trace(), least)
            assert_close(layer.low[0, g, :, : layer.seen].mT, k @ down)


@pytest.mark.parametrize("pieces", [PIECES, [20, 1, 1, 5, 1, 1, 1] + [1] * 22], ids=["one turn", "turns"])
def test_lowrank_in_some_layers_leaves_the_others_recycled(model, pieces):
    settings = {"policy": "lowrank", "budget": 8, "rank": 8, "stride": 4, "choosing_layers": [1]}
    oracle = Oracle(model, **settings)
    with RecycledCache(model, **settings) as cache:
        compare(model, tokens(2, sum(pieces)), pieces, cache, oracle)
        assert [type(layer).__name__ for layer in cache.layers] == ["RecycledLayer", "LowRankLayer"]
        assert cache.full_steps[0] > 0


def test_lowrank_directions_are_found_again_when_the_text_has_doubled(model):
    with RecycledCache(model, policy="lowrank", budget=8, rank=2) as cache:
        drive(model, tokens(2, 120), [20] + [1] * 100, cache)
        assert [layer.found_at for layer in cache.layers] == [84, 84]  # 21, 42, 84


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_a_fork_is_a_cache_that_read_the_prompt_itself(model, settings, side):
    ids, real = tokens(3, PROMPT + NEW), None
    if side is not None:
        real = torch.cat([padded((PROMPT, 30, 5), PROMPT, side), torch.ones(3, NEW, dtype=torch.bool)], 1)
    settings = {"budget": 12} | settings
    with RecycledCache(model, **settings) as cache:
        want = drive(model, ids, PIECES, cache, real)[:, PROMPT:]
    first = {"policy": "recycled", "schedule": "dynamic"} if settings.get("schedule") else {"policy": "full"}
    with RecycledCache(model, **first) as cache:
        drive(model, ids[:, :PROMPT], [PROMPT], cache, real if real is None else real[:, :PROMPT])
        with cache.fork(**settings) as fork:
            got = continued(model, ids, fork, real)
            assert cache.get_seq_length() == PROMPT
        with cache.fork(policy="full") as fork:  # the first is as it was
            exact = continued(model, ids, fork, real)
    assert_close(got, want)
    assert settings["policy"] == "full" or gap(exact, want) > 1e-3


@torch.no_grad()
def continued(model, ids, cache, real):
    found = []
    for t in range(PROMPT, PROMPT + NEW):
        more = {}
        if real is not None:
            seen = real[:, : t + 1]
            more = {"attention_mask": seen.long(), "position_ids": (seen.long().cumsum(1) - 1)[:, -1:]}
        found.append(model(ids[:, t : t + 1], **named(cache), **more).logits)
    return torch.cat(found, 1)


def test_a_fork_of_a_cache_that_was_saved(model, tmp_path):
    """It knows what a choice among its keys needs."""
    ids = tokens(2, PROMPT + NEW)
    with RecycledCache(model, policy="full") as cache:
        drive(model, ids[:, :PROMPT], [PROMPT], cache)
        cache.save(tmp_path / "prompt.safetensors")
        with cache.fork(policy="snapkv", budget=12) as fork:
            want = continued(model, ids, fork, None)
    with (
        RecycledCache.load(tmp_path / "prompt.safetensors", model) as cache,
        cache.fork(policy="snapkv", budget=12) as fork,
    ):
        assert torch.equal(continued(model, ids, fork, None), want)


def test_a_fork_says_what_it_cannot_know(model):
    with (
        RecycledCache(model, policy="streaming", budget=8) as cache,
        pytest.raises(ValueError, match="has forgotten keys"),
    ):
        cache.fork(policy="full")
    with RecycledCache(model, policy="full") as cache:
        drive(model, tokens(1, PROMPT), [PROMPT], cache)
        with pytest.raises(ValueError, match="last 40 tokens are remembered; policy='h2o' needs more"):
            cache.fork(policy="h2o", budget=8)
        with pytest.raises(ValueError, match="make the first cache with it as well"):
            cache.fork(policy="recycled", budget=8, schedule="dynamic")


@pytest.mark.parametrize("policy", ["lowrank", "quest"])
def test_choosing_policies_go_back_as_far_as_queries_are_remembered(model, policy):
    """With all directions: fewer are found from more of the text than a crop leaves."""
    ids = tokens(2, PROMPT + NEW)
    with RecycledCache(model, policy=policy, budget=12, page=4, rank=8) as cache:
        want = drive(model, ids, PIECES, cache)[:, -5:]
        cache.crop(-5)
        with torch.no_grad():
            got = [model(ids[:, t : t + 1], **named(cache)).logits for t in range(PROMPT + NEW - 5, PROMPT + NEW)]
    assert_close(torch.cat(got, 1), want)


def test_quest_needs_room_for_two_pages(model):
    with pytest.raises(ValueError, match="must hold two of them; got budget=31 and page=16"):
        RecycledCache(model, policy="quest", budget=31)


@pytest.mark.parametrize("policy", ["lowrank", "quest"])
def test_what_steps_gather_lies_in_one_memory_in_and_out_of_inference_mode(model, policy):
    settings, ids = {"policy": policy, "budget": 8, "page": 4, "rank": 3}, tokens(2, PROMPT + NEW)
    with RecycledCache(model, **settings) as cache, torch.no_grad():
        want = drive(model, ids, PIECES, cache)
    with RecycledCache(model, **settings) as cache, torch.no_grad():
        got = [drive(model, ids[:, : PROMPT + 4], [PROMPT, 1, 1, 1, 1], cache)]
        held = {name: memory.data_ptr() for name, memory in cache.call.spare.items()}
        got.append(drive(model, ids[:, PROMPT + 4 : PROMPT + 6], [1, 1], cache))
        assert held == {name: memory.data_ptr() for name, memory in cache.call.spare.items()}
        assert held.keys() == {"keys", "values"}
        with torch.inference_mode():
            got.append(drive(model, ids[:, PROMPT + 6 : PROMPT + 8], [1, 1], cache))
        with copy.deepcopy(cache) as other:
            assert other.call.spare == {}
            rest = drive(model, ids[:, PROMPT + 8 :], [1] * 4, other)
        got.append(drive(model, ids[:, PROMPT + 8 :], [1] * 4, cache))
    assert torch.equal(torch.cat(got, 1), want)
    assert torch.equal(got[-1], rest)
