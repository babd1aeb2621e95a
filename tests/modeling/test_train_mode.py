"""Inference in train mode, with gradient checkpointing on: nothing runs twice, so caches advance as in eval mode."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from zoo import ZOO, tokens

from scrubjay import AdoreCache, AdoreForCausalLM, RecycledCache, RecycledForCausalLM
from scrubjay.modeling.inputs.cache_argument import CACHE, named

SMALL = {"adore": {"cache_size": 8, "label_k": 4, "recent": 2}, "recycled": {"budget": 8}}
ATTACHED = {
    "adore": lambda model: AdoreCache(model, cache_size=8, recent=2),
    "adore in pieces": lambda model: AdoreCache(model, cache_size=8, recent=2, prefill="chunked"),
    "recycled": lambda model: RecycledCache(model, budget=8),
    "h2o": lambda model: RecycledCache(model, budget=8, policy="h2o"),
}


def generated(model, **more):
    ids = tokens(2, 12)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options, **more)


def training(model):
    model.gradient_checkpointing_enable()
    return model.train()


def own_cache(entry, model):
    return model.cache_class(model.config if entry.recurrent else model)


@pytest.mark.parametrize("given", [False, True], ids=["its own cache", "a cache that is given"])
def test_generation_in_train_mode_with_checkpointing_is_that_of_eval_mode(entry, given):
    model = entry.build(**SMALL.get(entry.name, {}))
    want = generated(model)
    training(model)
    cache = own_cache(entry, model) if given else None
    got = generated(model, **(named(cache) if given else {}))
    assert got.shape == want.shape
    assert entry.samples or torch.equal(got, want)
    assert cache is None or cache.get_seq_length() == 17
    layers = model.model.layers
    assert all(layer.gradient_checkpointing for layer in layers)  # a training step after it is checkpointed again


@pytest.mark.parametrize("kind", [AdoreForCausalLM, RecycledForCausalLM], ids=lambda kind: kind.__name__)
def test_generation_in_train_mode_with_transformers_own_cache(kind):
    (entry,) = (entry for entry in ZOO if entry.model is kind)
    model = entry.build()
    want = generated(model, **named(DynamicCache()))
    assert torch.equal(generated(training(model), **named(DynamicCache())), want)


def test_a_tail_for_training_is_left_out_where_a_cache_is_advanced():
    (entry,) = (entry for entry in ZOO if entry.model is RecycledForCausalLM)
    model = entry.build(budget=8, train_tail=16)
    want = generated(model)
    assert torch.equal(generated(training(model)), want)


@pytest.mark.parametrize("kind", ATTACHED)
def test_a_decoder_of_transformers_generates_in_train_mode_with_a_cache_of_the_zoo(kind):
    config = next(entry for entry in ZOO if entry.model is AdoreForCausalLM).config().base_config
    model = AutoModelForCausalLM.from_config(config).eval()
    with ATTACHED[kind](model) as cache:
        want = generated(model, **named(cache))
    training(model)
    with ATTACHED[kind](model) as cache:  # made where gradients are enabled
        assert torch.equal(generated(model, **named(cache)), want)
        assert cache.get_seq_length() == 17
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_a_training_step_with_checkpointing_refuses_a_cache_and_the_way_out_works(entry):
    model, ids = training(entry.build()), tokens(2, 12)
    cache = own_cache(entry, model)
    with pytest.raises(ValueError, match=r"pass none, or call model\.eval"):
        model(ids, **named(cache))
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().max() > 0
    with torch.no_grad():
        out = model.eval()(ids, **named(cache))
        assert getattr(out, CACHE) is cache
        assert cache.get_seq_length() == 12
        assert torch.equal(out.logits, model(ids).logits)


@pytest.mark.parametrize("kind", ATTACHED)
def test_a_training_step_of_a_decoder_refuses_a_cache_of_the_zoo_and_the_way_out_works(kind):
    config = next(entry for entry in ZOO if entry.model is AdoreForCausalLM).config().base_config
    model, ids = training(AutoModelForCausalLM.from_config(config)), tokens(2, 12)
    with ATTACHED[kind](model) as cache:
        with pytest.raises(ValueError, match=r"pass none, or call model\.eval"):
            model(ids, **named(cache))
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            model.eval()(ids, **named(cache))
        assert cache.get_seq_length() == 12
