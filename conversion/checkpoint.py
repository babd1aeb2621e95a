"""A checkpoint on disk, read tensor by tensor, and a folder of weights, written tensor by tensor.

Nothing is held beyond one tensor and some pages of one mapped file. Pickles are read with `weights_only=True` alone.
"""

import json
import pickle
import re
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# as transformers prefers them; Mistral's own file last, since its repositories hold a transformers copy beside it
FILES = ("model.safetensors", INDEXES[0], "pytorch_model.bin", INDEXES[1], "consolidated.safetensors")
RESIDENT = 1 << 26  # bytes read after which a file is mapped anew, so that its pages do not count up
CONFIGS = ("config.json", "params.json")
PICKLED = (".bin", ".pt", ".pth")


class Checkpoint:
    """Configuration, names, shapes and dtypes of a checkpoint, and its tensors one at a time.

    Args:
        path: a folder, or one file of weights, beside which the configuration may lie.

    Raises:
        ValueError: no weights, a damaged or incomplete file, an index that does not fit its files, a pickle that holds
            anything but tensors; each names the file.
        OSError: a file that cannot be opened.
    """

    def __init__(self, path: str | Path):
        path = Path(path).absolute()  # that an error names; links stay, since a Hub cache's lead to files without names
        self.folder = path if path.is_dir() else path.parent
        self.files, listed = _weight_files(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._file_of: dict[str, Path] = {}
        self._open: tuple[Path, _Safetensors | _Pickle] | None = None
        self._read = 0  # bytes of it
        for file in self.files:
            _check_sums(file)
            for name, (shape, dtype) in self._weights(file).entries.items():
                if name in self._file_of:
                    raise ValueError(f"{name} is in {self._file_of[name].name} and in {file.name}. Remove one of them.")
                self._file_of[name], self.shapes[name], self.dtypes[name] = file, shape, dtype
        self._check_index(listed)

    @cached_property
    def config_file(self) -> Path | None:
        """The file of the configuration. Mistral's own is read beside Mistral's own weights."""
        mistral = self.files[0].name == FILES[-1]
        names = CONFIGS[::-1] if mistral else CONFIGS
        return next((self.folder / name for name in names if (self.folder / name).is_file()), None)

    @cached_property
    def config(self) -> dict:
        """The configuration, empty where there is no file of it."""
        if self.config_file is None:
            return {}
        return read_object(self.config_file)

    @property
    def place(self) -> Path:
        """What to name in an error: the file of weights, or the folder of several."""
        return self.files[0] if len(self.files) == 1 else self.folder

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self.files)

    def read(self, name: str) -> torch.Tensor:
        """One tensor; its memory may be a mapped file's."""
        if self._read > RESIDENT and self._open is not None and self._open[1].mapped:
            self.close()
        tensor = self._weights(self._file_of[name]).read(name)
        self._read += tensor.numel() * tensor.element_size()
        return tensor

    def close(self) -> None:
        """Unmap the file that was read last."""
        self._open, self._read = None, 0

    def _weights(self, file):
        if self._open is None or self._open[0] != file:
            self.close()  # before the next is mapped
            self._open = (file, _reader(file)(file))
        return self._open[1]

    def _check_index(self, listed):
        if listed is not None and set(listed) != set(self.shapes):
            absent, extra = sorted(set(listed) - set(self.shapes)), sorted(set(self.shapes) - set(listed))
            raise ValueError(
                f"The index of {self.folder} does not fit its files. Listed but absent: {absent or 'none'}; in the "
                f"files but not listed: {extra or 'none'}."
            )


def _weight_files(path):
    """Files of weights, and the names that an index lists, if there is one."""
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _sharded(path)
        return [path], None
    if not path.exists():
        raise ValueError(f"{path} does not exist. Pass a folder, a file of weights, or owner/name on the Hub.")
    for name in FILES:
        if (path / name).is_file():
            return _sharded(path / name) if name in INDEXES else ([path / name], None)
    raise ValueError(f"No weights in {path}: none of {', '.join(FILES)} is there.")


def read_object(file: Path) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises:
        ValueError: names a file that holds no JSON, or something else than an object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold an object; it holds a {type(found).__name__}.")
    return found


def _sharded(index):
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(
            f"{index} is no index of shards: it needs an object weight_map, from tensors to names of files."
        )
    names = sorted(set(listed.values()))
    files = [index.parent / name for name in names]
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} names files outside of its folder: {', '.join(outside)}.")
    if absent := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{index} lists files that are not there: {', '.join(absent)}.")
    return files, listed


