"""The recall study: models of equal size, one recipe, rates tuned apart, and tables that say what the records say."""

import json
import re
from itertools import product

import numpy as np
import pytest
import torch
from transformers.models.mamba import modeling_mamba

from scrubjay.examples.studies import recall
from scrubjay.examples.studies.cells import Cell
from scrubjay.examples.studies.recall import LINES, SMOKE, TUNING, cells, groups, settings, sizes_of, verdict, work
from scrubjay.examples.studies.recall_models import MAKERS, Sizes, build, configuration, num_parameters
from scrubjay.examples.studies.selective_scan import fast_mamba1, selective_scan

GROUPS = list(groups())
QUICK = {"every": 2, "num_validation": 8, "num_test": 8}
SMALL = {"steps": 4, "batch_size": 4}


def test_all_models_of_a_line_have_as_many_parameters():
    for model, chosen in GROUPS:
        count = num_parameters(MAKERS[model].model, configuration(model, sizes_of(chosen)))
        assert abs(count / chosen["parameters"] - 1) < 0.02, (model, chosen)


def test_every_group_is_listed_once():
    keys = [(model, json.dumps(chosen)) for model, chosen in GROUPS]
    assert len(set(keys)) == len(keys)
    assert {model for _, _, models in LINES for model in models} == set(MAKERS)


@pytest.mark.parametrize("model", [name for name in MAKERS if name != "llama"])
def test_a_state_has_as_many_numbers_in_every_model(model):
    config = configuration(model, Sizes(16, 64, 256, 64, 200_000))
    values = getattr(config, "inner_size", None) or getattr(config, "intermediate_size", None)
    if model in ("rodimus", "rodimus_plus"):
        mixer = build(model, Sizes(16, 64, 256, 64, 200_000)).model.layers[0].mixer
        values = mixer.out_proj.weight.shape[1]
    if model == "mamba2":
        values = config.expand * config.hidden_size
    assert values == 128
    assert config.state_size == 64
    assert not config.tie_word_embeddings


@pytest.mark.parametrize("pairs", [8, 32])
def test_windows_are_shorter_than_what_they_have_to_look_over(pairs):
    sizes = sizes_of(settings("taipan", pairs, 16))
    taipan, plus = configuration("taipan", sizes), configuration("rodimus_plus", sizes)
    assert taipan.sliding_window == sizes.length // 2
    assert taipan.capacity == 0.15
    assert plus.sliding_window < 2 * pairs
    assert taipan.num_attention_heads == plus.num_attention_heads == 2
    hybrid = configuration("ssd_hybrid", sizes)
    assert hybrid.attn_layer_idx == [1]
    assert hybrid.attn_cfg["num_heads"] == 2


def test_a_size_that_cannot_be_met_is_refused():
    with pytest.raises(ValueError, match=r"mamba2 with a state of 16 has .* are not met within 2 %"):
        configuration("mamba2", Sizes(8, 64, 256, 16, 200_000))


@pytest.mark.parametrize("pairs", [1, 2, 3, 9, 32])
def test_training_batches_fit_at_every_size(pairs):
    chosen = {"pairs": pairs, "length": 4 * pairs, "vocab_size": 256, "batch_size": 2}
    rng = np.random.default_rng(0)
    lengths = {recall.training_batch(chosen, rng)[0].shape[1] for _ in range(20)}
    assert max(lengths) == 4 * pairs
    assert len(lengths) == min(3, pairs.bit_length())


@pytest.mark.parametrize(
    ("accuracies", "said"),
    [
        ([0.1, 0.999], "solved"),
        ([0.01] * 11, None),  # step 1100 of 2000
        ([0.01] * 12, "hopeless"),
        ([0.01, 0.07] + [0.01] * 15, None),  # it was beyond twice what guessing gives
    ],
)
def test_a_run_ends_where_it_is_solved_or_hopeless(accuracies, said):
    curve = {"step": [100 * (i + 1) for i in range(len(accuracies))], "accuracy": accuracies}
    assert verdict(curve, {"pairs": 32, "steps": 2000}) == said


def test_the_step_of_taking_off_is_where_accuracy_reaches_one_half():
    curve = {"step": [50, 100, 150], "accuracy": [0.1, 0.5, 0.3]}
    assert recall.take_off(curve) == 100
    assert recall.take_off({"step": [50], "accuracy": [0.49]}) is None


def result(accuracy, take_off, **more):
    return {"accuracy": accuracy, "take_off": take_off, "steps": 2000} | more


def test_of_rates_as_good_the_earlier_wins_and_no_start_makes_up_for_accuracy():
    order = [result(0.9, None), result(0.984, 1000), result(0.981, 500), result(0.99, 2000)]
    assert sorted(order, key=recall.score) == order


@pytest.mark.parametrize("cell", SMOKE, ids=lambda cell: cell.model)
def test_a_cell_of_every_model(cell):
    found = work(cell, **QUICK)
    assert found["curve"]["step"] == [2, 4]
    assert 0 <= found["accuracy"] <= 1
    assert found["width"] > 8
    assert ("selected" in found) == (cell.model == "taipan")
    json.dumps(found, allow_nan=False)


def test_a_cell_is_decided_by_its_seed_and_rate():
    def losses(seed, rate):
        torch.manual_seed(seed)  # as the laboratory does
        return work(Cell("recall", "ssd", seed, rate, settings("ssd", 8, 16) | SMALL), **QUICK)["curve"]["loss"]

    assert losses(0, 1e-2) == losses(0, 1e-2)
    assert len({tuple(losses(seed, rate)) for seed, rate in product((0, 1), (1e-2, 1e-3))}) == 4


