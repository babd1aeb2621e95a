"""Conversion of Mamba-2 checkpoints: logits against a float64 recurrence, bits there and back, published sizes."""

import dataclasses
import json
from itertools import permutations

import pytest
import torch
from conversion_cases import (
    BOUND,
    CASES,
    assert_same,
    codestral,
    judge,
    load_whole,
    mamba_ssm,
    prompt,
    stored,
    transformers,
)
from parity_cases import shake
from test_published_sizes import MAMBA2
from transformers import Mamba2Config, Mamba2ForCausalLM

from scrubjay import SSDConfig, SSDForCausalLM
from scrubjay.conversion import convert as conversion
from scrubjay.conversion.convert import FORMATS, convert, own_shapes
from scrubjay.conversion.keymap import plan_in, plan_out
from scrubjay.examples.benchmarks.published_layouts import (
    CODESTRAL,
    MAMBA2_2B7,
    mamba2_shapes,
    mamba_ssm_config,
    params_json,
)

LAYOUTS = {layout.name: layout for layout in FORMATS if layout.family == "ssd"}


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """A published folder, its tensors, its layout."""
    write, layout = CASES[request.param]
    return tmp_path / "source", write(tmp_path / "source"), layout


def far(got, want):
    assert got.shape == want.shape
    return float((got.double() - want).abs().max())


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def configuration(folder, layout):
    """What a folder's configuration means, in fields of ours."""
    shapes = {name: tuple(tensor.shape) for name, tensor in stored(folder).items()}
    config, _ = layout.read_config(json.loads((folder / layout.config_name).read_text()), shapes, {})
    return config.to_diff_dict() | {"dtype": None}


def test_a_converted_checkpoint_gives_the_logits_of_the_recurrence(case, tmp_path):
    source, tensors, _ = case
    convert(source, tmp_path / "new")
    ids = prompt(tensors)
    model = load_whole(tmp_path / "new")
    want = judge(tensors, ids)
    assert float(want.abs().max()) > 1
    assert far(logits(model, ids), want) < BOUND
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == ("lm_head.weight" not in stored(tmp_path / "new"))


def test_from_pretrained_reads_the_same_layouts_as_they_are(case):
    """Each tensor is found: an embedding that is not would be random and, where it is tied, go unnoticed."""
    source, tensors, layout = case
    if layout == "codestral":
        with pytest.raises(ValueError, match="scrubjay convert"):
            SSDForCausalLM.from_pretrained(source)
        return
    ids = prompt(tensors)
    model = load_whole(source)
    assert far(logits(model, ids), judge(tensors, ids)) < BOUND
    embedding = next(tensor for name, tensor in tensors.items() if "embedding" in name)
    assert torch.equal(model.model.embed_tokens.weight, embedding.float())


def test_there_and_back_changes_no_bit(case, tmp_path):
    source, tensors, layout = case
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to=layout)
    assert_same(stored(tmp_path / "back"), tensors)
    before, after = (configuration(folder, LAYOUTS[layout]) for folder in (source, tmp_path / "back"))
    assert before == after


@pytest.mark.parametrize(("first", "second"), list(permutations(["mamba_ssm", "transformers", "fla"], 2)))
def test_one_foreign_layout_becomes_another(first, second, tmp_path):
    """Straight, by way of ours, and back again: the same bits."""
    tensors = CASES[first][0](tmp_path / "source")
    if first == "transformers" and second == "fla":
        with pytest.raises(ValueError, match="fla cannot express this model: n_groups is 2, it has 1"):
            convert(tmp_path / "source", tmp_path / "straight", to=second)
        tensors = CASES["transformers, tied"][0](tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "straight", to=second)
    convert(tmp_path / "source", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "round", to=second)
    assert_same(stored(tmp_path / "straight"), stored(tmp_path / "round"))
    ids = prompt(tensors)
    assert far(logits(load_whole(tmp_path / "straight"), ids), judge(tensors, ids)) < BOUND
    convert(tmp_path / "straight", tmp_path / "back", to=first)
    assert_same(stored(tmp_path / "back"), tensors)


