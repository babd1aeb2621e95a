"""Thresholds of Taipan's gates: one for each layer, found on a text, and what drawing at inference makes of them."""

import pytest
import torch
from parity_cases import tokens
from taipan_cases import build, gates, logit, of_layer, recorded
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import scrubjay
from scrubjay.modeling.selective_layer import Gate

THREE = dict(attention_every=1, num_hidden_layers=6)
BIASES = (-1.5, 0.0, 1.5)


def uneven(**changes):
    """Three selective layers whose gates are apart by their biases."""
    model = build(**THREE | changes)
    with torch.no_grad():
        for gate, bias in zip((m for m in model.modules() if isinstance(m, Gate)), BIASES, strict=True):
            gate.bias[1] += bias
    return model


@pytest.mark.parametrize("rate", [None, 0.3, 0.8])
def test_calibration_makes_the_share_of_every_layer_what_is_asked(rate):
    model, ids = uneven().train(), tokens(29, 4, 600)
    model.model.layers[0].eval()
    shares = model.calibrate(ids, rate)
    assert model.training
    assert not model.model.layers[0].training
    with torch.no_grad():
        selected = model.eval()(ids).selection[:, 0].tolist()
    want = round(2400 * (rate or 0.15)) / 2400
    assert shares == selected == [want] * 3
    assert len(set(model.config.eval_threshold)) == 3
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="rate must lie between 0 and 1; got 1"):
        model.calibrate(ids, 1.0)


def test_a_threshold_found_again_is_the_same():
    """Those of the other layers, and what was there before, have no part in it."""
    model, ids = uneven(), tokens(29, 2, 100)
    model.calibrate(ids)
    first = model.config.eval_threshold
    model.config.eval_threshold = 0.9
    model.calibrate(ids)
    assert model.config.eval_threshold == first


def test_calibration_counts_no_padding():
    model, ids = uneven(), tokens(29, 3, 90)
    mask = torch.stack([torch.arange(90) >= 90 - n for n in (90, 40, 7)]).long()
    shares = model.calibrate(ids, 0.2, attention_mask=mask)
    found = model.config.eval_threshold
    with torch.no_grad():
        assert model(ids, attention_mask=mask).selection[:, 0].tolist() == shares
    assert shares == [pytest.approx(round(0.2 * 137) / 137)] * 3
    model.calibrate(ids.masked_fill(mask == 0, 3), 0.2, attention_mask=mask)
    assert model.config.eval_threshold == found
    with pytest.raises(ValueError, match="at least one real token"):
        model.calibrate(ids, 0.2, attention_mask=0 * mask)


def test_calibration_takes_a_text_longer_than_a_segment():
    model, ids = uneven(), tokens(29, 1, 2500)
    shares = model.calibrate(ids)
    with torch.no_grad():
        assert model(ids).selection[:, 0].tolist() == shares == [375 / 2500] * 3


def expected_shares(model, ids):
    """(selective layers,): the mean odds of a token, in one draw of what earlier layers select; and the outputs."""
    with torch.no_grad(), gates(model) as found:
        out = model(ids)
    thresholds = model.config.eval_threshold
    return torch.stack([torch.sigmoid(delta - logit(of_layer(thresholds, i))).mean() for i, delta in found]), out


def test_calibration_of_a_gate_that_draws_is_of_the_expected_share():
    """What a later layer sees differs from draw to draw: a mean of ten was off by 0.009 at most in eight seeds."""
    model, ids = uneven(eval_gate="sample"), tokens(29, 4, 100)
    assert model.calibrate(ids, 0.25) == [pytest.approx(0.25, rel=1e-9)] * 3
    found = torch.stack([expected_shares(model, ids)[0] for _ in range(10)])
    assert ((found[:, 0] - 0.25).abs() < 1e-9).all()
    assert ((found.mean(0) - 0.25).abs() < 0.045).all()


