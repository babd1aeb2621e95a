"""`cache.calibrate`: what it measures against slow and obvious runs, what it chooses, what it leaves behind."""

import pytest
import torch
import torch.nn.functional as F
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
from scrubjay.modeling.caches.calibration import DECODED, LOOKS, Bench
from scrubjay.modeling.caches.kept_keys import TAIL
from scrubjay.modeling.decoder.attached import Hooks
from scrubjay.modeling.decoder.controller import Controller
from scrubjay.modeling.inputs.cache_argument import named

ROWS, COLUMNS = 8, 4 * DECODED
PROMISE = 2.2  # nats: a random model looks at everything
POLICIES = {
    "fixed": {"policy": "recycled", "keep_recent": 2},
    "dynamic": {"policy": "recycled", "schedule": "dynamic", "qc": 2},
    "lowrank": {"policy": "lowrank"},
    "quest": {"policy": "quest"},
    "snapkv": {"policy": "snapkv"},
    "h2o": {"policy": "h2o"},
    "tova": {"policy": "tova"},
    "streaming": {"policy": "streaming"},
    "in the cache": {"policy": "streaming", "rope_mode": "cache"},
}


@pytest.fixture(scope="module")
def model():
    return decoder(initializer_range=0.4).requires_grad_(False)


@pytest.fixture(scope="module")
def text(model):
    """Rows that the model wrote itself: a random model knows more of no other text the more it reads."""
    torch.manual_seed(0)
    start = torch.randint(3, 61, (ROWS, 1))
    return model.generate(start, do_sample=True, top_k=0, max_new_tokens=COLUMNS - 1, eos_token_id=None)


def bench(model, text, **settings):
    """(cache, `Bench` of all rows) of which every token counts."""
    cache = RecycledCache(model, **settings)
    return cache, Bench(cache, text, torch.ones(len(text), DECODED - 1, dtype=torch.bool))


@torch.no_grad()
def by_hand(model, text, **settings):
    """(B,) loss of each row above full attention without any of the code that calibrates: a cache of its own reads the
    prompt, and goes on token by token."""
    start, losses = text.shape[1] - DECODED, []
    full = model(text).logits
    full = F.cross_entropy(full[:, start:-1].transpose(1, 2), text[:, start + 1 :], reduction="none")
    with RecycledCache(model, **settings) as cache:
        model(text[:, :start], **named(cache))
        for t in range(start, text.shape[1] - 1):
            logits = model(text[:, t : t + 1], **named(cache)).logits[:, -1]
            losses.append(F.cross_entropy(logits, text[:, t + 1], reduction="none"))
    return (torch.stack(losses, 1) - full).mean(1)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_trial_is_what_a_cache_of_its_own_loses(model, text, policy):
    settings = {"budget": 24, "stride": 5, "rank": 3, "page": 4} | POLICIES[policy]
    apart = by_hand(model, text, **settings)
    cache, own = bench(model, text, **settings)
    with cache, own:
        trial = own.trial({"budget": 24})
    assert trial.loss == pytest.approx(apart.mean().item(), abs=1e-9)
    assert trial.error == pytest.approx(apart.std().item() / ROWS**0.5, abs=1e-9)
    assert abs(trial.loss) > 1e-3


