"""Bytes and values at random: a right conversion, or an error that says where; nothing is left behind."""

import json
import random
import shutil
import struct
import zipfile

import pytest
import torch
from conversion_cases import assert_same, codestral, mamba_ssm, stored, tied
from conversion_rodimus_cases import FLA, OFFICIAL, fla_shapes, write
from hybrid_cases import hybrid
from recycled_cases import decoder

from scrubjay.conversion.checkpoint import Checkpoint
from scrubjay.conversion.convert import convert
from scrubjay.examples.benchmarks.published_layouts import values
from scrubjay.examples.benchmarks.published_rodimus import official_shapes

BIN, SAFE = "pytorch_model.bin", "model.safetensors"


def archive(folder):
    mamba_ssm(folder)
    return folder / BIN


def old_pickle(folder):
    torch.save(mamba_ssm(folder), folder / BIN, _use_new_zipfile_serialization=False)
    return folder / BIN


def test_records_that_were_compressed_are_read_as_what_they_hold(tmp_path):
    """torch maps them as they lie in the file, and would take the compressed bytes for numbers."""
    file = archive(tmp_path / "source")
    with zipfile.ZipFile(file) as old:
        records = {record.filename: old.read(record) for record in old.infolist()}
    want = stored(tmp_path / "source")
    with zipfile.ZipFile(file, "w") as new:
        for i, (name, content) in enumerate(records.items()):
            new.writestr(name, content, zipfile.ZIP_DEFLATED if "/data/" in name and i % 2 else zipfile.ZIP_STORED)
    found = Checkpoint(file)
    assert found.shapes.keys() == want.keys()
    assert_same({name: found.read(name) for name in want}, want)


def safetensors(folder):
    tied(folder)
    return folder / SAFE


def outcome(source, to):
    """The tensors that a conversion wrote; None after an error, which must say where and leave nothing."""
    place = source.parent
    try:
        convert(source, place / "new", to=to, progress=False)
    except (ValueError, OSError) as error:
        said = str(error)
    else:
        said = None
    if said is not None:
        assert str(source) in said
        assert "weights_only" not in said  # torch's advice is to trust the file
        assert [path.name for path in place.iterdir()] == [source.name]
        return None
    tensors = stored(place / "new")
    shutil.rmtree(place / "new")
    return tensors


def flipped(data, draw, length):
    """One to four bytes are others, within the first `length` of them."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        data[draw.randrange(length)] = draw.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("make", [archive, old_pickle, safetensors], ids=lambda make: make.__name__)
def test_cut_off_anywhere_is_an_error_that_names_the_file(tmp_path, make):
    file, draw = make(tmp_path / "source"), random.Random(0)
    data = file.read_bytes()
    for length in [*range(20), len(data) - 1, *(draw.randrange(len(data)) for _ in range(150))]:
        file.write_bytes(data[:length])
        assert outcome(tmp_path / "source", "mamba_ssm" if make is safetensors else "transformers") is None


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")  # torch's, of a flipped byte
@pytest.mark.parametrize("make", [archive, old_pickle, safetensors], ids=lambda make: make.__name__)
def test_flipped_bytes_are_an_error_that_names_the_file_or_do_not_matter(tmp_path, make):
    """An archive has checksums. Of the others a reader can know what is around the numbers, but not the numbers."""
    file, draw = make(tmp_path / "source"), random.Random(1)
    to = "mamba_ssm" if make is safetensors else "transformers"
    data, want = file.read_bytes(), outcome(tmp_path / "source", to)
    # of a pickle, its ends: most of what is no number stands there
    length = 8 + struct.unpack("<Q", data[:8])[0] if make is safetensors else 6000
    right = 0
    for i in range(300):
        at_the_end = i % 2 and make is not safetensors
        damaged = flipped(data[::-1], draw, length)[::-1] if at_the_end else flipped(data, draw, length)
        file.write_bytes(damaged)
        found = outcome(tmp_path / "source", to)
        if found is None:
            continue
        right += 1
        if make is old_pickle:  # what torch reads of the same bytes
            torch.save(torch.load(file, weights_only=True), file)
            want = outcome(tmp_path / "source", to)
        assert_same(found, want)
    assert 0 < right < 300


def rodimus(folder):
    config = OFFICIAL["plus"]
    write(folder, config, values(official_shapes(config)), pickled=True)


LAYOUTS = {
    "mamba_ssm": (mamba_ssm, None),
    "hybrid": (lambda folder: hybrid("attention and MLP", folder), None),
    "codestral": (codestral, None),
    "codefuse": (rodimus, None),
    "fla": (lambda folder: write(folder, FLA, values(fla_shapes(FLA))), None),
    "llama": (lambda folder: decoder("llama").save_pretrained(folder), "recycled"),
}
NONSENSE = [None, "nonsense", -1, 0, 7, float("inf"), [], {"rope_type": "nonsense"}, 10**30]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_value_in_a_configuration_converts_or_is_an_error_that_names_its_folder(tmp_path, layout):
    make, to = LAYOUTS[layout]
    make(tmp_path / "source")
    file = Checkpoint(tmp_path / "source").config_file
    config, refused = json.loads(file.read_text()), 0
    for field in config:
        for value in NONSENSE:
            file.write_text(json.dumps(config | {field: value}))
            refused += outcome(tmp_path / "source", to) is None
    assert refused > len(config)
