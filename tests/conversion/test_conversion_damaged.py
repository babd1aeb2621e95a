"""Damaged, foreign and hostile sources: what is wrong is said of the file; nothing is left behind."""

import json
import os
import pickle
import tarfile
import zipfile

import pytest
import torch
from conversion_cases import assert_same, mamba_ssm, stored, tied
from recycled_cases import decoder
from safetensors.torch import save_file
from test_conversion_files import sharded
from test_conversion_fuzz import BIN, SAFE, archive, old_pickle

from scrubjay.conversion import checkpoint as checkpoint_module
from scrubjay.conversion import convert as convert_module
from scrubjay.conversion.checkpoint import Checkpoint
from scrubjay.conversion.convert import convert


def truncate(file):
    os.truncate(file, file.stat().st_size - 100)


def drop_shard(folder):
    next(folder.glob("*-00002-of-*")).unlink()


def index_of(folder, change):
    path = next(folder.glob("*.index.json"))
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


DAMAGES = {
    "truncated shard": (lambda f: truncate(next(f.glob("*-00002-of-*"))), "is damaged or incomplete"),
    "missing shard": (drop_shard, "lists files that are not there: .*-00002-of-"),
    "name not in the files": (
        lambda f: index_of(f, lambda m: m.update(ghost=next(iter(m.values())))),
        r"absent: \['ghost'\]",
    ),
    "name not in the index": (
        lambda f: index_of(f, lambda m: m.pop("lm_head.weight")),
        r"not listed: \['lm_head.weight'\]",
    ),
    "path out of the folder": (
        lambda f: index_of(f, lambda m: m.update(x="../evil.bin")),
        "outside of its folder: ../evil",
    ),
    **{
        f"index {text}": (lambda f, text=text: next(f.glob("*.index.json")).write_text(text), match)
        for text, match in {
            "[]": "index.json must hold an object; it holds a list",
            "{": "index.json is not JSON",
            "{}": "index.json is no index of shards: it needs an object weight_map",
            '{"weight_map": {}}': "index.json is no index of shards",
            '{"weight_map": {"a": 1}}': "index.json is no index of shards",
            '{"weight_map": [1]}': "index.json is no index of shards",
        }.items()
    },
    "configuration cut off": (lambda f: truncate(f / "config.json"), "config.json is not JSON"),
    "configuration without an end": (lambda f: (f / "config.json").write_text("[" * 10**6), "config.json is not JSON"),
    "configuration of another kind": (lambda f: (f / "config.json").write_text("[1]"), "must hold an object"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_damaged_sources_are_refused_and_named(tmp_path, kind, damage):
    sharded(tmp_path / "source", kind, 20_000)
    spoil, match = DAMAGES[damage]
    spoil(tmp_path / "source")
    with pytest.raises(ValueError, match=match):
        convert(tmp_path / "source", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([torch.zeros(2)], "must hold a dictionary of tensors; it holds a list"),
        (
            {"model": {"a": torch.zeros(2)}, "step": 3},
            r"must hold tensors alone; it also holds model \(dict\), step \(int\)",
        ),
    ],
    ids=["list", "nested"],
)
def test_pickles_of_something_else_are_refused(tmp_path, content, match):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=match):
        convert(tmp_path, tmp_path / "new")


def test_a_truncated_single_file_is_refused(tmp_path):
    for write, name in ((mamba_ssm, "pytorch_model.bin"), (tied, "model.safetensors")):
        write(tmp_path / name)
        truncate(tmp_path / name / name)
        with pytest.raises(ValueError, match=f"{name} is damaged or incomplete"):
            convert(tmp_path / name, tmp_path / "new")


def test_no_weights_and_no_path_are_said(tmp_path):
    with pytest.raises(ValueError, match=r"No weights in .*none of model.safetensors"):
        convert(tmp_path, tmp_path / "new")
    for name in (str(tmp_path / "nowhere"), "nowhere", "./a/b"):
        with pytest.raises(ValueError, match=r"does not exist\. Pass a folder, a file of weights, or owner/name"):
            convert(name, tmp_path / "new")


