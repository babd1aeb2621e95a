"""The code that travels with a checkpoint: a model's own source and all it imports, flattened into one folder.

transformers loads remote code from flat siblings alone (`from .x import y`), so the closure of a modeling file is
written side by side and each `from scrubjay.<rooms>.<module> import ...` becomes `from .<module> import ...`. Code
that was itself loaded from such a folder is copied as it is.
"""

import hashlib
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

from transformers.utils import logging

HEADS = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification")  # ends of names of classes
logger = logging.get_logger(__name__)
OWN_IMPORT = re.compile(r"^(\s*)from scrubjay\.((?:\w+\.)+)(\w+) import ", re.MULTILINE)
FLAT_IMPORT = re.compile(r"^\s*from \.(\w+) import ", re.MULTILINE)


def check_folder(folder: str | os.PathLike) -> None:
    """Refuse a path that is a file; transformers would log an error and save nothing."""
    if os.path.isfile(folder):
        raise ValueError(f"save_pretrained needs a folder; got the file {os.fspath(folder)}.")


def written_class(cls: Any) -> Any:
    """The class whose code travels: `cls`, or the zoo's below one that a library made at run time or a user wrote."""
    models = [c for c in cls.__mro__ if hasattr(c, "config_class")]  # FSDP2 mixes in a class that is no model
    found: list[Any] = [c for c in models if getattr(sys.modules.get(c.__module__), c.__name__, None) is c]
    own = next(c for c in found if _is_own(c))
    if found[0] is not own:
        logger.warning_once(
            f"{found[0].__name__} is saved as {own.__name__}: of the code, only the zoo's travels with a checkpoint."
        )
    return own


def _is_own(cls):
    """Whether its module is the library's, or lies beside a copy of this one in a folder that it was loaded with."""
    path = getattr(sys.modules[cls.__module__], "__file__", None)
    if path is None:
        return False
    return cls.__module__.startswith("scrubjay.modeling.") or (Path(path).parent / "remote_code.py").is_file()


def auto_map(model_class: Any) -> dict[str, str]:
    """What config.json says of where the classes are, as module.Class of the flat folder."""
    model_class = written_class(model_class)
    found = {kind: _related(model_class, kind) for kind in HEADS}
    causal = found[HEADS[0]]
    named = {"AutoConfig": _flat_name(causal.config_class), "AutoModel": _flat_name(causal.model_class)}
    return named | {f"AutoModel{kind}": _flat_name(head) for kind, head in found.items()}


def code_files(model_class: Any) -> dict[str, str]:
    """{file name: source} of everything that the model needs to run."""
    files: dict[str, str] = {}
    model_class = written_class(model_class)
    waiting = [Path(inspect.getfile(cls)) for cls in (model_class, model_class.config_class)]
    while waiting:
        path = waiting.pop()
        if path.name in files:
            continue
        text = path.read_text(encoding="utf-8")
        files[path.name] = OWN_IMPORT.sub(r"\1from .\3 import ", text)
        waiting += [path.parent / f"{name}.py" for name in FLAT_IMPORT.findall(text)]
        waiting += [_module_path(path, rooms, name) for _, rooms, name in OWN_IMPORT.findall(text)]
    return files


def write_code(model_class: Any, folder: str | os.PathLike) -> None:
    """Write `code_files` into a folder."""
    for name, text in code_files(model_class).items():
        (Path(folder) / name).write_text(text, encoding="utf-8", newline="\n")  # the same bytes on every system


def digest(content: bytes) -> str:
    """sha256 of a code file."""
    return hashlib.sha256(content).hexdigest()


def _related(model_class, suffix):
    """The class with this head that stands in the same module as `model_class`."""
    module = sys.modules[model_class.__module__]
    return next(getattr(module, name) for name in vars(module) if name.endswith(suffix) and not name.startswith("Zoo"))


def _flat_name(cls):
    return f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}"


def _module_path(path, rooms, name):
    """Source of `scrubjay.<rooms><name>`, which `path`, a file of the library too, imports."""
    below = Path(*rooms.split("."), f"{name}.py")
    return next(root / below for root in path.parents if (root / below).is_file())
