"""From a checkpoint of one layout to a folder of another, tensor by tensor, whole or not at all."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import reduce
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig

from scrubjay.conversion.checkpoint import Checkpoint
from scrubjay.conversion.convert_decoder import DECODERS
from scrubjay.conversion.convert_mamba2 import MAMBA2
from scrubjay.conversion.convert_rodimus import RODIMUS
from scrubjay.conversion.destination import check_destination, whole_or_nothing
from scrubjay.conversion.formats import Format
from scrubjay.conversion.keymap import Plan, plan_in, plan_out, refuse
from scrubjay.conversion.parity import compare
from scrubjay.conversion.report import Report
from scrubjay.conversion.source import carried_files, local_path, tokenizer_config
from scrubjay.conversion.weights import Entries, parse_size, raw, write_weights
from scrubjay.modeling.hub.model_card import CARD, Place, read_card, write_card
from scrubjay.modeling.hub.remote_code import auto_map, write_code
from scrubjay.modeling.key_names import same

ZOO = "scrubjay"
# What code does that meets a text for a number, the name of nothing, a size of 0, and the like
MISLED = (TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, RuntimeError)
FORMATS: tuple[Format, ...] = (*MAMBA2, *RODIMUS, *DECODERS)
# Fields of a configuration that a conversion fills in itself.
WRITTEN = {
    "architectures": "it is the class of the model that is made",
    "base_config": "it is the decoder's configuration, which comes with the source",
    "dtype": "say to what tensors are cast with dtype= (--dtype)",
    "transformers_version": "it is the version that writes",
}


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str | None = None,
    check: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    progress: bool = True,
    settings: dict[str, Any] | None = None,
    revision: str | None = None,
) -> Report:
    """Write a checkpoint of one layout as a folder of another.

    The source's layout is found by its contents. The configuration is read off the shapes of the tensors and held
    against the configuration file. Peak memory is about the largest file of the source; tensors pass one by one.

    Args:
        source: folder, file of weights, or owner/name on the Hub.
        destination: folder to make, or an empty one to fill: all at the end, nothing after an error or an interrupt.
        to: None for a folder of this library, with its code; or the name of a layout ("transformers", "mamba_ssm",
            ...), or of the model to make of a decoder ("adore", "recycled").
        check: compare logits with another implementation on the source's own tensors, and write what was found into
            conversion.json and conversion.md of the destination. Needs memory for one model in float32 at a time.
        dtype: of all floating-point tensors but those that the model keeps in float32. None keeps each one's own.
        max_shard_size: bytes of a file, a number or such as "5GB". "mamba_ssm" and "codestral" have one, of any size.
        progress: a bar on stderr, where that is a terminal.
        settings: fields of our configuration that differ from what the source says or leaves open; of a decoder's own,
            tie_word_embeddings and sliding_window=None. quantization_config=None: the weights are plain all the same.
        revision: branch, tag or commit of a source on the Hub.

    Returns: what was read, written and left out.

    Raises:
        ValueError: an unknown or ambiguous layout, tensors that do not fit (all of them are listed), a configuration
            that contradicts the tensors (both values are said), a damaged file, a pickle that holds more than tensors,
            a destination that is not empty, numbers that are NaN, infinite or beyond the range of `dtype`, or a check
            that failed. Each names its file. Nothing is left at the destination then.
        OSError: a file that cannot be read or written.
    """
    destination = Path(destination).resolve()  # a link to an empty folder stays, and is filled
    check_destination(destination)
    parse_size(max_shard_size)
    checkpoint = Checkpoint(local_path(source, revision))
    theirs, target = choose_formats(checkpoint, to)
    settings = _settings(theirs, settings or {})
    config, notes, work, card = _prepared(checkpoint, theirs, target, settings, dtype)
    with whole_or_nothing(destination) as folder, _naming(checkpoint):
        how: dict[str, Any] = {"kind": target.weights, "max_shard_size": max_shard_size, "progress": progress}
        files = write_weights(folder, work.entries, work.make, **how)
        notes += [*(target.remarks(config) if target.remarks else ()), *carried_files(checkpoint.folder, folder)]
        _write_config(folder, target, work, card)
        report = Report.of(source, theirs, target, checkpoint, work.entries, files, notes, work.plan, work.out)
        if check:
            new = {*work.plan.new, *work.out.left_out}
            report.check = compare(checkpoint, theirs, folder, target, config, dtype, settings, new)
            report.write(folder)
    checkpoint.close()
    return report


@dataclass(frozen=True)
class _Work:
    """A conversion that was found possible: plans in and out, what is written, and how each tensor is made."""

    model: Any
    plan: Plan
    out: Plan
    entries: Entries
    make: Callable[[str], torch.Tensor]
    written: dict[str, Any] | None  # another library's configuration

    @classmethod
    def of(cls, checkpoint, theirs, target, config, dtype):
        with torch.device("meta"), _reading(theirs, checkpoint):
            model = theirs.model_class(config)
        shapes = own_shapes(model)
        plan = plan_in(_rows(theirs, config, shapes), checkpoint.shapes, shapes)
        _check_dtypes(checkpoint, plan)
        out = plan_out(_rows(target, config, shapes), shapes)
        written = None if target.write_config is None else target.write_config(config)
        initial = _initial(theirs, config, plan)
        _check_copies(checkpoint, plan)
        kept = tuple(type(model)._keep_in_fp32_modules_strict or ())
        entries = _entries(checkpoint, plan, out, initial, dtype, kept)
        config.dtype = _main_dtype(entries)

        def read(name):
            return initial[name] if name in plan.new else plan.recipes[name].make(checkpoint.read)

        return cls(model, plan, out, entries, lambda name: out.recipes[name].make(read), written)


def choose_formats(checkpoint: Checkpoint, to: str | None) -> tuple[Format, Format]:
    """The source's layout, by its contents, and the target's.

    Raises:
        ValueError: a layout that is unknown or ambiguous, a target that the source's model does not have or already is.
    """
    own = tuple(zoo_format(family, cls) for family, cls in {f.family: f.model_class for f in FORMATS}.items())
    config, shapes = checkpoint.config, checkpoint.shapes
    # a configuration of this library leaves no doubt, whatever the tensors are called
    found = [f for f in own if f.recognises(config, shapes)] or [f for f in FORMATS if f.recognises(config, shapes)]
    if not found:
        known = "".join(f"\n  {f.name} ({f.family}): {f.looks_for}" for f in (*own, *FORMATS))
        raise ValueError(f"The layout of {checkpoint.folder} is unknown, or no other has it. Looked for:{known}")
    if len(found) > 1 and to in {f.family for f in found}:
        found, to = [f for f in found if f.family == to], None
    if len(found) > 1:
        names = ", ".join(f"{f.name} ({f.family})" for f in found)
        families = " or ".join(f"--to {family}" for family in dict.fromkeys(f.family for f in found))
        raise ValueError(
            f"{checkpoint.folder} can be read in several ways: {names}. Say which model to make: {families}."
        )
    source = found[0]
    targets = [f for f in (*own, *FORMATS) if f.family == source.family and (f.write_config or f.name == ZOO)]
    wanted = ZOO if to is None or to == source.family else to
    target = next((f for f in targets if f.name == wanted), None)
    if target is None:
        names = ", ".join(f.name for f in targets if f.name != source.name)
        raise ValueError(f"A {source.family} model cannot be written as {wanted!r}. Choose one of {names}.")
    if target.name == source.name:
        raise ValueError(f"{checkpoint.folder} is of the layout {source.name} already: there is nothing to convert.")
    return source, target


def zoo_format(family: str, model_class: Any) -> Format:
    """This library's own layout of a model."""

    def read_config(config, shapes, settings):
        return model_class.config_class.from_dict(config | settings), []

    return Format(
        name=ZOO,
        family=family,
        model_class=model_class,
        looks_for=f"model_type scrubjay_{family} in config.json",
        recognises=lambda config, shapes: config.get("model_type") == f"scrubjay_{family}",
        read_config=read_config,
        write_config=None,
        rows=lambda config: (),
    )


