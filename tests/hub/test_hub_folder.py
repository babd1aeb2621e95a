"""Saving into a folder: what was there goes, stays, or is as it was when a save fails; and what `verify` says of it."""

import inspect
import json
import os
import re
import shutil
import types

import pytest
import torch
from added_adapters import needs_add_adapter
from command_helpers import error_of
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from zoo import ZOO

import scrubjay_cli
from scrubjay import RodimusForCausalLM, SSDForCausalLM
from scrubjay.conversion.export_hub import export
from scrubjay.modeling.hub import publishing, verify_hub
from scrubjay.modeling.hub.model_card import BEGIN, END, pinned
from scrubjay.modeling.hub.remote_code import code_files, digest, written_class
from scrubjay.modeling.hub.verify_hub import verify

SSD, RODIMUS = ZOO[0], ZOO[1]
SHARD = "20KB"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(model, folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("variant", [None, "half"])
def test_pieces_of_an_earlier_save_do_not_stay(tmp_path, variant):
    """A single file would be preferred to pieces, and so loaded in place of what was saved last."""
    name = "model.half" if variant else "model"
    for seed, options in enumerate([{}, {"max_shard_size": SHARD}, {"max_shard_size": "10KB"}, {}]):
        model = SSD.build(seed=seed)
        model.save_pretrained(tmp_path, variant=variant, **options)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, variant=variant)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
        weights = [path for path in contents(tmp_path) if ".safetensors" in path]
        assert (weights == [f"{name}.safetensors"]) == (not options)


def test_another_variant_stays(tmp_path):
    one, two = SSD.build(), SSD.build(seed=1)
    one.save_pretrained(tmp_path, variant="half", max_shard_size=SHARD)
    half = {name: content for name, content in contents(tmp_path).items() if "half" in name}
    two.save_pretrained(tmp_path)
    assert len(half) > 2
    assert half.items() <= contents(tmp_path).items()
    assert same(two, tmp_path)


def test_another_model_takes_the_place_of_one_and_leaves_what_is_not_of_it(tmp_path):
    SSD.build().save_pretrained(tmp_path, max_shard_size=SHARD)
    for name in ("train.py", "notes.txt", "checkpoint-5/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    RODIMUS.build().save_pretrained(tmp_path)
    held = contents(tmp_path)
    code = {name for name in held if name.endswith(".py")}
    assert code == {"train.py", *code_files(RodimusForCausalLM)}
    assert {"notes.txt", "checkpoint-5/model.safetensors"} <= set(held)
    assert [name for name in held if re.match(r"model[-.]", name)] == ["model.safetensors"]


def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path, monkeypatch, entry):
    entry.build().save_pretrained(tmp_path, card={"license": "mit"})
    before = contents(tmp_path)
    calls = []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    module = __import__("transformers.modeling_utils", fromlist=["x"])
    real = module.safe_save_file
    monkeypatch.setattr(module, "safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        entry.build(seed=1).save_pretrained(tmp_path, max_shard_size=SHARD)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("options", [{}, {"max_shard_size": SHARD}], ids=["one file", "pieces"])
@pytest.mark.parametrize("moves", [0, 1, 5, 24])
def test_a_folder_half_way_to_another_model_does_not_load(tmp_path, monkeypatch, moves, options):
    model = SSD.build()
    model.save_pretrained(tmp_path)
    done = []

    def move(*args):
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(args)
        return os.rename(*args)

    monkeypatch.setattr(publishing, "os", types.SimpleNamespace(replace=move, PathLike=os.PathLike))
    with pytest.raises(KeyboardInterrupt):
        SSD.build(seed=1).save_pretrained(tmp_path, **options)
    monkeypatch.undo()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not list(tmp_path.glob("_saving_*"))
    model.save_pretrained(tmp_path)
    assert same(model, tmp_path)


def test_an_adapter_that_would_be_loaded_on_top_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="from_pretrained would load on top of this model"):
        SSD.build().save_pretrained(tmp_path)
    assert list(contents(tmp_path)) == ["adapter_config.json"]


class Tokenizer:
    """Writes what each tokenizer does."""

    def save_pretrained(self, folder):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_text("{}")


