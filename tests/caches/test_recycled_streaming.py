"""StreamingLLM with positions counted within the cache: each step is the model on the sinks and the window alone."""

import copy

import pytest
import torch
from recycled_cases import assert_close, decoder, drive, gap, padded, tokens

from scrubjay import RecycledCache, RecycledConfig
from scrubjay.modeling.inputs.cache_argument import named

BUDGET, SINKS = 8, 3
TABLES = 1e-6  # transformers' rotary tables are float32, so equal distances at other positions differ by up to 1.3e-7


def cache_of(model, **more):
    return RecycledCache(model, **dict(policy="streaming", rope_mode="cache", budget=BUDGET, n_sink=SINKS) | more)


@torch.no_grad()
def alone(model, ids, end, held, new=1):
    """Logits of the last `new` of ids[:, :end], in a text that is the sinks and the newest columns, `held` in all."""
    window = ids[:, end - (held - SINKS) : end]
    return model(torch.cat([ids[:, :SINKS], window], 1), use_cache=False).logits[:, -new:]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("evict_first", [True, False])
def test_recycled_streaming_steps_are_a_text_of_the_sinks_and_the_window(kind, evict_first):
    """One layer, whose keys depend on token and position alone."""
    model, ids = decoder(kind, layers=1), tokens(2, 40)
    with cache_of(model, evict_first=evict_first) as cache:
        got = drive(model, ids, [12] + [1] * 20, cache)
        for end in range(13, 33):
            assert_close(got[:, end - 1 : end], alone(model, ids, end, BUDGET + (not evict_first)), bound=TABLES)
        piece = drive(model, ids[:, 32:38], [6], cache)
        held = BUDGET + (not evict_first)
        assert_close(piece, alone(model, ids, 38, held + 6, 6), bound=TABLES)
        assert_close(drive(model, ids[:, 38:39], [1], cache), alone(model, ids, 39, held), bound=TABLES)
    with cache_of(model, rope_mode="absolute") as cache:
        assert gap(drive(model, ids, [12] + [1] * 20, cache)[:, 20:], got[:, 20:]) > 1e-2


def test_recycled_streaming_turns_nothing_before_something_is_forgotten():
    model, ids = decoder(), tokens(2, 30)
    logits = []
    for rope_mode in ("cache", "absolute"):
        with cache_of(model, rope_mode=rope_mode, budget=30) as cache:
            logits.append(drive(model, ids, [3] + [1] * 9 + [10] + [1] * 8, cache))
    assert torch.equal(*logits)


@pytest.mark.parametrize("counts", [(30, 19, 30), (30, 2, 30), (30, 10, 1)])
@pytest.mark.parametrize("pieces", [[12] + [1] * 18, [12, 1, 1, 9] + [1] * 7], ids=str)
def test_recycled_streaming_rows_of_a_padded_batch_are_the_rows_alone(counts, pieces):
    model, ids, real = decoder(), tokens(3, 30), padded(counts, 30)
    with cache_of(model) as cache:
        got = drive(model, ids, pieces, cache, real)
    for row, count in enumerate(counts):
        ends = torch.tensor(pieces).cumsum(0).tolist()
        own = [max(0, end - (30 - count)) for end in ends]
        sizes = [b - a for a, b in zip([0, *own], own, strict=False) if b > a]
        with cache_of(model) as cache:
            want = drive(model, ids[row : row + 1, 30 - count :], sizes, cache)
        assert_close(got[row : row + 1, 30 - count :], want)


def test_recycled_streaming_goes_on_in_every_copy(tmp_path):
    model, ids = decoder(), tokens(2, 40)
    cache = cache_of(model)
    drive(model, ids[:, :25], [12] + [1] * 13, cache)
    cache.save(tmp_path / "c.safetensors")
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    rest = [1, 4, 1, 1, 8]
    others = (copy.deepcopy(cache), RecycledCache.load(tmp_path / "c.safetensors", model))
    size = cache.nbytes
    want = drive(model, ids[:, 25:], rest, cache)
    assert cache.nbytes == size
    for other in others:
        assert torch.equal(drive(model, ids[:, 25:], rest, other), want)
    assert_close(drive(model, ids[:, 25:].flip(0), rest, swapped), want.flip(0))


def test_recycled_streaming_generates_with_beams():
    model, ids = decoder(), tokens(2, 14)
    options = dict(max_new_tokens=12, do_sample=False, num_beams=3, eos_token_id=None)
    with cache_of(model, budget=40) as cache:
        assert torch.equal(model.generate(ids, **named(cache), **options), model.generate(ids, **options))
    with cache_of(model) as cache:
        both = model.generate(ids, **named(cache), **options)
    with cache_of(model) as cache:
        assert torch.equal(both[1:], model.generate(ids[1:], **named(cache), **options))


def test_recycled_streaming_positions_are_refused_where_they_mean_nothing():
    model = decoder()
    with pytest.raises(ValueError, match="policy='streaming' alone keeps; got 'h2o'"):
        RecycledCache(model, policy="h2o", rope_mode="cache", budget=8)
    with pytest.raises(ValueError, match="rope_mode must be one of"):
        RecycledCache(model, policy="streaming", rope_mode="relative", budget=8)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(Exception, match="those of rope_type 'dynamic' change"):
        RecycledConfig(hidden_size=32, num_hidden_layers=1, rope_parameters=rope, policy="streaming", rope_mode="cache")
