"""AdoreConfig and AdoreForCausalLM: every setting is checked, read, kept in files; checkpoints of the decoder load."""

import dataclasses
import inspect
import json
import re

import pytest
import torch
from adore_cases import VOCAB, decoder, text
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from zoo import own_fields

from scrubjay import AdoreCache, AdoreConfig, AdoreForCausalLM, AdoreModel
from scrubjay.configuration import configuration_adore
from scrubjay.configuration.configuration_adore import AdoreSettings
from scrubjay.modeling.decoder.controller import Controller
from scrubjay.modeling.inputs.cache_argument import CACHE, named

SIZES = dict(hidden_size=48, num_hidden_layers=2, vocab_size=VOCAB, num_attention_heads=4)
OTHER_VALUES = {
    "base_config": LlamaConfig(**SIZES),
    "cache_size": 7,
    "rebuild": 3,
    "rebuild_from": "host",
    "recent": 2,
    "sinks": 1,
    "score_mode": "distance",
    "controller_hidden": 16,
    "controller_pos": "learned",
    "controller_mlp_layers": 3,
    "rebuild_commit": "swap",
    "rebuild_mask": "full",
    "rebuild_every": 2,
    "rebuild_gate": True,
    "release_before": True,
    "position_mode": "compact",
    "prefill": "chunked",
    "store": "embeds",
    "label_k": 5,
    "label_agg": "vote",
    "label_layers": [1],
    "label_horizon": 4,
    "mask_scope": "per_head",
}


def small(**changes):
    torch.manual_seed(2)
    settings = dict(cache_size=7, rebuild=3, label_k=5, controller_hidden=16, initializer_range=0.3)
    return AdoreForCausalLM(AdoreConfig(**SIZES | settings | changes)).eval()


@pytest.fixture
def warned(monkeypatch):
    """What was said with warning_once."""
    said = []
    monkeypatch.setattr(configuration_adore.logger, "warning_once", said.append)
    return said


def test_every_field_survives_a_file(tmp_path):
    assert OTHER_VALUES.keys() == own_fields(AdoreConfig).keys(), "give each field a value in OTHER_VALUES"
    default = AdoreConfig()
    assert [name for name in OTHER_VALUES if getattr(default, name) == OTHER_VALUES[name]] == []
    host = {"rebuild_from": OTHER_VALUES["rebuild_from"]}  # two of the others speak of "model" alone
    for values in (host, {name: value for name, value in OTHER_VALUES.items() if name not in host}):
        config = AdoreConfig(**values)
        config.save_pretrained(tmp_path)
        loaded = AdoreConfig.from_pretrained(tmp_path)
        plain = {name: value for name, value in values.items() if name != "base_config"}
        assert {name: getattr(loaded, name) for name in plain} == plain
        assert loaded.base_config.to_dict() == config.base_config.to_dict()


def test_every_field_is_documented_and_none_that_is_gone():
    documented = set()
    for cls in (AdoreConfig, AdoreSettings):
        lines = re.findall(r"^ {4}(\w+(?:, \w+)*):", inspect.cleandoc(cls.__doc__), re.MULTILINE)
        documented |= {name for line in lines for name in line.split(", ")}
    assert documented == set(own_fields(AdoreConfig))


