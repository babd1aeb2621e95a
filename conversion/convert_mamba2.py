"""Mamba-2 checkpoints of other libraries: the authors' (mamba_ssm), transformers', fla's and Mistral's.

The tables of names are KEY_NAMES in modeling/modeling_ssd.py.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from scrubjay.configuration.configuration_ssd import MULTIPLE, SSDConfig, numbers
from scrubjay.configuration.mamba2_configs import config_for, fields_from, layout_of, their_name
from scrubjay.configuration.ssd_attention import attention_sizes, beside
from scrubjay.conversion.checkpoint import Checkpoint
from scrubjay.conversion.formats import Format
from scrubjay.conversion.keymap import Shapes, our_shapes, require
from scrubjay.conversion.reference_mamba2 import hybrid_logits
from scrubjay.modeling.key_names import layer_of
from scrubjay.modeling.modeling_ssd import KEY_NAMES, SSDForCausalLM

# By how the tensors are named: the configurations that may lie beside them.
CONFIGS_OF = {
    "mamba_ssm": ("mamba_ssm", "codestral"),
    "codestral": ("mamba_ssm", "codestral"),
    "transformers": ("transformers", "fla"),
}
STATE_SIZE = 128  # of every published model; shapes tell only the product of groups and state size
# Tensors of a Mamba-2 layer's mixer that tell its sizes, with their dimensions; and those that no attention layer has.
MAMBA2_DIMS = {"in_proj.weight": 2, "conv1d.weight": 3, "A_log": 1, "norm.weight": 1}
MAMBA2_ALONE = ("A_log", "D", "dt_bias", "norm.weight")


def sizes_from(shapes: Shapes) -> dict[str, Any]:
    """What the shapes of the tensors, by our names, say of a Mamba-2 model.

    Returns: fields of `SSDConfig`, those of Mamba-2 layers only where there are any; beside them "mlp_size",
        "groups_times_state" for the two that shapes do not tell apart, and of attention layers "attn_rows" (of the
        input projection), "attn_width" (columns of the output projection) and "attn_taps" (of the convolution).

    Raises:
        ValueError: names the tensors that are missing for it or of wrong shapes, or shapes that no Mamba-2 mixer has.
    """
    found = (layer_of("model.layers.*.norm.weight", name) for name in shapes)
    layers = sorted(int(number) for number in found if number)
    attending = [i for i in layers if _attends(shapes, f"model.layers.{i}.mixer.")]
    recurrent = min(set(layers) - set(attending), default=None if attending else 0)
    attention = f"model.layers.{attending[0]}.mixer." if attending else None
    mamba2 = f"model.layers.{recurrent}.mixer." if recurrent is not None else None
    down = "model.layers.0.mlp.fc2.weight"
    dims = {"model.embed_tokens.weight": 2}
    if mamba2:
        dims |= {f"{mamba2}{name}": n for name, n in MAMBA2_DIMS.items()}
    if attention:
        dims |= {f"{attention}in_proj.weight": 2, f"{attention}out_proj.weight": 2}
    dims |= {name: n for name, n in ((f"{attention}conv1d.weight", 3), (down, 2)) if name in shapes}
    require(shapes, dims, "Mamba-2 model")
    vocab, hidden = shapes["model.embed_tokens.weight"]
    sizes: dict[str, Any] = {"vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": len(layers)}
    sizes |= {"attn_layer_idx": attending, "mlp_size": shapes[down][1] if down in shapes else 0}
    if mamba2:
        sizes |= _mamba2_sizes(shapes, mamba2, hidden)
    if attention:
        sizes |= _attention_sizes(shapes, attention)
    return sizes


def _attends(shapes, mixer):
    """Whether a mixer is an attention layer: it has nothing that Mamba-2 alone has."""
    return f"{mixer}in_proj.weight" in shapes and not any(f"{mixer}{name}" in shapes for name in MAMBA2_ALONE)


def _mamba2_sizes(shapes, mixer, hidden):
    rows, channels, heads, inner = (shapes[f"{mixer}{name}"][0] for name in MAMBA2_DIMS)
    if rows != inner + channels + heads or (channels - inner) % 2 or inner % heads:
        raise ValueError(
            f"in_proj has {rows} rows; of {inner} channels, {channels} convolved ones and {heads} heads this model "
            f"makes {inner + channels + heads}. A mixer with an MLP inside (d_ssm) is not supported."
        )
    return {
        "expand": inner // hidden if inner % hidden == 0 else inner / hidden,
        "num_heads": heads,
        "head_dim": inner // heads,
        "conv_kernel": shapes[f"{mixer}conv1d.weight"][2],
        "use_bias": f"{mixer}in_proj.bias" in shapes,
        "use_conv_bias": f"{mixer}conv1d.bias" in shapes,
        "groups_times_state": (channels - inner) // 2,
    }


def _attention_sizes(shapes, mixer):
    return {
        "attn_rows": shapes[f"{mixer}in_proj.weight"][0],
        "attn_width": shapes[f"{mixer}out_proj.weight"][1],
        "attn_taps": shapes.get(f"{mixer}conv1d.weight", (0, 0, 0))[2],
    }


def _derived(fields):
    """What shapes tell and a configuration says in other words: the number, and the words."""
    attention, width = fields.get("attn_cfg"), fields.get("intermediate_size", 0)
    said = {"mlp_size": (-(-width // MULTIPLE) * MULTIPLE, f"d_intermediate {width!r}, which makes MLPs of")}
    if attention:
        heads, shared, size, more = (attention[n] for n in ("num_heads", "num_heads_kv", "head_dim", "mlp_dim"))
        words = f"attn_cfg num_heads {heads!r}, num_heads_kv {shared!r}, head_dim {size!r} and mlp_dim {more!r}"
        rows = (heads + 2 * shared) * size + beside(attention)
        said["attn_rows"] = (rows, f"{words}, which make rows of in_proj")
        said["attn_width"] = (heads * size + beside(attention) // 2, f"{words}, which make columns of out_proj")
        said["attn_taps"] = (attention["d_conv"], "attn_cfg d_conv")
    return said


def read_config(layout: str, theirs: dict, shapes: Shapes, settings: dict) -> tuple[SSDConfig, list[str]]:
    """The configuration that the shapes tell, held against the file's, which tells the rest."""
    sizes = sizes_from(our_shapes(KEY_NAMES[layout], shapes))
    product = sizes.pop("groups_times_state", None)
    if not theirs:
        fields, notes = _without_file(sizes, product, KEY_NAMES[layout][-1].theirs in shapes, settings)
        return SSDConfig(**fields | settings), notes
    known = layout_of(theirs)
    if known is None or known not in CONFIGS_OF[layout]:
        raise ValueError(
            f"The configuration is {known or 'no Mamba-2 one'}, and the tensors are named as {layout} names them. Put "
            "the configuration that belongs to these weights beside them, or none."
        )
    fields, name_of = fields_from(theirs), partial(their_name, known)
    faults = [
        f"{name_of(name)} {_said(theirs, name_of(name), fields[name])}, the tensors say {found!r}"
        for name, found in sizes.items()
        if fields.get(name, found) != found
    ]
    faults += [
        f"{words} {said!r}, the tensors say {sizes[name]!r}"
        for name, (said, words) in _derived(fields).items()
        if sizes.get(name, said) != said
    ]
    groups, state = fields["n_groups"], fields["state_size"]
    if product is not None and groups * state != product:
        faults.append(
            f"{name_of('n_groups')} {groups} and {name_of('state_size')} {state}, the tensors say {product} for their "
            "product"
        )
    if faults:
        raise ValueError("The configuration contradicts the tensors: it says " + "; it says ".join(faults) + ".")
    notes = [f"sizes: read off the tensors; the configuration ({known}) agrees"]
    if known == "codestral":
        notes.append("bos_token_id 1 and eos_token_id 2: of Mistral's tokenizers, params.json does not say")
    if known == "transformers" and fields["rescale_prenorm_residual"]:
        notes.append(
            "rescale_prenorm_residual is true: transformers' own from_pretrained divides every out_proj.weight by the "
            "root of num_hidden_layers after it has loaded it; here the weights are those of the file"
        )
    return SSDConfig(**fields | settings), notes


