"""Write weights tensor by tensor: each file is laid out, then filled, so that one tensor at a time is in memory."""

import json
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm  # type: ignore[import-untyped]

from scrubjay.conversion.checkpoint import SAFETENSORS_NAMES

Entries = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
PIECE = 1 << 26  # bytes written at a time


def parse_size(size: str | int) -> int:
    """Bytes of "5GB", "300MB", or a plain number, as transformers' `max_shard_size` reads them."""
    text = str(size).strip().upper()
    number, factor = (text[:-2], UNITS[text[-2:]]) if text[-2:] in UNITS else (text, 1)
    try:
        found = int(float(number) * factor)
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        raise ValueError(f'max_shard_size must be a positive number of bytes or such as "5GB"; got {size!r}.')
    return found


def write_weights(
    folder: Path,
    entries: Entries,
    make: Callable[[str], torch.Tensor],
    *,
    kind: str = "safetensors",
    max_shard_size: str | int = "5GB",
    progress: bool = True,
) -> list[Path]:
    """Write tensors into a folder; those of "safetensors" in shards where they exceed `max_shard_size`, with an index.

    Args:
        folder: exists and holds no weights.
        entries: shape and dtype of each tensor, by name.
        make: gives a tensor by its name; it is cast to the dtype of its entry.
        kind: "safetensors" (model.safetensors), "bin" (pytorch_model.bin) or "consolidated" (consolidated.safetensors).
            Of the last two, the libraries that have them read one file and no index.
        progress: a bar on stderr, where that is a terminal.

    Returns: the files written.

    Raises:
        ValueError: a tensor that does not have the shape of its entry; or, all of them in one error, those that have
            NaN, infinities or numbers beyond the range of their dtype.
    """
    stem, suffix = {"bin": ("pytorch_model", ".bin"), "safetensors": ("model", ".safetensors")}.get(
        kind, ("consolidated", ".safetensors")
    )
    shards = _shards(entries, parse_size(max_shard_size)) if kind == "safetensors" else [list(entries)]
    count = len(shards)
    names = [f"{stem}-{i:05d}-of-{count:05d}{suffix}" if count > 1 else stem + suffix for i in range(1, count + 1)]
    lay_out = _lay_out_pickle if kind == "bin" else _lay_out_safetensors
    total = sum(nbytes(*entry) for entry in entries.values())
    faults: list[str] = []
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=None if progress else True) as bar:
        for name, members in zip(names, shards, strict=True):
            offsets = lay_out(folder / name, {member: entries[member] for member in members})
            sums = _fill(folder / name, offsets, entries, make, bar, faults)
            if kind == "bin":
                _set_checksums(folder / name, sums)
    if faults:
        raise ValueError("\n  ".join([f"{len(faults)} tensors have numbers that cannot be written.", *faults]))
    files = [folder / name for name in names]
    if count > 1:
        weight_map = {member: name for name, members in zip(names, shards, strict=True) for member in members}
        numbers = {"total_parameters": sum(torch.Size(shape).numel() for shape, _ in entries.values())}
        index = {"metadata": numbers | {"total_size": total}, "weight_map": weight_map}
        files.append(folder / f"{stem}{suffix}.index.json")
        files[-1].write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return files


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor's numbers in order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def _shards(entries, limit):
    """Names, in order, so that no shard exceeds the limit unless it is one tensor."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, entry in entries.items():
        size = nbytes(*entry)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _lay_out_safetensors(file, entries):
    """Write the header; returns where each tensor starts."""
    names = {dtype: name for name, dtype in SAFETENSORS_NAMES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in sorted(entries.items(), key=lambda item: -item[1][1].itemsize):  # which aligns them
        start, end = end, end + nbytes(shape, dtype)
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
    return {name: 8 + len(text) + header[name]["data_offsets"][0] for name in entries}


def _lay_out_pickle(file, entries):
    """Let torch.save leave room for the tensors; returns where each starts."""
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in entries.items()}, file)
    with FakeTensorMode():
        tensors = torch.load(file, weights_only=True)
    return {name: tensor.untyped_storage()._checkpoint_offset for name, tensor in tensors.items()}


def _fill(file, offsets, entries, make, bar, faults):
    """Write the tensors to their places; returns the checksum of what stands at each. Of a fault on, only look."""
    sums = {}
    with open(file, "r+b") as stream:
        for name, offset in offsets.items():
            shape, dtype = entries[name]
            tensor = make(name)
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{name} has shape {list(tensor.shape)} in the file, {list(shape)} was expected.")
            faults += _faults(name, tensor, dtype)
            if not faults:
                stream.seek(offset)
                sums[offset] = _write(stream, raw(tensor.to(dtype)), bar)
    return sums


def _write(stream, data, bar):
    """In pieces, for the bar; returns their checksum."""
    sum_ = 0
    for start in range(0, len(data), PIECE):
        piece = data[start : start + PIECE]
        stream.write(piece)
        sum_ = zlib.crc32(piece, sum_)
        bar.update(len(piece))
    return sum_


def _faults(name, tensor, dtype):
    """What a file of weights should not hold: numbers that are none, or would be none in `dtype`."""
    if not tensor.is_floating_point() or not tensor.numel():
        return []
    largest = max(abs(float(x)) for x in tensor.aminmax())
    if largest <= torch.finfo(dtype).max or bool(tensor.to(dtype).isfinite().all()):  # some are rounded into range
        return []
    if math.isfinite(largest):
        advice = " Take bfloat16." if dtype == torch.float16 and largest < torch.finfo(torch.bfloat16).max else ""
        return [f"{name} has numbers up to {largest:.3g}, beyond the range of {dtype}.{advice}"]
    count = tensor.numel() - int(tensor.isfinite().sum())
    return [f"{name} has {count:,} NaN or infinite of {tensor.numel():,} numbers."]


def _set_checksums(file, sums):
    """Give the records of an archive the checksums of what was filled in, as readers other than torch check them."""
    with zipfile.ZipFile(file) as archive:
        records, place = archive.infolist(), archive.start_dir
    with open(file, "r+b") as stream:
        for record in records:
            stream.seek(place)
            entry = stream.read(46)  # of the central directory: checksum at 16, lengths of three texts at 28
            stream.seek(record.header_offset)
            local = stream.read(30)
            start = record.header_offset + 30 + sum(struct.unpack_from("<HH", local, 26))
            if start in sums:
                value = struct.pack("<I", sums[start])
                behind = start + record.file_size
                stream.seek(behind)
                descriptor = stream.read(4) == b"PK\x07\x08" and local[6] & 8
                for position in (place + 16, behind + 4 if descriptor else record.header_offset + 14):
                    stream.seek(position)
                    stream.write(value)
            place += 46 + sum(struct.unpack_from("<HHH", entry, 28))