def _reader(file):
    """By the contents: a file in the Hub's cache has no suffix. By the suffix where they are damaged."""
    with open(file, "rb") as stream:
        head = stream.read(9)
    if head.startswith(b"version h"):
        raise ValueError(f"{file} is a pointer of Git LFS, not the weights. Get them with: git lfs pull")
    if head[4:] == b"\0\0\0\0{":  # behind the length of a header of less than 4 GB
        return _Safetensors
    if head.startswith((b"PK", b"\x80")):
        return _Pickle
    if file.suffix not in (".safetensors", *PICKLED):
        raise ValueError(f"{file} holds no weights: it is neither safetensors nor of torch.save. Pass a file that is.")
    return _Pickle if file.suffix in PICKLED else _Safetensors


def _is_archive(file):
    """Whether torch.save wrote it in the form it has since torch 1.6: an archive, which can be mapped."""
    with open(file, "rb") as stream:
        return stream.read(4) == b"PK\3\4"


def _can_be_mapped(file):
    """Whether the bytes of the file are the tensors' own: torch would read compressed ones as numbers."""
    if not _is_archive(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())


def _check_sums(file):
    """Refuse an archive whose records are not what was written: torch does not look at their checksums."""
    if not _is_archive(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            program = any(name.endswith("/constants.pkl") for name in archive.namelist())
            for record in archive.infolist():
                if record.CRC:  # writers may leave them out
                    with archive.open(record) as stream:
                        while stream.read(1 << 20):
                            pass
    except Exception as error:  # of as many kinds as there are bytes to be wrong
        raise _damaged(file, error) from None
    if program:
        raise ValueError(f"{file} is a TorchScript program, no file of weights. Save its state_dict().")


def _damaged(file, error):
    lines = str(error).splitlines() or [""]
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return ValueError(
            f"{file} does not fit into memory: {lines[0]}. Safetensors are read tensor by tensor, and so is what "
            "torch.save writes since torch 1.6, as long as nothing compresses it."
        )
    if "Bad CRC" in str(error):
        lines[0] += ". If its tensors were changed in place, torch.save them again"
    return ValueError(f"{file} is damaged or incomplete: {type(error).__name__}: {lines[0]}")


class _Safetensors:
    mapped = True

    def __init__(self, file):
        self.file = file
        try:
            self.handle = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise _damaged(file, error) from None

    @cached_property
    def entries(self):
        slices = {name: self.handle.get_slice(name) for name in self.handle.keys()}  # noqa: SIM118  not a dictionary
        found = {name: s.get_dtype() for name, s in slices.items()}
        if other := sorted(set(found.values()) - set(SAFETENSORS_NAMES)):
            known = ", ".join(SAFETENSORS_NAMES)
            raise ValueError(f"{self.file} has tensors of dtype {', '.join(other)}; known are {known}.")
        return {name: (tuple(s.get_shape()), SAFETENSORS_NAMES[found[name]]) for name, s in slices.items()}

    def read(self, name):
        return self.handle.get_tensor(name)


class _Pickle:
    def __init__(self, file):
        self.mapped = _can_be_mapped(file)
        try:
            self.tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=self.mapped)
        except Exception as error:  # a damaged one makes torch do anything
            if not isinstance(error, pickle.UnpicklingError) and "weights_only" not in str(error):
                raise _damaged(file, error) from None
            raise ValueError(
                f"{file} was not read: {_no_tensors(error)}"
            ) from None  # torch's own text tells to trust it
        if not isinstance(self.tensors, dict):
            raise ValueError(f"{file} must hold a dictionary of tensors; it holds a {type(self.tensors).__name__}.")
        if other := [f"{name} ({kind})" for name, x in self.tensors.items() if (kind := _no_weight(name, x))]:
            raise ValueError(f"{file} must hold tensors alone; it also holds {', '.join(other[:8])}.")

    @property
    def entries(self):
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}

    def read(self, name):
        return self.tensors[name].detach().resolve_neg()


def _no_tensors(error):
    found = re.search(r"GLOBAL (\S+)", str(error))
    what = f"it names {found[1]}, so it" if found else "it is damaged, or"
    return (
        f"{what} is no pickle of tensors alone, and loading anything else could run code of its author. Look for the "
        "same weights in safetensors, or save the tensors alone."
    )


def _no_weight(name, value):
    """Why an entry of a pickle is no plain tensor of that name; "" if it is one."""
    if not isinstance(name, str):
        return f"a name of type {type(name).__name__}"
    if not torch.is_tensor(value):
        return type(value).__name__
    plain = value.layout == torch.strided and value.device.type == "cpu"
    return "" if plain else f"a tensor of {value.layout} on {value.device}"


SAFETENSORS_NAMES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