@pytest.mark.parametrize("threshold", [0.5, [0.4, 0.6]], ids=str)
def test_a_calibration_that_fails_changes_nothing(threshold, monkeypatch):
    model, ids = build(eval_threshold=threshold).train(), tokens(29, 1, 30)
    model.model.layers[1].eval()
    passes, call = [], type(model.model).forward

    def fails_later(self, **kwargs):
        passes.append(model.config.eval_threshold)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return call(self, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", fails_later)
    with pytest.raises(KeyboardInterrupt):
        model.calibrate(ids)
    assert passes[1] != threshold  # the first layer's was found by then
    assert model.config.eval_threshold == threshold
    assert model.training
    assert not model.model.layers[1].training
    assert not any(module._forward_hooks for module in model.modules())


def test_calibrated_thresholds_are_saved_with_the_model(tmp_path):
    model, ids = uneven(dtype=torch.float32), tokens(29, 2, 100)
    model.calibrate(ids)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.eval_threshold == model.config.eval_threshold
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    card = (tmp_path / "README.md").read_text()
    assert f"| `eval_threshold` | `{model.config.eval_threshold}` |" in card


@pytest.mark.parametrize("threshold", [0.5, 0.8, [0.2, 0.8]], ids=str)
def test_sampling_at_inference_follows_the_gate_and_its_threshold(threshold):
    model, ids = build(eval_gate="sample", eval_threshold=threshold), tokens(29, 2, 61)
    draws = [expected_shares(model, ids) for _ in range(40)]
    rates, expected = torch.stack([out.selection[:, 0] for _, out in draws]), torch.stack([found for found, _ in draws])
    assert (rates.std(0) > 0).all()
    assert ((rates - expected).mean(0).abs() < 5 * (rates - expected).std(0) / 40**0.5).all()
    assert (expected[:, 0].std() < 1e-12).all()  # of the first layer, the same in each draw


def test_a_draw_without_noise_is_the_choice_without_chance(monkeypatch):
    model, ids = build("a threshold for each layer"), tokens(29, 2, 61)
    want, _ = recorded(model, ids)
    model.config.eval_gate = "sample"
    assert not torch.equal(recorded(model, ids)[0], want)
    monkeypatch.setattr("scrubjay.modeling.selective_layer.gumbel_difference", torch.zeros_like)
    assert torch.equal(recorded(model, ids)[0], want)


def test_training_that_draws_knows_of_no_threshold():
    model, ids, found = build().train(), tokens(29, 2, 40), []
    for threshold in (0.5, [0.01, 0.99]):
        model.config.eval_threshold = threshold
        torch.manual_seed(3)
        found.append(model(ids, labels=ids).loss)
    assert torch.equal(*found)


def test_a_threshold_belongs_to_the_place_at_which_a_block_stands(tmp_path):
    """Of a model that has lost its first unit: in place, and loaded from what it saves."""
    model, ids = uneven(dtype=torch.float32, eval_threshold=[0.9, 0.4, 0.6]), tokens(29, 2, 40)
    del model.model.layers[:2]
    model.config.num_hidden_layers = 4
    for call in (lambda: model(ids), lambda: model(ids, use_cache=False), lambda: model.calibrate(ids)):
        with pytest.raises(ValueError, match=r"list of 2, one for each selective layer \(1, 3\); got 3"):
            call()
    model.config.eval_threshold = [0.4, 0.6]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad(), gates(model) as found:
        out = model(ids)
        assert torch.equal(again(ids).logits, out.logits)
    for (i, delta), (selected, _, _) in zip(found, out.selection.tolist(), strict=True):
        assert selected == pytest.approx(float((delta > logit((0.4, 0.6)[i])).double().mean()), abs=1e-6)


def test_blocks_that_are_not_where_thresholds_belong_are_refused_without_a_cache_too():
    for threshold in ([0.3, 0.5, 0.7], 0.5):
        model, ids = uneven(eval_threshold=threshold), tokens(29, 2, 10)
        del model.model.layers[0]
        with pytest.raises(ValueError, match="has 5 blocks, and num_hidden_layers = 6"):
            model(ids, use_cache=False)


@pytest.mark.parametrize("threshold", [0.0, 1.0, [0.3, 0.5, 1.5]], ids=str)
def test_a_threshold_that_is_none_is_refused_by_name_also_where_it_was_set_later(threshold):
    model, ids = uneven(), tokens(29, 2, 10)
    model.config.eval_threshold = threshold
    with pytest.raises(ValueError, match="eval_threshold must lie between 0 and 1; got"):
        model(ids)


@pytest.mark.parametrize("head", ["", "ForSequenceClassification", "ForTokenClassification"])
def test_calibration_needs_no_head_of_a_language_model(head):
    model, ids = uneven(), tokens(29, 4, 300)
    mask = torch.ones_like(ids)
    mask[0, :100] = mask[1, 200:] = 0
    other = getattr(scrubjay, "Taipan" + (head or "Model"))(model.config).eval()
    other.base_model.load_state_dict(model.model.state_dict())
    want = model.calibrate(ids, 0.2, mask)
    model.config.eval_threshold = other.config.eval_threshold = 0.5
    assert other.calibrate(ids, 0.2, mask) == want
    assert other(ids, attention_mask=mask).selection[:, 0].tolist() == pytest.approx(want)


def test_torchs_wrapper_for_checkpoints_leaves_a_block_its_threshold():
    model, ids = build("a threshold for each layer"), tokens(29, 2, 40)
    with torch.no_grad():
        want = model(ids).logits
        model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
        assert torch.equal(model(ids).logits, want)
