"""A recycled cache in the hands of generate(), on models of transformers as they are."""

import copy
import gc

import pytest
import torch
from recycled_cases import Oracle, assert_close, decoder, drive, padded, tokens
from transformers import DynamicCache

from scrubjay import RecycledCache
from scrubjay.modeling.inputs.cache_argument import named

KINDS = ("llama", "qwen2", "qwen3")
POLICIES = ("recycled", "lowrank", "snapkv", "h2o", "tova", "streaming", "full")
STEPS = [12] + [1] * 12


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return decoder(request.param)


@pytest.fixture(scope="module")
def llama():
    return decoder()


def batch():
    """Three prompts of different lengths, padded on the left."""
    mask = padded((14, 9, 5), 14).long()
    return {"input_ids": tokens(3, 14) * mask, "attention_mask": mask}


def generate(model, cache, inputs=None, **options):
    options = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None} | options
    return model.generate(**(batch() if inputs is None else inputs), **named(cache), **options)


@torch.no_grad()
def steps_on(model, ids, cache, real=None, pieces=None):
    """Logits of ids on a cache that holds some columns."""
    found, start = [], 0
    for piece in pieces or [1] * ids.shape[1]:
        seen = cache.get_seq_length() + piece
        more = {}
        if real is not None:
            mask = real[:, :seen].long()
            more = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -piece:]}
        found.append(model(ids[:, start : start + piece], **named(cache), **more).logits)
        start += piece
    return torch.cat(found, 1)


def state_of(model):
    """What a cache may change in a model."""
    inner = model.get_decoder()
    return (
        inner.config._attn_implementation,
        len(inner._forward_pre_hooks),
        len(inner._forward_hooks),
        len(inner._forward_hooks_with_kwargs),
        len(inner._forward_hooks_always_called),
        len(inner._forward_pre_hooks_with_kwargs),
        sorted(inner.__dict__),
        model.config._attn_implementation,
    )


@pytest.mark.parametrize(("policy", "beams"), [*((policy, 1) for policy in POLICIES), ("recycled", 3), ("h2o", 3)])
def test_recycled_generation_within_the_budget_is_stock_generation(model, policy, beams):
    with RecycledCache(model, budget=40, policy=policy) as cache:
        got = generate(model, cache, num_beams=beams)
    assert torch.equal(got, generate(model, DynamicCache(), num_beams=beams))


@pytest.mark.parametrize("policy", POLICIES)
def test_recycled_greedy_generation_is_the_oracles(model, policy):
    settings = dict(budget=6, stride=5, policy=policy)
    with RecycledCache(model, **settings) as cache:
        got = generate(model, cache)
    real = torch.cat([batch()["attention_mask"].bool(), torch.ones(3, 14, dtype=torch.bool)], 1)
    logits = Oracle(model, **settings).drive(got[:, :-1], [14] + [1] * 13, real[:, :-1])
    assert torch.equal(logits[:, 13:].argmax(-1), got[:, 14:])
    if policy != "full":
        assert not torch.equal(got, generate(model, DynamicCache()))


@pytest.mark.parametrize("policy", ["recycled", "snapkv", "h2o", "streaming"])
def test_recycled_rows_move_with_all_that_belongs_to_them(llama, policy):
    """Beams: reorder, then step, is what the row's own history gives."""
    ids, order = tokens(3, 24), torch.tensor([2, 0, 0])
    real = torch.cat([padded((12, 5, 9), 12), torch.ones(3, 12, dtype=torch.bool)], 1)
    for method in ("reorder_cache", "batch_select_indices"):
        for schedule in ("fixed", "dynamic"):
            settings = dict(budget=6, stride=5, policy=policy, schedule=schedule, qc=2, threshold=0.3)
            with RecycledCache(llama, **settings) as cache, RecycledCache(llama, **settings) as moved:
                drive(llama, ids[:, :15], [12, 1, 1, 1], cache, real[:, :15])
                drive(llama, ids[order, :15], [12, 1, 1, 1], moved, real[order, :15])
                getattr(cache, method)(order)
                for _ in range(6):
                    more = tokens(3, 1, seed=cache.get_seq_length())
                    mask = real[order, : cache.get_seq_length() + 1]
                    with torch.no_grad():
                        inputs = dict(attention_mask=mask.long(), position_ids=mask.long().sum(1, keepdim=True) - 1)
                        got = llama(more, **named(cache), **inputs).logits
                        want = llama(more, **named(moved), **inputs).logits
                    if schedule == "fixed":
                        assert_close(got, want)
                    else:  # "any" asks all rows: those that have gone had their part in the steps before
                        assert torch.isfinite(got).all()