def test_each_tensor_keeps_its_dtype(tmp_path):
    tensors = transformers(tmp_path / "source")
    for name in tensors:
        if not name.endswith(("A_log", "D", "dt_bias")):
            tensors[name] = tensors[name].bfloat16()
    torch.save(tensors, tmp_path / "source" / "pytorch_model.bin")
    (tmp_path / "source" / "model.safetensors").unlink()
    report = convert(tmp_path / "source", tmp_path / "ours")
    assert set(report.dtypes) == {"bfloat16", "float32"}
    assert SSDConfig.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16
    convert(tmp_path / "ours", tmp_path / "back", to="transformers")
    assert_same(stored(tmp_path / "back"), tensors)


def test_a_cast_spares_what_the_model_keeps_in_float32(tmp_path):
    mamba_ssm(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours", dtype=torch.bfloat16, check=True)
    for name, tensor in stored(tmp_path / "ours").items():
        assert tensor.dtype == (torch.float32 if name.endswith(("A_log", ".D", "dt_bias")) else torch.bfloat16), name
    assert SSDForCausalLM.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16
    convert(tmp_path / "source", tmp_path / "whole")
    convert(tmp_path / "whole", tmp_path / "back", to="mamba_ssm", dtype=torch.bfloat16, check=True)
    assert stored(tmp_path / "back")["backbone.layers.0.mixer.A_log"].dtype == torch.float32


@pytest.mark.parametrize("name", MAMBA2)
def test_published_sizes_map_whole_in_both_directions(name):
    """Names and shapes of the published files, without their values; the number of parameters is the published one."""
    fields, (channels, rows), parameters = MAMBA2[name]
    layout = LAYOUTS["codestral" if name == "codestral-7b" else "mamba_ssm"]
    sizes = CODESTRAL if name == "codestral-7b" else MAMBA2_2B7
    sizes = sizes | dict(d=fields["hidden_size"], L=fields["num_hidden_layers"])
    prefix = "model." if name == "codestral-7b" else ""
    shapes = mamba2_shapes("embedding", sizes, prefix, head=True)
    theirs = params_json(sizes) if prefix else mamba_ssm_config(sizes, unpadded=50277)
    for given in (theirs, {}):
        assert layout.recognises(given, shapes)
        config, notes = layout.read_config(given, shapes, {})
        assert {key: getattr(config, key) for key in fields} == {key: fields[key] for key in fields} or not given
        assert (config.state_size, config.n_groups, config.head_dim, config.conv_size) == (
            128,
            sizes["G"],
            64,
            channels,
        )
        assert bool(given) == ("there is no configuration file" not in notes[0])
    config, _ = layout.read_config(theirs, shapes, {})
    with torch.device("meta"):
        model = SSDForCausalLM(config)
    assert model.num_parameters() == parameters
    assert model.model.layers[0].mixer.in_proj.out_features == rows
    ours = own_shapes(model)
    plan = plan_in(layout.rows(config), shapes, ours)
    assert plan.shapes == ours
    assert sum(torch.Size(shape).numel() for shape in plan.shapes.values()) == parameters
    assert plan.used | {copy for copy, _ in plan.copies} == shapes.keys()
    assert plan_out(layout.rows(config), ours).shapes == shapes
    again, _ = layout.read_config(layout.write_config(config), shapes, {})
    assert again.to_diff_dict() == config.to_diff_dict()


def test_the_check_measures_and_reports(tmp_path):
    tensors = mamba_ssm(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    (tmp_path / "source" / "LICENSE").write_text("as you like")
    report = convert(tmp_path / "source", tmp_path / "new", to="transformers", check=True)
    found = json.loads((tmp_path / "new" / "conversion.json").read_text())
    assert found["layouts"] == ["mamba_ssm", "transformers"]
    assert found["parameters"] == sum(t.numel() for n, t in tensors.items() if n != "lm_head.weight")
    assert found["bytes_read"] == (tmp_path / "source" / "pytorch_model.bin").stat().st_size
    assert found["bytes_written"] == (tmp_path / "new" / "model.safetensors").stat().st_size
    assert found["dtypes"] == {"float32": 4 * found["parameters"]}
    assert found["left_out"] == {"lm_head.weight": "repeats backbone.embedding.weight"}
    measured = found["check"]["max_logit_difference"]
    assert list(measured) == ["this library's model on the result", "transformers itself, which loads the result"]
    assert all(0 < x < found["check"]["bound"] for x in measured.values())
    assert len(found["check"]["sha256"]["model.safetensors"]) == 64
    assert found["check"]["config_differences"] == {"rescale_prenorm_residual": [True, False]}
    text = (tmp_path / "new" / "conversion.md").read_text()
    allowed = found["check"]["allowed"]
    assert allowed == 1e-4 * found["check"]["scale"] > 2e-4
    ours = measured["this library's model on the result"]
    assert f"{ours:.2e} (bound {allowed:.2e}, of 0.0001 * max(1, largest logit " in text
    assert report.text() in text
    assert (tmp_path / "new" / "LICENSE").read_text() == "as you like"
    assert (tmp_path / "new" / "tokenizer.json").is_file()


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.1, 0.6)])
def test_a_folder_that_transformers_saved_passes_the_check(tmp_path, limit):
    """It writes infinity as a dictionary."""
    sizes = dict(hidden_size=32, num_heads=4, head_dim=16, state_size=8, num_hidden_layers=2, vocab_size=48, n_groups=1)
    shake(Mamba2ForCausalLM(Mamba2Config(**sizes, time_step_limit=limit))).save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "new", check=True)
    assert 0 < max(report.check["max_logit_difference"].values()) < BOUND
    assert load_whole(tmp_path / "new").config.time_step_limit == list(limit)


