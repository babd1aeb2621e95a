"""Mamba-2 configurations as other libraries write them, to and from the fields of `SSDConfig`.

    mamba_ssm      the authors' (state-spaces/mamba): d_model, n_layer, ssm_cfg
    codestral      Mistral's params.json: dim, n_layers, n_groups
    fla            flash-linear-attention: model_type "mamba2" and norm_eps
    transformers   model_type "mamba2"

A field that a file leaves out has the default of the library that reads such files. What this model does not compute
is refused, by name. Chunk sizes are not carried over: they suit each library's kernels and never change a result.
"""

import dataclasses
import math
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from scrubjay.configuration.ssd_attention import attention_sizes

# For each of our fields: their name and their default.
Table = dict[str, tuple[str, Any]]

SIZES: Table = {
    "conv_kernel": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "head_dim": ("head_dim", 64),
    "state_size": ("state_size", 128),
    "use_bias": ("use_bias", False),
    "use_conv_bias": ("use_conv_bias", True),
    "hidden_act": ("hidden_act", "silu"),
    "residual_in_fp32": ("residual_in_fp32", True),
    "use_cache": ("use_cache", True),
    "tie_word_embeddings": ("tie_word_embeddings", False),
}
TABLES: dict[str, Table] = {
    "transformers": SIZES
    | {
        "vocab_size": ("vocab_size", 32768),
        "hidden_size": ("hidden_size", 4096),
        "num_hidden_layers": ("num_hidden_layers", 64),
        "num_heads": ("num_heads", 128),
        "n_groups": ("n_groups", 8),
        "layer_norm_epsilon": ("layer_norm_epsilon", 1e-5),
        "initializer_range": ("initializer_range", 0.1),
        "rescale_prenorm_residual": ("rescale_prenorm_residual", False),
        "time_step_limit": ("time_step_limit", None),
        "time_step_min": ("time_step_min", 0.001),
        "time_step_max": ("time_step_max", 0.1),
        "time_step_floor": ("time_step_floor", 1e-4),
        "pad_token_id": ("pad_token_id", 1),
        "bos_token_id": ("bos_token_id", 0),
        "eos_token_id": ("eos_token_id", 2),
    },
    "fla": SIZES
    | {
        "vocab_size": ("vocab_size", 32000),
        "hidden_size": ("hidden_size", 2048),
        "num_hidden_layers": ("num_hidden_layers", 48),
        "n_groups": ("n_groups", 1),
        "layer_norm_epsilon": ("norm_eps", 1e-5),
        "initializer_range": ("initializer_range", 0.02),
        "rescale_prenorm_residual": ("rescale_prenorm_residual", True),
        "A_initializer_range": ("A_init_range", (1.0, 16.0)),
        "time_step_limit": ("dt_limit", None),
        "time_step_min": ("dt_min", 0.001),
        "time_step_max": ("dt_max", 0.1),
        "time_step_floor": ("dt_init_floor", 1e-4),
        "pad_token_id": ("pad_token_id", 0),
        "bos_token_id": ("bos_token_id", 1),
        "eos_token_id": ("eos_token_id", 2),
    },
    "mamba_ssm": {
        "vocab_size": ("vocab_size", 50277),
        "hidden_size": ("d_model", 2560),
        "num_hidden_layers": ("n_layer", 64),
        "residual_in_fp32": ("residual_in_fp32", True),
        "tie_word_embeddings": ("tie_embeddings", True),
        "intermediate_size": ("d_intermediate", 0),
        "attn_layer_idx": ("attn_layer_idx", []),
        "attn_cfg": ("attn_cfg", {}),
    },
    "codestral": {
        "vocab_size": ("vocab_size", 32768),
        "hidden_size": ("dim", 4096),
        "num_hidden_layers": ("n_layers", 64),
        "n_groups": ("n_groups", 8),
        "residual_in_fp32": ("residual_in_fp32", True),
        "tie_word_embeddings": ("tie_embeddings", False),
    },
}
# mamba_ssm's `ssm_cfg`, whose defaults hold for Mistral's files too
MIXER: Table = {
    "state_size": ("d_state", 128),
    "conv_kernel": ("d_conv", 4),
    "expand": ("expand", 2),
    "head_dim": ("headdim", 64),
    "n_groups": ("ngroups", 1),
    "use_bias": ("bias", False),
    "use_conv_bias": ("conv_bias", True),
    "A_initializer_range": ("A_init_range", (1.0, 16.0)),
    "time_step_limit": ("dt_limit", None),
    "time_step_min": ("dt_min", 0.001),
    "time_step_max": ("dt_max", 0.1),
    "time_step_floor": ("dt_init_floor", 1e-4),
}
# What the constructor of mamba_ssm's attention takes where `attn_cfg` says nothing, and this library takes otherwise.
ATTENTION = {"causal": False, "d_conv": 0, "out_proj_bias": True, "qkv_proj_bias": True, "rotary_emb_dim": 0}
BESIDE = {"attn_layer_idx": "its Mamba-2 has no attention layers", "intermediate_size": "its Mamba-2 has no MLPs"}
# Theirs, where only one value is what this model computes. transformers writes norm_before_gate and does not read it.
ONLY: dict[str, dict[str, Any]] = {
    "mamba_ssm": {"rms_norm": True},
    "codestral": {"rms_norm": True},
    "fla": {"rms_norm": True},
    "transformers": {},
}
# What the authors' mixer can be beside, and published checkpoints do without: what it is here, and what it would be.
VARIANTS: dict[str, tuple[Any, str]] = {
    "d_ssm": (
        None,
        "the mixer would have an MLP inside, of channels that no state sees (intermediate_size: behind it)",
    ),
    "D_has_hdim": (False, "D would be a number for each channel, it is one for each head"),
    "rmsnorm": (True, "the norm behind the gate would be left out"),
    "norm_before_gate": (False, "the norm would stand before the gate, it stands behind"),
}
MIXER_IGNORED = ("layer", "chunk_size", "use_mem_eff_path", "conv_init", "sequence_parallel", "process_group")
OLD_FLA = {"time_step_limit", "time_step_min", "time_step_max", "time_step_floor"}  # as in transformers, once
PASSED = {"torch_dtype", "quantization_config"}  # for from_pretrained
NO_LIMIT = (0.0, math.inf)


