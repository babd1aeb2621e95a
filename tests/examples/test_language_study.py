"""The language study: models of equal size, scores against their definition, and tables against the records."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from scrubjay.examples.studies import language, language_runs
from scrubjay.examples.studies.ablations import QUESTIONS
from scrubjay.examples.studies.ablations import STUDY as ABLATIONS
from scrubjay.examples.studies.cells import Cell, cell_of
from scrubjay.examples.studies.drawing import NAMES, ranged
from scrubjay.examples.studies.equal_models import FAMILIES, Sizes, build, configured, count, fitted, places, target
from scrubjay.examples.studies.language import SMOKE, STUDY, decode_cell, main, rate_in, work
from scrubjay.examples.studies.language_runs import Budget, excerpt, learn, read_settings, read_text, score, settings_of

TINY = SMOKE.sizes


@pytest.fixture(scope="module")
def text():
    return read_text(TINY.vocab_size, SMOKE.budget.train_bytes)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Records of the smoke run, and the file they are in."""
    out = tmp_path_factory.mktemp("study") / "language.json"
    only = ["--smoke", "--threads", "1", "--out", str(out), "--only", " (llama|ssd_hybrid|taipan) "]
    main(only)
    main([*only, "--decode"])
    return out


def cell_with(settings, model="taipan"):
    return Cell("language", model, 0, 1e-2, settings)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_model_has_the_parameters_of_the_measure(name):
    sizes = STUDY.sizes
    config = configured(name, sizes)
    assert abs(count(config) / target(sizes) - 1) < 0.01
    assert 5e6 < target(sizes) < 5.5e6
    assert config.vocab_size == 4096
    assert config.tie_word_embeddings
    assert config.hidden_size == 256


