"""Rodimus configurations as other libraries write them, to and from the fields of `RodimusConfig`.

    codefuse   the authors' (codefuse-ai/rodimus): d_model, n_layer, mixer_cfg, attn_cfg
    fla        flash-linear-attention: model_type "rodimus", hidden_size, ska_attn; expand_ratio is the state's size

A field that a file leaves out has the default of the library that reads such files. What this model does not compute
is refused, by name. The authors' `window_size` W lets a query see W // 2 + 1 keys, fla's w lets it see w.
"""

import dataclasses
from collections.abc import Container
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

# For each of our fields: their name and their default.
Table = dict[str, tuple[str, Any]]

GENERIC: Table = {
    "initializer_range": ("initializer_range", 0.02),
    "max_position_embeddings": ("max_position_embeddings", 2048),
    "residual_in_fp32": ("residual_in_fp32", True),
    "use_cache": ("use_cache", True),
    "pad_token_id": ("pad_token_id", None),
}
TABLES: dict[str, Table] = {
    "codefuse": GENERIC
    | {
        "block_type": ("block_type", "rodimus"),
        "vocab_size": ("vocab_size", 50277),
        "hidden_size": ("d_model", 2048),
        "num_hidden_layers": ("n_layer", 24),
        "rms_norm_eps": ("norm_epsilon", 1e-5),
        "rescale_prenorm_residual": ("rescale_prenorm_residual", True),
        "hidden_dropout": ("dropout", 0.0),
        "activation_dropout": ("activation_dropout", 0.0),
        "attention_dropout": ("attention_dropout", 0.0),
        "scale_embedding": ("use_scale_embedding", False),
        "norm_embedding": ("use_norm_embedding", False),
        "tie_word_embeddings": ("tie_word_embeddings", False),
        "bos_token_id": ("bos_token_id", 0),
        "eos_token_id": ("eos_token_id", 0),
    },
    "fla": GENERIC
    | {
        "block_type": ("block_type", "rodimus_plus"),
        "vocab_size": ("vocab_size", 126464),
        "hidden_size": ("hidden_size", 2048),
        "num_hidden_layers": ("num_hidden_layers", 24),
        "rms_norm_eps": ("norm_eps", 1e-5),
        "tie_word_embeddings": ("tie_word_embeddings", True),
        "bos_token_id": ("bos_token_id", 126080),
        "eos_token_id": ("eos_token_id", 126081),
    },
}
# Of the mixer: the authors' `mixer_cfg`, and fla's configuration itself.
MIXER: dict[str, Table] = {
    "codefuse": {
        "state_size": ("mem_size", 64),
        "expand": ("expand_ratio", 2),
        "conv_kernel": ("d_conv", 4),
        "input_gate_rank": ("input_gate_low_rank", "auto"),
        "k_norm_eps": ("normalize_epsilon", None),
    },
    "fla": {
        "state_size": ("expand_ratio", 64),
        "conv_kernel": ("conv_size", 4),
        "short_conv": ("use_short_conv", True),
        "input_gate_rank": ("input_gate_low_rank", "auto"),
        "k_norm_eps": ("k_norm_eps", None),
    },
}
# Of the window attention: the authors' `attn_cfg`, fla's `ska_attn`.
ATTENTION: dict[str, Table] = {
    "codefuse": {
        "num_attention_heads": ("num_heads", None),
        "num_key_heads": ("num_heads_k", None),
        "num_value_heads": ("num_heads_v", None),
        "sliding_window": ("window_size", None),
        "rope_theta": ("rotary_emb_base", 10000.0),
        "rotary_dim": ("rotary_emb_dim", -1),
        "rope_interleaved": ("rotary_emb_interleaved", False),
    },
    "fla": {
        "num_attention_heads": ("num_heads", None),
        "sliding_window": ("window_size", 1024),
        "rope_theta": ("rope_theta", 10000.0),
    },
}
PARTS = {"codefuse": ("mixer_cfg", "attn_cfg"), "fla": (None, "ska_attn")}
# Theirs, where only some values are what this model computes.
ONLY: dict[str, dict[str, tuple]] = {
    "codefuse": {},
    "fla": {"attn": (None,), "hidden_act": ("swish", "silu")},
}
ATTENTION_ONLY: dict[str, dict[str, tuple]] = {
    "codefuse": {"softmax_scale": (None,), "rotary_emb_scale_base": (None,)},
    "fla": {"qkv_bias": (False,), "qk_norm": (False,)},
}
# Of no effect on results, or read apart: the way in which the same sums are taken, and the feed-forward width.
MIXER_IGNORED = ("mode", "post_norm_epsilon")
ATTENTION_IGNORED = {"codefuse": ("ffn_expand_ratio",), "fla": ()}
FIRST_K_NORM_EPS = 1e-12  # both libraries', where no value is given


