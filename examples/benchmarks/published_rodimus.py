"""Rodimus checkpoints as the authors publish them, with random values: names, shapes, files and configurations.

Written out by hand from their code and files, so that a converter can be held against them. d width, m inner width,
n state size, K taps, r rank of the input gate, V rows of the embedding.
"""

from pathlib import Path
from typing import Any

import torch

from scrubjay.examples.benchmarks.published_layouts import values, write_folder

OFFICIAL_ROOT = {
    "architectures": ["RodimusForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_rodimus.RodimusConfig",
        "AutoModelForCausalLM": "modeling_rodimus.RodimusForCausalLM",
    },
    "model_type": "rodimus",
    "torch_dtype": "float32",
    "transformers_version": "4.42.0",
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "initializer_range": 0.02,
    "no_weight_decay_on_bias": True,
    "no_weight_decay_on_embedding": True,
    "no_weight_decay_on_norm": True,
    "norm_epsilon": 1e-05,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": True,
    "use_cache": True,
    "use_fast_path": True,
    "use_fused_cross_entropy": True,
    "use_fused_swiglu": True,
    "use_norm_embedding": False,
    "use_scale_embedding": False,
}
MIXER = {"d_conv": 4, "expand_ratio": 2, "input_gate_low_rank": "auto", "mem_size": 64, "mode": "fused_chunk"}
ATTENTION = {"rotary_emb_base": 10000.0, "rotary_emb_dim": -1, "rotary_emb_interleaved": False, "softmax_scale": None}


def official(
    block: str,
    d: int,
    layers: int,
    heads: int | None,
    window: int | None,
    tie: bool,
    key_heads: int = 1,
    value_heads: int | None = None,
    mixer: dict | None = None,
    attention: dict | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The authors' config.json; mixer and attention: what differs in `mixer_cfg` and `attn_cfg`."""
    counts = {"num_heads": heads, "num_heads_k": heads and key_heads, "num_heads_v": value_heads or heads}
    config = OFFICIAL_ROOT | {"block_type": block, "d_model": d, "n_layer": layers, "tie_word_embeddings": tie} | more
    config["mixer_cfg"] = MIXER | (mixer or {})
    config["attn_cfg"] = counts | {"window_size": window, "ffn_expand_ratio": 4 / 3} | ATTENTION | (attention or {})
    return config


PUBLIC = {"vocab_size": 126464, "bos_token_id": 126080, "eos_token_id": 126081, "pad_token_id": None}
CODER = {"mixer": {"normalize_epsilon": 1e-5}, "max_position_embeddings": 4096}
# config.json, whether the file holds a head, numbers in the model, and in the file
PUBLISHED = {
    "rodimus_1B4_base": (official("rodimus", 2048, 48, None, 128, True, **PUBLIC), False, 1_531_551_744, 1_531_551_744),
    "Rodimus-Plus-Coder-1.6B-Base": (
        official("rodimus_plus", 2048, 24, 16, 4096, True, **PUBLIC, **CODER),
        True,
        1_607_095_296,
        1_866_093_568,
    ),
    "Rodimus-Plus-Coder-4B-Base": (
        official("rodimus_plus", 3072, 32, 24, 4096, False, **PUBLIC, **CODER),
        True,
        4_786_527_232,
        4_786_527_232,
    ),
}


def eights(x: float) -> int:
    """Cut off, then up to a multiple of 8."""
    return (int(x) + 7) // 8 * 8


def lengths(config: dict[str, Any]) -> tuple[int, int, int, int, int, int]:
    """d, m, n, K, r, V of the authors' configuration."""
    d, mixer = config["d_model"], config["mixer_cfg"]
    rank = mixer["input_gate_low_rank"]
    r = max(d // 64, 16) if rank == "auto" else int(rank)
    return d, eights(d * mixer["expand_ratio"]), mixer["mem_size"], mixer["d_conv"], r, config["vocab_size"]


def official_shapes(config: dict[str, Any], head: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' state dictionary. head: whether the file repeats a tied head."""
    d, m, n, K, r, V = lengths(config)
    shapes: dict[str, tuple[int, ...]] = {"model.embeddings.weight": (V, d), "model.norm_f.weight": (d,)}
    if head or not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, d)
    if config["use_norm_embedding"]:
        shapes["model.embed_norm.weight"] = (d,)
    layer: dict[str, tuple[int, ...]] = {
        "mixer_norm.weight": (d,),
        "mixer.act_norm.weight": (m,),
        "mixer.fc.weight": (2 * m, d),
        "mixer.out_proj.weight": (d, m),
        "mixer.inner_mixer.residual_weight": (m,),
        "mixer.inner_mixer.short_conv.conv1d.weight": (m, 1, K),
        "mixer.inner_mixer.short_conv.conv1d.bias": (m,),
        "mixer.inner_mixer.in_proj.weight": (2 * n, m),
        "mixer.inner_mixer.ch_gate_proj.0.weight": (r, m),
        "mixer.inner_mixer.ch_gate_proj.1.weight": (m, r),
        "mixer.inner_mixer.ch_gate_proj.1.bias": (m,),
        "mixer.inner_mixer.mem_gate_proj.weight": (2 * n, m),
        "mixer.inner_mixer.mem_gate_proj.bias": (2 * n,),
    }
    if config["block_type"] == "rodimus_plus":
        attention = config["attn_cfg"]
        p, f = d // attention["num_heads"], eights(d * attention["ffn_expand_ratio"])
        layer |= {
            "attn_norm.weight": (d,),
            "attn.q_proj.weight": (d, d),
            "attn.k_proj.weight": (p * attention["num_heads_k"], d),
            "attn.v_proj.weight": (p * attention["num_heads_v"], d),
            "attn.out_proj.weight": (d, d),
            "ffn_norm.weight": (d,),
            "ffn.fc.weight": (2 * f, d),
            "ffn.out_proj.weight": (d, f),
        }
    return shapes | {f"model.layers.{i}.{k}": s for i in range(config["n_layer"]) for k, s in layer.items()}


def repeat_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As a tied model is pickled: the head is the embedding's own memory."""
    return tensors | {"lm_head.weight": tensors["model.embeddings.weight"]}


def write_rodimus(folder: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A folder of the authors', in float32: a pickle, with the head beside the embedding that it may repeat."""
    tensors = values(official_shapes(config))
    tensors = repeat_head(tensors) if config["tie_word_embeddings"] else tensors
    return write_folder(folder, "pytorch_model.bin", tensors, "config.json", config)