def test_recycled_index_after_a_reorder_gathers_from_the_reordered_buffer(llama):
    ids, order = tokens(3, 14), torch.tensor([1, 1, 0])
    with RecycledCache(llama, budget=6, stride=50) as cache:
        drive(llama, ids, [12, 1, 1], cache)
        before = copy.deepcopy(cache)
        cache.reorder_cache(order)
        drive(llama, tokens(3, 1), [1], cache)
        for layer, old in zip(cache.layers, before.layers, strict=True):
            assert not torch.equal(old.kept.index[0], old.kept.index[1])
            for b in range(3):
                assert torch.equal(layer.full_keys[b, :, :14], old.full_keys[order[b], :, :14])
                for g in range(2):
                    at = layer.kept.index[b, g]
                    assert torch.equal(layer.kept.keys[b, g], layer.full_keys[b, g, at])
                    assert torch.equal(layer.kept.values[b, g], layer.full_values[b, g, at])


def test_recycled_rows_repeat_in_place(llama):
    ids = tokens(2, 20)
    real = torch.cat([padded((12, 5), 12), torch.ones(2, 8, dtype=torch.bool)], 1)
    with RecycledCache(llama, budget=6, stride=3) as cache, RecycledCache(llama, budget=6, stride=3) as other:
        drive(llama, ids[:, :15], [12, 1, 1, 1], cache, real[:, :15])
        cache.batch_repeat_interleave(2)
        drive(llama, ids.repeat_interleave(2, 0), [12] + [1] * 3, other, real.repeat_interleave(2, 0))
        more = tokens(4, 1)
        with torch.no_grad():  # without a mask: the cache knows it
            positions = torch.tensor([[15], [15], [8], [8]])
            got = llama(more, **named(cache), position_ids=positions).logits
            want = llama(more, **named(other), position_ids=positions).logits
        assert_close(got, want)


@pytest.mark.parametrize("policy", ["recycled", "full"])
def test_recycled_chunked_prefill_is_prefill(llama, policy):
    settings = dict(budget=6, stride=5, policy=policy)
    with RecycledCache(llama, **settings) as chunked, RecycledCache(llama, **settings) as whole:
        assert torch.equal(generate(llama, chunked, prefill_chunk_size=4), generate(llama, whole))


@pytest.mark.parametrize("suffix", [False, True], ids=["full ids", "suffix ids"])
@pytest.mark.parametrize("policy", POLICIES)
def test_recycled_second_turn_goes_on(llama, policy, suffix):
    ids, settings = tokens(2, 12), dict(budget=6, stride=5, policy=policy)
    with RecycledCache(llama, **settings) as cache:
        first = generate(llama, cache, {"input_ids": ids}, max_new_tokens=6)
        turn = torch.cat([first, tokens(2, 5, seed=3)], 1)
        mask = torch.ones_like(turn)
        given = turn[:, cache.get_seq_length() :] if suffix else turn
        second = generate(llama, cache, {"input_ids": given, "attention_mask": mask}, max_new_tokens=6)[:, -6:]
    whole = torch.cat([turn, second], 1)[:, :-1]
    logits = Oracle(llama, **settings).drive(whole, [12] + [1] * 5 + [6] + [1] * 5)
    assert torch.equal(logits[:, -6:].argmax(-1), second)