def test_presets():
    paper, robust = AdoreConfig.preset("paper"), AdoreConfig.preset("robust", rebuild=4)
    assert (paper.cache_size, paper.rebuild, paper.recent, paper.sinks) == (192, 8, 1, 0)
    assert (robust.cache_size, robust.rebuild, robust.recent, robust.sinks) == (192, 4, 32, 4)
    assert robust.settings == AdoreSettings(rebuild=4, recent=32, sinks=4)
    with pytest.raises(ValueError, match=r"one of \('paper', 'robust'\); got 'other'"):
        AdoreConfig.preset("other")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        *(
            ({name: "other"}, rf"{name} must be one of \(.*\); got 'other'")
            for name, value in OTHER_VALUES.items()
            if isinstance(value, str)
        ),
        *(
            ({name: 0}, f"{name} must be at least 1; got 0")
            for name in ("controller_hidden", "controller_mlp_layers", "label_k", "label_horizon", "rebuild_every")
        ),
        ({"rebuild": -1}, "rebuild must be at least 0; got -1"),
        ({"cache_size": 3, "sinks": 4, "label_k": 2}, r"cache_size >= sinks \+ recent >= 1 is needed; got 3, 4 and 1"),
        ({"recent": 0}, "got 192, 0 and 0"),
        ({"label_k": 193}, "label_k must be at most cache_size = 192, .*got 193"),
        ({"controller_hidden": 7}, "controller_hidden must be even, .*got 7"),
        ({"score_mode": "static", "label_horizon": 2}, "label_horizon must be 1 .*got 2"),
        ({"label_layers": [2]}, r"label_layers must be layer indices from 0 to 1; got \[2\]"),
        ({"label_layers": [True]}, r"got \[True\]"),
    ],
    ids=str,
)
def test_values_that_mean_nothing_are_refused_with_value_and_rule(given, said):
    with pytest.raises(StrictDataclassClassValidationError, match=said):
        AdoreConfig(**SIZES | given)


@pytest.mark.parametrize("given", [{"rebuild": "8"}, {"rebuild_gate": 1}, {"cache_size": 8.5}, {"label_layers": 1}])
def test_values_of_a_wrong_type_are_refused_by_name(given):
    ((name, _),) = given.items()
    with pytest.raises(StrictDataclassFieldValidationError, match=name):
        AdoreConfig(**SIZES | given)


def test_labels_fit_the_cache_where_nothing_is_said_of_them(tmp_path):
    for size, labels in ((64, 64), (500, 96)):
        assert AdoreConfig(**SIZES, cache_size=size).num_labelled == labels
    stock, folder = LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path / "ours"
    stock.save_pretrained(tmp_path / "stock")
    model = AdoreForCausalLM.from_pretrained(tmp_path / "stock", cache_size=64)
    assert model.controller.sizes["label_k"] == model.config.num_labelled == 64
    model.save_pretrained(folder)
    assert AdoreForCausalLM.from_pretrained(folder, cache_size=32).config.num_labelled == 32
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"label_k": 24}))  # as an earlier version may have
    assert AdoreForCausalLM.from_pretrained(folder).config.num_labelled == 24


@pytest.mark.parametrize(
    ("given", "said"), [({"cache_size": 0}, "got 0, 0 and 1"), ({"rebuild": "8"}, "rebuild"), ({"label_k": 999}, "999")]
)
def test_settings_that_a_caller_of_from_pretrained_gets_wrong_are_a_value_error(given, said, tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said):
        AdoreForCausalLM.from_pretrained(tmp_path, **given)


def test_static_scores_with_rebuilding_are_warned_of(warned):
    AdoreConfig(score_mode="static", rebuild=0)
    AdoreConfig(score_mode="query")
    assert not warned
    AdoreConfig(score_mode="static", rebuild=8)
    assert len(warned) == 1
    assert "192 cached and 8 rebuilt tokens are the tokens that a cache of 200 attends" in warned[0]


def test_a_policy_of_fixed_order_with_rebuilding_is_warned_of(warned):
    model = decoder()
    AdoreCache(model, rebuild=0, controller="recency")
    AdoreCache(model, rebuild=2, controller="random")
    assert not warned
    AdoreCache(model, rebuild=2, controller="recency")
    assert "RecencyPolicy" in warned[0]


CACHE_FIELDS = [field.name for field in dataclasses.fields(AdoreSettings) if field.name not in ("store",)]


