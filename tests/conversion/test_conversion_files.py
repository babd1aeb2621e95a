"""Reading and writing of checkpoints: destinations, interrupts, a full disk, memory, shards, progress."""

import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from conversion_cases import SMALL, assert_same, codestral, mamba_ssm, stored, tied
from safetensors.torch import load_file, save_file

from scrubjay.conversion import source as source_module
from scrubjay.conversion import weights as weights_module
from scrubjay.conversion.checkpoint import Checkpoint
from scrubjay.conversion.convert import convert
from scrubjay.conversion.destination import whole_or_nothing
from scrubjay.conversion.weights import parse_size, write_weights
from scrubjay.examples.benchmarks.published_layouts import mamba2_shapes, values, write_mamba_ssm

TENSORS = {
    "a": torch.arange(15.0).view(3, 5).bfloat16(),
    "b": torch.randn(7),
    "c": torch.tensor(3.0),
    "d": torch.arange(4).view(2, 2),
    "e": torch.randn(4, 4).half(),
    "f": torch.randn(6, 4, dtype=torch.float64).T,
    "empty": torch.zeros(0, 3),
}
ENTRIES = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def sharded(folder, kind, limit):
    """A small mamba_ssm folder of several files."""
    tensors = mamba_ssm(folder)
    (folder / "pytorch_model.bin").unlink()
    write_shards(folder, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.get, kind, limit)
    return tensors


def write_shards(folder, shapes, make, kind, limit):
    """float32 tensors in files of at most `limit` bytes, and their index, as torch and safetensors write them."""
    shards = [[]]
    for name, shape in shapes.items():
        if shards[-1] and 4 * sum(math.prod(shapes[n]) for n in shards[-1]) + 4 * math.prod(shape) > limit:
            shards.append([])
        shards[-1].append(name)
    stem, suffix = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}{suffix}" for i in range(len(shards))]
    for file, members in zip(names, shards, strict=True):
        tensors = {name: make(name).clone() for name in members}
        (save_file if kind == "safetensors" else torch.save)(tensors, folder / file)
    listed = {member: file for file, members in zip(names, shards, strict=True) for member in members}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return [folder / file for file in names]


@pytest.mark.parametrize("size", ["5GB", 100])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "consolidated"])
def test_written_files_are_what_other_readers_expect(tmp_path, kind, size):
    files = write_weights(tmp_path, ENTRIES, TENSORS.__getitem__, kind=kind, max_shard_size=size)
    assert {file.name for file in files} == {path.name for path in tmp_path.iterdir()}
    found = stored(tmp_path)
    assert_same(found, TENSORS)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.shapes == {name: shape for name, (shape, _) in ENTRIES.items()}
    assert checkpoint.dtypes == {name: dtype for name, (_, dtype) in ENTRIES.items()}
    assert_same({name: checkpoint.read(name) for name in ENTRIES}, TENSORS)
    for file in files:
        if file.suffix == ".bin":
            assert zipfile.ZipFile(file).testzip() is None  # readers other than torch look at the checksums
            assert_same(torch.load(file, mmap=True, weights_only=True), torch.load(file, weights_only=True))
        elif file.suffix == ".safetensors":
            header = json.loads(file.read_bytes()[8:].split(b"}}")[0] + b"}}")
            starts = {name: entry["data_offsets"][0] for name, entry in header.items() if name in TENSORS}
            assert all(start % TENSORS[name].element_size() == 0 for name, start in starts.items())  # can be mapped
    if size == 100 and kind == "safetensors":
        index = json.loads(next(tmp_path.glob("*.index.json")).read_text())
        assert index["metadata"] == {
            "total_size": sum(t.numel() * t.element_size() for t in TENSORS.values()),
            "total_parameters": sum(t.numel() for t in TENSORS.values()),
        }
        assert set(index["weight_map"]) == set(TENSORS)
        for name in set(index["weight_map"].values()):
            members = [member for member, file in index["weight_map"].items() if file == name]
            assert len(members) == 1 or sum(TENSORS[m].numel() * TENSORS[m].element_size() for m in members) <= 100
    else:
        assert len(files) == 1


