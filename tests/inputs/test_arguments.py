"""How a call names what it gives: the cache by either name, and nothing that the model would ignore."""

import inspect
import warnings

import pytest
import torch
from recycled_cases import VOCAB, decoder
from transformers import Trainer, TrainingArguments
from zoo import tokens

from scrubjay import AdoreCache, RecycledCache
from scrubjay.configuration.cache_names import CACHE_NAMES
from scrubjay.modeling.inputs.cache_argument import CACHE, by_its_name, named, pop_cache

OPTIONS = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)


def test_transformers_takes_the_name_that_is_given_to_it():
    outputs = decoder()(tokens(1, 3) % VOCAB, use_cache=True)
    assert CACHE in outputs
    assert CACHE in CACHE_NAMES


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_by_either_name_is_advanced(entry, name):
    model, ids = entry.build(torch.float64), tokens(2, 12)
    cache = entry.model.cache_class(model)
    with torch.no_grad():
        first = model(ids[:, :7], **{name: cache})
        second = model.model(ids[:, 7:], **{name: cache})
        whole = model(ids, use_cache=False).logits
    for out in (first, second):
        assert out.cache is cache
        assert out.past_key_values is cache
    assert cache.get_seq_length() == 12
    torch.testing.assert_close(first.logits, whole[:, :7])
    torch.testing.assert_close(model.lm_head(second.last_hidden_state).to(whole.dtype), whole[:, 7:])


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_generate_continues_a_cache_by_either_name(entry, name):
    model, ids = entry.build(torch.float64), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    alone = model.generate(ids, attention_mask=mask, use_cache=False, **OPTIONS)
    cache = entry.model.cache_class(model)
    assert torch.equal(model.generate(ids, attention_mask=mask, **{name: cache}, **OPTIONS), alone)
    turn = torch.cat([alone, tokens(2, 4, seed=2)], 1)
    longer = torch.cat([mask, torch.ones(2, 12, dtype=torch.long)], 1)
    again = model.generate(turn, attention_mask=longer, **{name: cache}, **OPTIONS)
    assert torch.equal(again, model.generate(turn, attention_mask=longer, use_cache=False, **OPTIONS))


def test_one_cache_by_both_names_is_one_and_two_are_refused(entry):
    model, ids = entry.build(), tokens(1, 5)
    one, other = (entry.model.cache_class(model) for _ in range(2))
    assert model(ids, cache=one, past_key_values=one).cache is one
    assert model(ids, cache=None, past_key_values=other).cache is other
    with pytest.raises(ValueError, match="two caches, by the names cache and past_key_values"):
        model(ids, cache=one, past_key_values=other)


def test_a_signature_has_both_names(entry):
    model = entry.build()
    for forward in (model.forward, model.model.forward):
        parameters = inspect.signature(forward).parameters
        assert all(name in parameters for name in CACHE_NAMES)
        assert list(parameters)[3] == "cache"  # by position as in transformers
    ids, cache = tokens(1, 5), entry.model.cache_class(model)
    assert model(ids, None, None, cache).cache is cache


def test_keyword_arguments_get_the_name_of_the_installed_version():
    mark = object()
    assert by_its_name({"use_cache": True}) == {"use_cache": True}
    for name in CACHE_NAMES:
        given = {name: mark, "use_cache": True}
        assert by_its_name(given) == {CACHE: mark, "use_cache": True}
        assert given[name] is mark, "the caller's own dictionary stays as it is"
        assert pop_cache(given) is mark
    assert named(mark) == {CACHE: mark}


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("make", [AdoreCache, RecycledCache])
def test_a_cache_attached_to_a_decoder_of_transformers_goes_by_either_name(make, name):
    llama, ids = decoder(), tokens(2, 12) % VOCAB
    settings = {"cache_size": 64} if make is AdoreCache else {"budget": 64}
    with torch.no_grad(), make(llama, **settings) as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own, of the older name
        parts = [llama(ids[:, a:b], **{name: cache}).logits for a, b in ((0, 7), (7, 8), (8, 12))]
        last = llama.model(ids[:, :1], **{name: cache}).last_hidden_state
        assert cache.get_seq_length() == 13
        torch.testing.assert_close(torch.cat(parts, 1), llama(ids, use_cache=False).logits)
    assert last.shape[1] == 1


def test_trainer_predicts_without_handing_a_cache_on(entry, tmp_path):
    model = entry.build()
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(3, 9)]
    arguments = TrainingArguments(
        tmp_path, use_cpu=True, report_to="none", per_device_eval_batch_size=2, prediction_loss_only=False
    )
    found = Trainer(model, arguments).predict(rows)
    with torch.no_grad():
        want = model(torch.stack([row["input_ids"] for row in rows])).logits
    torch.testing.assert_close(torch.as_tensor(found.predictions), want)


def test_an_argument_that_nobody_knows_is_refused_by_its_name(entry):
    model, ids = entry.build(), tokens(1, 5)
    for call in (model, model.model):
        with pytest.raises(ValueError, match="has no argument 'atention_mask' and would have ignored it"):
            call(ids, atention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="kv_store"):  # a cache by a name to come
        model(ids, kv_store=entry.model.cache_class(model))


def test_what_tokenizers_and_collators_pass_to_any_model_does_no_harm(entry):
    model, ids = entry.build(), tokens(2, 5)
    want = model(ids).logits
    harmless = dict(token_type_ids=torch.zeros_like(ids), max_length_q=5, max_length_k=5, not_given=None)
    harmless |= dict(cache_position=torch.arange(5), output_router_logits=False, is_causal=True)
    assert torch.equal(model(ids, **harmless).logits, want)


@pytest.mark.parametrize("asked", [dict(is_causal=False), dict(output_router_logits=True)])
def test_what_a_model_cannot_do_is_refused_by_its_name(entry, asked):
    with pytest.raises(ValueError, match=f"cannot be called with {next(iter(asked))}"):
        entry.build()(tokens(1, 5), **asked)


def test_a_state_has_no_probabilities_to_give(recurrent):
    model, ids = recurrent.build(), tokens(1, 5)
    assert torch.equal(model(ids, output_attentions=False).logits, model(ids).logits)
    with pytest.raises(ValueError, match="cannot be called with output_attentions=True"):
        model(ids, output_attentions=True)
