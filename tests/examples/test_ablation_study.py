"""The ablation study: what each variant changes, its tables against its records, and the picture of a selection."""

import json

import pytest
import torch

from scrubjay.examples.studies.ablations import QUESTIONS, RECALL, SMOKE, STUDY, drawn, main
from scrubjay.examples.studies.cells import cell_of
from scrubjay.examples.studies.drawing import ranged
from scrubjay.examples.studies.equal_models import build, configured, count
from scrubjay.examples.studies.language_runs import read_settings, read_text
from scrubjay.examples.studies.recall import sizes_of
from scrubjay.examples.studies.recall_models import build as build_recall
from scrubjay.examples.studies.selection_picture import cells, draw_selection, marked, read_selection


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "ablations.json"
    only = "^(gates .*none|layers .*2[}]|capacity .*0.15.*none|recall_gates .*(full|keys))"
    main(["--smoke", "--threads", "1", "--out", str(out), "--only", only])
    return out


def config_of(cell):
    """Of a cell that trains on text."""
    sizes, _ = read_settings(cell.settings)
    shape = tuple(cell.settings.get("shape", {}).items())
    return configured(cell.model, sizes, shape=shape, **cell.settings.get("switches", {}))


@pytest.mark.parametrize("name", [name for name in QUESTIONS if name != RECALL])
def test_variants_are_other_models_of_the_same_sizes(name):
    found = {}
    for cell in STUDY.cells([], guess=True):
        if cell.study == name:
            found.setdefault(json.dumps([cell.settings.get("shape"), cell.settings.get("switches")]), config_of(cell))
    assert len(found) == len(QUESTIONS[name].variants)
    configs = list(found.values())
    assert len({config.to_json_string() for config in configs}) == len(configs)
    assert {(config.hidden_size, config.num_hidden_layers) for config in configs} == {
        (128, configs[0].num_hidden_layers)
    }
    assert all(1.2e6 < count(config) < 2.2e6 for config in configs)


def test_heads_can_be_shared_and_not():
    variants = QUESTIONS["keys"].variants.values()
    found = [configured("rodimus_plus", STUDY.sizes, **given.get("switches", {})) for given in variants]
    heads = {(config.num_key_heads, config.num_value_heads) for config in found}
    assert heads == {(1, 4), (1, 1), (2, 2), (4, 4)}
    assert {config.num_attention_heads for config in found} == {4}


def test_recall_is_asked_of_the_same_variants():
    variants = STUDY.variants(RECALL)
    assert list(variants) == list(QUESTIONS["gates"].variants)
    models = []
    for name, settings in variants.values():
        with torch.device("meta"):
            models.append(build_recall(name, sizes_of(settings), settings.get("switches")))
    assert models[1].config.temperature_gate is False
    assert len({model.config.to_json_string() for model in models}) == len(models)
    assert len({model.config.hidden_size for model in models}) == 1


def test_every_variant_has_the_same_effort():
    cells = STUDY.cells([], guess=True)
    variants = {}
    for cell in cells:
        switches = json.dumps([cell.study, cell.settings.get("shape"), cell.settings.get("switches")])
        variants.setdefault(switches, []).append((cell.seed, cell.rate))
    assert len(variants) == sum(len(question.variants) for question in QUESTIONS.values())
    for name, runs in variants.items():
        rates = len(STUDY.tuned(json.loads(name)[0]).rates)
        assert rates == (4 if RECALL in name else 5)
        assert sorted(seed for seed, _ in runs) == [0, 1, 2, *[100] * rates]


def test_smoke_tables_are_what_the_records_say(smoke, capsys):
    records = json.loads(smoke.read_text())
    assert all("result" in record for record in records), [record.get("error") for record in records]
    assert str(smoke.parent) not in smoke.read_text()
    assert smoke.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    main(["--smoke", "--table", "--out", str(smoke)])
    printed = capsys.readouterr().out
    shown = {cell_of(record).study: record["result"] for record in records if cell_of(record).seed == 0}
    assert set(shown) == {"gates", "layers", "capacity", RECALL}
    for name, variant in (("gates", "no input gate"), ("layers", "2"), ("capacity", "0.15")):
        (row,) = (line for line in printed.splitlines() if line.startswith(f"| {variant} |"))
        bits = shown[name]["bits_per_byte"]
        assert f"| {ranged([bits['16']])} | {ranged([bits['64']])} |" in row
    assert f"| {ranged([shown[RECALL]['accuracy']])} |" in printed
    (share,) = shown["capacity"]["selected_in_training"]  # of one selective layer
    assert f"| {ranged([share])} |" in row


def test_smoke_draws_a_selection(smoke):
    found = drawn(SMOKE, json.loads(smoke.read_text()))
    assert all(len(numbers) == len(found["tokens"]) for numbers in found["layers"].values())
    assert smoke.with_name("ablations_selection.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_drawn_is_what_the_model_selects():
    torch.manual_seed(0)
    text = read_text(SMOKE.sizes.vocab_size, SMOKE.budget.train_bytes)
    model = build(configured("taipan", SMOKE.sizes, attention_every=4)).eval()
    ids = torch.from_numpy(text.heldout[:200])
    model.calibrate(ids[None], 0.2)
    found = read_selection(model, ids, text.tokenizer)
    assert list(found["layers"]) == [str(place) for place in model.config.selective_layers]
    with torch.no_grad():
        shares = model(ids[None]).selection[:, 0]
    for numbers, share in zip(found["layers"].values(), shares.tolist(), strict=True):
        assert sum(number > 0 for number in numbers) == pytest.approx(200 * share, abs=1.5)  # numbers are rounded
    assert "".join(found["tokens"]) == text.tokenizer.decode(ids, skip_special_tokens=True)


def test_selected_tokens_are_marked():
    assert marked(["def ", "f", "(x)"], [-1.0, 0.5, -0.2]) == "def ‹f›(x)"


def test_a_page_has_lines_and_a_width():
    placed = cells(["ab\n", "\tc", "de"], columns=6)
    assert [[(line, column) for line, column, _ in token] for token in placed] == [
        [(0, 0), (0, 1), (0, 2)],
        [(1, 0), (1, 4)],
        [(1, 5), (2, 0)],
    ]
    assert [character for token in placed for _, _, character in token] == list("ab↵→cde")


def test_a_selection_of_any_text_is_drawn(tmp_path):
    tokens = ["x = $y$_{", "\n", "\té", "z" * 200]
    draw_selection({"tokens": tokens, "layers": {"1": [1, -1, 0.1, 9], "3": [-1] * 4}}, tmp_path / "s.png", "a title")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
