"""What the card of a model says: read back as YAML and Markdown, and held against the model."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from zoo import ZOO, tokens

from scrubjay.configuration.tested_versions import OLDEST
from scrubjay.modeling.hub.model_card import BEGIN, END, Notes

ROOT = Path(__file__).parents[2]
SSD = ZOO[0]
NOTES = {
    "license": "cc-by-4.0",
    "training_data": "acorns | pine cones",
    "training_command": "run `this`\n```and this```",
    "evaluation": {"bits per byte | acorns": 1.25, "recall": "all"},
}


def card_of(model, folder, **options):
    model.save_pretrained(folder, **options)
    return (folder / "README.md").read_text(encoding="utf-8")


def rows(text):
    """First cell: the rest, of all tables."""
    split = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in split}


def section(text, name):
    return re.search(rf"\n## {name}\n\n([\s\S]*?)(?=\n## |\n<!--)", text)[1].strip()


def test_the_metadata_is_what_the_hub_reads(entry, tmp_path):
    text = card_of(entry.build(), tmp_path, card={"license": "mit"})
    data = ModelCard(text).data.to_dict()
    model_type, paper = entry.config().model_type, entry.config().paper
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "tags": ["custom_code", "scrubjay", model_type, f"arxiv:{paper['arxiv']}"],
    }


def test_links_are_whole_and_tables_are_even(entry, tmp_path):
    text = card_of(entry.build(), tmp_path, card=NOTES)
    links = re.findall(r"\[([^\]]+)\]\(([^)]*)\)", re.sub(r"```[\s\S]*?```", "", text))
    assert links == [(entry.config().paper["title"], f"https://arxiv.org/abs/{entry.config().paper['arxiv']}")]
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert not re.search(r"[ \t]$", text, re.MULTILINE)


def test_open_choices_are_fields_with_the_values_of_this_model(entry, tmp_path):
    model = entry.build()
    text = section(card_of(model, tmp_path), "What the paper leaves open")
    found, named = rows(text), model.config.paper["open"]
    for field, what in named.items():
        assert found[f"`{field}`"] == [f"`{getattr(model.config, field)}`", what]
    assert len(found) == (len(named) + 2 if named else 0)


@pytest.mark.parametrize(
    ("name", "changes", "shown"),
    [
        ("taipan", {"kv_scope": "selected", "budget_lambda": 0.5}, ["`selected`", "`0.5`"]),
        ("adore", {"rebuild_mask": "full"}, ["`full`"]),
        ("recycled", {"qsim_batch": "all"}, ["`all`"]),
        ("rodimus_plus", {"k_norm_eps": 1e-5}, ["`1e-05`"]),
    ],
)
def test_a_choice_that_was_made_otherwise_is_shown(name, changes, shown, tmp_path):
    entry = next(entry for entry in ZOO if entry.name == name)
    found = rows(card_of(entry.build(**changes), tmp_path))
    assert [found[f"`{field}`"][0] for field in changes] == shown


def test_sizes_are_those_of_the_model_and_its_files(entry, tmp_path):
    model = entry.build(dtype=torch.bfloat16)
    found = rows(card_of(model, tmp_path))
    number = sum(parameter.numel() for parameter in model.parameters())
    nbytes = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert found["parameters"] == [f"{number:,}"]
    assert found["weights"] == [f"{nbytes:,} bytes, {str(model.dtype)[6:]}"]
    assert found["hidden size"] == [str(model.config.hidden_size)]
    assert found["vocabulary"] == ["97"]


def test_a_model_in_four_bits_says_so(tmp_path):
    pytest.importorskip("bitsandbytes")
    plain = SSD.build(hidden_size=64, head_dim=16, n_groups=1)
    plain.save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings)
    before, after = rows((tmp_path / "plain" / "README.md").read_text()), rows(card_of(model, tmp_path / "four"))
    assert after["parameters"] == before["parameters"]
    nbytes = (tmp_path / "four" / "model.safetensors").stat().st_size
    assert nbytes < 0.5 * (tmp_path / "plain" / "model.safetensors").stat().st_size
    assert after["weights"] == [f"{nbytes:,} bytes, quantized by bitsandbytes, computing in float32"]
    for folder, needed in (("plain", "torch"), ("four", "torch, accelerate, bitsandbytes")):
        assert f"With {needed} and transformers 5.17 or newer; nothing" in (tmp_path / folder / "README.md").read_text()


VARIANTS = {
    "ssd": [{}],
    "rodimus": [{}],
    "rodimus_plus": [{}],
    "taipan": [{}, {"kv_scope": "selected"}],
    "ssd_hybrid": [{}, {"attn_cfg": {"d_conv": 0}}],
    "adore": [{}, {"score_mode": "static"}, {"rebuild": 0}, {"store": "embeds"}],
    "recycled": [
        {},
        {"policy": "lowrank", "choosing_layers": [1]},
        {"policy": "lowrank", "choosing_layers": [1], "hold": "host"},
        *({"policy": policy, "hold": "host", "hold_bits": 4} for policy in ("recycled", "lowrank", "full")),
        *({"hold": hold, "hold_bits": bits} for hold in ("device", "host") for bits in (None, 8)),
        *({"policy": policy} for policy in ("full", "lowrank", "quest", "snapkv", "h2o", "tova", "streaming")),
    ],
}
CASES = [(entry, changes) for entry in ZOO for changes in VARIANTS[entry.name]]


@pytest.mark.parametrize(("entry", "changes"), CASES, ids=lambda x: getattr(x, "name", None) or str(x))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_a_cache_are_those_of_a_real_one(entry, changes, dtype, tmp_path):
    """After 509 tokens and 3 more: without what the docstrings leave out, room ahead and ADORE's table, to the byte."""
    small = {"adore": {"cache_size": 200}, "recycled": {"budget": 100}}.get(entry.name, {})
    model = entry.build(dtype=dtype, **small, **changes)
    if entry.name == "adore":
        model.controller.float()  # as from_pretrained leaves it
    with torch.no_grad():
        cache = model(tokens(1, 509), use_cache=True).cache
        for _ in range(3):
            model(tokens(1, 1), cache=cache)
    held = cache.nbytes
    if entry.name == "adore" and cache._table is not None:
        held -= cache._table.nbytes
    if entry.name == "recycled":
        held -= sum(gathered.nbytes for gathered in cache.call.spare.values())
        for layer in cache.layers:
            for name, buffer in layer.tensors().items():
                used = {"few.key_codes": 448, "few.key_scales": 448 // 32, "few.value_codes": 448}.get(name[5:], 512)
                used = 448 if name == "held.few.value_scales" else used
                if name.startswith(("full_", "held.")):
                    held -= buffer[:, :, used:].nbytes
            waiting = getattr(layer, "waiting", None)
            held -= 0 if waiting is None else waiting.nbytes
            if changes.get("policy") == "snapkv":
                held -= sum(
                    getattr(layer.kept, name)[:, :, 103:].nbytes for name in ("keys", "values", "index", "rank")
                )
            low = getattr(layer, "low", None)
            held -= low[..., layer.lowered :].nbytes if type(layer).__name__.endswith("LowRankLayer") else 0
    once, each = type(cache).row_bytes(model.config, model.dtype)
    count, token = (3, "token after the prompt") if changes.get("policy") == "snapkv" else (512, "token")
    assert held == once + count * each
    told = rows(card_of(model, tmp_path))["cache of one sequence"][0]
    assert told == f"{once:,} bytes" + (
        f" and {each:,} bytes more for each {token}" if each else ", whatever its length"
    )


def test_what_is_not_given_is_not_made_up(entry, tmp_path):
    text = card_of(entry.build(), tmp_path)
    assert section(text, "Training") == "Data: not given\n\nCommand: not given"
    assert section(text, "Evaluation") == "Not given."
    assert section(text, "Licence") == "Weights: not given. Code files: Apache-2.0."
    assert "license" not in ModelCard(text).data.to_dict()
    assert "model_card" not in json.loads((tmp_path / "config.json").read_text())


def test_what_was_given_is_shown_kept_and_changed(entry, tmp_path):
    text = card_of(entry.build(), tmp_path / "one", card=NOTES)
    assert section(text, "Training") == (
        "Data: acorns | pine cones\n\nCommand:\n\n````\nrun `this`\n```and this```\n````"
    )
    assert rows(section(text, "Evaluation")) == {
        "measured": ["value"],
        "---": ["---"],
        "bits per byte \\| acorns": ["1.25"],
        "recall": ["all"],
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert card_of(loaded, tmp_path / "two") == text
    loaded.describe(license="mit", evaluation=None)
    changed = card_of(loaded, tmp_path / "three")
    assert section(changed, "Evaluation") == "Not given."
    assert ModelCard(changed).data.license == "mit"
    assert section(changed, "Training") == section(text, "Training")


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ({"licence": "mit"}, "'licence': 'mit'"),
        (["mit"], r"got \['mit'\]"),
        ({"license": 3}, "license must be text"),
        ({"training_data": f"x {BEGIN}"}, "training_data must be text without the marks"),
        ({"evaluation": {"bits": [1]}}, "evaluation must be"),
        ({"evaluation": [1]}, "evaluation must be"),
        ({"evaluation": {f"bits {END}": 1}}, "without the marks of this card"),
        ({"evaluation": {"bits": BEGIN}}, "without the marks of this card"),
    ],
)
def test_notes_that_the_card_has_no_place_for_are_refused(card, said, tmp_path):
    model = SSD.build()
    with pytest.raises(ValueError, match=said):
        model.save_pretrained(tmp_path / "new", card=card)
    with pytest.raises(ValueError, match=said):
        model.push_to_hub("nobody/nothing", card=card)
    assert not (tmp_path / "new").exists()
    assert not hasattr(model.config, "model_card")