def test_a_run_that_diverges_has_recalled_nothing():
    found = work(Cell("recall", "ssd", 0, 1e30, settings("ssd", 8, 16) | SMALL), **QUICK)
    assert (found["stopped"], found["accuracy"]) == ("diverged", 0.0)
    json.dumps(found, allow_nan=False)


def test_the_same_decay_for_every_model_by_its_own_rule():
    for name in ("taipan", "mamba1"):
        model = build(name, Sizes(8, 64, 256, 16, 200_000))
        decayed, kept = recall.decay_groups(model, 0.1)
        spared = {id(p) for p in kept["params"]}
        assert all(id(p) in spared for n, p in model.named_parameters() if "gate." in n or n.endswith("A_log"))
        assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def records_of(model, chosen, found):
    """Records of a group, {rate: (score of the tuning)} and reported results at the best."""
    cells = TUNING.trials("recall", model, chosen)
    best = {cell: result(0.9 if cell.rate == 1e-2 else 0.1, 500) for cell in cells}
    best |= {Cell("recall", model, seed, 1e-2, chosen): each for seed, each in enumerate(found)}
    took = {"cpu_seconds": 360.0, "machine": {"cpu": "A processor"}}
    return [{"cell": cell.__dict__, "result": each, **took} for cell, each in best.items()]


@pytest.fixture
def records():
    ssd = records_of("ssd", settings("ssd", 32, 16), [result(0.9, 600), result(0.2, None), result(0.97, 900)])
    llama = records_of("llama", settings("llama", 64, 64), [result(0.998, 300), result(1.0, 400)])
    return ssd + llama


def test_the_table_says_what_the_records_say(records):
    lines = recall.table(records).splitlines()
    assert lines[0] == "| test accuracy: mean (lowest to highest) | 32 pairs | 64 pairs |"
    assert lines[2:4] == [
        "| SSD, n = 16 | 0.690 (0.200 to 0.970) |  |",
        "| Llama |  | 0.999 (0.998 to 1.000, 2 of 3 seeds) |",
    ]
    assert lines[7:9] == ["| SSD, n = 16 | 900; 0.01 |  |", "| Llama |  | 400; 0.01 |"]
    assert lines[10] == "13 runs, 1.3 processor hours (A processor)."


def test_a_group_is_reported_only_once_its_rates_are_tuned(records):
    untuned = [record for record in records if record["cell"]["rate"] != 3e-2]
    assert recall.rows(untuned) == {}
    assert recall.table(untuned) == "Not run yet."
    assert len(cells([])) == len(GROUPS) * 4
    assert len(cells([], guess=True)) == len(GROUPS) * 7
    assert len(cells(records)) == len(GROUPS) * 4 + 6


def test_the_command_plans_runs_and_tells(tmp_path, capsys, monkeypatch, records):
    out, guide = tmp_path / "recall.json", tmp_path / "guide.md"
    monkeypatch.setattr(recall, "GUIDE", guide)
    guide.write_text("before\n<!-- recall -->\nold\n<!-- /recall -->\nafter\n")
    monkeypatch.setattr(recall, "work", lambda cell: result(0.5, None))
    done = recall.main(["--out", str(out), "--threads", "1", "--only", "ssd .*pairs=32 .*state_size=16 "])
    assert len(done) == 7
    capsys.readouterr()
    recall.main(["--out", str(out), "--plan", "--only", "ssd .*pairs=32 .*state_size=(16|64) "])
    assert "7 cells are missing" in capsys.readouterr().out
    recall.main(["--out", str(out), "--table"])
    assert "old" in guide.read_text()  # which shows what lies where results belong
    monkeypatch.setattr(recall, "RESULTS", out)
    recall.main(["--table"])
    assert "](../results/recall.png)" in guide.read_text()
    assert re.fullmatch(
        r"before\n<!-- recall -->\n\n\| test .*\n\n<!-- /recall -->\nafter\n", guide.read_text(), re.DOTALL
    )
    assert "| SSD, n = 16 | never; 0.001* |" in guide.read_text()
    assert out.with_suffix(".png").stat().st_size > 0


def test_smoke_keeps_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(recall, "SMOKE", SMOKE[:1])
    monkeypatch.setattr(recall, "RESULTS", tmp_path / "recall.json")
    (record,) = recall.main(["--smoke", "--threads", "1"])
    assert record["command"] == "python examples/studies/recall.py --smoke --threads 1"
    assert "result" in record
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [1, 15, 16, 37])
def test_selective_scan_equals_that_of_transformers(steps):
    def random(*shape):
        return torch.randn(*shape, requires_grad=True)

    x, dt, z, B, C = (random(2, width, steps) for width in (12, 12, 12, 5, 5))
    A, D, bias = (-8 * torch.rand(12, 5)).requires_grad_(), random(12), random(12)
    found = []
    for scan in (modeling_mamba.mamba_selective_scan, selective_scan):
        y, state = scan(x, dt, A, B, C, D, z, delta_bias=bias, delta_softplus=True, return_last_state=True)
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + state.sum()
        found.append([y, state, *torch.autograd.grad(loss, (x, dt, A, B, C, D, z, bias))])
    for expected, got in zip(*found, strict=True):
        assert (got - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1e-6)


def test_mamba1_is_transformers_own_but_for_the_scan():
    model = build("mamba1", Sizes(8, 32, 256, 16, 200_000)).eval()
    ids = torch.randint(256, (2, 32))
    expected = model(input_ids=ids, use_cache=False).logits
    before = modeling_mamba.mamba_selective_scan
    with fast_mamba1():
        assert modeling_mamba.mamba_selective_scan is selective_scan
        got = model(input_ids=ids, use_cache=False).logits
    assert modeling_mamba.mamba_selective_scan is before
    assert 0 < (got - expected).abs().max() < 1e-5 * expected.abs().max()
