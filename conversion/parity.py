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
from scrubjay.modeling.key_names import layer_of

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
    new: set[str],
) -> dict[str, Any]:
    """Of a conversion to `folder`: {tokens, bound, scale, max_logit_difference, why_not, config_differences, sha256}.

    The source's logits come from an implementation that reads the source's own names; where there is none, and for a
    source of this library, from this library's model. They are held against this library's model loaded from `folder`
    and, where the target's layout has another implementation, against that too. `dtype`: to which tensors were cast;
    `new`: tensors of ours that one of the sides does not have.

    Raises:
        ValueError: logits that differ by more than `BOUND` of their scale, with the numbers.
    """
    kept = tuple(theirs.model_class._keep_in_fp32_modules_strict or ())
    ids = torch.randint(0, config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    written = Checkpoint(folder)
    differences: dict[str, float] = {}
    scale, why_not = 0.0, ""
    if theirs.name != "scrubjay" and theirs.reference is None:
        why_not = f"there is no other implementation of {theirs.name}"
    else:
        spared = theirs_of(theirs.rows(config), kept)
        want = _source_logits(source, theirs, ids, dtype, (spared, kept), new)
        gc.collect()  # models hold themselves in circles, and two of them would be in memory
        scale = float(want.abs().max())
        differences["this library's model on the result"] = _far(_own_logits(target, folder, ids, new), want)
        if target.reference is not None:
            found = target.reference(written, ids)
            differences[f"another implementation of {target.name} on the result"] = _far(found, want)
    if wrong := {what: x for what, x in differences.items() if not x <= BOUND * max(1.0, scale)}:
        said = "; ".join(f"{what}: {x:.3g}" for what, x in wrong.items())
        raise ValueError(
            f"The check failed: logits differ from the source's by {said}, with logits up to {scale:.3g}. At most "
            f"{BOUND:g} times that is rounding. Nothing was written."
        )
    again, _ = target.read_config(written.config, written.shapes, {})
    written.close()
    return {
        "tokens": TOKENS,
        "bound": BOUND,
        "scale": scale,
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


def _source_logits(source, theirs, ids, dtype, kept, new):
    if theirs.reference is not None:
        return theirs.reference(source if dtype is None else Rounded(source, dtype, kept[0]), ids)
    return _own_logits(theirs, source.folder, ids, new, dtype, kept[1])


@torch.no_grad()
def _own_logits(layout, folder, ids, new, dtype=None, kept=()):
    """Of this library's model, whose key mapping reads the layout's names as they are."""
    if layout.config_name == "config.json":
        place, more = folder, {}
    else:  # transformers finds no configuration there
        checkpoint = Checkpoint(folder)
        config, _ = layout.read_config(checkpoint.config, checkpoint.shapes, {})
        place, more = (
            None,
            {"config": config, "state_dict": {name: checkpoint.read(name) for name in checkpoint.shapes}},
        )
    load = layout.model_class.from_pretrained
    model, info = load(place, dtype=torch.float32, output_loading_info=True, **more)
    if lost := {kind: sorted(set(info[kind]) - new) for kind in KEYS if set(info[kind]) - new}:
        raise ValueError(f"The check failed: the model does not load whole from the result: {lost}.")
    for name, parameter in model.named_parameters() if dtype is not None else ():
        if not any(part in kept for part in name.split(".")):
            parameter.copy_(parameter.to(dtype))
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
