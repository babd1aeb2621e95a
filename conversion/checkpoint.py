"""A checkpoint on disk, read tensor by tensor, and a folder of weights, written tensor by tensor.

Nothing is held beyond one tensor and some pages of one mapped file. Pickles are read with `weights_only=True` alone.
"""

import json
import pickle
import zipfile
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# as transformers prefers them; Mistral's own file last, since its repositories hold a transformers copy beside it
FILES = ("model.safetensors", INDEXES[0], "pytorch_model.bin", INDEXES[1], "consolidated.safetensors")
RESIDENT = 1 << 26  # bytes read after which a file is mapped anew, so that its pages do not count up
CONFIGS = ("config.json", "params.json")


class Checkpoint:
    """Configuration, names, shapes and dtypes of a checkpoint, and its tensors one at a time.

    Args:
        path: a folder, or one file of weights, beside which the configuration may lie.

    Raises:
        ValueError: no weights, a damaged or incomplete file, an index that does not fit its files, a pickle that holds
            anything but tensors; each names the file.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        self.folder = path if path.is_dir() else path.parent
        self.files, listed = _weight_files(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._file_of: dict[str, Path] = {}
        self._open: tuple[Path, _Safetensors | _Pickle] | None = None
        self._read = 0  # bytes of it
        for file in self.files:
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
        try:
            config = json.loads(self.config_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.config_file} is not JSON: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{self.config_file} must hold an object; it holds a {type(config).__name__}.")
        return config

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self.files)

    def read(self, name: str) -> torch.Tensor:
        """One tensor; its memory may be a mapped file's."""
        if self._read > RESIDENT:
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
            self._open = (file, _Safetensors(file) if file.suffix == ".safetensors" else _Pickle(file))
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


def _sharded(index):
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(listed.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is not an index of shards: it needs an object weight_map.") from None
    files = [index.parent / name for name in names]
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} names files outside of its folder: {', '.join(outside)}.")
    if absent := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{index} lists files that are not there: {', '.join(absent)}.")
    return files, listed


class _Safetensors:
    def __init__(self, file):
        try:
            self.handle = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or incomplete: {error}") from None

    @cached_property
    def entries(self):
        slices = {name: self.handle.get_slice(name) for name in self.handle.keys()}  # noqa: SIM118  not a dictionary
        return {name: (tuple(s.get_shape()), _dtype(s.get_dtype())) for name, s in slices.items()}

    def read(self, name):
        return self.handle.get_tensor(name)


class _Pickle:
    def __init__(self, file):
        try:
            # files of before torch 1.6 are no archives and cannot be mapped
            self.tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except pickle.UnpicklingError as error:
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"{file} was not read: it is no pickle of tensors alone, and loading anything else could run code of "
                f"its author. {reason}"
            ) from None
        except (RuntimeError, EOFError, OSError) as error:
            raise ValueError(f"{file} is damaged or incomplete: {str(error).splitlines()[0]}") from None
        if not isinstance(self.tensors, dict):
            raise ValueError(f"{file} must hold a dictionary of tensors; it holds a {type(self.tensors).__name__}.")
        if other := [f"{name} ({type(x).__name__})" for name, x in self.tensors.items() if not torch.is_tensor(x)]:
            raise ValueError(f"{file} must hold tensors alone; it also holds {', '.join(other[:8])}.")

    @property
    def entries(self):
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}

    def read(self, name):
        return self.tensors[name]


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


def _dtype(name):
    if name not in SAFETENSORS_NAMES:
        raise ValueError(f"The checkpoint has tensors of dtype {name}; known are {', '.join(SAFETENSORS_NAMES)}.")
    return SAFETENSORS_NAMES[name]
