"""Decoders of transformers (Llama, Qwen2, Qwen3, Mistral) to ADORE and Recycled Attention, and back.

The weights have the decoder's own names on both sides and stay as they are, bit by bit. ADORE's controller is new: it
starts from its initial values, which a seed makes the same every time, and is left out on the way back.
"""

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig

from scrubjay.configuration.configuration_adore import AdoreConfig
from scrubjay.configuration.configuration_recycled import RecycledConfig
from scrubjay.configuration.configuration_wrapped import BASES, WrappedConfig
from scrubjay.conversion.checkpoint import Checkpoint
from scrubjay.conversion.formats import Format
from scrubjay.conversion.keymap import Shapes, require
from scrubjay.modeling.decoder.attached import decoder_of
from scrubjay.modeling.key_names import Copy, Ignore, New, Row, same
from scrubjay.modeling.modeling_adore import AdoreForCausalLM, AdoreModel
from scrubjay.modeling.modeling_recycled import RecycledForCausalLM

SEED = 0
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BASE_SETTINGS = ("sliding_window", "tie_word_embeddings")
CONTROLLER = "model.controller."
ROTARY = Ignore("model.layers.*.self_attn.rotary_emb.inv_freq", "a buffer of older versions of transformers")


def sizes_from(shapes: Shapes) -> dict[str, Any]:
    """What the shapes of the tensors say of a decoder.

    Returns: fields of its configuration; beside them "query_width" and "key_width", the channels of all query heads and
        of all key heads.

    Raises:
        ValueError: names the tensors that are missing for it or of wrong shapes.
    """
    first = "model.layers.0."
    names = [EMBEDDING, *(f"{first}{name}_proj.weight" for name in ("self_attn.q", "self_attn.k", "mlp.gate"))]
    require(shapes, dict.fromkeys(names, 2), f"decoder of {', '.join(BASES)}")
    vocabulary, query, key, gate = (shapes[name] for name in names)
    return {
        "vocab_size": vocabulary[0],
        "hidden_size": vocabulary[1],
        "num_hidden_layers": len({name.split(".")[2] for name in shapes if name.startswith("model.layers.")}),
        "intermediate_size": gate[0],
        "query_width": query[0],
        "key_width": key[0],
    }


def read_config(
    config_class: type[WrappedConfig], theirs: dict, shapes: Shapes, settings: dict
) -> tuple[PreTrainedConfig, list[str]]:
    """The decoder's configuration, held against the shapes, inside one of ours. Of the decoder's own, `settings` may
    change `BASE_SETTINGS`.

    Raises:
        ValueError: no configuration, one that contradicts the shapes, a decoder with a window of its own, a setting of
            a field that the decoder does not have.
    """
    sizes = sizes_from(shapes)
    if not theirs:
        raise ValueError(
            "There is no config.json, and shapes do not tell a decoder's heads and positions. Put the decoder's beside "
            f"the weights: one of model_type {', '.join(BASES)}."
        )
    own = {name: value for name, value in settings.items() if name not in BASE_SETTINGS}
    base = _base(theirs, settings)
    decoder_of(SimpleNamespace(config=base))
    head = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
    widths = {"query_width": head * base.num_attention_heads, "key_width": head * base.num_key_value_heads}
    names = {"query_width": "num_attention_heads times the size of a head", "key_width": "num_key_value_heads times it"}
    if faults := [
        f"the configuration says {names.get(name, name)} {said!r}, the tensors say {found!r}"
        for name, found in sizes.items()
        if (said := widths.get(name) or getattr(base, name)) != found
    ]:
        raise ValueError(f"The configuration contradicts the tensors: {'; '.join(faults)}.")
    config = config_class(base_config=base, **own)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config_class)}
    defaults = {name: fields[name] for name in fields if name in _own_fields(config_class) and name not in own}
    said = ", ".join(f"{name} {value!r}" for name, value in defaults.items())
    changed = ", ".join(f"{name} {value!r}" for name, value in settings.items() if name in BASE_SETTINGS)
    stays = f"the decoder's configuration, {theirs['model_type']}, stays as it is"
    notes = [f"{stays} but for {changed}" if changed else stays, f"the defaults: {said}"]
    if config_class is AdoreConfig:
        notes.append("the controller is new, with initial values: train one and give it to set_controller")
    return config, notes


def write_config(config: PreTrainedConfig) -> dict[str, Any]:
    """The decoder's own."""
    base = config.base_config
    return base.to_diff_dict() | {"architectures": [_class_of(base).__name__], "model_type": base.model_type}


def key_names(model_class: Any, config: PreTrainedConfig) -> tuple[Row, ...]:
    """Rows of the decoder that a configuration of ours holds."""
    with torch.device("meta"):
        names = list(model_class(config).state_dict())
    new = [name for name in names if name.startswith(CONTROLLER)]
    copy = Copy(HEAD, EMBEDDING, written=False)
    reason = "ADORE's controller, which the decoder does not have"
    return (*same(*(n for n in names if n not in new)), copy, ROTARY, *(New(name, reason) for name in new))


def new_controller(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Initial values of ADORE's controller, by our names, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        with torch.device("meta"):
            model = AdoreModel(config)
        controller = type(model.controller)(**model.controller.sizes)
    return {f"{CONTROLLER}{name}": tensor for name, tensor in controller.state_dict().items()}


def _base(theirs, settings):
    """The decoder's own configuration, with what `settings` change of it."""
    changed = {name: settings[name] for name in BASE_SETTINGS if name in settings}
    config_class = CONFIG_MAPPING[theirs["model_type"]]
    if absent := sorted(set(changed) - {field.name for field in dataclasses.fields(config_class)}):
        raise ValueError(f"{', '.join(absent)}: no such field in {config_class.__name__}.")
    if (window := changed.get("sliding_window")) is not None:
        raise ValueError(f"sliding_window may be set to None alone, which takes a decoder's own off; got {window!r}.")
    return config_class.from_dict(theirs | changed)


def _class_of(base):
    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(base))


@torch.no_grad()
def decoder_logits(checkpoint: Checkpoint, ids: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """(B, T) ids to (B, T, V) logits by transformers' own model in float32, of the checkpoint's tensors."""
    base = _base(checkpoint.config, settings)
    tensors = {name: checkpoint.read(name) for name in checkpoint.shapes}
    model = _class_of(base).from_pretrained(None, config=base, state_dict=tensors, dtype=torch.float32)
    return model.eval()(ids, use_cache=False).logits


@torch.no_grad()
def loaded(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """(B, T) ids to (B, T, V) logits of what transformers makes of a folder, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()(ids, use_cache=False).logits


def _own_fields(config_class):
    inherited = {field.name for field in dataclasses.fields(WrappedConfig)}
    return {field.name for field in dataclasses.fields(config_class)} - inherited


def _layout(family, config_class, model_class, initial=None):
    def recognises(config, shapes):
        decoder = EMBEDDING in shapes and "model.layers.0.self_attn.q_proj.weight" in shapes
        return decoder and (not config or config.get("model_type") in BASES)

    return Format(
        name="transformers",
        family=family,
        model_class=model_class,
        looks_for=f"model_type {', '.join(BASES)} and tensor {EMBEDDING}",
        recognises=recognises,
        read_config=partial(read_config, config_class),
        write_config=write_config,
        rows=partial(key_names, model_class),
        reference=decoder_logits,
        loaded=loaded,
        more_settings=BASE_SETTINGS,
        initial=initial,
    )


DECODERS = (
    _layout("adore", AdoreConfig, AdoreForCausalLM, new_controller),
    _layout("recycled", RecycledConfig, RecycledForCausalLM),
)