SOURCES = ("mamba_ssm", "mamba_ssm, grouped", "fla", "codestral")
RESCALED = "rescale_prenorm_residual"


@pytest.mark.parametrize("by_ours", [True, False], ids=["by way of ours", "straight"])
@pytest.mark.parametrize("name", SOURCES)
def test_transformers_loads_the_weights_that_are_written_for_it(name, by_ours, tmp_path):
    """It divides what it has loaded by sqrt(num_hidden_layers) where the configuration asks for the initialisation of
    mamba_ssm, which our configuration does; that moves these logits by 0.3 and more."""
    source, tensors = tmp_path / "source", CASES[name][0](tmp_path / "source")
    if by_ours:
        convert(source, tmp_path / "ours")
        assert getattr(SSDConfig.from_pretrained(tmp_path / "ours"), RESCALED)
        source = tmp_path / "ours"
    report = convert(source, tmp_path / "new", to="transformers")
    assert any(note.startswith(f"{RESCALED} false instead of true") for note in report.notes)
    ids = prompt(tensors)
    want = judge(tensors, ids)
    folder = tmp_path / "new"
    assert far(logits(Mamba2ForCausalLM.from_pretrained(folder, dtype=torch.float32), ids), want) < BOUND
    config = json.loads((folder / "config.json").read_text())
    assert config[RESCALED] is False
    (folder / "config.json").write_text(json.dumps(config | {RESCALED: True}))  # what it would do otherwise
    assert far(logits(Mamba2ForCausalLM.from_pretrained(folder, dtype=torch.float32), ids), want) > 0.3
    assert far(logits(load_whole(folder), ids), want) < BOUND  # ours takes the weights of the file


def test_a_folder_for_fla_is_not_rescaled_either_by_transformers(tmp_path):
    """Which reads it where fla is not installed, since both say model_type "mamba2"."""
    tensors = mamba_ssm(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "new", to="fla")
    ids = prompt(tensors)
    assert far(logits(Mamba2ForCausalLM.from_pretrained(tmp_path / "new"), ids), judge(tensors, ids)) < BOUND
    assert SSDConfig.from_pretrained(tmp_path / "new").rescale_prenorm_residual
    convert(tmp_path / "source", tmp_path / "other", to="fla", settings={RESCALED: False})
    assert not SSDConfig.from_pretrained(tmp_path / "other").rescale_prenorm_residual


def test_the_check_judges_what_transformers_loads(tmp_path, monkeypatch):
    mamba_ssm(tmp_path / "source")
    good = LAYOUTS["transformers"]
    wrong = dataclasses.replace(good, write_config=lambda config: good.write_config(config) | {RESCALED: True})
    monkeypatch.setattr(conversion, "FORMATS", (LAYOUTS["mamba_ssm"], wrong))
    convert(tmp_path / "source", tmp_path / "unchecked", to="transformers")
    with pytest.raises(ValueError, match="differ from the source's by transformers itself, which loads the result: "):
        convert(tmp_path / "source", tmp_path / "new", to="transformers", check=True)