def own_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a model's files hold: tied tensors once."""
    tensors = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if first[id(tensor)] == name}


def _settings(theirs, given):
    """Those given, with whole numbers as floats where the field is one."""
    config_class = theirs.model_class.config_class
    kinds = {field.name: field.type for field in fields(config_class)} | dict.fromkeys(theirs.more_settings)
    if given.get("quantization_config", "") is None:
        kinds["quantization_config"] = None
    if unknown := sorted(set(given) - set(kinds)):
        raise ValueError(f"{', '.join(unknown)}: no such field in {config_class.__name__}.")
    if fixed := sorted(set(given) & set(WRITTEN)):
        raise ValueError(" ".join(f"{name} is no setting: {WRITTEN[name]}." for name in fixed))

    def wanted(name, value):
        allowed = {kinds[name], *get_args(kinds[name])}
        return float(value) if type(value) is int and float in allowed and int not in allowed else value

    return {name: wanted(name, value) for name, value in given.items()}


def _prepared(checkpoint, theirs, target, settings, dtype):
    """Configuration, notes, work and the source's card: all that can be wrong, but for numbers, is found here."""
    with _naming(checkpoint):
        config, notes = _read_config(theirs, checkpoint, settings)
        work = _Work.of(checkpoint, theirs, target, config, dtype)
    tokenizer_config(checkpoint.folder)
    return config, notes, work, read_card(checkpoint.folder / CARD) if work.written is None else None