def test_a_tokenizer_that_was_given_leaves_nothing_of_another(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("of another")
    SSD.build().save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").exists()
    assert "AutoTokenizer" not in (tmp_path / "README.md").read_text()
    SSD.build().save_pretrained(tmp_path, tokenizer=Tokenizer())
    assert not (tmp_path / "chat_template.jinja").exists()
    assert "AutoTokenizer" in (tmp_path / "README.md").read_text()
    SSD.build().save_pretrained(tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(contents(tmp_path))
    assert "AutoTokenizer" in (tmp_path / "README.md").read_text()


@needs_add_adapter
def test_adapters_on_a_model_are_saved_alone(tmp_path):
    model = SSD.build()
    model.add_adapter(LoraConfig(r=2, target_modules=["in_proj"]))
    model.save_pretrained(tmp_path, tokenizer=Tokenizer())
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(contents(tmp_path)) - {"generation_config.json"} == adapter | {"tokenizer.json", "tokenizer_config.json"}
    with pytest.raises(ValueError, match="card= is for whole models, and an adapter is saved alone"):
        model.save_pretrained(tmp_path, card={"license": "mit"})


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path):
    SSD.build().save_pretrained(tmp_path / "new", is_main_process=False)
    assert contents(tmp_path / "new") == {}


def test_a_class_made_at_run_time_is_saved_as_the_one_it_was_made_of(tmp_path):
    """As FSDP makes one for each model that it shards."""
    model = SSD.build()
    model.__class__ = type("FSDPSSDForCausalLM", (SSDForCausalLM,), {"__module__": "torch.nn"})
    assert written_class(type(model)) is SSDForCausalLM
    model.save_pretrained(tmp_path)
    plain = SSD.build()
    plain.save_pretrained(tmp_path / "plain")
    assert contents(tmp_path / "plain").items() <= contents(tmp_path).items()


class OwnSSD(SSDForCausalLM):
    """A user's, here in a module that is none of the library's."""


def test_a_users_subclass_is_saved_as_the_model_that_it_extends(tmp_path, transformers_log):
    model = OwnSSD(SSD.config()).eval()
    model.save_pretrained(tmp_path)
    assert "OwnSSD is saved as SSDForCausalLM" in transformers_log.text
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"] == (
        "modeling_ssd.SSDForCausalLM"
    )
    assert {name for name in contents(tmp_path) if name.endswith(".py")} == set(code_files(SSDForCausalLM))
    assert same(model, tmp_path)


def test_weights_that_transformers_would_not_write_are_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    SSD.build(hidden_size=64, n_groups=2).save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings)
    with pytest.raises(ValueError, match="Of a quantized model transformers writes the weights that it has"):
        model.save_pretrained(tmp_path / "new", state_dict=model.state_dict())
    assert not contents(tmp_path / "new")


def test_push_to_hub_takes_what_transformers_takes(monkeypatch, tmp_path):
    """save_pretrained(push_to_hub=True) hands its options on, all of them."""
    seen = {}
    monkeypatch.setattr(SSDForCausalLM, "_push", lambda self, *how, **options: seen.update(options, how=how))
    options = {"revision": "next", "private": True, "create_pr": True, "commit_message": "m", "token": "t"}
    options |= {"commit_description": "d", "tags": ["x"]}
    written = {"max_shard_size": SHARD, "variant": "half", "state_dict": SSD.build(seed=1).state_dict()}
    SSD.build().save_pretrained(tmp_path / "acorn", push_to_hub=True, **options, **written)
    assert seen.pop("how")[1].keys() == written.keys()
    assert seen == {"tokenizer": None, **options}
    assert written["state_dict"].keys() == SSD.build().state_dict().keys()  # transformers' own save empties it
    monkeypatch.setattr(SSDForCausalLM, "_write_model", lambda self, *how, **options: None)
    SSD.build().save_pretrained(tmp_path / "parts", push_to_hub=True, distributed_checkpoint=True)
    assert "distributed_checkpoint" not in seen["how"][1]  # a push gathers the parts
    theirs, ours = (inspect.signature(cls.push_to_hub).parameters for cls in (PreTrainedModel, SSDForCausalLM))
    assert len(theirs) > 8
    assert set(theirs) <= set(ours)


@pytest.fixture
def saved(tmp_path):
    SSD.build().save_pretrained(tmp_path)
    return tmp_path


def test_export_pushes_models_of_the_zoo_alone(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes)).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"is a LlamaForCausalLM\. Call its push_to_hub"):
        export(str(tmp_path / "llama"), tmp_path / "new", push="jay/llama")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": '{"tokenizer_class": "PreTrained'},
        {"tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}', "tokenizer.json": '{"version"'},
        {"tokenizer_config.json": '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}'},
    ],
    ids=["configuration cut off", "tokenizer cut off", "code not trusted"],
)
def test_export_leaves_no_tokenizer_behind_in_silence(saved, tmp_path_factory, files):
    for name, text in files.items():
        (saved / name).write_text(text)
    new = tmp_path_factory.mktemp("exports") / "new"
    with pytest.raises(ValueError, match=r"The tokenizer of .* cannot be read, and the model would go without it"):
        export(str(saved), new)
    assert not new.exists()


def test_verify_agrees_with_what_was_saved(entry, tmp_path, capsys):
    entry.build().save_pretrained(tmp_path)
    found = verify(str(tmp_path))
    assert found.agrees
    assert sorted(found.files) == sorted(code_files(entry.model))
    assert scrubjay_cli.main(["verify", str(tmp_path)]) == 0
    assert "code files are as the card pins them" in capsys.readouterr().out


