"""Rodimus and Rodimus+ checkpoints of other libraries: the authors' (codefuse) and fla's.

The tables of names are KEY_NAMES in modeling/modeling_rodimus.py.
"""

from functools import partial
from typing import Any

from scrubjay.configuration.configuration_rodimus import RodimusConfig
from scrubjay.configuration.rodimus_configs import config_for, eights, fields_from, layout_of, their_name
from scrubjay.conversion.formats import Format
from scrubjay.conversion.keymap import Shapes, our_shapes, require
from scrubjay.conversion.reference_rodimus import codefuse_logits, fla_logits
from scrubjay.modeling.key_names import layer_of
from scrubjay.modeling.modeling_rodimus import KEY_NAMES, RodimusForCausalLM

# Fields that no shape tells.
UNSEEN = ("sliding_window", "k_norm_eps", "rms_norm_eps", "rope_theta", "scale_embedding", "tie_word_embeddings")


def sizes_from(layout: str, shapes: Shapes) -> dict[str, Any]:
    """What the shapes of the tensors, by our names, say of a Rodimus model.

    Args:
        layout: the library's. fla's models may be without a convolution.

    Returns: fields of `RodimusConfig`; beside them "inner_size", and for Rodimus+ "key_width" and "value_width", the
        channels of all key heads and of all value heads.

    Raises:
        ValueError: names the tensors that are missing for it or of wrong shapes.
    """
    first = "model.layers.0."
    convolved = layout != "fla" or any("mixer.conv1d." in name for name in shapes)
    parts = ("act_norm.weight", "in_proj.weight", *(["conv1d.weight"] if convolved else []))
    names = {name: f"{first}mixer.{name}" for name in parts}
    names |= {"embedding": "model.embed_tokens.weight", "gate": f"{first}mixer.ch_gate_down.weight"}
    plus = f"{first}attn.q_proj.weight" in shapes
    if plus:
        names |= {name: f"{first}{name}.weight" for name in ("attn.k_proj", "attn.v_proj", "ffn.out_proj")}
    dims = {"act_norm.weight": 1, "conv1d.weight": 3}
    require(shapes, {full: dims.get(name, 2) for name, full in names.items()}, "Rodimus model")
    found = {name: shapes[full] for name, full in names.items()}
    sizes = {
        "block_type": "rodimus_plus" if plus else "rodimus",
        "vocab_size": found["embedding"][0],
        "hidden_size": found["embedding"][1],
        "num_hidden_layers": len({layer_of("model.layers.*.mixer_norm.weight", name) for name in shapes} - {None}),
        "inner_size": found["act_norm.weight"][0],
        "state_size": found["in_proj.weight"][0] // 2,
        "input_gate_rank": found["gate"][0],
        "norm_embedding": "model.embed_norm.weight" in shapes,
    }
    sizes |= {"short_conv": convolved} | ({"conv_kernel": found["conv1d.weight"][2]} if convolved else {})
    if plus:
        sizes |= {"key_width": found["attn.k_proj"][0], "value_width": found["attn.v_proj"][0]}
        sizes["intermediate_size"] = found["ffn.out_proj"][1]
    return sizes


def read_config(layout: str, theirs: dict, shapes: Shapes, settings: dict) -> tuple[RodimusConfig, list[str]]:
    """The configuration that the shapes tell, held against the file's, which tells the rest."""
    sizes = sizes_from(layout, our_shapes(KEY_NAMES[layout], shapes))
    if not theirs:
        fields, notes = _without_file(sizes, "lm_head.weight" in shapes)
    elif layout_of(theirs) != layout:
        raise ValueError(
            f"The configuration is {layout_of(theirs) or 'no Rodimus one'}, and the tensors are named as {layout} "
            "names them. Put the configuration that belongs to these weights beside them, or none."
        )
    else:
        fields = fields_from(theirs, settings)
        notes = [f"sizes: read off the tensors; the configuration ({layout}) agrees"]
    config = RodimusConfig(**fields | settings)
    _refuse_contradictions(layout, config, sizes, settings)
    return config, [*notes, *(_origins(layout, config, theirs, settings) if theirs else ())]


def _refuse_contradictions(layout, config, sizes, settings):
    def said(name):
        if name in ("key_width", "value_width"):
            return config.head_dim * getattr(config, f"num_{name.removesuffix('_width')}_heads")
        return getattr(config, name)

    faults = []
    for name, found in sizes.items():
        if said(name) != found:
            field = {"inner_size": "expand", "key_width": "num_key_heads", "value_width": "num_value_heads"}.get(
                name, name
            )
            who = "the setting says" if field in settings else "the configuration says"
            made = "" if field == name else f" {getattr(config, field)!r}, which makes {name}"
            faults.append(f"{who} {their_name(layout, field)}{made} {said(name)!r}, the tensors say {found!r}")
    if faults:
        raise ValueError(f"The configuration contradicts the tensors: {'; '.join(faults)}.")


def _origins(layout, config, theirs, settings):
    """In words, where the values of `UNSEEN` come from: one line for each origin."""

    def origin(name):
        *part, last = their_name(layout, name).split(".")
        told = last in ((theirs.get(part[0]) or {}) if part else theirs)
        return "given" if name in settings else "as the configuration says" if told else "the default"

    seen = [name for name in UNSEEN if name not in ("sliding_window", "rope_theta") or config.has_attention]
    for kind in ("given", "as the configuration says", "the default"):
        if values := [f"{name} {getattr(config, name)}" for name in seen if origin(name) == kind]:
            yield f"{', '.join(values)}: {kind}"


def _without_file(sizes, has_head):
    fields = {name: value for name, value in sizes.items() if name not in ("inner_size", "key_width", "value_width")}
    hidden, inner = sizes["hidden_size"], sizes["inner_size"]
    fields["expand"] = 2 if inner == eights(2 * hidden) else inner / hidden
    fields["tie_word_embeddings"] = not has_head
    notes = [
        "sizes: read off the tensors; there is no configuration file",
        f"tie_word_embeddings {not has_head}: the checkpoint has {'a' if has_head else 'no'} head of its own",
        "norms' eps, k_norm_eps, scale_embedding, token ids: the defaults of this library, which shapes do not tell",
    ]
    if fields["block_type"] == "rodimus_plus":
        width = sizes["key_width"]
        fields |= {"num_attention_heads": hidden // width, "num_value_heads": sizes["value_width"] // width}
        notes.append("num_key_heads 1: as in the published models; shapes tell only the width of all key heads")
        notes.append("sliding_window and positions: the defaults of this library, which shapes do not tell")
    return fields, notes


def _layout(name, marker, looks_for, logits):
    return Format(
        name=name,
        family="rodimus",
        model_class=RodimusForCausalLM,
        looks_for=looks_for,
        recognises=lambda config, shapes: f"model.layers.0.mixer.{marker}" in shapes,
        read_config=partial(read_config, name),
        write_config=partial(config_for, name),
        rows=lambda config: KEY_NAMES[name],
        reference=logits,
    )


RODIMUS = (
    _layout(
        "codefuse",
        "inner_mixer.in_proj.weight",
        "tensors model.layers.0.mixer.inner_mixer.in_proj.weight; d_model, mixer_cfg, attn_cfg",
        codefuse_logits,
    ),
    _layout(
        "fla",
        "g_gate_proj.weight",
        "tensors model.layers.0.mixer.g_gate_proj.weight; model_type rodimus and expand_ratio",
        fla_logits,
    ),
)