def layout_of(theirs: dict) -> str | None:
    """Which library wrote a configuration; None where it is not one of Mamba-2 that is known."""
    if "d_model" in theirs and "n_layer" in theirs and "mixer_cfg" not in theirs:
        return "mamba_ssm"
    if "dim" in theirs and "n_layers" in theirs and theirs.get("model_type", "mamba") == "mamba":
        return "codestral"
    if theirs.get("model_type") == "mamba2":
        return "fla" if "norm_eps" in theirs else "transformers"
    return None


def fields_from(theirs: dict) -> dict[str, Any]:
    """Fields of `SSDConfig` from a configuration that `layout_of` knows.

    Raises:
        ValueError: what this model does not compute: Mamba-1, other norms, attention that is not as its authors'.
    """
    layout = layout_of(theirs)
    assert layout is not None, "ask layout_of first"
    for name, value in ONLY[layout].items():
        if theirs.get(name, value) != value:
            raise ValueError(
                f"{name} is {theirs[name]!r} in the configuration; this model computes {value!r} alone. It cannot hold "
                "this checkpoint."
            )
    if layout == "fla":
        refuse_variants(theirs)
    if layout == "fla" and theirs.get("n_groups", 1) != 1:
        raise ValueError(
            f"n_groups is {theirs['n_groups']}: fla normalises the channels of all groups together; this model, as the "
            "authors', normalises each group and would give other logits."
        )
    generic = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"model_type", "architectures"}
    fields = {name: theirs[name] for name in generic | PASSED if name in theirs}
    if layout == "mamba_ssm":
        fields |= _read(MIXER, theirs.get("ssm_cfg") or {})
    elif layout == "codestral":
        fields |= _read(MIXER, {}) | {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    fields |= _read(TABLES[layout], theirs)
    if layout == "fla":
        fields |= {name: theirs[name] for name in OLD_FLA if name in theirs}
    multiple = theirs.get("pad_vocab_size_multiple", 8 if layout == "mamba_ssm" else 1)
    fields["vocab_size"] = -(-fields["vocab_size"] // multiple) * multiple
    return fields | _hybrid(theirs, fields) if layout == "mamba_ssm" else fields


def refuse_variants(given: dict, where: str = "") -> None:
    """Refuse what the authors' mixer can be and this one is not.

    Raises:
        ValueError: which, and what it would mean.
    """
    for name, (value, why) in VARIANTS.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"{where}{name} is {given[name]!r}: {why}. The published checkpoints do without it, and "
                f"this model computes {value!r} alone."
            )


def config_for(layout: str, config: Any) -> dict[str, Any]:
    """An `SSDConfig` as another library's configuration.

    Raises:
        ValueError: lists the fields that it cannot express.
    """
    table = TABLES[layout]
    theirs = {name: getattr(config, ours) for ours, (name, _) in table.items()}
    if layout in ("fla", "transformers"):
        theirs |= {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], "chunk_size": 256}
        fixed: dict[str, Any] = {"expand": int(config.expand)}
        if layout == "fla":  # its norm takes all channels together; the second name is what its older versions read
            fixed["n_groups"] = 1
            theirs |= {"time_step_limit": config.time_step_limit, "num_heads": config.num_heads}
        # transformers' class rescales weights that it has loaded where this is true: a folder for it says false, and
        # one for fla, which that class reads where fla is absent, leaves fla's default unsaid
        if layout == "transformers":
            theirs["rescale_prenorm_residual"] = False
        elif config.rescale_prenorm_residual:
            del theirs["rescale_prenorm_residual"]
    else:
        theirs |= {"rms_norm": True, "fused_add_norm": True}
        theirs["pad_vocab_size_multiple"] = next(m for m in (16, 8, 1) if config.vocab_size % m == 0)
        fixed = {"layer_norm_epsilon": 1e-5}
        mixer = {name: getattr(config, ours) for ours, (name, _) in MIXER.items()}
        defaults = _mixer_defaults()
        if layout == "mamba_ssm":
            changed = {ours: mixer[name] for ours, (name, _) in MIXER.items() if mixer[name] != defaults[ours]}
            cfg = {"layer": "Mamba2"} | {MIXER[ours][0]: value for ours, value in changed.items()}
            theirs["ssm_cfg"] = cfg
        else:
            theirs["model_type"] = "mamba"
            initial = ("A_initializer_range", "time_step_min", "time_step_max", "time_step_floor", "n_groups")
            fixed |= {name: value for name, value in defaults.items() if name not in initial}
    wrong = [
        f"{name} is {getattr(config, name)}, it has {v}" for name, v in fixed.items() if getattr(config, name) != v
    ]
    if layout != "mamba_ssm":
        wrong += [f"{name} is {getattr(config, name)}, {why}" for name, why in BESIDE.items() if getattr(config, name)]
    if wrong:
        raise ValueError(f"{layout} cannot express this model: {'; '.join(wrong)}. Nothing was written.")
    return theirs