@pytest.mark.parametrize(("size", "want"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), (17, 17), ("300KB", 300_000)])
def test_sizes_are_read_as_transformers_reads_them(size, want):
    assert parse_size(size) == want


@pytest.mark.parametrize("size", ["", "0", "-1GB", "many", "5 bananas", "nan", "inf"])
def test_sizes_that_are_none_are_refused(tmp_path, size):
    mamba_ssm(tmp_path / "source")
    with pytest.raises(ValueError, match="max_shard_size must be a positive number"):
        convert(tmp_path / "source", tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_sources_and_results_in_shards(tmp_path, kind):
    tensors = sharded(tmp_path / "source", kind, 20_000)
    assert len(list((tmp_path / "source").iterdir())) > 4
    convert(tmp_path / "source", tmp_path / "new", max_shard_size=15_000, check=True)
    assert len(list((tmp_path / "new").glob("model-*.safetensors"))) > 3
    convert(tmp_path / "new", tmp_path / "back", to="mamba_ssm", max_shard_size="10KB")
    assert_same(stored(tmp_path / "back"), tensors)
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert {name for name in names if "pytorch_model" in name} == {"pytorch_model.bin"}  # mamba_ssm reads no index


def test_pickles_of_the_old_form_are_read(tmp_path):
    tensors = mamba_ssm(tmp_path / "source")
    torch.save(tensors, tmp_path / "source" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(tmp_path / "source", tmp_path / "new", to="transformers")
    assert torch.equal(stored(tmp_path / "new")["backbone.norm_f.weight"], tensors["backbone.norm_f.weight"])


def failing_at(monkeypatch, number, error, look=lambda: None):
    """Let the reading of a tensor fail; returns the names that were read."""
    read, calls = Checkpoint.read, []

    def fails_later(self, name):
        calls.append(name)
        look()
        if len(calls) == number:
            raise error
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "read", fails_later)
    return calls


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
@pytest.mark.parametrize("to", [None, "mamba_ssm"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["ctrl-c", "disk"])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch, error, to, there):
    """Not the parents either that it made; an empty folder that was there stays."""
    tied(tmp_path / "source")
    place = tmp_path / "deep" / "deeper" / "new"
    if there:
        place.mkdir(parents=True)
    calls = failing_at(monkeypatch, 12, error)
    with pytest.raises(type(error)):
        convert(tmp_path / "source", place, to=to)
    assert len(calls) == 12
    assert list(place.iterdir()) == [] if there else [path.name for path in tmp_path.iterdir()] == ["source"]


def test_parents_into_which_another_process_wrote_stay(tmp_path, monkeypatch):
    tied(tmp_path / "source")
    failing_at(monkeypatch, 3, KeyboardInterrupt, lambda: (tmp_path / "a" / "theirs").touch())
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "source", tmp_path / "a" / "b" / "new")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["theirs"]


def test_an_empty_folder_is_filled_and_stays_the_folder_that_it_is(tmp_path, monkeypatch):
    """As a mount point must, or a folder in a parent that may not be written: beside it nothing is ever made."""
    tied(tmp_path / "source")
    place = tmp_path / "new"
    place.mkdir()
    place.chmod(0o2770)
    before, beside, moved, rename = place.stat(), set(), [], os.rename
    failing_at(monkeypatch, None, None, lambda: beside.update(path.name for path in tmp_path.iterdir()))
    monkeypatch.setattr(os, "rename", lambda *paths: [moved.append(Path(paths[1]).name), rename(*paths)])
    convert(tmp_path / "source", place)
    after = place.stat()
    for what in ("st_ino", "st_dev", "st_mode", "st_uid", "st_gid"):
        assert getattr(after, what) == getattr(before, what), what
    assert beside == {"source", "new"}
    assert moved[-1] == "config.json"  # without it nothing loads from there
    assert sorted(moved) == sorted(path.name for path in place.iterdir())
    assert len(moved) > 4