def layout_of(theirs: dict) -> str | None:
    """Which library wrote a configuration; None where it is not one of Rodimus that is known."""
    kind = theirs.get("model_type", "rodimus")
    if (
        kind == "rodimus"
        and "d_model" in theirs
        and "n_layer" in theirs
        and ({"mixer_cfg", "block_type"} & set(theirs))
    ):
        return "codefuse"
    if kind == "rodimus" and "hidden_size" in theirs and "expand_ratio" in theirs:
        return "fla"
    return None


def fields_from(theirs: dict, given: Container[str]) -> dict[str, Any]:
    """Fields of `RodimusConfig` from a configuration that `layout_of` knows.

    Args:
        given: names of fields that the user sets, which are not among those returned where they have no value here.

    Raises:
        ValueError: what this model does not compute: other attention layers, biases or norms of queries and keys,
            other scales; a window that holds everything, where `given` has no `sliding_window`.
    """
    layout = layout_of(theirs)
    assert layout is not None, "ask layout_of first"
    mixer, attention = (theirs if part is None else theirs.get(part) or {} for part in PARTS[layout])
    _refuse(theirs, ONLY[layout], "")
    _refuse(attention, ATTENTION_ONLY[layout], f"{PARTS[layout][1]}.")
    _refuse_unknown(layout, mixer, attention)
    generic = {field.name for field in dataclasses.fields(PreTrainedConfig)} | {"torch_dtype", "quantization_config"}
    fields = {name: theirs[name] for name in generic - {"model_type", "architectures"} if name in theirs}
    fields |= _read(TABLES[layout], theirs) | _read(MIXER[layout], mixer) | _read(ATTENTION[layout], attention)
    fields["input_gate_rank"] = _rank(fields["input_gate_rank"])
    if fields["k_norm_eps"] is None:
        fields["k_norm_eps"] = FIRST_K_NORM_EPS
    fields["sliding_window"] = _window(layout, fields, given)
    fields["intermediate_size"] = _width(layout, theirs, attention, fields["hidden_size"])
    if (fields.get("rotary_dim") or 0) < 0:
        fields["rotary_dim"] = None
    if fields["num_attention_heads"] is None and layout == "codefuse":
        fields["num_attention_heads"] = fields["hidden_size"] // 128 or None
    unset = ("sliding_window", "num_key_heads", "num_value_heads")
    return {name: value for name, value in fields.items() if value is not None or name not in unset}


