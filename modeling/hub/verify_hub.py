"""Whether the code of a folder or repository is what its card says and what this library has. Runs none of it."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from scrubjay.modeling.hub.model_card import CARD, pinned, read_card
from scrubjay.modeling.hub.publishing import CONFIG, Published
from scrubjay.modeling.hub.remote_code import auto_map, code_files, digest


@dataclass
class Verification:
    """What was compared, and what does not agree. Names of code files.

    Args:
        files: code files there.
        altered: other than the card pins them.
        missing: pinned, or needed by the model, and not there.
        extra: there, neither pinned nor needed.
        foreign: other than in this library, whatever the card says: of another version of it, or changed by somebody.
        elsewhere: entries of an "auto_map", "file: what it says", that name code which this library would not.
        apart: folders inside that hold a model of their own (a Trainer's checkpoints), which was not looked at.
    """

    files: list[str]
    altered: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Whether there is nothing to report."""
        return not (self.altered or self.missing or self.extra or self.foreign or self.elsewhere)

    def lines(self) -> list[str]:
        """The report, for people."""
        text = {
            "altered": "not as the card pins it",
            "missing": "missing",
            "extra": "neither pinned by the card nor part of the model",
            "foreign": "not this library's source: of another version of it, or changed by somebody",
            "elsewhere": "names other code than this model's",
        }
        found = [f"{name}: {what}" for kind, what in text.items() for name in getattr(self, kind)]
        found += [f"{name}: a model of its own, to be verified by itself" for name in self.apart]
        if self.agrees:
            return [f"{len(self.files)} code files are as the card pins them, and this library's own source", *found]
        return [*found, "Do not load this with trust_remote_code=True before you know why."]


def verify(source: str, *, revision: str | None = None, token: bool | str | None = None) -> Verification:
    """Compare code files with the sha256 that the card pins, and with this library's own source.

    Args:
        source: folder that save_pretrained wrote, or owner/name on the Hub, of which all but the weights is downloaded.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: a source without config.json, of a model that is not this library's, or without a card that pins.
        OSError: what the Hub refused.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(
            snapshot_download(source, revision=revision, token=token, allow_patterns=["*.py", "*.json", CARD])
        )
    elif revision is not None:
        raise ValueError(f"revision={revision!r} was given with the folder {source}. A folder has no revisions.")
    model_class = _class_of(folder)
    pins = pinned(read_card(folder / CARD) or "")
    if not pins:
        advice = "Go online to have it looked for." if _only_cached(source) else "Save the model again to get one."
        raise ValueError(f"{source} has no {CARD} with sha256 of code files. {advice}")
    apart = [path.parent for path in sorted(folder.rglob(CONFIG)) if path.parent != folder]
    files = [path for path in sorted(folder.rglob("*")) if not set(path.parents).intersection(apart)]
    own = {name: digest(text.encode()) for name, text in code_files(model_class).items()}
    there = {_name(path, folder): digest(path.read_bytes()) for path in files if path.suffix == ".py"}
    return Verification(
        files=list(there),
        altered=[name for name in there if name in pins and there[name] != pins[name]],
        missing=sorted((set(pins) | set(own)) - set(there)),
        extra=[name for name in there if name not in pins and name not in own],
        foreign=[name for name in there if (name in pins or name in own) and there[name] != own.get(name)],
        elsewhere=_elsewhere(folder, files, auto_map(model_class)),
        apart=[_name(path, folder) for path in apart],
    )


def _name(path, folder):
    return path.relative_to(folder).as_posix()


def _only_cached(source):
    """Whether a repository was looked for in the cache alone, which holds what somebody has needed of it."""
    return HF_HUB_OFFLINE and not Path(source).is_dir()


def _class_of(folder):
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(
            f"no {CONFIG} in {folder}. Pass a folder that save_pretrained wrote, or owner/name on the Hub."
        )
    try:
        kind = json.loads(path.read_bytes()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no configuration: {error}") from None
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[kind], None) if kind in CONFIG_MAPPING else None
    if not (isinstance(found, type) and issubclass(found, Published)):
        raise ValueError(
            f"{path} is of model_type {kind!r}, which is not a model of scrubjay: nothing to compare with."
        )
    return found


def _elsewhere(folder, files, own):
    found = []
    for path in (path for path in files if path.suffix == ".json"):
        try:
            content = json.loads(path.read_bytes())
        except ValueError:  # then it names nothing, to transformers either
            continue
        named = content.get("auto_map") if isinstance(content, dict) else None
        for key, value in (named or {}).items() if isinstance(named, dict | None) else [("auto_map", named)]:
            if value != own.get(key):
                found.append(f"{_name(path, folder)}: {key} is {value}")
    return found
