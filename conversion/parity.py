"""Hold a converted folder against its source: logits of two implementations, configurations, checksums."""

import gc
import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig

from scrubjay.conversion.checkpoint import Checkpoint
from scrubjay.conversion.formats import Format
from scrubjay.conversion.keymap import theirs_of
from scrubjay.modeling.key_names import layer_of, same

TOKENS = 96  # crosses a chunk of every model
# float32 against float32 of another implementation, and of logits of the scale of 10 and less. The worst of the models
# of the tests was 2e-5; exchanging two tensors of a block moves logits by 0.1 and more.
BOUND = 1e-4
KEYS = ("missing_keys", "unexpected_keys")


class Rounded:
    """A checkpoint whose tensors were cast on the way, as `read` gives them. kept: patterns of those that were not."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, kept: list[str]):
        self.checkpoint, self.dtype, self.kept = checkpoint, dtype, kept

    def __getattr__(self, name: str) -> Any:
        return getattr(self.checkpoint, name)

    def read(self, name: str) -> torch.Tensor:
        """The tensor, cast and back."""
        tensor = self.checkpoint.read(name)
        if not tensor.is_floating_point() or any(layer_of(pattern, name) is not None for pattern in self.kept):
            return tensor
        return tensor.to(self.dtype).to(tensor.dtype)


def compare(
    source: Checkpoint,
    theirs: Format,
    folder: Path,
    target: Format,
    config: PreTrainedConfig,
    dtype: torch.dtype | None,
    settings: dict[str, Any],
    new: set[str],
) -> dict[str, Any]:
    """Of a conversion to `folder`: {tokens, bound, scale, allowed, max_logit_difference, why_not, config_differences,
    sha256}. scale: of the largest logit; allowed: what they may differ by, bound * max(1, scale).

    The source's logits come from an implementation that reads the source's own names; where there is none, and for a
    source of this library, from this library's model. They are held against this library's model loaded from `folder`
    and, where the target's layout has another implementation, against that too: as the other library loads the folder,
    where that library is at hand. `config`: ours; `dtype`: to which tensors were cast; `settings`: fields that hold
    before what the source's configuration says; `new`: tensors of ours that one of the sides does not have.

    Raises:
        ValueError: logits that differ by more than is allowed, with the numbers.
    """
    ids = torch.randint(0, config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    written = Checkpoint(folder)
    differences: dict[str, float] = {}
    scale, why_not = 0.0, ""
    if theirs.name != "scrubjay" and theirs.reference is None:
        why_not = f"there is no other implementation of {theirs.name}"
    else:
        want = _source_logits(source, theirs, ids, config, dtype, settings, new)
        gc.collect()  # models hold themselves in circles, and two of them would be in memory
        scale = float(want.abs().max())
        differences["this library's model on the result"] = _far(_result_logits(target, ids, new, written), want)
        if target.loaded is not None:
            differences[f"{target.name} itself, which loads the result"] = _far(target.loaded(folder, ids), want)
        elif target.reference is not None:
            found = target.reference(written, ids, {})
            differences[f"another implementation of {target.name} on the result"] = _far(found, want)
    allowed = BOUND * max(1.0, scale)
    if wrong := {what: x for what, x in differences.items() if not x <= allowed}:
        said = "; ".join(f"{what}: {x:.3g}" for what, x in wrong.items())
        raise ValueError(
            f"The check failed: logits differ from the source's by {said}, with logits up to {scale:.3g}. At most "
            f"{allowed:.3g} is rounding. Nothing was written."
        )
    again, _ = target.read_config(written.config, written.shapes, {})
    written.close()
    return {
        "tokens": TOKENS,
        "bound": BOUND,
        "scale": scale,
        "allowed": allowed,
        "max_logit_difference": differences,
        "why_not": why_not,
        "config_differences": config_differences(config, again),
        "sha256": {file.name: _digest(file) for file in written.files},
    }


def config_differences(first: PreTrainedConfig, second: PreTrainedConfig) -> dict[str, list]:
    """Fields of two configurations of ours that differ, with both values."""
    ours = ("auto_map", "architectures", "transformers_version", "model_type", "_name_or_path", "dtype", "model_card")
    a, b = first.to_dict(), second.to_dict()
    names = [name for name in sorted(set(a) | set(b)) if name not in ours]
    return {name: [a.get(name), b.get(name)] for name in names if a.get(name) != b.get(name)}


def _source_logits(source, theirs, ids, config, dtype, settings, new):
    if dtype is not None:
        rows = theirs.rows(config) or same(*source.shapes)  # this library's own names
        source = Rounded(source, dtype, theirs_of(rows, theirs.model_class._keep_in_fp32_modules_strict or ()))
    if theirs.reference is None:
        return _own_logits(theirs, ids, new, None, source, config)
    return theirs.reference(source, ids, settings)


def _result_logits(layout, ids, new, written):
    """Of this library's model, loaded from a folder as a user loads it."""
    if layout.config_name == "config.json":
        return _own_logits(layout, ids, new, written.folder)
    config, _ = layout.read_config(written.config, written.shapes, {})  # transformers finds no configuration there
    return _own_logits(layout, ids, new, None, written, config)


@torch.no_grad()
def _own_logits(layout, ids, new, folder, checkpoint=None, config=None):
    """Of this library's model, whose key mapping reads the layout's names as they are: of a folder, or of the tensors
    of a checkpoint with a configuration."""
    tensors = None if checkpoint is None else {name: checkpoint.read(name) for name in checkpoint.shapes}
    options = dict(dtype=torch.float32, output_loading_info=True)
    model, info = layout.model_class.from_pretrained(folder, config=config, state_dict=tensors, **options)
    if lost := {kind: sorted(set(info[kind]) - new) for kind in KEYS if set(info[kind]) - new}:
        raise ValueError(f"The check failed: the model does not load whole from {folder or 'the tensors'}: {lost}.")
    logits = model.eval()(ids, use_cache=False).logits  # a cache that releases tokens is meant to change them
    del model
    gc.collect()
    return logits


def _far(got, want):
    if got.shape != want.shape:
        raise ValueError(f"The check failed: logits have shape {list(got.shape)}, the source's {list(want.shape)}.")
    return float((got.double() - want.double()).abs().max())


def _digest(file):
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
