"""What tests of Rodimus conversions share: small published layouts, and their meaning to the judge.

The authors' layout is spelled out in `published_rodimus.py`, fla's here. The judge is the float64 recurrence of
`recurrences.py`, which is fed here by a translation of its own: nothing comes from the tables of the library.
"""

from types import SimpleNamespace

import torch

from scrubjay.examples.benchmarks.published_layouts import write_folder
from scrubjay.examples.benchmarks.published_rodimus import eights, lengths, official

SMALL = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "max_position_embeddings": 128}
OFFICIAL = {
    "rodimus": official("rodimus", 48, 2, None, 128, True, **SMALL),
    "rodimus, other sizes": official(
        "rodimus",
        40,
        3,
        None,
        None,
        False,
        mixer={"expand_ratio": 1.45, "mem_size": 6, "d_conv": 3, "input_gate_low_rank": "5"},
        **SMALL,
    ),
    "plus": official("rodimus_plus", 48, 2, 4, 8, True, mixer={"normalize_epsilon": 1e-5}, **SMALL),
    "plus, odd window": official("rodimus_plus", 48, 2, 4, 11, False, **SMALL),
    "plus, all else": official(
        "rodimus_plus",
        48,
        3,
        6,
        10,
        False,
        key_heads=3,
        value_heads=2,
        mixer={"mem_size": 10, "expand_ratio": 1.5, "normalize_epsilon": 0.5, "input_gate_low_rank": 7},
        attention={"rotary_emb_base": 100.0, "rotary_emb_dim": 4, "rotary_emb_interleaved": True}
        | {"ffn_expand_ratio": 2.2},
        **SMALL | {"use_scale_embedding": True, "use_norm_embedding": True, "norm_epsilon": 1e-2},
    ),
}
FLA = {
    "architectures": ["RodimusForCausalLM"],
    "model_type": "rodimus",
    "attn": None,
    "attn_mode": "chunk",
    "block_residual_in_fp32": True,
    "block_type": "rodimus_plus",
    "bos_token_id": 1,
    "conv_size": 4,
    "eos_token_id": 2,
    "expand_ratio": 6,
    "fuse_cross_entropy": True,
    "fuse_norm": True,
    "hidden_act": "swish",
    "hidden_ratio": 4 / 3,
    "hidden_size": 48,
    "initializer_range": 0.02,
    "input_gate_low_rank": "auto",
    "intermediate_size": None,
    "k_norm_eps": 0.5,
    "max_position_embeddings": 128,
    "norm_eps": 1e-4,
    "num_hidden_layers": 2,
    "residual_in_fp32": True,
    "ska_attn": {"num_heads": 4, "qk_norm": False, "qkv_bias": False, "rope_theta": 500.0, "window_size": 5},
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_short_conv": True,
    "vocab_size": 61,
}


# What the authors' code has no switch for.
WHOLE = {"temperature_gate": True, "input_gate": "low_rank", "short_conv": True, "two_hop": True}


