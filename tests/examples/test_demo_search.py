"""The search for the demo's recipe: what it tries, by what it knows, with trainings that are made up."""

import pytest

from scrubjay.examples.learning.recipe import QUICK
from scrubjay.examples.studies.cells import Cell
from scrubjay.examples.studies.demo_search import (
    BUDGET,
    CHANGES,
    CHOICES,
    MARGIN,
    SEEDS,
    SIZES,
    TITLES,
    Search,
    learn,
    main,
    measure_pace,
    pace_of,
    recipe_of,
    table,
    tables,
)
from scrubjay.examples.studies.laboratory import Laboratory

STEP = {"adamw": 0.1, "muon": 0.125}  # seconds


def made_up(cell):
    """Muon pays for Rodimus+, to SSD it is worth less than the margin, and 0.012 is the best rate."""
    optimizer = cell.settings["optimizer"]
    if cell.study == "pace":
        return {"cpu_seconds": STEP[optimizer], "parameters": 1}
    bits = 1.7 + abs(cell.rate - 0.012) + (0.1 if (optimizer == "muon") != (cell.model == "rodimus_plus") else 0.0)
    bits += abs(cell.settings.get("matrix_rate", 0.5) - 0.5)
    bits -= 0.1 + 0.9 * MARGIN if (cell.model, optimizer) == ("ssd", "muon") else 0.0
    return {"bits_per_byte": bits, "training_nats": 4.0, "tokens": 1000 * cell.settings["steps"], "parameters": 1}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    laboratory = Laboratory(tmp_path_factory.mktemp("out") / "all.json", "a command", log=lambda line: None)
    return laboratory.run(lambda records: Search(records).cells(), made_up)


def test_steps_are_measured_before_anything_is_trained(records):
    studies = [record["cell"]["study"] for record in records]
    assert studies.index("sizes") == studies.count("pace")
    assert all(cell.study == "pace" for cell in Search([]).cells())


def test_every_model_has_the_same_trials_and_as_many_steps_as_its_share_holds(records):
    cells = [Cell(**record["cell"]) for record in records]
    for model in QUICK:
        trials = [cell for cell in cells if (cell.study, cell.model) == ("rates", model)]
        assert [(c.settings["optimizer"], c.rate, c.settings.get("matrix_rate", 1.0)) for c in trials] == CHOICES
        for cell in trials:
            assert cell.settings["steps"] * STEP[cell.settings["optimizer"]] == pytest.approx(BUDGET / 3, rel=0.01)


def test_the_best_of_each_model_gets_the_whole_budget_on_other_seeds(records):
    whole = [Cell(**record["cell"]) for record in records if record["cell"]["study"] == "whole"]
    tried = [
        (model, optimizer, seed)
        for model in QUICK
        for optimizer in (("muon", "adamw") if model == "rodimus_plus" else ("adamw",))
        for seed in SEEDS
    ]
    assert [(cell.model, cell.settings["optimizer"], cell.seed) for cell in whole] == tried
    for cell in whole:
        optimizer = cell.settings["optimizer"]
        assert cell.rate == 0.012
        assert cell.settings.get("matrix_rate") == (0.5 if optimizer == "muon" else None)
        assert cell.settings["steps"] == round(BUDGET / STEP[optimizer])


def test_a_cell_is_the_demos_recipe_with_its_settings():
    settings = {"optimizer": "muon", "matrix_rate": 0.5, "batch_size": 2, "share": 0.3, "steps": 10}
    cell = Cell("rates", "ssd", 0, 0.006, settings)
    recipe = recipe_of(cell)
    assert (recipe.optimizer, recipe.matrix_rate, recipe.batch_size) == ("muon", 0.5, 2)
    assert (recipe.learning_rate, recipe.num_hidden_layers) == (0.006, QUICK["ssd"]["num_hidden_layers"])
    assert pace_of(cell).settings == {"optimizer": "muon", "batch_size": 2}


def test_tables_show_each_setting_once_with_its_seeds(records):
    text = tables(Search(records))
    whole = text.split("whole\n")[1].splitlines()
    assert len([line for line in whole if line.startswith("| ")]) == 1 + 1 + len(QUICK) + 1
    assert "1.700 (1.700 to 1.700)" in text


def test_tables_name_what_differs_and_nothing_else(records):
    changes = tables(Search(records)).split("changes\n")[1].splitlines()
    header = [name.strip() for name in changes[1].strip("|").split("|")]
    assert set(header) == {
        "batch_size",
        "length",
        "vocab_size",
        "decay",
        "warmup",
        "parameters",
        "tokens",
        "bits per byte",
    }


def test_the_guide_shows_what_was_chosen_but_no_single_trial_of_a_rate(records):
    text = table(records)
    assert all(f"{title}:\n\n| " in text for title in TITLES.values())
    assert text.count("\n| ") == 3 * 2 + len(QUICK) + 1 + len(CHANGES) + len(SIZES) * 2 + 4
    assert text.endswith(f"processor hours ({records[0]['machine']['cpu']}).")


@pytest.mark.slow
def test_a_step_is_timed_and_a_cell_learns():
    cell = Cell("rates", "rodimus_plus", 0, 0.01, {"optimizer": "muon", "smoke": True, "steps": 4, "share": 0.3})
    assert 0 < measure_pace(pace_of(cell))["cpu_seconds"] < 60
    found = learn(cell)
    assert 0 < found["bits_per_byte"] < 8
    assert found["tokens"] == 4 * 4 * 64


def test_the_plan_runs_nothing(tmp_path, capsys):
    main(["--plan", "--out", str(tmp_path / "none.json")])
    assert "cells are missing" in capsys.readouterr().out
    assert not (tmp_path / "none.json").exists()