def test_a_folder_that_cannot_be_filled_to_the_end_is_empty_again(tmp_path, monkeypatch):
    tied(tmp_path / "source")
    place = tmp_path / "new"
    place.mkdir()
    moved, rename = [], os.rename

    def fails_later(*paths):
        moved.append(paths)
        if len(moved) == 3:
            raise OSError(5, "Input/output error")
        rename(*paths)

    monkeypatch.setattr(os, "rename", fails_later)
    with pytest.raises(OSError, match="Input/output"):
        convert(tmp_path / "source", place)
    assert len(moved) == 3
    assert list(place.iterdir()) == []


def test_a_file_that_another_process_wrote_meanwhile_is_not_touched(tmp_path, monkeypatch):
    tied(tmp_path / "source")
    place = tmp_path / "new"
    place.mkdir()
    failing_at(monkeypatch, None, None, lambda: (place / "model.safetensors").write_text("theirs"))
    with pytest.raises(ValueError, match=r"Another process writes into .*new: model\.safetensors"):
        convert(tmp_path / "source", place)
    assert [(path.name, path.read_text()) for path in place.iterdir()] == [("model.safetensors", "theirs")]


def test_two_processes_do_not_fill_one_folder(tmp_path):
    """At least one of them sees the other, whoever is first: both would move their files between those of the other."""
    place = tmp_path / "new"
    place.mkdir()
    with whole_or_nothing(place) as first:
        (first / "config.json").write_text("first")
        with pytest.raises(ValueError, match=r"Another process writes into .*new: \.new-"), whole_or_nothing(place):
            pytest.fail("the second began")
    assert [(path.name, path.read_text()) for path in place.iterdir()] == [("config.json", "first")]
    shutil.rmtree(place)
    place.mkdir()
    with pytest.raises(ValueError, match="Another process writes into"), whole_or_nothing(place):
        (place / ".new-of-another").mkdir()  # that began after this one looked
    assert [path.name for path in place.iterdir()] == [".new-of-another"]


def test_a_new_folder_has_the_mode_and_group_that_others_there_have(tmp_path):
    mamba_ssm(tmp_path / "source")
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2775)
    (shared / "other").mkdir()
    convert(tmp_path / "source", shared / "new")
    assert (shared / "new").stat().st_mode == (shared / "other").stat().st_mode
    assert (shared / "new").stat().st_mode & 0o2000


def test_a_disk_that_is_full_leaves_nothing(tmp_path):
    """The system itself refuses to write on."""
    tied(tmp_path / "source")
    code = (
        "import resource, signal, sys\n"
        "from scrubjay.conversion.convert import convert\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, resource.RLIM_INFINITY))\n"
        "try:\n    convert(sys.argv[1], sys.argv[2])\n"
        "except OSError as error:\n    print(error.strerror)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "source", tmp_path / "new"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "File too large\n"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


LARGE = dict(d=1024, L=6, V=10_000, P=64, N=128, G=1, K=4)
SHARD = 48 * 10**6


def memory(*jobs):
    """Bytes that conversions took at their peaks: source, layout, destination of each."""
    child = Path(__file__).with_name("conversion_memory_child.py")
    return json.loads(subprocess.run([sys.executable, child, *jobs], capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to reset a process's peak")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_memory_stays_within_the_largest_file(tmp_path, kind):
    """At most 1.3 times it, whatever the number of files; measured 1.00 to 1.13."""
    shapes = mamba2_shapes("embedding", LARGE, head=True)
    source = tmp_path / "source"
    write_mamba_ssm(source, LARGE | dict(L=0, V=48), unpadded=LARGE["V"])
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"n_layer": LARGE["L"]}))
    (source / "pytorch_model.bin").unlink()

    def values_of(name):  # the head repeats the embedding
        seed = 0 if shapes[name][0] == LARGE["V"] else len(name)
        return torch.rand(shapes[name], generator=torch.Generator().manual_seed(seed))

    files = write_shards(source, shapes, values_of, kind, SHARD)
    sizes = [file.stat().st_size for file in files]
    assert len(sizes) > 4
    grown = memory(source, "scrubjay", tmp_path / "ours", source, "transformers", tmp_path / "theirs")
    (whole,) = (file.stat().st_size for file in (tmp_path / "ours").glob("*.safetensors"))
    assert whole > 4 * SHARD
    (single,) = memory(tmp_path / "ours", "mamba_ssm", tmp_path / "back").values()
    assert single < 0.7 * whole, single / whole  # measured 0.55: a file is not held as a whole either
    assert len(grown) == 2
    for layout, size in grown.items():
        assert 0.2 * max(sizes) < size < 1.3 * max(sizes), (layout, size / max(sizes))