def test_verify_lists_what_was_altered_is_missing_or_was_added(saved, capsys):
    with (saved / "ssd.py").open("a") as file:
        file.write("# changed\n")
    (saved / "base.py").unlink()
    (saved / "deep").mkdir()
    (saved / "deep" / "extra.py").write_text("raise SystemExit('this runs')")
    found = verify(str(saved))
    assert (found.altered, found.missing, found.extra) == (["ssd.py"], ["base.py"], ["deep/extra.py"])
    assert found.foreign == ["ssd.py"]
    assert scrubjay_cli.main(["verify", str(saved)]) == 1
    said = capsys.readouterr().out
    for line in ("ssd.py: not as the card pins it", "base.py: missing", "deep/extra.py: neither pinned by the card"):
        assert line in said


@pytest.mark.parametrize("how", ["pinned anew", "not pinned"])
def test_verify_sees_code_that_the_card_was_changed_for(saved, how):
    path, card = saved / "ssd.py", saved / "README.md"
    old = path.read_bytes()
    path.write_bytes(old + b"# changed\n")
    pin = f"{digest(old)}  ssd.py\n"
    assert pin in card.read_text()
    card.write_text(
        card.read_text().replace(pin, pin.replace(digest(old), digest(path.read_bytes())) * (how[0] == "p"))
    )
    found = verify(str(saved))
    assert (found.altered, found.foreign, found.agrees) == ([], ["ssd.py"], False)


@pytest.mark.parametrize("value", ["crow/model--modeling_ssd.SSDForCausalLM", "other.SSDForCausalLM"])
def test_verify_sees_a_configuration_that_names_code_elsewhere(saved, value):
    config = json.loads((saved / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = value
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": [None, "x.Y"]}}))
    found = verify(str(saved))
    assert found.elsewhere == [
        f"config.json: AutoModelForCausalLM is {value}",
        "tokenizer_config.json: AutoTokenizer is [None, 'x.Y']",
    ]
    assert not found.agrees


def test_verify_leaves_a_trainers_checkpoints_to_themselves(saved, capsys):
    SSD.build(seed=1).save_pretrained(saved / "checkpoint-2")
    (saved / "notes.json").write_text('{"of": "a log"}\n{"of": "lines"}\n')
    found = verify(str(saved))
    assert (found.agrees, found.apart) == (True, ["checkpoint-2"])
    assert scrubjay_cli.main(["verify", str(saved)]) == 0
    assert "checkpoint-2: a model of its own, to be verified by itself" in capsys.readouterr().out
    assert verify(str(saved / "checkpoint-2")).agrees
    config = json.loads((saved / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "checkpoint-2.modeling_ssd.SSDForCausalLM"
    (saved / "config.json").write_text(json.dumps(config))
    assert not verify(str(saved)).agrees  # no code of there runs unseen


def test_a_card_with_other_line_ends_says_the_same(saved):
    card = saved / "README.md"
    card.write_bytes(card.read_bytes().replace(b"\n", b"\r\n"))
    assert verify(str(saved)).agrees
    RODIMUS.build().save_pretrained(saved)
    assert not {"ssd.py", "modeling_ssd.py"} & set(contents(saved))


def test_verify_says_what_it_cannot_compare(saved, capsys, monkeypatch):
    config = json.loads((saved / "config.json").read_text())
    with pytest.raises(ValueError, match="A folder has no revisions"):
        verify(str(saved), revision="main")
    (saved / "README.md").write_text("no pins")
    assert "has no README.md with sha256 of code files. Save the model again" in error_of(capsys, "verify", saved)
    monkeypatch.setattr(verify_hub, "snapshot_download", lambda *name, **how: saved)  # what a cache holds of it
    monkeypatch.setattr(verify_hub, "HF_HUB_OFFLINE", True)
    assert "sha256 of code files. Go online" in error_of(capsys, "verify", "jay/saved")
    (saved / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "'llama', which is not a model of scrubjay" in error_of(capsys, "verify", saved)
    assert "Pass a folder that save_pretrained wrote" in error_of(capsys, "verify", saved / "nowhere")
    (saved / "config.json").write_text("{")
    assert "config.json is no configuration: Expecting" in error_of(capsys, "verify", saved)


def test_an_exported_folder_has_the_tokenizer_on_its_card(saved, tmp_path_factory, capsys):
    new = tmp_path_factory.mktemp("exports") / "new"
    for name in ("--private", "--revision"):
        rest = ["next"] if name == "--revision" else []
        assert "belong to a push" in error_of(capsys, "export", saved, new, name, *rest)
    assert not new.exists()
    export(str(saved), new)
    assert contents(new) == contents(saved)
    shutil.rmtree(new)


def test_the_card_of_a_save_replaces_its_own_part_alone(saved):
    card = saved / "README.md"
    text = card.read_text()
    begin, end = text.index(BEGIN), text.index(END) + len(END)
    card.write_bytes(f"{text[:begin]}Above.\r\n\n{text[begin:end]}\n\nBelow. `{END}`\n".encode())
    RODIMUS.build().save_pretrained(saved)
    new = card.read_bytes().decode()
    assert re.fullmatch(r"---\n[\s\S]*\n---\nAbove\.\r\n\n<!--[\s\S]*-->\n\nBelow\. `<!-- scrubjay: end -->`\n", new)
    assert pinned(new).keys() == code_files(RodimusForCausalLM).keys()