@pytest.mark.parametrize("name", FAMILIES)
def test_the_guide_says_the_sizes(name):
    guide = (Path(__file__).parents[2] / "examples" / "studies" / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(
        rf"^\| {re.escape(NAMES[name])}(?:, state.*?)? \| (\d+)(?:,[^|]*)? \|([^|]*)\|$", guide, re.MULTILINE
    )
    blocks, spare = fitted(name, STUDY.sizes)
    assert int(row[0]) == blocks
    assert spare is None or str(spare) in row[1]


def test_the_studies_show_every_family():
    assert set(FAMILIES) <= set(NAMES)
    assert {cell.model for cell in STUDY.trainings([], guess=True)} == set(FAMILIES)


def test_hybrids_of_any_number_of_attention_layers_are_as_large():
    sizes = ABLATIONS.sizes
    for variant in QUESTIONS["layers"].variants.values():
        config = configured("ssd_hybrid", sizes, shape=tuple(variant["shape"].items()))
        assert len(config.attn_layer_idx) == variant["shape"]["attention"]
        assert abs(count(config) / target(sizes) - 1) < 0.01


def test_attention_layers_stand_apart():
    assert places(9, 1) == [4]
    assert places(10, 2) == [2, 7]
    for blocks in (8, 9, 10):
        for attention in range(blocks + 1):
            found = places(blocks, attention)
            assert len(set(found)) == attention
            assert found == sorted(found)
            assert all(0 <= place < blocks for place in found)


def test_the_spare_size_is_the_nearest_of_its_steps():
    sizes = STUDY.sizes
    blocks, spare = fitted("llama", sizes)
    make, goal = FAMILIES["llama"].make, target(sizes)
    off = [abs(count(make(sizes, blocks, spare + step)) - goal) for step in (-8, 0, 8)]
    assert min(off) == off[1]


def test_settings_come_back():
    sizes, budget = Sizes(blocks=3, head_dim=32), Budget(tokens=4096, scored=[128])
    cell = cell_with(settings_of(sizes, budget, drawn=5))
    assert read_settings(cell.settings) == (sizes, budget)
    assert cell.settings["drawn"] == 5
    assert "window" not in cell.settings  # as it always is
    assert settings_of(Sizes(), Budget()) == {"tokens": Budget().tokens}


def test_bytes_of_ids_are_those_of_their_text(text):
    for stream in (text.train[:999], text.heldout[:999]):
        words = text.tokenizer.decode(stream, skip_special_tokens=True)
        assert text.num_bytes(stream) == len(words.encode())


def test_rates_are_chosen_by_other_text_than_is_reported(text):
    chosen, reported = text.parts(SMOKE.budget)
    assert len(chosen) == SMOKE.budget.validation + 1
    assert len(reported) == SMOKE.budget.rows * max(SMOKE.budget.scored) + 1
    assert (np.concatenate([chosen[:-1], reported]) == text.heldout[: len(chosen) + len(reported) - 1]).all()


def test_a_text_that_is_too_short_is_refused(text):
    with pytest.raises(ValueError, match=r"training text has .* tokens; the budget asks for 1,000,000,000"):
        text.parts(Budget(tokens=10**9))


@pytest.mark.parametrize("name", ["llama", "ssd_hybrid", "rodimus_plus"])
def test_a_score_is_the_mean_over_contexts_read_from_nothing(name, text, monkeypatch):
    torch.manual_seed(0)
    model = build(configured(name, TINY)).eval()
    stream = text.heldout[:129]
    nats = 0.0
    with torch.no_grad():
        for start in range(0, 128, 32):
            ids, wanted = (torch.from_numpy(stream[start + shift : start + shift + 32]) for shift in (0, 1))
            nats += cross_entropy(model(ids[None]).logits[0], wanted, reduction="sum").item()
    expected = nats / math.log(2) / text.num_bytes(stream[1:])
    assert score(model, stream, 32, text)["bits_per_byte"] == pytest.approx(expected, abs=2e-5)
    monkeypatch.setattr(language_runs, "PIECE", 8)  # in pieces, through the cache
    assert score(model, stream, 32, text)["bits_per_byte"] == pytest.approx(expected, abs=2e-5)


def test_no_token_is_read_twice_and_seeds_read_others(text, monkeypatch):
    seen = []

    class Reader(torch.nn.Linear):
        def forward(self, input_ids, labels, use_cache):
            seen.append(input_ids)
            return type("Out", (), {"loss": self.weight.sum()})

    budget = Budget(tokens=1024, batch_size=2, length=16)
    rows = []
    for seed in (0, 1):
        seen.clear()
        losses, selected = learn(Reader(1, 1), np.arange(1600), budget, 1e-3, seed)
        assert len(losses) == budget.steps == len(seen) == 32
        assert not selected
        rows.append(torch.cat(seen)[:, 0].tolist())
        assert len(set(rows[-1])) == 64
    assert set(rows[0]) != set(rows[1])


def test_the_loss_of_taipan_is_its_cross_entropy(text):
    """At a weight of the budget so large that it would show."""
    torch.manual_seed(0)
    model = build(configured("taipan", TINY, budget_lambda=1e4))
    (loss,), _ = learn(model, text.train, Budget(tokens=32, batch_size=2, length=16), 1e-3, 0)
    assert loss == pytest.approx(math.log(TINY.vocab_size), abs=0.3)


def test_rates_are_tried_in_shorter_runs_on_a_seed_apart():
    study = STUDY
    trials = study.trainings([])
    assert {cell.seed for cell in trials} == {100}
    assert {cell.settings["tokens"] for cell in trials} == {study.budget.tokens // 4}
    assert len(trials) == len(FAMILIES) * len(study.tuning.rates)
    records = [
        {"cell": json.loads(cell.key), "result": {"validation": 2 - 0.1 * (cell.rate == 4e-3)}} for cell in trials
    ]
    cells = study.trainings(records)
    assert cells[: len(trials)] == trials
    assert [(cell.model, cell.seed, cell.rate) for cell in cells[len(trials) :]] == [
        (name, seed, 4e-3) for seed in (0, 1, 2) for name in FAMILIES
    ]
    assert {cell.settings["tokens"] for cell in cells[len(trials) :]} == {study.budget.tokens}
    assert len(study.trainings([], guess=True)) == len(cells)
    assert rate_in(study.tuning, 4e-3) == "0.004"
    assert rate_in(study.tuning, 2e-3) == "0.002, the grid's end"


def test_smoke_records_every_cell_and_the_table_is_what_they_say(smoke, capsys):
    records = json.loads(smoke.read_text())
    assert all("result" in record for record in records)
    assert {cell_of(record).model for record in records} == {"llama", "ssd_hybrid", "taipan"}
    assert records[0]["command"].startswith("python examples/studies/language.py --smoke")
    assert str(smoke.parent) not in smoke.read_text()
    assert smoke.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    main(["--smoke", "--table", "--out", str(smoke)])
    learned, cost = (part.splitlines()[2:] for part in capsys.readouterr().out.strip().split("\n\n"))
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in learned}
    for name in ("llama", "ssd_hybrid", "taipan"):
        seeds = [record for record in records if (c := cell_of(record)).model == name and c.seed in (0, 1)]
        seeds = [record["result"] for record in seeds if cell_of(record).study == "language"]
        assert len(seeds) == 2
        for at, length in enumerate(("16", "64")):
            assert rows[NAMES[name]][3 + at] == ranged([found["bits_per_byte"][length] for found in seeds])
        assert rows[NAMES[name]][2] == ranged([found["curve"][-1][1] for found in seeds])
        (decoding,) = (r["result"] for r in records if cell_of(r).model == name and cell_of(r).study == "decode")
        (line,) = (line for line in cost if line.startswith(f"| {NAMES[name]} |"))
        assert line.endswith(f" {decoding['milliseconds']['64']:.2f} |")
    assert len(rows) == len(cost) == 3


def test_a_run_that_is_done_is_not_done_again(smoke, capsys):
    main(["--smoke", "--plan", "--out", str(smoke), "--only", " (llama|ssd_hybrid|taipan) "])
    assert "0 cells are missing" in capsys.readouterr().out


def test_the_plan_counts_what_is_missing(tmp_path, capsys):
    main(["--plan", "--out", str(tmp_path / "none.json")])
    assert re.search(r"\b49 cells are missing", capsys.readouterr().out)
    assert not (tmp_path / "none.json").exists()


def test_caches_are_weighed_after_their_lengths():
    llama, hybrid, ssd = (
        decode_cell(Cell("decode", name, 0, 0.0, SMOKE.settings | {"steps": 2, "scored": [16, 1024]}))["nbytes"]
        for name in ("llama", "ssd_hybrid", "ssd")
    )
    config = configured("llama", TINY)
    assert llama["1024"] == 64 * llama["16"] == 2 * 4 * config.num_hidden_layers * 1024 * config.hidden_size
    assert ssd["16"] == ssd["1024"]
    assert hybrid["16"] < hybrid["1024"]


def test_decoding_is_timed_alone(capsys):
    assert language.parse(["--decode"]).threads == 1
    with pytest.raises(SystemExit):
        language.parse(["--decode", "--workers", "2"])
    assert "time each other" in capsys.readouterr().err


def test_an_excerpt_begins_where_a_file_does(text):
    budget = SMOKE.budget
    ids = excerpt(text, budget, 24)
    assert len(ids) == 24
    ends = np.flatnonzero(text.parts(budget)[1][:-24] == text.tokenizer.eos_token_id)
    assert not len(ends) or ids[0] == text.tokenizer.eos_token_id


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_learns_in_the_study(name):
    """A text of few words, again and again."""
    found = work(cell_with(SMOKE.settings | {"tokens": 4096}, name))
    first, *_, last = [value for _, value in found["curve"]]
    assert last < 0.8 * first
    assert found["curve"][-1][0] == found["tokens"] == 4096
    assert len(found["curve"]) == language_runs.POINTS
    assert set(found["bits_per_byte"]) == {"16", "64"}
    assert ("selected" in found) == (name == "taipan")
