"""`cache.calibrate`: what becomes the configuration's, what it refuses, and ADORE's."""

import pytest
import torch
from calibration_cases import COLUMNS, PROMISE, ROWS, by_hand, own_text, random_model
from recycled_cases import assert_close, decoder

from scrubjay import (
    AdoreCache,
    AdoreConfig,
    AdoreForCausalLM,
    RecycledCache,
    RecycledConfig,
    RecycledForCausalLM,
)
from scrubjay.modeling.caches import calibration
from scrubjay.modeling.caches.calibration import DECODED, LOOKS
from scrubjay.modeling.caches.kept_keys import TAIL
from scrubjay.modeling.decoder.attached import Hooks
from scrubjay.modeling.decoder.controller import Controller
from scrubjay.modeling.inputs.cache_argument import named


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def text(model):
    return own_text(model)


def test_the_configuration_keeps_the_answer(tmp_path, text):
    torch.manual_seed(0)
    base = decoder(initializer_range=0.4)
    config = RecycledConfig(base_config=base.config, policy="lowrank")
    model = RecycledForCausalLM(config).double().eval()
    model.load_state_dict(base.state_dict(), strict=False)
    with RecycledCache(model) as cache:
        found = cache.calibrate(text, PROMISE, rank=[4], budget=[32, 64, 128])
    model.save_pretrained(tmp_path)
    again = RecycledConfig.from_pretrained(tmp_path)
    assert found.settings == {"rank": 4, "budget": again.budget}
    assert again.rank == 4