def config_for(layout: str, config: Any) -> dict[str, Any]:
    """A `RodimusConfig` as another library's configuration.

    Raises:
        ValueError: lists the fields that it cannot express.
    """
    ours = config.to_dict()
    default_rank = config.input_gate_rank == max(config.hidden_size // 64, 16)
    changed = {
        "max_position_embeddings": ours.get("max_position_embeddings", 2048),
        "input_gate_rank": "auto" if default_rank else config.input_gate_rank,
    }
    if layout == "codefuse":
        changed["sliding_window"] = 2 * (config.sliding_window - 1)
    table, mixer, attention = (
        {name: changed.get(field, ours.get(field)) for field, (name, _) in part[layout].items()}
        for part in (TABLES, MIXER, ATTENTION)
    )
    refused = _not_in_codefuse(config) if layout == "codefuse" else _not_in_fla(config)
    if refused:
        raise ValueError(f"{layout} cannot express this model: {'; '.join(refused)}. Nothing was written.")
    theirs = {"architectures": ["RodimusForCausalLM"], "model_type": "rodimus"} | table
    if layout == "codefuse":
        attention["ffn_expand_ratio"] = _ratio(config)
        return theirs | {"mixer_cfg": mixer | {"mode": "fused_chunk"}, "attn_cfg": attention}
    # its blocks hand the residual stream on only if both of its flags agree
    flags = {"block_residual_in_fp32": config.residual_in_fp32, "attn_mode": "chunk", "attn": None}
    theirs |= mixer | flags | {"intermediate_size": config.intermediate_size}
    return theirs | {"ska_attn": attention | {"qkv_bias": False, "qk_norm": False} if config.has_attention else None}


def their_name(layout: str, field: str) -> str:
    """What another library calls a field of ours."""
    mixer, attention = PARTS[layout]
    for table, part in ((TABLES, None), (MIXER, mixer), (ATTENTION, attention)):
        if field in table[layout]:
            name = table[layout][field][0]
            return name if part is None else f"{part}.{name}"
    return "attn_cfg.ffn_expand_ratio" if (layout, field) == ("codefuse", "intermediate_size") else field


def eights(value: int) -> int:
    """Rounded up to a multiple of 8, as all three do with the mixer's and the feed-forward network's width."""
    return -(-value // 8) * 8


def _read(table, theirs):
    fields = {ours: theirs.get(name, default) for ours, (name, default) in table.items()}
    real = {ours for ours, (_, default) in table.items() if isinstance(default, float)}
    return {name: float(value) if name in real and value is not None else value for name, value in fields.items()}


def _refuse(theirs, only, where):
    for name, allowed in only.items():
        if theirs.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"{where}{name} is {theirs[name]!r} in the configuration; this model computes {allowed[0]!r} alone. "
                "It cannot hold this checkpoint."
            )


def _refuse_unknown(layout, mixer, attention):
    """The authors' parts are arguments of their layers: nothing in them is without a meaning."""
    if layout == "fla":
        return
    known = ({name for name, _ in MIXER[layout].values()}.union(MIXER_IGNORED), mixer, "mixer_cfg")
    names = {name for name, _ in ATTENTION[layout].values()} | set(ATTENTION_ONLY[layout])
    for allowed, found, part in (known, (names.union(ATTENTION_IGNORED[layout]), attention, "attn_cfg")):
        if unknown := sorted(set(found) - allowed):
            raise ValueError(
                f"{part} has fields of unknown meaning: {', '.join(unknown)}. Known are {sorted(allowed)}."
            )


def _rank(value):
    if value is None or value == "auto":
        return None
    try:
        rank = float(value)
    except (TypeError, ValueError):
        rank = 0.5
    if rank % 1 or rank < 1:
        raise ValueError(f'input_gate_low_rank must be a whole number of at least 1, or "auto"; got {value!r}.')
    return int(rank)


def _window(layout, fields, given):
    window = fields["sliding_window"]
    if fields["block_type"] != "rodimus_plus":
        return None
    if window is None or window < 1:
        if "sliding_window" in given:
            return None
        raise ValueError(
            f"window_size is {window!r} in the configuration: queries see all keys, for which this model has no cache "
            "of constant size. Give sliding_window, the number of keys that a query is to see."
        )
    return window // 2 + 1 if layout == "codefuse" else window


def _width(layout, theirs, attention, hidden):
    """Of the feed-forward network."""
    if layout == "fla" and theirs.get("intermediate_size") is not None:
        return theirs["intermediate_size"]
    ratio = attention.get("ffn_expand_ratio") if layout == "codefuse" else theirs.get("hidden_ratio")
    return eights(int(hidden * (4 / 3 if ratio is None else ratio)))


def _ratio(config):
    """Their ratio of the feed-forward width, from which they compute the width again."""
    width, hidden = config.intermediate_size, config.hidden_size
    return 4 / 3 if eights(int(hidden * 4 / 3)) == width else width / hidden


def _ablated(config, layout):
    """Reasons: parts of the model that are switched off, and that the library always has."""
    known = set(MIXER[layout])
    return [
        f"{name} is {getattr(config, name)!r} ({words}), for which its code has no switch"
        for name, words in config.ablations.items()
        if name not in known
    ]


def _not_in_codefuse(config):
    refused = _ablated(config, "codefuse")
    if config.has_attention and config.sliding_window == 1:
        refused.append("sliding_window is 1, and its windows hold at least 2 keys")
    if config.has_attention and eights(int(config.hidden_size * _ratio(config))) != config.intermediate_size:
        refused.append(f"intermediate_size is {config.intermediate_size}, and its widths are multiples of 8")
    return refused


def _not_in_fla(config):
    wanted = {"scale_embedding": False, "norm_embedding": False, "inner_size": eights(2 * config.hidden_size)}
    wanted |= dict.fromkeys(("hidden_dropout", "activation_dropout", "attention_dropout"), 0.0)
    if config.has_attention:
        wanted |= {"num_key_heads": 1, "num_value_heads": config.num_attention_heads}
        wanted |= {"rotary_dim": config.head_dim, "rope_interleaved": False}
    return _ablated(config, "fla") + [
        f"{name} is {getattr(config, name)}, it has {v}" for name, v in wanted.items() if getattr(config, name) != v
    ]