def _said(theirs, name, value):
    given = theirs | (theirs.get("ssm_cfg") or {})
    if name not in given:
        return f"{value!r} (the default, as nothing is given)"
    return f"{value!r}" if name != "vocab_size" or given[name] == value else f"{given[name]!r}, padded to {value!r}"


def remarks(config: SSDConfig) -> list[str]:
    """Of a folder for transformers."""
    if not config.rescale_prenorm_residual:
        return []
    return [
        "rescale_prenorm_residual false instead of true: it is of initial values alone, and transformers would divide "
        "the weights that it loads as well"
    ]


def _without_file(sizes, product, has_head, settings):
    if sizes["attn_layer_idx"] and not settings.get("attn_cfg"):
        raise ValueError(
            f"There is no configuration file, and layers {sizes['attn_layer_idx']} are attention layers, of whose "
            "heads and positions shapes tell too little. Put the config.json beside the weights, or say attn_cfg, such "
            """as --set 'attn_cfg={"num_heads": 30, "head_dim": 128, "d_conv": 4, "rotary_emb_dim": 64}'."""
        )
    fields = {name: value for name, value in sizes.items() if name not in ("attn_rows", "attn_width", "attn_taps")}
    fields |= {"intermediate_size": fields.pop("mlp_size"), "tie_word_embeddings": not has_head}
    notes = ["sizes: read off the tensors; there is no configuration file"]
    if product is not None:
        state = STATE_SIZE if product % STATE_SIZE == 0 else product
        fields |= {"state_size": state, "n_groups": product // state}
        notes.append(
            f"state_size {state} and n_groups {product // state}: shapes tell their product alone; as the published "
            "models"
        )
    notes += [
        f"tie_word_embeddings {not has_head}: the checkpoint has {'a' if has_head else 'no'} head of its own",
        "layer_norm_epsilon, time_step_limit, token ids: the defaults of this library",
    ]
    return fields, notes


def reference(checkpoint: Checkpoint, ids: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """(B, T) ids to (B, T, V) logits by transformers' Mamba-2 in float32, from the checkpoint's own names and sizes;
    where there are attention layers or MLPs, which it has not, by a recurrence in float64.

    Without a configuration file and settings, groups are those of the published models.
    """
    if any(name.endswith(".norm2.weight") for name in checkpoint.shapes) or not _all_recurrent(checkpoint.shapes):
        if attention := settings.get("attn_cfg"):
            hidden = checkpoint.shapes["backbone.embedding.weight"][1]
            settings = settings | {"attn_cfg": attention_sizes(attention, hidden)}
        return hybrid_logits(checkpoint, ids, settings)
    tensors = {_plain(name): name for name in checkpoint.shapes}
    shapes = {plain: checkpoint.shapes[name] for plain, name in tensors.items()}
    vocab, hidden = shapes["backbone.embeddings.weight"]
    heads, inner = shapes["backbone.layers.0.mixer.D"][0], shapes["backbone.layers.0.mixer.norm.weight"][0]
    told = (fields_from(checkpoint.config) if checkpoint.config else {}) | settings
    rest = {n: told[n] for n in ("n_groups", "time_step_limit", "layer_norm_epsilon") if told.get(n) is not None}
    if "time_step_limit" in rest:
        rest["time_step_limit"] = tuple(numbers("time_step_limit", rest["time_step_limit"]))
    product = (shapes["backbone.layers.0.mixer.conv1d.weight"][0] - inner) // 2
    groups = rest.pop("n_groups", None) or (1 if product % STATE_SIZE else product // STATE_SIZE)
    sizes = Mamba2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=1 + max(int(name.split(".")[2]) for name in shapes if ".layers." in name),
        num_heads=heads,
        head_dim=inner // heads,
        expand=inner // hidden,
        n_groups=groups,
        state_size=product // groups,
        conv_kernel=shapes["backbone.layers.0.mixer.conv1d.weight"][2],
        use_bias="backbone.layers.0.mixer.in_proj.bias" in shapes,
        use_conv_bias="backbone.layers.0.mixer.conv1d.bias" in shapes,
        tie_word_embeddings="lm_head.weight" not in shapes,
        chunk_size=64,
        **rest,
    )
    with torch.device("meta"):
        model = Mamba2ForCausalLM(sizes)
    _check_groups(model)
    weights = {plain: checkpoint.read(name).float() for plain, name in tensors.items()}
    weights.setdefault("lm_head.weight", weights["backbone.embeddings.weight"])
    model.load_state_dict(weights, assign=True)
    with torch.no_grad():
        return model.eval()(ids).logits.float()


@torch.no_grad()
def loaded(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """(B, T) ids to (B, T, V) logits of what transformers makes of a folder, in float32."""
    model = Mamba2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    _check_groups(model)
    return model.eval()(ids).logits


def _all_recurrent(shapes):
    layers, recurrent = (
        sum(layer_of(f"backbone.layers.*.{name}", found) is not None for found in map(_plain, shapes))
        for name in ("norm.weight", "mixer.A_log")
    )
    return layers == recurrent


def _check_groups(model):
    if model.config.n_groups > 1 and not hasattr(model.backbone.layers[0].mixer.norm, "group_size"):
        raise ValueError(
            f"The check needs a transformers whose Mamba-2 normalises each group of channels; this one gives other "
            f"logits where n_groups is {model.config.n_groups}. 5.23 does it."
        )


def _plain(name):
    return name.removeprefix("model.").replace("backbone.embedding.", "backbone.embeddings.")


def _layout(name, weights, names, looks_for, config_name="config.json"):
    head = "model." if names == "codestral" else ""
    embedding = "embeddings" if names == "transformers" else "embedding"

    def recognises(config, shapes):
        recurrent = any(layer_of(f"{head}backbone.layers.*.mixer.A_log", found) is not None for found in shapes)
        mine = f"{head}backbone.{embedding}.weight" in shapes and (recurrent or bool(config.get("attn_layer_idx")))
        # named alike, and told apart by the configuration
        return mine and (names != "transformers" or (name == "fla") == (layout_of(config) == "fla"))

    return Format(
        name=name,
        family="ssd",
        model_class=SSDForCausalLM,
        looks_for=looks_for,
        recognises=recognises,
        read_config=partial(read_config, names),
        write_config=partial(config_for, name),
        rows=lambda config: KEY_NAMES[names],
        weights=weights,
        config_name=config_name,
        reference=reference,
        loaded=loaded if name == "transformers" else None,
        remarks=remarks if name == "transformers" else None,
    )


MAMBA2 = (
    _layout(
        "mamba_ssm", "bin", "mamba_ssm", "tensors backbone.embedding.weight, backbone.layers.0.mixer.A_log; d_model"
    ),
    _layout("transformers", "safetensors", "transformers", "tensors backbone.embeddings.weight; model_type mamba2"),
    _layout("fla", "safetensors", "transformers", "tensors backbone.embeddings.weight; model_type mamba2 and norm_eps"),
    _layout(
        "codestral",
        "consolidated",
        "codestral",
        "tensors model.backbone.embedding.weight; dim and n_layers",
        "params.json",
    ),
)