def test_numbers_of_an_archive_are_held_against_its_checksums_where_it_has_them(tmp_path):
    """torch reads past them."""
    file = archive(tmp_path / "source")
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as records:
        name = next(record for record in records.infolist() if record.filename.endswith("data/3"))
        assert name.CRC
    data[name.header_offset + 200] ^= 1
    file.write_bytes(data)
    torch.load(file, weights_only=True)
    with pytest.raises(ValueError, match=f"{BIN} is damaged or incomplete: BadZipFile: Bad CRC-32 for file .*data/3"):
        Checkpoint(tmp_path / "source")
    want = mamba_ssm(tmp_path / "source")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(want, file)
    finally:
        torch.serialization.set_crc32_options(True)
    found = Checkpoint(file)
    assert_same({name: found.read(name) for name in found.shapes}, want)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "nonsense"}, "KeyError: 'nonsense'"),
        ({"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}}, "KeyError: 'nonsense'"),
        ({"pad_token_id": 1000}, "AssertionError: Padding_idx must be within num_embeddings"),
    ],
    ids=["activation", "rope", "padding"],
)
def test_a_value_on_which_the_model_cannot_be_made_is_an_error_of_the_configuration(tmp_path, changes, said):
    decoder("llama").save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=f"{file} has a value of the wrong kind: {said}"):
        convert(tmp_path / "source", tmp_path / "new", to="adore", progress=False)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer_config.json", b"{", "is not JSON"),
        ("tokenizer_config.json", b"\xff", "is not JSON"),
        ("tokenizer_config.json", b"[]", "must hold an object"),
        ("tokenizer_config.json", b'{"tokenizer_class": ["a"]}', r"needs a name as tokenizer_class; it has \['a'\]"),
        ("README.md", b"\xff", "is not UTF-8 text"),
    ],
    ids=str,
)
def test_what_travels_and_is_damaged_is_found_before_anything_is_written(tmp_path, monkeypatch, name, content, said):
    mamba_ssm(tmp_path / "source")
    (tmp_path / "source" / name).write_bytes(content)
    monkeypatch.setattr(convert_module, "write_weights", None)
    with pytest.raises(ValueError, match=f"source/{name} {said}"):
        convert(tmp_path / "source", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tokenizer_without_a_class_travels(tmp_path):
    mamba_ssm(tmp_path / "source")
    (tmp_path / "source" / "tokenizer_config.json").write_text('{"tokenizer_class": null}')
    convert(tmp_path / "source", tmp_path / "new")
    assert (tmp_path / "new" / "tokenizer_config.json").read_text() == '{"tokenizer_class": null}'


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (0, torch.zeros(2), r"0 \(a name of type int\)"),
        ("x", torch.eye(2).to_sparse(), r"x \(a tensor of torch.sparse_coo on cpu\)"),
        ("x", torch.zeros(2, device="meta"), r"x \(a tensor of torch.strided on meta\)"),
        ("x", 3, r"x \(int\)"),
        ("x", {"a": torch.zeros(2)}, r"x \(dict\)"),
    ],
    ids=["name", "sparse", "meta", "number", "nested"],
)
def test_what_is_no_plain_tensor_of_a_pickle_is_named(tmp_path, name, value, said):
    torch.save(mamba_ssm(tmp_path / "source") | {name: value}, tmp_path / "source" / BIN)
    with pytest.raises(ValueError, match=f"source/{BIN} must hold tensors alone; it also holds {said}"):
        convert(tmp_path / "source", tmp_path / "new")


def test_views_and_parameters_of_a_pickle_are_read_as_their_numbers(tmp_path):
    want = mamba_ssm(tmp_path / "source")
    first, second, third = (f"backbone.layers.0.mixer.{name}" for name in ("A_log", "in_proj.weight", "D"))
    odd = {first: torch._neg_view(-want[first]), second: want[second].T.contiguous().T}
    torch.save(want | odd | {third: torch.nn.Parameter(want[third])}, tmp_path / "source" / BIN)
    convert(tmp_path / "source", tmp_path / "new", to="transformers", progress=False)
    found = stored(tmp_path / "new")
    assert all(torch.equal(found[name], want[name]) for name in (first, second, third))


def test_the_kind_of_a_file_is_known_by_its_contents(tmp_path):
    """A file in the Hub's cache of blobs is called by its digest."""
    tied(tmp_path / "a")
    mamba_ssm(tmp_path / "b")
    for folder, name in (("a", SAFE), ("b", BIN)):
        want = stored(tmp_path / folder)
        (tmp_path / folder / name).rename(tmp_path / folder / "0f3a")
        found = Checkpoint(tmp_path / folder / "0f3a")
        assert_same({name: found.read(name) for name in found.shapes}, want)