def their_name(layout: str, field: str) -> str:
    """What another library calls a field of ours."""
    return (MIXER | TABLES[layout] if layout in ("mamba_ssm", "codestral") else TABLES[layout]).get(field, (field,))[0]


def _hybrid(theirs, fields):
    """What mamba_ssm has beside Mamba-2: attention layers in the place of some, MLPs behind all."""
    places, hidden = sorted(set(fields["attn_layer_idx"] or ())), fields["hidden_size"]
    if len(places) < fields["num_hidden_layers"]:  # or there is no Mamba layer of either kind
        _check_mixer(theirs.get("ssm_cfg") or {})
    width = fields["intermediate_size"]
    attention = theirs.get("attn_cfg") or {}
    if places and "num_heads" not in attention:
        raise ValueError("attn_cfg has no num_heads, and mamba_ssm has no default for it. Add it to the configuration.")
    return {
        "attn_layer_idx": places,
        "attn_cfg": attention_sizes(ATTENTION | attention, hidden) if places else {},
        "intermediate_size": int(8 * hidden / 3) if width is None else width,
    }


def _read(table, theirs):
    return {ours: theirs.get(name, default) for ours, (name, default) in table.items()}


def _mixer_defaults():
    """By our names, as `SSDConfig` holds them."""
    defaults = {ours: default for ours, (_, default) in MIXER.items()}
    return defaults | {"time_step_limit": list(NO_LIMIT), "A_initializer_range": list(defaults["A_initializer_range"])}


def _check_mixer(mixer):
    if mixer.get("layer", "Mamba1") != "Mamba2":
        raise ValueError(
            f"ssm_cfg.layer is {mixer.get('layer', 'Mamba1')!r} in the configuration (where nothing is given it is "
            '"Mamba1"); this model is "Mamba2" and cannot hold this checkpoint.'
        )
    refuse_variants(mixer, "ssm_cfg.")
    known = {name for name, _ in MIXER.values()} | set(VARIANTS) | set(MIXER_IGNORED)
    if unknown := sorted(set(mixer) - known):
        raise ValueError(f"ssm_cfg has fields of unknown meaning: {', '.join(unknown)}. Known are {sorted(known)}.")