def test_a_readme_of_the_users_keeps_its_text_and_metadata(tmp_path):
    own = "---\nlicense: mit\ntags:\n- birds\npipeline_tag: other\nmodel-index:\n- odd: 1\n---\n# Jay\n\nSings. é\n"
    (tmp_path / "README.md").write_text(own, encoding="utf-8")
    text = card_of(SSD.build(), tmp_path)
    assert "\n---\n# Jay\n\nSings. é\n\n<!-- scrubjay" in text
    assert "Weights: mit." in text
    assert "model-index:\n- odd: 1\n" in text
    data = ModelCard(text, ignore_metadata_errors=True).data
    assert (data.license, data.pipeline_tag, data.tags[:2]) == ("mit", "other", ["birds", "custom_code"])
    assert card_of(SSD.build(), tmp_path) == text


def test_a_readme_without_metadata_and_a_single_mark_lose_nothing(tmp_path):
    (tmp_path / "README.md").write_text(f"Mine.\n{BEGIN}\nnot ended\n")
    for _ in range(2):
        text = card_of(SSD.build(), tmp_path)
        assert text.split("\n---\n")[1].startswith(f"Mine.\n{BEGIN}\nnot ended\n\n{BEGIN}\n")
        assert text.count("## How to load") == 1


@pytest.mark.parametrize("metadata", ["- a list", "a: [open", "text"])
def test_metadata_that_cannot_be_read_are_left_for_the_user_to_repair(tmp_path, metadata):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\nmine\n")
    with pytest.raises(ValueError, match="Repair or remove them"):
        SSD.build().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_readme_that_is_not_utf8_is_left_for_the_user_to_repair(tmp_path):
    (tmp_path / "README.md").write_bytes("Häher".encode("latin-1"))
    with pytest.raises(ValueError, match=r"README.md is not UTF-8 text .* Save it as UTF-8, or remove it"):
        SSD.build().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_blocks_of_a_folders_card_run_in_it(entry, tmp_path, monkeypatch):
    text = card_of(entry.build(), tmp_path)
    monkeypatch.chdir(tmp_path)
    loading, check = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(loading, "card", "exec"), {})
    assert output.getvalue().startswith("tensor([[")
    for change, said in ((b"", "same"), (b"#", "ALTERED")):
        with (tmp_path / "loss.py").open("ab") as file:
            file.write(change)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(check, "card", "exec"), {})
        assert f"{said} loss.py\n" in output.getvalue()


def test_a_model_without_a_head_says_so(tmp_path, monkeypatch):
    text = card_of(SSD.build().model, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "AutoModel.from_pretrained" in text
    assert ModelCard(text).data.pipeline_tag == "feature-extraction"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    assert output.getvalue() == "torch.Size([1, 3, 48])\n"


def test_the_oldest_transformers_is_that_of_the_package():
    assert f'"transformers>={OLDEST},' in (ROOT / "pyproject.toml").read_text()


def test_notes_survive_a_configuration_changed_by_hand():
    config = SSD.config()
    config.model_card = {"color": "blue"}
    with pytest.raises(ValueError, match="color"):
        Notes.of(config)