def fla_shapes(config):
    """Names and shapes of fla's state dictionary."""
    d, n, K, V = config["hidden_size"], config["expand_ratio"], config["conv_size"], config["vocab_size"]
    m, r = eights(2 * d), max(d // 64, 16)
    shapes = {"model.embeddings.weight": (V, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, d)
    layer = {"mixer_norm.weight": (d,), "mixer.residual_weight": (m,), "mixer.activation_norm.weight": (m,)}
    layer |= {f"mixer.{name}_proj.weight": (m, d) for name in ("up", "gate")} | {"mixer.down_proj.weight": (d, m)}
    if config["use_short_conv"]:
        layer |= {"mixer.short_conv.weight": (m, 1, K), "mixer.short_conv.bias": (m,)}
    layer |= {f"mixer.{name}_proj.weight": (n, m) for name in ("q", "k", "g_gate", "tau_gate")}
    layer |= {f"mixer.{name}_gate_proj.bias": (n,) for name in ("g", "tau")}
    layer |= {"mixer.i_gate_proj.0.weight": (r, m), "mixer.i_gate_proj.1.weight": (m, r)}
    layer["mixer.i_gate_proj.1.bias"] = (m,)
    if config["block_type"] == "rodimus_plus":
        f, p = eights(d * config["hidden_ratio"]), d // config["ska_attn"]["num_heads"]
        layer |= {"ska_attn_norm.weight": (d,), "mlp_norm.weight": (d,), "ska_attn.k_proj.weight": (p, d)}
        layer |= {f"ska_attn.{name}_proj.weight": (d, d) for name in "qvo"}
        layer |= {f"mlp.{name}_proj.weight": (f, d) for name in ("up", "gate")} | {"mlp.down_proj.weight": (d, f)}
    return shapes | {f"model.layers.{i}.{k}": s for i in range(config["num_hidden_layers"]) for k, s in layer.items()}


def write(folder, config, tensors, pickled=False):
    """The folder, written; of safetensors no two share memory."""
    if pickled:
        write_folder(folder, "pytorch_model.bin", tensors, "config.json", config)
    else:
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        write_folder(folder, "model.safetensors", copies, "config.json", config)
    return folder


def meaning_of_official(tensors, config):
    """(weights under the names that the recurrence reads, its sizes), from the authors' names."""
    d, _, n, K, *_ = lengths(config)
    w = {"model.embed_tokens.weight": tensors["model.embeddings.weight"]}
    w["model.norm.weight"] = tensors["model.norm_f.weight"]
    w["lm_head.weight"] = tensors["model.embeddings.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    if config["use_norm_embedding"]:
        w["model.embed_norm.weight"] = tensors["model.embed_norm.weight"]
    for i in range(config["n_layer"]):
        theirs, ours = f"model.layers.{i}.", f"model.layers.{i}."
        inner = theirs + "mixer.inner_mixer."
        for name in ("mixer_norm.weight", "mixer.fc.weight", "mixer.act_norm.weight", "mixer.out_proj.weight"):
            w[ours + name] = tensors[theirs + name]
        for name in ("in_proj.weight", "mem_gate_proj.weight", "residual_weight"):
            w[ours + "mixer." + name] = tensors[inner + name]
        for name in ("weight", "bias"):
            w[f"{ours}mixer.conv1d.{name}"] = tensors[f"{inner}short_conv.conv1d.{name}"]
            w[f"{ours}mixer.ch_gate_up.{name}"] = tensors[f"{inner}ch_gate_proj.1.{name}"]
        w[ours + "mixer.ch_gate_down.weight"] = tensors[inner + "ch_gate_proj.0.weight"]
        w[ours + "mixer.mem_gate_bias"] = tensors[inner + "mem_gate_proj.bias"]
        if config["block_type"] == "rodimus_plus":
            for name in ("attn_norm", "ffn_norm", "attn.q_proj", "attn.k_proj", "attn.v_proj", "ffn.fc"):
                w[f"{ours}{name}.weight"] = tensors[f"{theirs}{name}.weight"]
            w[ours + "ffn.out_proj.weight"] = tensors[theirs + "ffn.out_proj.weight"]
            w[ours + "attn.o_proj.weight"] = tensors[theirs + "attn.out_proj.weight"]
    attention, mixer = config["attn_cfg"], config["mixer_cfg"]
    sizes = dict(hidden_size=d, num_hidden_layers=config["n_layer"], state_size=n, expand=mixer["expand_ratio"])
    sizes |= dict(block_type=config["block_type"], rms_norm_eps=config["norm_epsilon"], conv_kernel=K)
    sizes |= dict(scale_embedding=config["use_scale_embedding"], norm_embedding=config["use_norm_embedding"])
    sizes |= dict(k_norm_eps=mixer.get("normalize_epsilon") or 1e-12, num_attention_heads=attention["num_heads"])
    sizes |= dict(sliding_window=attention["window_size"] and attention["window_size"] // 2 + 1)
    rotary = attention["rotary_emb_dim"]
    sizes |= dict(rotary_dim=d // (attention["num_heads"] or 1) if rotary < 0 else rotary)
    sizes |= dict(rope_theta=attention["rotary_emb_base"], rope_interleaved=attention["rotary_emb_interleaved"])
    return w, SimpleNamespace(**sizes, **WHOLE)


def meaning_of_fla(tensors, config):
    """As `meaning_of_official`, from fla's names: what it keeps apart lies one behind the other."""
    w = {"model.embed_tokens.weight": tensors["model.embeddings.weight"]}
    w["model.norm.weight"] = tensors["model.norm.weight"]
    w["lm_head.weight"] = tensors["model.embeddings.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    for i in range(config["num_hidden_layers"]):
        of = {name.removeprefix(f"model.layers.{i}."): t for name, t in tensors.items() if f"layers.{i}." in name}
        layer = {
            "mixer_norm.weight": of["mixer_norm.weight"],
            "mixer.fc.weight": torch.cat([of["mixer.up_proj.weight"], of["mixer.gate_proj.weight"]]),
            "mixer.in_proj.weight": torch.cat([of["mixer.q_proj.weight"], of["mixer.k_proj.weight"]]),
            "mixer.mem_gate_proj.weight": torch.cat([of["mixer.g_gate_proj.weight"], of["mixer.tau_gate_proj.weight"]]),
            "mixer.mem_gate_bias": torch.cat([of["mixer.g_gate_proj.bias"], of["mixer.tau_gate_proj.bias"]]),
            "mixer.ch_gate_down.weight": of["mixer.i_gate_proj.0.weight"],
            "mixer.ch_gate_up.weight": of["mixer.i_gate_proj.1.weight"],
            "mixer.ch_gate_up.bias": of["mixer.i_gate_proj.1.bias"],
            "mixer.residual_weight": of["mixer.residual_weight"],
            "mixer.act_norm.weight": of["mixer.activation_norm.weight"],
            "mixer.out_proj.weight": of["mixer.down_proj.weight"],
        }
        if config["use_short_conv"]:
            layer |= {f"mixer.conv1d.{name}": of[f"mixer.short_conv.{name}"] for name in ("weight", "bias")}
        if config["block_type"] == "rodimus_plus":
            layer |= {f"attn.{x}_proj.weight": of[f"ska_attn.{x}_proj.weight"] for x in "qkvo"}
            layer |= {"attn_norm.weight": of["ska_attn_norm.weight"], "ffn_norm.weight": of["mlp_norm.weight"]}
            layer["ffn.fc.weight"] = torch.cat([of["mlp.up_proj.weight"], of["mlp.gate_proj.weight"]])
            layer["ffn.out_proj.weight"] = of["mlp.down_proj.weight"]
        w |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    attention = config["ska_attn"] or {"num_heads": 1, "window_size": 1, "rope_theta": 1.0}
    sizes = dict(hidden_size=config["hidden_size"], num_hidden_layers=config["num_hidden_layers"], expand=2)
    sizes |= dict(state_size=config["expand_ratio"], block_type=config["block_type"], rms_norm_eps=config["norm_eps"])
    sizes |= dict(conv_kernel=config["conv_size"], k_norm_eps=config["k_norm_eps"] or 1e-12, scale_embedding=False)
    sizes |= dict(norm_embedding=False, num_attention_heads=attention["num_heads"], rope_interleaved=False)
    sizes |= dict(sliding_window=attention["window_size"], rope_theta=attention["rope_theta"])
    sizes["rotary_dim"] = config["hidden_size"] // attention["num_heads"]
    return w, SimpleNamespace(**sizes, **WHOLE | {"short_conv": config["use_short_conv"]})