def test_a_source_that_transformers_rescales_is_read_as_it_is_and_the_report_says_so(tmp_path):
    tensors = transformers(tmp_path / "source", **{RESCALED: True})
    ids = prompt(tensors)
    want = judge(tensors, ids)
    assert far(logits(Mamba2ForCausalLM.from_pretrained(tmp_path / "source"), ids), want) > 0.3
    assert far(logits(load_whole(tmp_path / "source"), ids), want) < BOUND
    report = convert(tmp_path / "source", tmp_path / "new", check=True)
    assert any("transformers' own from_pretrained divides every out_proj.weight" in note for note in report.notes)
    assert far(logits(load_whole(tmp_path / "new"), ids), want) < BOUND
    transformers(tmp_path / "plain")
    assert not any("divides" in note for note in convert(tmp_path / "plain", tmp_path / "other").notes)


def test_the_check_takes_settings_and_the_file_that_was_named(tmp_path):
    """A folder may hold two files of weights; a setting may change what the model computes."""
    tensors = mamba_ssm(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours")
    convert(
        tmp_path / "ours", tmp_path / "official", to="mamba_ssm", settings={"time_step_limit": [0.0, 0.05]}, check=True
    )
    assert SSDConfig.from_pretrained(tmp_path / "official").time_step_limit == [0.0, 0.05]
    convert(tmp_path / "source", tmp_path / "limited", settings={"time_step_limit": [0.0, 0.05]}, check=True)
    ours = {name: tensor * 1.1 for name, tensor in stored(tmp_path / "ours").items()}
    torch.save(ours, tmp_path / "ours" / "pytorch_model.bin")
    convert(tmp_path / "ours" / "pytorch_model.bin", tmp_path / "new", to="mamba_ssm", check=True)
    assert torch.equal(stored(tmp_path / "new")["backbone.norm_f.weight"], 1.1 * tensors["backbone.norm_f.weight"])


@pytest.mark.parametrize("pair", [("D", "dt_bias"), ("norm.weight", "norm_f.weight")], ids=str)
def test_the_check_sees_two_tensors_exchanged(tmp_path, monkeypatch, pair):
    """On the way into our own names; nothing is left of the result."""
    mamba_ssm(tmp_path / "source")

    def exchanged(rows, theirs, ours):
        plan = plan_in(rows, theirs, ours)
        a, b = (next(name for name in ours if name.endswith(end)) for end in ("0.mixer.D", "0.mixer.dt_bias"))
        if pair[0] != "D":
            a, b = "model.layers.0.norm.weight", "model.norm.weight"
        plan.recipes[a], plan.recipes[b] = plan.recipes[b], plan.recipes[a]
        return plan

    monkeypatch.setattr(conversion, "plan_in", exchanged)
    with pytest.raises(ValueError, match="The check failed: logits differ"):
        convert(tmp_path / "source", tmp_path / "new", check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_of_this_library_is_whole(tmp_path):
    """Configuration, generation settings, code and card, as save_pretrained writes them."""
    mamba_ssm(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "new")
    load_whole(tmp_path / "new").save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names
    config, saved = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("new", "saved"))
    assert config == saved
    for name in names - {"config.json", "model.safetensors", "README.md"}:
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes(), name


def test_settings_are_fields_of_the_new_configuration(tmp_path):
    mamba_ssm(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "new", settings={"chunk_size": 16, "eos_token_id": 7})
    config = SSDConfig.from_pretrained(tmp_path / "new")
    assert (config.chunk_size, config.eos_token_id) == (16, 7)
    convert(tmp_path / "source", tmp_path / "whole", settings={"time_step_max": 1})  # a whole number is a float as well
    assert SSDConfig.from_pretrained(tmp_path / "whole").time_step_max == 1.0


def test_codestral_has_the_token_ids_of_its_tokenizer(tmp_path):
    codestral(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "new")
    config = SSDConfig.from_pretrained(tmp_path / "new")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
    assert any("eos_token_id 2" in note for note in report.notes)
