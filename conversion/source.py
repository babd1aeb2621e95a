"""Where a checkpoint comes from: a local path as it is, or a name on the Hub; and what travels with the weights."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.utils import validate_repo_id

from scrubjay.conversion.checkpoint import read_object
from scrubjay.modeling.hub.publishing import TOKENIZER

CARRIED = (
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
# Classes around a tokenizer.json that add names alone, with the values that they have where a file does not say: the
# authors' of Rodimus, whose code most of their repositories lack.
PLAIN_TOKENIZERS = {
    "RodimusTokenizer": {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "cls_token": "[CLS]",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
}
# In the order in which `Checkpoint` prefers them; the first kind that a repository has is the only one downloaded.
WEIGHTS = (("model*.safetensors", "model*.safetensors.index.json"), ("pytorch_model*",), ("consolidated*.safetensors",))


def local_path(source: str | Path, revision: str | None = None) -> Path:
    """The path itself where it exists; otherwise the snapshot of a repository on the Hub, downloaded.

    Args:
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: neither a path that exists nor owner/name, or a revision of a path.
    """
    path = Path(source)
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision={revision!r} was given with the path {source}, which has no revisions.")
        return path
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{name} does not exist. Pass a folder, a file of weights, or owner/name on the Hub.")
    validate_repo_id(name)
    small = [*CARRIED, "config.json", "params.json", "README.md"]
    for weights in WEIGHTS:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*small, *weights]))
        if any(fnmatch(file.name, pattern) for file in folder.iterdir() for pattern in weights):
            return folder
    at = "" if revision is None else f" at {revision}"
    raise ValueError(f"{name}{at} has no weights that are known: {', '.join(p for kind in WEIGHTS for p in kind)}.")


def carried_files(source: Path, destination: Path) -> list[str]:
    """Copy tokenizer, generation settings and licence; returns what has to be said of it."""
    names = sorted(file.name for file in source.iterdir() if file.is_file())
    for name in names:
        if any(fnmatch(name, pattern) for pattern in CARRIED) and not (destination / name).exists():
            shutil.copyfile(source / name, destination / name)
    code = [name for name in names if fnmatch(name, "tokenization*.py")]
    notes = [f"the tokenizer's own code was not copied: {', '.join(code)}"] if code else []
    return notes + _without_code(destination)


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """What a folder says of its tokenizer; empty where it says nothing.

    Raises:
        ValueError: names a file that cannot be read, or has something else than a name as the tokenizer's class.
    """
    path = folder / TOKENIZER
    config = read_object(path) if path.is_file() else {}
    name = config.get("tokenizer_class")
    if not isinstance(name, str | None):
        raise ValueError(f"{path} needs a name as tokenizer_class; it has {name!r}. Repair it, or remove the file.")
    return config


def _without_code(folder):
    """Let transformers' own class read a tokenizer whose class is known to compute nothing of its own."""
    path, config = folder / TOKENIZER, tokenizer_config(folder)
    known = PLAIN_TOKENIZERS.get(config.get("tokenizer_class"))
    if known is None or not (folder / "tokenizer.json").is_file():
        return []
    config = known | {name: value for name, value in config.items() if name != "auto_map"}
    path.write_text(
        json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n", encoding="utf-8"
    )
    return [f"the tokenizer needs no code: transformers' own class reads what was {config['tokenizer_class']}'s"]
