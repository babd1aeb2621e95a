"""The card of a model: README.md with YAML metadata and one part that every save writes anew.

What only a person knows (`Notes`) is kept in config.json, as `model_card`: every way of loading a model reads that
file, so a model says the same of itself wherever it is saved again. All other text in a README.md is left alone.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import REGEX_YAML_BLOCK, RepoCard

from scrubjay.configuration.tested_versions import OLDEST
from scrubjay.modeling.hub.remote_code import digest, written_class

CARD = "README.md"
BEGIN = "<!-- scrubjay: every save writes this part anew; text above and below it stays -->"
END = "<!-- scrubjay: end -->"
PART = re.compile(rf"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)})[\s\S])*?{re.escape(END)}")
PINNED = re.compile(r"^([0-9a-f]{64})  (\S+\.py)\r?$", re.MULTILINE)
CODE_LICENSE = "Apache-2.0"
NEEDED = {"bitsandbytes": "accelerate, bitsandbytes"}
NOT_GIVEN = "not given"
# {end of a class's name: the Hub's name of what it does, what the example of the card prints of the output}
TASKS = {
    "ForCausalLM": ("text-generation", None),
    "ForSequenceClassification": ("text-classification", "logits"),
    "ForTokenClassification": ("token-classification", "logits"),
}
HEADLESS = ("feature-extraction", "last_hidden_state.shape")


@dataclass(frozen=True)
class Notes:
    """What the author of a model says of it. None: not given, and the card says so.

    Args:
        license: of the weights, a name that the Hub knows ("apache-2.0", "mit", "cc-by-4.0", ...).
        training_data: what the model was trained on.
        training_command: the command that trained it.
        evaluation: numbers or text by what was measured, {"bits per byte, Python source": 1.15}.
    """

    license: str | None = None
    training_data: str | None = None
    training_command: str | None = None
    evaluation: dict | None = None

    @classmethod
    def of(cls, config, changes: dict | None = None) -> "Notes":
        """Those that a configuration holds, some of them changed.

        Raises:
            ValueError: a note that the card has no place for, or of another type than it needs.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        merged: Any = getattr(config, "model_card", None) or {}
        if changes is not None:
            merged = merged | changes if isinstance(changes, dict) else changes
        if not isinstance(merged, dict) or set(merged) - set(names):
            raise ValueError(f"card must be a dictionary with some of {names}; got {merged!r}.")
        notes = cls(**merged)
        for name in names[:3]:
            value = getattr(notes, name)
            if not isinstance(value, str | None) or _marked(value):
                raise ValueError(f"card: {name} must be text without the marks of this card, or None; got {value!r}.")
        results = {} if notes.evaluation is None else notes.evaluation
        if not isinstance(results, dict) or not all(
            isinstance(key, str) and isinstance(value, str | int | float) and not _marked(key, value)
            for key, value in results.items()
        ):
            raise ValueError(
                "card: evaluation must be {what was measured: number or text}, without the marks of this card; got "
                f"{results!r}."
            )
        return notes

    def given(self) -> dict:
        """Those that are not None, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Place:
    """Where the card will stand. source: what from_pretrained is given; revision: None for the main one."""

    source: str = "."
    revision: str | None = None
    tokenizer: bool = False
    tags: tuple[str, ...] = ()

    @property
    def arguments(self) -> str:
        """What a call that loads from there is given."""
        return json.dumps(self.source) + (f", revision={json.dumps(self.revision)}" if self.revision else "")


def write_card(model: Any, folder: Path, old: str | None, place: Place = Place()) -> None:
    """Write README.md into a folder that holds all other files of a model.

    Args:
        old: text of the README.md that this one replaces, if there is one.

    Raises:
        ValueError: metadata in `old` that cannot be read.
    """
    old = old or ""
    block = "" if REGEX_YAML_BLOCK.search(old) else "---\n{}\n---\n"
    try:
        card = RepoCard(block + old)
    except Exception as error:  # of the YAML parser, which is huggingface_hub's affair
        raise ValueError(f"The metadata of the {CARD} there cannot be read. Repair or remove them. {error}") from error
    notes, paper, data = Notes.of(model.config), model.config.paper, card.data
    data["library_name"] = "transformers"
    data["pipeline_tag"] = data.get("pipeline_tag") or TASKS.get(_head(_kind(model)), HEADLESS)[0]
    own = ("custom_code", "scrubjay", model.config.model_type, f"arxiv:{paper['arxiv']}", *place.tags)
    data["tags"] = list(dict.fromkeys([*_as_list(data.get("tags")), *own]))
    if notes.license is not None:
        data["license"] = notes.license
    part = "\n\n".join(_part(model, folder, notes, data.get("license"), place))
    part = f"{BEGIN}\n\n{part}\n\n{END}"
    if PART.search(card.text):
        card.text = PART.sub(lambda match: part, card.text)
    else:
        card.text = f"{card.text.rstrip()}\n\n{part}\n".lstrip("\n")
    (folder / CARD).write_bytes(card.content.encode())


def read_card(path: Path) -> str | None:
    """Text of a README.md as it stands; None where there is none.

    Raises:
        ValueError: a file that is not UTF-8.
    """
    if not path.is_file():
        return None
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8, or remove it.") from None


def pinned(text: str) -> dict[str, str]:
    """{code file: sha256} as a card says."""
    return {name: sha for part in PART.findall(text) for sha, name in PINNED.findall(part)}


def _part(model, folder, notes, license_name, place) -> Iterable[str]:
    paper, kind = model.config.paper, _kind(model)
    yield f"# {paper['name']}"
    link = f"[{paper['title']}](https://arxiv.org/abs/{paper['arxiv']})"
    yield f"A language model for Transformers, `{kind}`, and the code that runs it. The paper: {link}."
    yield _sizes(model, folder)
    yield "## How to load"
    needed = ", ".join(["torch", *(NEEDED.get(name, name) for name in _quantizer(model))])
    yield (
        f"With {needed} and transformers {OLDEST} or newer; nothing else has to be installed. "
        "`trust_remote_code=True` runs the code files listed below."
    )
    yield _loading(kind, place)
    if _head(kind) == "ForCausalLM":
        yield (
            f"`AutoModelForSequenceClassification.from_pretrained({place.arguments}, num_labels=2, "
            "trust_remote_code=True)`, or `AutoModelForTokenClassification`, makes a classifier of it: a new `score`, "
            "which is to be trained, stands where the language model's head stood."
        )
    yield "## What the paper leaves open"
    yield _choices(model.config)
    yield "## Training"
    yield f"Data: {notes.training_data or NOT_GIVEN}"
    yield (
        f"Command: {NOT_GIVEN}" if notes.training_command is None else f"Command:\n\n{_fenced(notes.training_command)}"
    )
    yield "## Evaluation"
    yield _table(("measured", "value"), notes.evaluation.items()) if notes.evaluation else "Not given."
    yield "## Licence"
    yield f"Weights: {license_name or NOT_GIVEN}. Code files: {CODE_LICENSE}."
    yield "## Code"
    yield _code(folder, place)


def _marked(*values):
    return any(mark in str(value) for value in values for mark in (BEGIN, END))


def _kind(model):
    return written_class(type(model)).__name__


def _head(kind):
    """Which head a class has, "" without one."""
    return next((end for end in TASKS if kind.endswith(end)), "")


def _quantizer(model):
    """The library that quantized the model, or nothing."""
    if getattr(model, "hf_quantizer", None) is None:
        return []
    method = model.hf_quantizer.quantization_config.quant_method
    return [getattr(method, "value", method)]


def _sizes(model, folder):
    config = model.config
    once, each = model.cache_class.row_bytes(config, model.dtype)
    token = "token after the prompt" if getattr(config, "policy", None) == "snapkv" else "token"
    cache = f"{once:,} bytes" + (f" and {each:,} bytes more for each {token}" if each else ", whatever its length")
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    kind = str(model.dtype).removeprefix("torch.")
    for library in _quantizer(model):
        kind = f"quantized by {library}, computing in {kind}"
    rows = {
        "parameters": f"{model.num_parameters():,}",
        "weights": f"{weights:,} bytes, {kind}",
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "vocabulary": f"{config.vocab_size:,}",
        "cache of one sequence": cache,
    }
    return _table(("", ""), rows.items())


def _loading(kind, place):
    where = place.arguments
    head = f"AutoModel{_head(kind)}"
    shown = TASKS.get(_head(kind), HEADLESS)[1]
    lines = [f"from transformers import {head}" + (", AutoTokenizer" if place.tokenizer else ""), ""]
    lines.append(f"model = {head}.from_pretrained({where}, trust_remote_code=True)")
    if place.tokenizer:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({where}, trust_remote_code=True)")
        lines.append('inputs = tokenizer("A jay", return_tensors="pt", return_token_type_ids=False)')
    else:
        lines[:0] = ["import torch"]
        lines.append('inputs = {"input_ids": torch.tensor([[1, 2, 3]])}  # no tokenizer came with the model')
    if shown is not None:
        lines.append(f"print(model(**inputs).{shown})")
    else:
        lines.append("output = model.generate(**inputs, max_new_tokens=20)")
        lines.append("print(tokenizer.decode(output[0]))" if place.tokenizer else "print(output)")
    note = " In this folder:" if place.source == "." else ""
    return f"{note}\n\n".lstrip() + _fenced("\n".join(lines), "python")


def _choices(config):
    rows = [(f"`{name}`", f"`{getattr(config, name)}`", text) for name, text in config.paper["open"].items()]
    return _table(("field", "here", "what is open"), rows) if rows else "Nothing that would need a choice here."


def _code(folder, place):
    pins = "\n".join(f"{digest(path.read_bytes())}  {path.name}" for path in sorted(folder.glob("*.py")))
    if place.source == ".":
        where = "folder = pathlib.Path()"
    else:
        files = 'allow_patterns=["*.py", "README.md"]'
        where = f"folder = pathlib.Path(huggingface_hub.snapshot_download({place.arguments}, {files}))"
    modules = "import hashlib, pathlib, re" if place.source == "." else "import hashlib, huggingface_hub, pathlib, re"
    check = f"""{modules}

{where}
for sha, name in re.findall(r"^([0-9a-f]{{64}})  (\\S+)$", (folder / "README.md").read_text(encoding="utf-8"), re.M):
    print("same" if hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha else "ALTERED", name)"""
    return (
        f"sha256 of each code file:\n\n{_fenced(pins, 'text')}\n\n"
        f"Whether the files are those, without running them:\n\n{_fenced(check, 'python')}\n\n"
        "Who can change the files can change this list too: `scrubjay verify`, where that library is installed, also "
        "compares them with its own source. Pass `revision=` with a commit to load what you have looked at."
    )


def _table(head, rows):
    cell = lambda value: str(value).replace("|", "\\|").replace("\n", " ")  # noqa: E731
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def _fenced(text, language=""):
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _as_list(value):
    return [value] if isinstance(value, str) else list(value or [])