REFUSED = {
    "a text too short": (dict(rows=slice(3)), "at least 4 rows of 256 tokens"),
    "rows too short": (dict(columns=slice(200)), "at least 4 rows of 256 tokens"),
    "no setting": (dict(window=[3]), r"cannot search \['window'\]"),
    "two settings": (dict(stride=[3], threshold=[0.9]), "one other setting"),
    "a promise that none keeps": (dict(loss=-1.0, budget=[16], stride=[5, 9]), "No candidate stays within -1.0 nats"),
    "labels of another shape": (dict(labels=torch.zeros(2, 2)), "labels must have the shape"),
    "labels that count nothing": (dict(labels=torch.full((ROWS, COLUMNS), -100)), "count one of the last 63"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_change_nothing(model, text, case):
    options, message = REFUSED[case]
    options = {"loss": PROMISE} | options
    given = text[options.pop("rows", slice(None)), options.pop("columns", slice(None))]
    model.train()
    living = len(hooks.living) if (hooks := Hooks.of(model.get_decoder())) else 0
    with RecycledCache(model, budget=77, stride=3) as cache:
        with pytest.raises(ValueError, match=message):
            cache.calibrate(given, **options)
        assert (cache.settings.budget, cache.settings.stride, model.training) == (77, 3, True)
        assert len(Hooks.of(model.get_decoder()).living) == living + 1
    model.eval()


def test_refused_for_a_text_without_tokenizer_a_cache_in_use_and_full_attention(model, text):
    with RecycledCache(model) as cache:
        with pytest.raises(ValueError, match="needs its tokenizer"):
            cache.calibrate("a text")
        model(text, **named(cache))
        with pytest.raises(ValueError, match="empty cache"):
            cache.calibrate(text)
    with RecycledCache(model, policy="full") as cache, pytest.raises(ValueError, match="nothing to calibrate"):
        cache.calibrate(text)


def adore(model, **settings):
    """A cache whose controller is untrained."""
    torch.manual_seed(0)
    controller = Controller(32, 16, score_mode="bilinear").double()
    return AdoreCache(model, controller=controller, recent=2, **settings)


def test_adore_finds_what_it_holds_and_rebuilds(model, text):
    with adore(model) as cache:
        found = cache.calibrate(text, PROMISE, cache_size=[40, 80, 160])
        passing = [trial for trial in found.trials if trial.loss + trial.error <= PROMISE]
        assert found.found.keys == min(trial.keys for trial in passing)
        size, rebuilt = found.settings["cache_size"], found.settings["rebuild"]
        assert found.found.keys == size + rebuilt + 1
        assert (cache.settings.cache_size, cache.settings.rebuild, cache.settings.recent) == (size, rebuilt, 2)
        assert cache.layers[0].size == size
        assert found.stride is None
        assert {trial.settings["rebuild"] for trial in found.trials} == {16, 8, 4, 0}
        model.generate(text[:, :200], **named(cache), max_new_tokens=3)
    apart = by_hand(model, text[1::2], adore(model, cache_size=size, rebuild=rebuilt))
    assert found.held_out.loss == pytest.approx(apart.mean().item(), abs=1e-9)


def test_adores_mass_is_that_of_full_attention_on_what_it_attends(model, text):
    last = COLUMNS - DECODED + LOOKS[-1]
    with adore(model, cache_size=30, rebuild=3) as cache, torch.no_grad():
        model(text[:, : COLUMNS - DECODED], **named(cache))
        for t in range(COLUMNS - DECODED, last + 1):
            slots = cache.slots
            model(text[:, t : t + 1], **named(cache))
        attended = torch.cat([slots, cache.last_rebuilt, torch.full((ROWS, 1), last)], 1)
        model.set_attn_implementation("eager")
        attentions = model(text[:, : last + 1], output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        found = list(calibration._mass(looked(model, text), cache.attended(), last + 1))
    for full, mass in zip(attentions, found, strict=True):
        wanted = full[:, :, -1].gather(2, attended[:, None].expand(-1, 4, -1)).sum(2).mean()
        assert_close(torch.tensor(mass).double(), wanted, bound=1e-6)  # transformers' softmax is float32's


def looked(model, text):
    """What full attention looks at, found by a pass of the model, which is the same as from a cache of all keys."""
    logits, by_pass = calibration.looked_at(model, text, COLUMNS - DECODED)
    with RecycledCache(model, policy="full") as cache:
        model(text, **named(cache))
        for columns in (COLUMNS - DECODED + 1 + step for step in LOOKS):
            for layer in range(2):
                assert_close(by_pass(layer, columns), cache.look(layer, columns))
    assert_close(logits, model(text).logits[:, -DECODED:])
    assert model.config._attn_implementation == "sdpa"
    return by_pass


def test_an_adore_models_configuration_keeps_the_answer(tmp_path, text):
    base = decoder(initializer_range=0.4)
    config = AdoreConfig(base_config=base.config, controller_hidden=16, recent=2)
    model = AdoreForCausalLM(config).double().eval()
    with AdoreCache(model) as cache:
        found = cache.calibrate(text, 5.0, rebuild=[3], cache_size=[50, 100])
    model.save_pretrained(tmp_path)
    again = AdoreConfig.from_pretrained(tmp_path)
    assert found.settings == {"rebuild": again.rebuild, "cache_size": again.cache_size}
    assert again.rebuild == 3


def test_the_tokens_that_are_given_are_no_more_than_caches_remember_queries_of():
    assert DECODED <= TAIL


def of_config(tmp_path, text, cache_settings, loss=PROMISE, candidates=None, **config):
    """A Recycled model with a configuration, calibrated through a cache of other settings, saved and loaded again."""
    base = decoder(initializer_range=0.4)
    model = RecycledForCausalLM(RecycledConfig(base_config=base.config, **config)).double().eval()
    model.requires_grad_(False)
    with RecycledCache(model, **cache_settings) as cache:
        found = cache.calibrate(text, loss, **candidates or {})
    model.save_pretrained(tmp_path)
    return found, RecycledForCausalLM.from_pretrained(tmp_path).config


def test_what_a_cache_was_told_beside_what_it_found_is_kept(tmp_path, text):
    candidates = {"rank": [3], "budget": [32, 64, 128]}
    found, config = of_config(tmp_path, text, {"policy": "lowrank"}, 9.0, candidates, train_tail=5)
    assert (config.policy, config.rank, config.budget) == ("lowrank", 3, found.settings["budget"])
    assert config.train_tail == 0  # which the new policy has no use for


def test_a_configuration_of_another_policy_does_not_stand_in_the_way(tmp_path, text):
    found, config = of_config(tmp_path, text, {"policy": "tova"}, 9.0, {"budget": [16]}, policy="quest", page=16)
    assert (config.policy, config.budget) == ("tova", 16)
    assert found.settings == {"budget": 16}


@pytest.mark.parametrize(
    "config", [{"hold": "host"}, {"hold_bits": 4}, {"policy": "streaming", "rope_mode": "cache"}], ids=str
)
def test_models_whose_caches_hold_keys_elsewhere_calibrate(tmp_path, text, config):
    found, after = of_config(tmp_path, text, {}, 9.0, {"budget": [64, 128]}, **config)
    assert after.budget == found.settings["budget"]
    assert {name: getattr(after, name) for name in config} == config


def test_adore_keeps_room_for_the_tokens_that_are_labelled(tmp_path, text):
    base = decoder(initializer_range=0.4)
    model = AdoreForCausalLM(AdoreConfig(base_config=base.config, controller_hidden=16, label_k=96)).double().eval()
    with AdoreCache(model) as cache:
        found = cache.calibrate(text, 9.0, rebuild=[0], cache_size=[32, 100])
    assert found.settings["cache_size"] == 100
    model.save_pretrained(tmp_path)
    assert AdoreConfig.from_pretrained(tmp_path).cache_size == 100


def test_layers_are_searched_under_lowrank_alone(model, text):
    with RecycledCache(model, policy="tova") as cache, pytest.raises(ValueError, match="policy='lowrank' alone"):
        cache.calibrate(text, layers=True)
    with adore(model) as cache, pytest.raises(ValueError, match="policy='lowrank' alone"):
        cache.calibrate(text, layers=True)
