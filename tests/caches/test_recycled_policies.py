"""The policies that Recycled Attention is compared with, against their simulation with lists; padding and turns."""

import pytest
import torch
from recycled_cases import Oracle, assert_close, compare, decoder, drive, gap, padded, tokens

from scrubjay import RecycledCache

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

EVICTING = ("snapkv", "h2o", "tova", "streaming")
POLICIES = ("recycled", "lowrank", "quest", *EVICTING, "full")
ONE_TURN = [12] + [1] * 20
TURNS = [12, 1, 1, 1, 2, 1, 1, 7, 1, 1, 1, 1, 1, 1]  # pieces shorter and longer than half the budget
SHORT = [1, 1, 1, 3, 1, 1, 1, 1, 1, 1, 5, 1, 1, 1]  # shorter than the budget at first


@pytest.fixture(scope="module")
def model():
    return decoder()


def settings_of(policy, **more):
    return {"policy": policy, "budget": 8, "stride": 6, "page": 3, "rank": 8} | more  # a head has 8 dimensions


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("policy", POLICIES)
def test_recycled_policies_are_the_oracles_in_every_family(policy, kind):
    model, settings = decoder(kind), settings_of(policy)
    with RecycledCache(model, **settings) as cache:
        compare(model, tokens(2, sum(TURNS)), TURNS, cache, Oracle(model, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_sink": 2},
        {"evict_first": False},
        {"keep_recent": 3},
        {"budget": 9},
        {"budget": 5},
        {"pool_kernel": 1},
        {"pool_kernel": 3, "group_reduce": "mean"},
        {"group_reduce": "first"},
    ],
    ids=str,
)
@pytest.mark.parametrize("pieces", [ONE_TURN, TURNS, SHORT], ids=["one turn", "turns", "short"])
@pytest.mark.parametrize("policy", EVICTING)
def test_recycled_policies_keep_what_the_oracle_keeps(model, policy, pieces, settings):
    settings = settings_of(policy, **settings)
    oracle = Oracle(model, **settings)
    with RecycledCache(model, **settings) as cache:
        compare(model, tokens(2, sum(pieces)), pieces, cache, oracle)
        for i, layer in enumerate(cache.layers):
            index = layer.kept.index[:, :, : layer.kept.filled].sort(-1).values
            assert index.tolist() == [[sorted(columns) for columns in row] for row in oracle.kept[i]]


def test_recycled_streaming_keeps_the_first_and_the_newest(model):
    with RecycledCache(model, policy="streaming", budget=8) as cache:
        drive(model, tokens(1, 32), ONE_TURN, cache)
        for layer in cache.layers:
            assert layer.kept.index.sort(-1).values.unique(dim=1).tolist() == [[[0, 1, 2, 3, 28, 29, 30, 31]]]