@pytest.mark.parametrize("policy", ["recycled", "full"])
def test_recycled_assisted_generation_within_the_budget_is_greedy(llama, policy):
    assistant, inputs = decoder(seed=0), {"input_ids": tokens(1, 12)}
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.3 * torch.randn_like(assistant.lm_head.weight))  # right at times only
    with RecycledCache(llama, budget=60, policy=policy) as cache:
        got = generate(llama, cache, inputs, assistant_model=assistant)
        assert type(cache.layers[0].seen) is int
    assert torch.equal(got, generate(llama, DynamicCache(), inputs))
    with RecycledCache(llama, budget=60, policy=policy) as cache:
        got = generate(llama, cache, inputs, prompt_lookup_num_tokens=3)
    assert torch.equal(got, generate(llama, DynamicCache(), inputs))


@pytest.mark.parametrize("settings", [{"stride": 4}, {"schedule": "dynamic", "qc": 2, "threshold": 0.4}], ids=str)
@pytest.mark.parametrize("padding", [False, True])
def test_recycled_crop_restores(llama, settings, padding):
    """Prefill, five steps, five back: the same five steps give the same, whatever was read in between."""
    ids = tokens(2, 17)
    real = torch.cat([padded((12, 7), 12), torch.ones(2, 9, dtype=torch.bool)], 1) if padding else None
    with RecycledCache(llama, budget=6, **settings) as cache:
        first = drive(llama, ids, [12] + [1] * 5, cache, None if real is None else real[:, :17])
        for other in ([1] * 5, [5], [2, 1, 1, 1]):
            cache.crop(-5)
            assert cache.get_seq_length() == 12
            again = steps_on(llama, ids[:, 12:], cache, real)
            assert torch.equal(again, first[:, 12:])
            cache.crop(-5)
            steps_on(llama, tokens(2, 5, seed=9), cache, real, other)
        cache.crop(0)
        assert cache.get_seq_length() == 17


@torch.no_grad()
def test_recycled_crop_in_the_middle_chooses_as_the_last_token_that_stays(llama):
    """By hand: scores of the query of column 16, the last that stays, not of the one that was read last."""
    ids = tokens(2, 20)
    with RecycledCache(llama, budget=6, stride=50) as cache:
        drive(llama, ids, [12] + [1] * 8, cache)
        cache.crop(-3)
        layer = cache.layers[0]
        p = layer.tail[:, :, 16].view(2, 2, 2, 8) @ layer.full_keys[:, :, :17].mT * 8**-0.5
        u = p.log_softmax(-1).amax(2)
        near = torch.stack([u[..., max(0, j - 3) : j + 4].amax(-1) for j in range(17)], -1)
        steps_on(llama, ids[:, 17:18], cache)
        for b in range(2):
            for g in range(2):
                best = sorted(range(17), key=lambda j: (j == 16, near[b, g, j], j))[-5:]
                assert set(layer.kept.index[b, g].tolist()) == {*best, 17}


def test_recycled_crop_refuses_what_it_cannot_do(llama):
    with RecycledCache(llama, budget=6) as cache:
        drive(llama, tokens(1, 80), [80], cache)
        with pytest.raises(ValueError, match=r"minus the number of columns.*got 5"):
            cache.crop(5)
        with pytest.raises(ValueError, match=r"last 64 columns are remembered.*got -64"):
            cache.crop(-64)
        cache.crop(-63)
        assert cache.get_seq_length() == 17
    for policy in ("snapkv", "h2o", "streaming"):
        with RecycledCache(llama, budget=6, policy=policy) as cache:
            drive(llama, tokens(1, 8), [8], cache)
            with pytest.raises(ValueError, match="deepcopy"):
                cache.crop(-1)
            cache.crop(0)


