"""What ADORE's cache refuses, and what it says then."""

import pytest
import torch
from adore_cases import PIECES, SMALL, decoder, made, run, text

from scrubjay import AdoreCache
from scrubjay.configuration.configuration_adore import AdoreSettings
from scrubjay.modeling.decoder import controller as controller_module
from scrubjay.modeling.decoder.controller import Controller, Scorer
from scrubjay.modeling.inputs.cache_argument import named


@pytest.fixture
def model():
    return decoder()


def test_a_closed_cache_and_one_of_another_model_are_refused(model):
    cache, other = made(model), decoder()
    with pytest.raises(ValueError, match="model that it was made for, and only until it is closed"):
        other(text(), **named(cache))
    cache.close()
    with pytest.raises(ValueError, match="model that it was made for, and only until it is closed"):
        model(text(), **named(cache))


def test_a_call_that_failed_half_way_is_not_gone_on_from(model):
    cache, ids = made(model), text()
    run(model, ids, PIECES, cache)

    def failing(*args, **kwargs):
        raise RuntimeError("out of memory")

    handle = model.model.layers[1].register_forward_pre_hook(failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(ids[:, :1], **named(cache))
    handle.remove()
    with pytest.raises(ValueError, match="failed half way"):
        model(ids[:, :1], **named(cache))
    cache.reset()
    assert torch.isfinite(run(model, ids, PIECES, cache)[0]).all()
    undecided = AdoreCache(model, controller=Scorer(), **SMALL)
    for said in ("subclasses of Scorer define score", "failed half way"):
        with pytest.raises(ValueError, match=said):
            model(ids, **named(undecided))


def test_a_prompt_of_which_a_piece_was_read_is_not_gone_on_from(model):
    cache, ids = made(model, prefill="chunked"), text(1, 18)
    wrong = ids.clone()
    wrong[0, -1] = 1000  # in the last piece
    with pytest.raises(IndexError):
        model(wrong, **named(cache))
    with pytest.raises(ValueError, match="failed half way"):
        model(ids, **named(cache))
    cache.reset()
    wrong[0, 0] = 1000
    with pytest.raises(IndexError):
        model(wrong, **named(cache))
    assert torch.isfinite(model(ids, **named(cache)).logits).all()


def test_assisted_decoding_and_crop_are_refused(model):
    cache = made(model)
    with pytest.raises(ValueError, match=r"[Aa]ssisted decoding"):
        model.generate(text(1, 18), **named(cache), max_new_tokens=20, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="cannot give 2 tokens back"):
        cache.crop(-2)
    assert not cache.is_croppable
    assert not cache.is_compileable


def test_decoders_that_it_cannot_work_with_are_refused(model):
    with pytest.raises(ValueError, match="layers that see a window only"):
        AdoreCache(decoder("mistral", sliding_window=8))
    with pytest.raises(ValueError, match=r"frequencies of rope_type 'dynamic'"):
        AdoreCache(decoder(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))
    cache = made(model)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'flex_attention' does not take"):
        model(text(), **named(cache))
    with pytest.raises(ValueError, match="'flex_attention' does not take"):
        AdoreCache(model)


def test_checkpointing_layers_cannot_advance_it(model):
    cache = made(model)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="cannot advance a cache"):
        model(text(), **named(cache))


def test_a_controller_of_another_model_is_warned_of(model, monkeypatch):
    said, controller = [], Controller(48, 16, base_model="one")
    monkeypatch.setattr(controller_module.logger, "warning_once", said.append)
    model.config.name_or_path = "one"
    AdoreCache(model, controller=controller)
    assert not said
    model.config.name_or_path = "other"
    AdoreCache(model, controller=controller)
    assert said == ["This controller was trained for one; the model is other."]


def test_bad_calls_are_named(model):
    cache, ids = made(model), text(2)
    run(model, ids, PIECES, cache)
    with pytest.raises(ValueError, match="holds 2 rows, the input has 1"):
        model(ids[:1, :1], **named(cache))
    with pytest.raises(ValueError, match=r"attention_mask must have shape .* got \(2, 5\)"):
        model(ids[:, :1], attention_mask=torch.ones(2, 5), **named(cache))
    for given, said in (
        ({}, "exactly one of input_ids"),
        ({"input_ids": ids[:, :1], "inputs_embeds": model.model.embed_tokens(ids[:, :1])}, "exactly one of input_ids"),
        ({"input_ids": ids[:, 0]}, r"input_ids must have shape \(batch, length\)"),
        ({"input_ids": ids[:, :0]}, r"holds 38 columns, and this call brings none .*reset\(\)"),
        ({"input_ids": ids[:, :1], "attention_mask": {"full_attention": None}}, "attention_mask must be .* got dict"),
    ):
        with pytest.raises(ValueError, match=said):
            model.model(**named(cache), **given)
    with pytest.raises(IndexError):
        model(ids[:, :1] + 1000, **named(cache))
    assert torch.isfinite(model(ids[:, :1], **named(cache)).logits).all(), "a refused call changes nothing"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(cache_size=0), "got 0, 0 and 1"),
        (dict(cache_size=5, sinks=4, recent=2), r"cache_size >= sinks \+ recent >= 1 is needed; got 5, 4 and 2"),
        (dict(recent=0, sinks=0), "got 192, 0 and 0"),
        (dict(rebuild=-1), "rebuild must be at least 0; got -1"),
        (dict(rebuild_every=0), "rebuild_every must be at least 1; got 0"),
        (dict(rebuild=2.0), "rebuild must be of type int; got 2.0"),
        (dict(rebuild_gate=1), "rebuild_gate must be of type bool; got 1"),
        (dict(prefill="some"), r"prefill must be one of \('full', 'chunked'\); got 'some'"),
        (dict(budget=3), r"no setting \['budget'\]"),
        (dict(controller="h2o"), r"one of \('recency', 'streaming', 'random'\); got 'h2o'"),
        (dict(controller=3), "got int"),
        (dict(controller=Controller(64, 16, base_model="other")), r"width 64 \(it was made for other\); the model's"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(model, arguments, said):
    with pytest.raises(ValueError, match=said):
        AdoreCache(model, **arguments)


def test_defaults_and_the_policy_that_stands_in_for_a_controller(model):
    cache = AdoreCache(model, rebuild=0)
    assert cache.settings == AdoreSettings(rebuild=0, sinks=4)
    assert type(cache.scorer).__name__ == "RecencyPolicy"
    assert AdoreCache(model, AdoreSettings(cache_size=9), rebuild=0, recent=2).settings.cache_size == 9
