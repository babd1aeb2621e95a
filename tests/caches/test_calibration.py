"""`cache.calibrate`: what it measures against slow and obvious runs, and what it chooses."""

import pytest
import torch
import torch.nn.functional as F
from calibration_cases import COLUMNS, PROMISE, ROWS, bench, by_hand, own_text, random_model
from recycled_cases import assert_close

from scrubjay import RecycledCache
from scrubjay.modeling.caches import calibration
from scrubjay.modeling.caches.calibration import DECODED, LOOKS, Bench
from scrubjay.modeling.inputs.cache_argument import named

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
    return random_model()


@pytest.fixture(scope="module")
def text(model):
    return own_text(model)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_trial_is_what_a_cache_of_its_own_loses(model, text, policy):
    settings = {"budget": 24, "stride": 5, "rank": 3, "page": 4} | POLICIES[policy]
    apart = by_hand(model, text, RecycledCache(model, **settings))
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
    apart = by_hand(model, text[1::2], RecycledCache(model, keep_recent=2, **found.settings))
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


def test_a_text_is_cut_into_rows(model, text):
    class Tokenizer:
        def __call__(self, text, **options):
            return {"input_ids": [int(word) for word in text.split()]}

    words = " ".join(map(str, text.flatten().tolist()))
    with RecycledCache(model) as cache:
        found = cache.calibrate(words, PROMISE, tokenizer=Tokenizer(), length=COLUMNS, rows=6)
    with RecycledCache(model) as cache:
        assert cache.calibrate(text[:6], PROMISE) == found


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


def test_a_text_begins_as_its_tokenizer_begins_all():
    class Tokenizer:
        bos_token_id = 1

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1] * add_special_tokens + [int(word) for word in text.split()]}

    cut = calibration._cut(" ".join(map(str, range(10, 30))), Tokenizer(), 6, 3)
    assert cut.tolist() == [[1, *range(10, 15)], [1, *range(15, 20)], [1, *range(20, 25)]]
