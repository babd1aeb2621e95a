"""A cache in a safetensors file, all of it or nothing."""

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def write_tensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor], cls: type, about: dict) -> None:
    """Write a cache's tensors and what else it needs (anything JSON can say) to a file, all of it or nothing."""
    path = Path(path)
    metadata = {"class": cls.__name__, "about": json.dumps(about)}
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_tensors(path: str | os.PathLike, cls: type, device: str | torch.device = "cpu") -> tuple[dict, dict]:
    """(tensors, about) that `write_tensors` wrote for this class.

    Raises:
        ValueError: a file of another kind of cache, or no cache at all.
    """
    with safe_open(path, framework="pt", device=str(device)) as file:
        metadata = file.metadata() or {}
        if metadata.get("class") != cls.__name__:
            raise ValueError(
                f"{path} holds {metadata.get('class', 'no cache')}; {cls.__name__}.load needs its own kind."
            )
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["about"])  # noqa: SIM118
