"""What a converter has to know of one layout of checkpoints. Each convert_*.py gives its own as `FORMATS`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig

from scrubjay.conversion.checkpoint import Checkpoint
from scrubjay.conversion.keymap import Shapes
from scrubjay.modeling.key_names import Row


@dataclass(frozen=True)
class Format:
    """One layout of the checkpoints of one model of the zoo.

    Attributes:
        name: as in `--to`.
        family: the model of the zoo, as in its model_type: "ssd", "rodimus", "adore", "recycled".
        model_class: the model with its head, in the zoo.
        looks_for: what `recognises` looks for, in words.
        recognises: whether a checkpoint is of this layout, by its configuration (empty where there is none) and shapes.
        read_config: (configuration, shapes, settings) -> our configuration, and what was taken from where in words.
            `settings` are fields of ours that the user gives. Raises ValueError where the configuration and the shapes
            contradict each other, with both values, or where the model cannot express what is asked for.
        write_config: (our configuration) -> theirs. Raises ValueError for what they cannot express. None: not written.
        rows: (our configuration) -> names of the tensors.
        weights: "safetensors", "bin" (pickled) or "consolidated" (one file of safetensors): how theirs are stored.
        config_name: file of the configuration.
        reference: (checkpoint, ids (B, T), settings) -> (B, T, V) logits by another implementation, which reads the
            checkpoint's own names and not `rows`. `settings` as for `read_config`: they hold before what the
            configuration says. None: there is none.
        loaded: (folder, ids (B, T)) -> (B, T, V) logits, in float32, of what the other library's own `from_pretrained`
            makes of a folder that was written. None: that library is not at hand, and `reference` has to do.
        remarks: (our configuration) -> what to say, in words, of a folder of this layout that is written of it.
        more_settings: names that `settings` may have beside the fields of our configuration.
        initial: (our configuration) -> values of the tensors that they do not have, by our names.
    """

    name: str
    family: str
    model_class: Any
    looks_for: str
    recognises: Callable[[dict, Shapes], bool]
    read_config: Callable[[dict, Shapes, dict], tuple[PreTrainedConfig, list[str]]]
    write_config: Callable[[PreTrainedConfig], dict] | None
    rows: Callable[[PreTrainedConfig], tuple[Row, ...]]
    weights: str = "safetensors"
    config_name: str = "config.json"
    reference: Callable[[Checkpoint, torch.Tensor, dict[str, Any]], torch.Tensor] | None = None
    loaded: Callable[[Path, torch.Tensor], torch.Tensor] | None = None
    remarks: Callable[[PreTrainedConfig], list[str]] | None = None
    more_settings: tuple[str, ...] = ()
    initial: Callable[[PreTrainedConfig], dict[str, torch.Tensor]] | None = None