@pytest.mark.parametrize("name", [*CACHE_FIELDS, "score_mode", "controller_pos", "controller_mlp_layers"])
def test_every_setting_of_cache_and_controller_changes_what_is_generated(name):
    value = {"cache_size": 9, "rebuild": 1, "recent": 5, "sinks": 3}.get(name, OTHER_VALUES[name])
    ids, logits = text(2, 60), []
    base = {"cache_size": 28} if name == "rebuild_gate" else {}  # few released: sometimes none is worth it
    for changes in (base, base | {name: value}):
        model, other = small(**changes), small()
        model.load_state_dict({k: v for k, v in other.state_dict().items() if "controller" not in k}, strict=False)
        with torch.no_grad():
            for parameter in model.controller.parameters():  # apart, or scores would hardly follow the query
                parameter.mul_(6)
            cache = AdoreCache(model)
            logits.append(torch.cat([model(x, **named(cache)).logits for x in ids.split([30] + [1] * 30, 1)], 1))
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_the_model_makes_its_own_cache_with_its_own_controller_and_settings():
    model, ids = small(sinks=2), text(2, 20)
    with torch.no_grad():
        cache = model(ids, use_cache=True)[CACHE]
    assert type(cache) is AdoreCache
    assert cache.scorer is model.controller is model.model.controller
    assert cache.settings == model.config.settings == AdoreSettings(cache_size=7, rebuild=3, sinks=2)
    out = model.generate(ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=10, do_sample=False, **named(AdoreCache(model))), out)
    stock = model.generate(ids, max_new_tokens=10, do_sample=False, use_cache=False)
    assert not torch.equal(stock, out)
    headless = AdoreModel(model.config).eval()
    headless.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        assert torch.equal(headless(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_checkpoint_of_the_decoder_loads_and_computes_the_same(family, tmp_path):
    stock, ids = decoder(family, dtype=torch.float32), text(2, 20)
    stock.save_pretrained(tmp_path / "stock")
    loaded, report = AdoreForCausalLM.from_pretrained(
        tmp_path / "stock", output_loading_info=True, cache_size=9, label_k=9
    )
    assert report["missing_keys"], "the controller starts anew"
    assert all(name.startswith("model.controller.") for name in report["missing_keys"])
    assert not report["unexpected_keys"]
    assert loaded.config.base_config.model_type == family
    assert loaded.config.cache_size == 9
    assert set(stock.state_dict()) == {name for name in loaded.state_dict() if ".controller." not in name}
    for name, value in stock.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")(ids).logits
        assert torch.equal(loaded.eval()(ids).logits, reference)
    width = loaded.controller.hidden**-0.5
    for name, parameter in loaded.controller.named_parameters():
        assert 0.5 * width < parameter.abs().max() <= width, name  # torch's own start, whatever the decoder's is


def test_a_controller_that_was_trained_apart_moves_in_and_is_saved(tmp_path):
    model, trained = small(), Controller(48, 16, label_k=5, base_model="tiny")
    trained.save(tmp_path / "controller")
    model.set_controller(Controller.load(tmp_path / "controller"))
    model.save_pretrained(tmp_path / "model")
    loaded = AdoreForCausalLM.from_pretrained(tmp_path / "model")
    for name, value in trained.state_dict().items():
        assert torch.equal(loaded.controller.state_dict()[name], value)
    assert model.controller.sizes["base_model"] == "tiny"
    with pytest.raises(ValueError, match=r"asks for a controller of .*'hidden': 16.* got one of .*'hidden': 8"):
        model.set_controller(Controller(48, 8))


def test_the_language_model_loss_does_not_train_the_controller():
    model, ids = small().train(), text(2, 12)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (".controller." in name), name
        assert parameter.requires_grad != (".controller." in name)


def test_a_saved_folder_names_every_setting(tmp_path):
    small(rebuild_commit="swap").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "scrubjay_adore"
    assert written["rebuild_commit"] == "swap"
    assert set(own_fields(AdoreConfig)) <= set(written)
    loaded = AdoreForCausalLM.from_pretrained(tmp_path)
    assert all(not p.requires_grad for p in loaded.controller.parameters())