@pytest.mark.parametrize("policy", ["fixed", "lowrank", "quest", "snapkv", "tova"])
def test_mass_is_that_of_full_attention_on_what_is_read(model, text, policy):
    settings = {"budget": 24, "stride": 500, "rank": 3, "page": 4} | POLICIES[policy]
    last = LOOKS[-1]  # of the steps at which mass is taken
    text = text[:, : COLUMNS - DECODED + last + 2]  # so that it is the last of all by hand
    kept = _stopped(model, text, settings)
    model.set_attn_implementation("eager")
    attentions = model(text[:, :-1], output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for full, index, found in zip(attentions, kept, _looked(model, text, settings), strict=True):
        share = full[:, :, -1].unflatten(1, (2, 2)).mean(2)
        assert_close(
            torch.tensor(found).double(), share.gather(2, index).sum(2).mean(), bound=1e-6
        )  # transformers' softmax is float32's
        assert 0.02 < found < 1


def _stopped(model, text, settings):
    """What each layer attended last, after a prompt as long as a bench's of `COLUMNS`."""
    start = COLUMNS - DECODED
    with RecycledCache(model, **settings) as cache, torch.no_grad():
        model(text[:, :start], **named(cache))
        for t in range(start, text.shape[1] - 1):
            model(text[:, t : t + 1], **named(cache))
        return [layer.attended() for layer in cache.layers]


def _looked(model, text, settings):
    """Mass of each layer at the last step that a bench looks at."""
    whole = F.pad(text, (0, COLUMNS - text.shape[1]), value=5)
    found = []
    cache, own = bench(model, whole, **settings)
    with cache, own, pytest.MonkeyPatch.context() as patch:
        mass = calibration._mass
        patch.setattr(calibration, "_mass", lambda *args: found.append(list(mass(*args))) or found[-1])
        own.trial({"budget": settings["budget"]}, look=True)
        assert own.mass == [pytest.approx(sum(layer) / len(found)) for layer in zip(*found, strict=True)]
    return found[-1]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_cheapest_that_keeps_the_promise_becomes_the_setting(model, text, policy):
    with RecycledCache(model, **POLICIES[policy]) as cache:
        found = cache.calibrate(text, PROMISE)
        passing = [trial for trial in found.trials if trial.loss + trial.error <= PROMISE]
        assert found.found.keys == min(trial.keys for trial in passing)
        assert {name: getattr(cache.settings, name) for name in found.settings} == found.settings
        assert all(layer.settings is cache.settings for layer in cache.layers)
        assert cache.get_seq_length() == 0
        model.generate(text[:, :200], **named(cache), max_new_tokens=3)


def test_rows_that_check_decide_nothing(model, text):
    other = text.clone()
    other[1::2] = text[1::2].flip(1)
    with RecycledCache(model) as cache:
        first = cache.calibrate(text, PROMISE)
    with RecycledCache(model) as cache:
        second = cache.calibrate(other, PROMISE)
    assert first.found == second.found
    assert first.trials == second.trials
    assert first.held_out != second.held_out
    assert second.full_loss > first.full_loss


def test_held_out_loss_and_stride_are_those_of_the_settings(model, text):
    with RecycledCache(model, keep_recent=2) as cache:
        found = cache.calibrate(text, PROMISE, budget=[16, 32, 64, 128], stride=[7])
    apart = by_hand(model, text[1::2], keep_recent=2, **found.settings)
    assert found.held_out.loss == pytest.approx(apart.mean().item(), abs=1e-9)
    assert found.stride == 7
    n, K = COLUMNS - DECODED // 2, found.settings["budget"]
    assert found.found.keys == pytest.approx(K + (n - K) / 7)
    assert found.holds == (found.held_out.loss <= PROMISE)
    assert "promised 2.2000" in str(found)


def test_only_what_labels_count_is_promised(model, text):
    labels = torch.full_like(text, -100)
    labels[:, -9:-4] = text[:, -9:-4]
    cache, whole = bench(model, text, budget=16, stride=9)
    with cache, RecycledCache(model, stride=9) as other:
        found = other.calibrate(text, 10.0, labels=labels, budget=[16], stride=[9])
        some = Bench(cache, text[::2], labels[::2, 1 - DECODED :] != -100)
        with some:
            assert some.trial({"budget": 16, "stride": 9}) == found.found
            assert_close(some.full, _full_loss(model, text[::2], -9, -4))
        with whole:
            assert whole.trial({"budget": 16}).loss != found.found.loss


def _full_loss(model, text, start, end):
    with torch.no_grad():
        logits = model(text).logits[:, start - 1 : end - 1]
    return F.cross_entropy(logits.transpose(1, 2), text[:, start:end], reduction="none").mean(1)


def test_layers_that_need_not_choose_are_found(model, text):
    with RecycledCache(model, policy="lowrank", stride=5) as cache:
        found = cache.calibrate(text, PROMISE, layers=True, budget=[32, 64, 128])
        alone = [trial for trial in found.trials if len(trial.settings.get("choosing_layers", ())) == 1]
        assert len(alone) >= 2
        assert found.found.loss + found.found.error <= PROMISE
        names = [type(layer).__name__ for layer in cache.layers]
        chosen = found.settings.get("choosing_layers", [0, 1])
        assert names == ["LowRankLayer" if i in chosen else "RecycledLayer" for i in range(2)]


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


def test_a_text_is_cut_into_rows(model, text):
    class Tokenizer:
        def __call__(self, text, **options):
            return {"input_ids": [int(word) for word in text.split()]}

    words = " ".join(map(str, text.flatten().tolist()))
    with RecycledCache(model) as cache:
        found = cache.calibrate(words, PROMISE, tokenizer=Tokenizer(), length=COLUMNS, rows=6)
    with RecycledCache(model) as cache:
        assert cache.calibrate(text[:6], PROMISE) == found


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
    with adore(model, cache_size=size, rebuild=rebuilt) as cache, torch.no_grad():
        start, losses = COLUMNS - DECODED, []
        rows = text[1::2]
        full = F.cross_entropy(model(rows).logits[:, start:-1].mT, rows[:, start + 1 :], reduction="none")
        model(rows[:, :start], **named(cache))
        for t in range(start, COLUMNS - 1):
            logits = model(rows[:, t : t + 1], **named(cache)).logits[:, -1]
            losses.append(F.cross_entropy(logits, rows[:, t + 1], reduction="none"))
    assert found.held_out.loss == pytest.approx((torch.stack(losses, 1) - full).mean().item(), abs=1e-9)


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


@pytest.mark.parametrize("stride", [1, 2, 3, 10])
def test_steps_that_read_all_keys_count_as_often_as_they_are(model, text, stride):
    """Also where no step that is looked at is one of them; the law looks at every step."""
    settings = {"budget": 24, "stride": stride, "keep_recent": 2}
    cache, own = bench(model, text, **settings)
    with cache, own, pytest.MonkeyPatch.context() as patch:
        few = own.trial({"budget": 24}, look=True) and own.mass
        patch.setattr(calibration, "LOOKS", tuple(range(DECODED - 1)))
        _, own.look = calibration.looked_at(model, text, COLUMNS - DECODED)
        every = own.trial({"budget": 24}, look=True) and own.mass
        assert few == pytest.approx(every, abs=0.06)  # of ten steps; measured: 0.03
        assert min(few) >= (DECODED - 1) // stride / (DECODED - 1)


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


def test_keys_that_are_read_are_counted_where_all_are(model, text):
    n = COLUMNS - DECODED // 2
    for settings in ({"policy": "quest", "page": 4, "full_layers": [0, 1]}, {"policy": "lowrank", "budget": 250}):
        cache, own = bench(model, text, **settings)
        with cache, own:
            assert own.trial({}).keys == n


def test_a_cache_that_never_reads_all_keys_has_no_stride(model, text):
    cache, own = bench(model, text, budget=64, schedule="dynamic", threshold=-1.0, keep_recent=2)
    with cache, own:
        own.trial({}, look=True)
        assert own.stride is None


def test_adore_keeps_room_for_the_tokens_that_are_labelled(tmp_path, text):
    base = decoder(initializer_range=0.4)
    model = AdoreForCausalLM(AdoreConfig(base_config=base.config, controller_hidden=16, label_k=96)).double().eval()
    with AdoreCache(model) as cache:
        found = cache.calibrate(text, 9.0, rebuild=[0], cache_size=[32, 100])
    assert found.settings["cache_size"] == 100
    model.save_pretrained(tmp_path)
    assert AdoreConfig.from_pretrained(tmp_path).cache_size == 100


def test_a_text_begins_as_its_tokenizer_begins_all():
    class Tokenizer:
        bos_token_id = 1

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1] * add_special_tokens + [int(word) for word in text.split()]}

    cut = calibration._cut(" ".join(map(str, range(10, 30))), Tokenizer(), 6, 3)
    assert cut.tolist() == [[1, *range(10, 15)], [1, *range(15, 20)], [1, *range(20, 25)]]


def test_layers_are_searched_under_lowrank_alone(model, text):
    with RecycledCache(model, policy="tova") as cache, pytest.raises(ValueError, match="policy='lowrank' alone"):
        cache.calibrate(text, layers=True)
    with adore(model) as cache, pytest.raises(ValueError, match="policy='lowrank' alone"):
        cache.calibrate(text, layers=True)