def _read_config(theirs, checkpoint, settings):
    quantized = checkpoint.config.get("quantization_config")
    if settings.pop("quantization_config", quantized) is None or _switched_off(quantized):
        checkpoint.config.pop("quantization_config", None)
    elif quantized:
        method = quantized.get("quant_method", "unnamed") if isinstance(quantized, dict) else quantized
        raise ValueError(
            f"{checkpoint.config_file} says that the weights are quantized (quantization_config, method {method}); "
            "converted are plain ones alone. Dequantize and save them, or, where they are plain already, say so: --set "
            "quantization_config=null."
        )
    with _reading(theirs, checkpoint):
        return theirs.read_config(checkpoint.config, checkpoint.shapes, settings)


def _switched_off(quantized):
    """Whether these are bitsandbytes' settings for neither 4 nor 8 bits."""
    flags = [quantized.get(name) for name in ("load_in_4bit", "load_in_8bit")] if isinstance(quantized, dict) else []
    return flags == [False, False]


@contextmanager
def _naming(checkpoint: Checkpoint) -> Iterator[None]:
    """Errors of what a checkpoint holds say which one it is."""
    try:
        yield
    except ValueError as error:
        if str(checkpoint.folder) in str(error):
            raise
        raise ValueError(f"{checkpoint.place}: {error}") from error


@contextmanager
def _reading(theirs: Format, checkpoint: Checkpoint) -> Iterator[None]:
    """Errors of what a configuration's values do to code that trusts them say which file it is."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(f"The configuration, with the settings given, is no valid one. {error}") from None
    except MISLED as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"{checkpoint.config_file or 'The configuration'} has a value of the wrong kind: {what}. Compare it with "
            f"a published one of {theirs.name}."
        ) from error


def _rows(layout, config, shapes):
    return same(*shapes) if layout.name == ZOO else layout.rows(config)


def _initial(theirs, config, plan: Plan):
    if not plan.new:
        return {}
    initial = {} if theirs.initial is None else theirs.initial(config)
    refuse([f"missing: no initial value of {name}" for name in plan.new if name not in initial], "the model")
    return initial


def _check_dtypes(checkpoint: Checkpoint, plan: Plan):
    """All our tensors hold floating-point numbers; integers and those of 8 bits are a quantized checkpoint's, whose
    scales are apart."""
    found = {name: checkpoint.dtypes[name] for name in sorted(plan.used)}
    wrong = {name: dtype for name, dtype in found.items() if not dtype.is_floating_point or dtype.itemsize < 2}
    needed = "needed a floating-point one of 16 bits or more"
    refuse([f"wrong dtype: {name} is {dtype}, {needed}" for name, dtype in wrong.items()], "the checkpoint")


def _check_copies(checkpoint: Checkpoint, plan: Plan):
    faults = [
        f"{name} differs from {of}, of which the configuration says that it is a copy (tied embeddings). Where the two "
        "are meant to differ, say so: --set tie_word_embeddings=false keeps both"
        for name, of in plan.copies
        if _fingerprint(checkpoint.read(name)) != _fingerprint(checkpoint.read(of))
    ]
    refuse(faults, "the checkpoint")


def _fingerprint(tensor):
    """Of two tensors that are compared, only one is in memory at a time."""
    return tensor.dtype, hashlib.sha256(raw(tensor)).digest()


def _entries(checkpoint, plan, out, initial, dtype, kept) -> Entries:
    """Shape and dtype of each tensor to write."""

    def dtype_of(name):
        sources = plan.recipes[name].sources if name in plan.recipes else ()
        found = [checkpoint.dtypes[s] for s in sources] or [initial[name].dtype]
        own = reduce(torch.promote_types, found)
        spared = dtype is None or not own.is_floating_point or any(part in kept for part in name.split("."))
        return own if spared else dtype

    return {name: (out.shapes[name], dtype_of(recipe.sources[0])) for name, recipe in out.recipes.items()}


def _main_dtype(entries: Entries):
    """The floating-point dtype of most elements."""
    counts: dict[torch.dtype, int] = {}
    for shape, dtype in entries.values():
        if dtype.is_floating_point:
            counts[dtype] = counts.get(dtype, 0) + torch.Size(shape).numel()
    return max(counts, key=lambda dtype: counts[dtype])


def _write_config(folder, target, work, card):
    """All that stands beside the weights."""
    model, config = work.model, work.model.config
    if work.written is not None:
        named = {"dtype": str(config.dtype).removeprefix("torch.")} if target.weights == "safetensors" else {}
        text = json.dumps(work.written | named, indent=2) + "\n"
        (folder / target.config_name).write_text(text, encoding="utf-8")
        return
    config.auto_map, config.architectures = auto_map(type(model)), [type(model).__name__]
    config.save_pretrained(folder)
    if not (folder / "generation_config.json").is_file():
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    write_code(type(model), folder)
    write_card(model.to(config.dtype), folder, card, Place(tokenizer=(folder / "tokenizer_config.json").is_file()))