def tape(file):
    """The form that torch wrote before 2017."""
    with tarfile.open(file, "w") as members:
        for name in ("storages", "tensors", "pickle"):
            members.addfile(tarfile.TarInfo(name))


def program(file):
    torch.jit.script(torch.nn.Linear(2, 2)).save(file)


FOREIGN = {
    "config.json": (lambda file: file.write_text('{"model_type": ""}'), "config.json holds no weights: it is neither"),
    "empty": (lambda file: file.touch(), "empty holds no weights: it is neither"),
    "lfs.bin": (lambda file: file.write_text("version https://git-lfs"), "lfs.bin is a pointer of Git LFS"),
    "jit.pt": (program, r"jit.pt is a TorchScript program, no file of weights. Save its state_dict\(\)"),
    "tape.bin": (tape, "tape.bin was not read: it is damaged, or is no pickle of tensors alone"),
    "pickle.bin": (
        lambda file: file.write_bytes(pickle.dumps(os.system, 2)),
        "pickle.bin was not read: it names posix",
    ),
    "odd.safetensors": (lambda file: save_file({"x": torch.ones(2).to(torch.uint16)}, file), "odd.*dtype U16; known"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_another_kind_are_said_to_be(tmp_path, name):
    make, said = FOREIGN[name]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=said) as error:
        convert(tmp_path / name, tmp_path / "new")
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("name", [SAFE, BIN])
def test_a_file_that_may_not_be_read_is_said_to_be_so(tmp_path, monkeypatch, name):
    (tied if name == SAFE else mamba_ssm)(tmp_path)
    (tmp_path / name).chmod(0)
    monkeypatch.chdir(tmp_path)
    user = os.geteuid()
    try:
        if user == 0:  # who may read everything
            os.seteuid(65534)
        with pytest.raises(PermissionError, match=rf"Permission denied: '.*{name}'"):
            Checkpoint(name)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("to", [None, "transformers"])
def test_numbers_that_are_none_are_refused_and_every_tensor_of_them_is_named(tmp_path, to):
    tensors = mamba_ssm(tmp_path / "source")
    for name, value in (("norm_f.weight", "nan"), ("layers.0.mixer.D", "inf"), ("layers.1.mixer.D", "-inf")):
        tensors[f"backbone.{name}"][1:].fill_(float(value))
    torch.save(tensors, tmp_path / "source" / BIN)
    with pytest.raises(ValueError, match=f"source/{BIN}: 3 tensors have numbers that cannot be written") as error:
        convert(tmp_path / "source", tmp_path / "new", to=to, progress=False, dtype=torch.float16)
    said = str(error.value).splitlines()[1:]
    assert sorted(line.split()[0].split(".", 1)[1].removeprefix("layers.") for line in said) == [
        "0.mixer.D",
        "1.mixer.D",
        "norm.weight" if to is None else "norm_f.weight",
    ]
    assert all("NaN or infinite of" in line for line in said)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_numbers_beyond_a_dtype_are_listed_with_those_that_are_none(tmp_path):
    tensors = mamba_ssm(tmp_path / "source")
    tensors["backbone.norm_f.weight"][3:4].fill_(-1e5)
    tensors["backbone.layers.1.mixer.D"][:1] = float("nan")
    torch.save(tensors, tmp_path / "source" / BIN)
    with pytest.raises(ValueError, match="2 tensors have numbers that cannot be written") as error:
        convert(tmp_path / "source", tmp_path / "new", dtype=torch.float16)
    said = str(error.value)
    assert "model.norm.weight has numbers up to 1e+05, beyond the range of torch.float16. Take bfloat16." in said
    assert "1.mixer.D has 1 NaN or infinite of 4 numbers." in said


@pytest.mark.parametrize("make", [archive, old_pickle], ids=lambda make: make.__name__)
def test_a_file_that_cannot_be_mapped_is_read_once(tmp_path, monkeypatch, make):
    """One that can is mapped anew, so that its pages do not count up."""
    make(tmp_path / "source")
    loads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda file, **options: [loads.append(file), load(file, **options)][1])
    monkeypatch.setattr(checkpoint_module, "RESIDENT", 1000)
    convert(tmp_path / "source", tmp_path / "new", to="transformers", progress=False)
    assert len(loads) == 1 if make is old_pickle else len(loads) > 5