@torch.no_grad()
def test_recycled_h2o_keeps_the_newest_half_and_what_received_most(model):
    """After the prompt: column sums of the attention of all prompt queries, by hand."""
    ids, recorded = tokens(1, 20), {}
    oracle = Oracle(model, policy="full")
    with oracle.running() as stock:
        drive(model, ids, [20], stock, None, oracle)
        recorded = {i: layer.keys for i, layer in enumerate(stock.layers)}
    with RecycledCache(model, policy="h2o", budget=8) as cache:
        drive(model, ids, [20], cache)
    hidden = model.model(ids, output_hidden_states=True).hidden_states[0]
    layer = model.model.layers[0]
    q = layer.self_attn.q_proj(layer.input_layernorm(hidden)).view(1, 20, 4, 8).transpose(1, 2)
    cos, sin = model.model.rotary_emb(hidden, torch.arange(20)[None])
    a, b = q.chunk(2, -1)
    q = q * cos + torch.cat([-b, a], -1) * sin
    scores = q @ recorded[0].repeat_interleave(2, 1).mT * 8**-0.5
    p = scores.masked_fill(~torch.ones(20, 20, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    mass = p.view(1, 2, 2, 20, 20).amax(2).sum(2)
    for g in range(2):
        heavy = mass[0, g, :16].topk(4).indices.tolist()
        assert set(cache.layers[0].kept.index[0, g].tolist()) == {*heavy, 16, 17, 18, 19}
        kept = cache.layers[0].kept.index[0, g]
        assert_close(cache.layers[0].mass[0, g], mass[0, g, kept])


@pytest.mark.parametrize("policy", ["h2o", "tova", "streaming"])
def test_recycled_bytes_of_evicting_policies_do_not_grow(model, policy):
    sizes = set()
    with RecycledCache(model, policy=policy, budget=8) as cache:
        drive(model, tokens(2, 112), [12] + [1] * 60 + [9] + [1] * 31, cache, after=lambda: sizes.add(cache.nbytes))
    mass = 8 if policy in ("h2o", "tova") else 0  # float64 here
    assert sizes == {2 * 2 * 2 * 8 * (2 * 8 * 8 + 8 + 8 + mass)}  # layers, rows, key heads, slots


@pytest.mark.parametrize("side", ["left", "right", "inner"])
@pytest.mark.parametrize("pieces", [ONE_TURN, TURNS], ids=["one turn", "turns"])
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "quest"])
def test_recycled_rows_of_a_padded_batch_are_the_rows_alone(model, policy, pieces, side):
    """Rows with all columns, fewer tokens than the budget, fewer than sinks, and one. Quest's pages are of columns."""
    counts, more = (12, 6, 2, 1), sum(pieces) - 12
    prompt, ids = padded(counts, 12, side), tokens(4, sum(pieces))
    real = torch.cat([prompt, torch.ones(4, more, dtype=torch.bool)], 1)
    settings = settings_of(policy, n_sink=3)
    with RecycledCache(model, **settings) as cache:
        batch = drive(model, ids, pieces, cache, real)
    for b, count in enumerate(counts):
        with RecycledCache(model, **settings) as cache:
            alone = drive(model, ids[b : b + 1, real[b]], [count, *pieces[1:]], cache)
        assert_close(batch[b : b + 1, real[b]], alone)


@pytest.mark.parametrize("side", ["left", "right", "inner"])
@pytest.mark.parametrize("policy", POLICIES)
def test_recycled_padding_in_every_turn_is_as_the_oracle_has_it(model, policy, side):
    ids, real = tokens(3, sum(TURNS)), torch.ones(3, sum(TURNS), dtype=torch.bool)
    real[:, :12] = padded((12, 5, 2), 12, side)
    real[:, 15:17] = padded((1, 2, 0), 2, side)  # a row without a new token
    real[:, 19:26] = padded((7, 1, 4), 7, side)
    real[1, 28] = False  # and one that has none in a step
    real[0, 29] = False
    settings = settings_of(policy, n_sink=3, stride=3)
    oracle = Oracle(model, **settings)
    with RecycledCache(model, **settings) as cache:
        compare(model, ids, TURNS, cache, oracle, real)


@pytest.mark.parametrize("policy", EVICTING)
def test_recycled_rows_with_holes_are_the_rows_alone(model, policy):
    """Evicting policies have no schedule: a step in which a row has no token leaves no trace in it."""
    ids, real = tokens(2, 40), torch.ones(2, 40, dtype=torch.bool)
    real[0, [3, 4, 15, 20, 21, 33]] = False
    with RecycledCache(model, policy=policy, budget=8) as cache:
        batch = drive(model, ids, [12] + [1] * 28, cache, real)
    with RecycledCache(model, policy=policy, budget=8) as cache:
        alone = drive(model, ids[:1, real[0]], [10] + [1] * 24, cache)
    assert_close(batch[:1, real[0]], alone)


def test_recycled_policies_differ(model):
    """That the comparisons above tell them apart."""
    found = {}
    for policy in POLICIES:
        with RecycledCache(model, **settings_of(policy, rank=2)) as cache:
            found[policy] = drive(model, tokens(2, 32), ONE_TURN, cache)
    names = list(found)
    assert all(gap(found[a], found[b]) > 0.1 for a in names for b in names if a < b)