@pytest.mark.parametrize("progress", [True, False])
def test_progress_counts_every_byte_and_is_for_terminals(tmp_path, monkeypatch, progress):
    mamba_ssm(tmp_path / "source")
    bars = []

    class Bar(weights_module.tqdm):
        def __init__(self, **arguments):
            bars.append(arguments | {"counted": 0})
            super().__init__(**arguments)

        def update(self, n=1):
            bars[-1]["counted"] += n
            return super().update(n)

    monkeypatch.setattr(weights_module, "tqdm", Bar)
    report = convert(tmp_path / "source", tmp_path / "new", progress=progress)
    assert bars[0]["counted"] == bars[0]["total"] == sum(report.dtypes.values())
    assert bars[0]["disable"] == (None if progress else True)  # None asks the stream whether it is a terminal


def test_a_name_on_the_hub_is_downloaded_once_and_without_what_is_not_read(tmp_path, monkeypatch):
    """The repository has the weights three times; only the kind that is read comes."""
    tied(tmp_path / "repository")
    save_file({"x": torch.zeros(1)}, tmp_path / "repository" / "consolidated.safetensors")
    torch.save({"x": torch.zeros(1)}, tmp_path / "repository" / "pytorch_model.bin")
    (tmp_path / "repository" / "modeling_evil.py").write_text("raise SystemExit")
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        folder = tmp_path / "cache" / str(len(asked))
        folder.mkdir(parents=True)
        for file in (tmp_path / "repository").iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(file, folder / file.name)
        return str(folder)

    monkeypatch.setattr(source_module, "snapshot_download", snapshot_download)
    convert("owner/name", tmp_path / "new", revision="v2")
    assert asked == [("owner/name", "v2")]
    assert {path.name for path in (tmp_path / "cache" / "1").iterdir()} == {"config.json", "model.safetensors"}
    assert_same(
        load_file(tmp_path / "cache" / "1" / "model.safetensors"),
        load_file(tmp_path / "repository" / "model.safetensors"),
    )
    (tmp_path / "repository" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"layout of .* is unknown"):  # now it is the pickle that is read
        convert("owner/name", tmp_path / "other")
    assert {revision for _, revision in asked[1:]} == {None}
    with pytest.raises(ValueError, match=r"revision='v2' was given with the path .*, which has no revisions"):
        convert(tmp_path / "repository", tmp_path / "other", revision="v2")


def test_mistral_files_are_read_beside_a_copy_for_transformers(tmp_path):
    """Its repository has both; the copy is what `from_pretrained` loads, and so does a conversion."""
    codestral(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert Checkpoint(tmp_path).config_file.name == "params.json"
    tied(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert (checkpoint.files[0].name, checkpoint.config_file.name) == ("model.safetensors", "config.json")


def test_one_mapping_at_a_time(tmp_path):
    sharded(tmp_path / "source", "safetensors", 20_000)
    checkpoint = Checkpoint(tmp_path / "source")
    names = [f"backbone.layers.{i}.norm.weight" for i in range(SMALL["L"])]
    want = values(mamba2_shapes("embedding", SMALL))
    for name in names * 2:
        assert torch.equal(checkpoint.read(name), want[name])
        assert checkpoint._open[0] == checkpoint._file_of[name]
    checkpoint.close()
    assert checkpoint._open is None