def test_recycled_cache_leaves_other_calls_alone(model):
    ids, before = tokens(2, 20), state_of(model)
    want, alone = drive(model, ids, STEPS[:1] + [1] * 8, DynamicCache()), model(ids).logits
    with RecycledCache(model, budget=6) as cache:
        during = state_of(model)
        drive(model, ids, [12] + [1] * 8, cache)
        assert state_of(model) == during
        assert (during[0], during[-1]) == (before[0], before[-1])
        other = DynamicCache()
        for start, stop in ((0, 12), *((i, i + 1) for i in range(12, 20))):
            with torch.no_grad():
                got = model(ids[:, start:stop], **named(other)).logits
            assert torch.equal(got, want[:, start:stop])
            drive(model, ids[:, :1], [1], cache)
        assert torch.equal(model(ids).logits, alone)
    assert state_of(model) == before


@pytest.mark.parametrize("ending", ["close", "with", "del", "raise", "raise inside"])
def test_recycled_cache_leaves_no_trace(llama, ending):
    before = state_of(llama)
    gc.collect()
    gc.disable()
    try:
        cache = RecycledCache(llama, budget=6)
        drive(llama, tokens(1, 14), [12, 1, 1], cache)
        if ending == "close":
            cache.close()
            cache.close()
            assert not cache.attached
        elif ending == "with":
            with cache:
                pass
        elif ending == "raise inside":
            hook = llama.model.layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("broken")))
            with pytest.raises(KeyError, match="broken"):
                drive(llama, tokens(1, 1), [1], cache)
            hook.remove()
            assert state_of(llama)[0] == before[0]
            assert cache.call.table is None
            cache.close()
        elif ending == "raise":
            with pytest.raises(KeyError), cache:
                raise KeyError
        del cache
        assert state_of(llama) == before
    finally:
        gc.enable()


def test_recycled_cache_says_that_a_call_failed_halfway(llama):
    with RecycledCache(llama, budget=6) as cache:
        drive(llama, tokens(1, 12), [12], cache)
        hook = llama.model.layers[0].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            drive(llama, tokens(1, 1), [1], cache)
        hook.remove()
        with pytest.raises(ValueError, match=r"failed between two layers; call cache.reset"):
            drive(llama, tokens(1, 1), [1], cache)
        cache.reset()
        assert torch.equal(drive(llama, tokens(1, 12), [12], cache), drive(llama, tokens(1, 12), [12], DynamicCache()))


def test_recycled_caches_of_one_model_take_turns(llama):
    ids, settings = [tokens(2, 24, seed=s) for s in (1, 2)], ({"stride": 3}, {"policy": "h2o"})
    want = []
    for i in range(2):
        with RecycledCache(llama, budget=6, **settings[i]) as cache:
            want.append(drive(llama, ids[i], STEPS, cache))
    with RecycledCache(llama, budget=6, **settings[0]) as one, RecycledCache(llama, budget=6, **settings[1]) as two:
        got, start = [[], []], 0
        for piece in STEPS:
            for i, cache in enumerate((one, two)):
                got[i].append(steps_on(llama, ids[i][:, start : start + piece], cache, None, [piece]))
            start += piece
    assert all(torch.equal(torch.cat(got[i], 1), want[i]) for i in range(2))


@pytest.mark.parametrize("policy", POLICIES)
def test_recycled_reset_forgets_and_keeps_the_settings(llama, policy):
    with RecycledCache(llama, budget=6, policy=policy) as cache:
        first = drive(llama, tokens(3, 24), STEPS, cache)
        nbytes = cache.nbytes
        cache.reset()
        assert cache.get_seq_length() == cache.nbytes == 0
        assert torch.equal(drive(llama, tokens(3, 24), STEPS, cache), first)
        assert cache.nbytes == nbytes
        cache.reset()
        assert torch.isfinite(drive(llama, tokens(1, 24), STEPS, cache)).all()
