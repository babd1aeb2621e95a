"""Mamba-2 checkpoints as they are published, with random values: names, shapes, dtypes, files and configurations.

Written out by hand from the published files, so that a converter can be held against them.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# Sizes by the letters of the paper: d width, L layers, V rows of the embedding, P head size, N state, G groups, K taps;
# beside them A places of attention layers, whose sizes are `attention`, and F width of MLPs, as in config.json.
MAMBA2_2B7 = dict(d=2560, L=64, V=50288, P=64, N=128, G=1, K=4)
ATTENTION_2B7 = dict(causal=True, d_conv=4, head_dim=128, num_heads=30, out_proj_bias=False, qkv_proj_bias=False)
ATTENTION_2B7 |= dict(rotary_emb_dim=64)
MAMBA2ATTN_2B7 = MAMBA2_2B7 | dict(A=[9, 18, 27, 36, 45, 56], attention=ATTENTION_2B7)
CODESTRAL = dict(d=4096, L=64, V=32768, P=64, N=128, G=8, K=4)


def mixer_shapes(d: int, P: int, N: int, G: int, K: int, bias: bool = False, **_: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one mixer. in_proj makes [z, x, B, C, dt]; the convolution takes x, B and C."""
    inner = 2 * d
    heads = inner // P
    shapes = {
        "in_proj.weight": (2 * inner + 2 * G * N + heads, d),
        "conv1d.weight": (inner + 2 * G * N, 1, K),
        "conv1d.bias": (inner + 2 * G * N,),
        "dt_bias": (heads,),
        "A_log": (heads,),
        "D": (heads,),
        "norm.weight": (inner,),
        "out_proj.weight": (d, inner),
    }
    if bias:
        shapes |= {"in_proj.bias": (2 * inner + 2 * G * N + heads,), "out_proj.bias": (d,)}
    return shapes


def attention_shapes(d: int, attention: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one attention layer's mixer. in_proj makes queries, keys and values, which are all convolved,
    and what a network beside the attention takes, which is not."""
    heads = attention["num_heads"]
    p, groups = attention.get("head_dim", d // heads), attention.get("num_heads_kv", heads)
    qkv, network = p * (heads + 2 * groups), (attention.get("mlp_dim", 0) + 255) // 256 * 256
    shapes: dict[str, tuple[int, ...]] = {"in_proj.weight": (qkv + network, d)}
    shapes["out_proj.weight"] = (d, p * heads + network // 2)
    if attention.get("d_conv", 0):
        shapes |= {"conv1d.weight": (qkv, 1, attention["d_conv"]), "conv1d.bias": (qkv,)}
    if attention.get("qkv_proj_bias", True):
        shapes["in_proj.bias"] = (qkv + network,)
    if attention.get("out_proj_bias", True):
        shapes["out_proj.bias"] = (d,)
    return shapes


def mlp_shapes(d: int, F: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what follows a mixer. fc1 makes what is passed on, then its gate."""
    width = (F + 127) // 128 * 128
    return {"norm2.weight": (d,), "mlp.fc1.weight": (2 * width, d), "mlp.fc2.weight": (d, width)}


def mamba2_shapes(embedding: str, sizes: dict[str, Any], prefix: str = "", head: bool = False) -> dict[str, tuple]:
    """Names and shapes of a whole checkpoint whose embedding is called `embedding`."""
    d, V = sizes["d"], sizes["V"]
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}backbone.{embedding}.weight": (V, d)}
    for i in range(sizes["L"]):
        shapes[f"{prefix}backbone.layers.{i}.norm.weight"] = (d,)
        attends = i in sizes.get("A", ())
        mixer = attention_shapes(d, sizes["attention"]) if attends else mixer_shapes(**sizes)
        shapes |= {f"{prefix}backbone.layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
        behind = mlp_shapes(d, sizes["F"]) if sizes.get("F") else {}
        shapes |= {f"{prefix}backbone.layers.{i}.{name}": shape for name, shape in behind.items()}
    shapes[f"{prefix}backbone.norm_f.weight"] = (d,)
    if head:
        shapes[f"{prefix}lm_head.weight"] = (V, d)
    return shapes


def value(name: str, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    """Random values of the size that they have in trained models: no norm, bias or skip is at a neutral value."""
    x = torch.randn(shape, generator=random)
    last = name.rsplit(".", 1)[-1]
    if last == "A_log":
        return (1 + 15 * torch.rand(shape, generator=random)).log()
    if last == "dt_bias":
        return x * 0.7 - 3
    if "norm" in name:
        return 1 + 0.2 * x
    if last == "D" or "conv1d" in name:
        return 0.5 * x
    return x * (0.3 if last == "bias" else shape[-1] ** -0.5)


def values(shapes: dict[str, tuple], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Values for all names."""
    random = torch.Generator().manual_seed(seed)
    return {name: value(name, shape, random).to(dtype) for name, shape in shapes.items()}


def mamba_ssm_config(sizes: dict[str, Any], pad: int = 16, unpadded: int | None = None, **changes: Any) -> dict:
    """config.json of state-spaces/mamba2-* and mamba2attn-*. What ssm_cfg leaves out has mamba_ssm's default."""
    default = dict(P=("headdim", 64), N=("d_state", 128), G=("ngroups", 1), K=("d_conv", 4), bias=("bias", False))
    ssm_cfg = {name: sizes[key] for key, (name, usual) in default.items() if sizes.get(key, usual) != usual}
    return {
        "d_model": sizes["d"],
        "d_intermediate": sizes.get("F", 0),
        "n_layer": sizes["L"],
        "vocab_size": unpadded or sizes["V"],
        "ssm_cfg": {"layer": "Mamba2"} | ssm_cfg,
        "attn_layer_idx": sizes.get("A", []),
        "attn_cfg": sizes.get("attention", {}),
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": pad,
        "tie_embeddings": True,
    } | changes


def params_json(sizes: dict[str, Any]) -> dict:
    """params.json of Mamba-Codestral-7B-v0.1."""
    return {
        "dim": sizes["d"],
        "n_layers": sizes["L"],
        "vocab_size": sizes["V"],
        "n_groups": sizes["G"],
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": False,
        "model_type": "mamba",
    }


def transformers_config(sizes: dict[str, Any], tied: bool, **changes: Any) -> dict:
    """config.json of transformers' own Mamba-2 folders."""
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "bos_token_id": 0,
        "chunk_size": 256,
        "conv_kernel": sizes["K"],
        "eos_token_id": 0,
        "expand": 2,
        "head_dim": sizes["P"],
        "hidden_act": "silu",
        "hidden_size": sizes["d"],
        "initializer_range": 0.1,
        "layer_norm_epsilon": 1e-05,
        "model_type": "mamba2",
        "n_groups": sizes["G"],
        "norm_before_gate": True,
        "num_heads": 2 * sizes["d"] // sizes["P"],
        "num_hidden_layers": sizes["L"],
        "pad_token_id": 0,
        "rescale_prenorm_residual": False,
        "residual_in_fp32": True,
        "rms_norm": True,
        "state_size": sizes["N"],
        "tie_word_embeddings": tied,
        "time_step_floor": 0.0001,
        "time_step_limit": [0.0, math.inf],
        "time_step_max": 0.1,
        "time_step_min": 0.001,
        "time_step_rank": 256,
        "torch_dtype": "float32",
        "transformers_version": "4.44.0",
        "use_bias": sizes.get("bias", False),
        "use_cache": True,
        "use_conv_bias": True,
        "vocab_size": sizes["V"],
    } | changes


def fla_config(sizes: dict[str, Any], tied: bool, **changes: Any) -> dict:
    """config.json of flash-linear-attention's Mamba-2."""
    return {
        "A_init_range": [1, 16],
        "D_has_hdim": False,
        "architectures": ["Mamba2ForCausalLM"],
        "bos_token_id": 1,
        "chunk_size": 256,
        "conv_init": None,
        "conv_kernel": sizes["K"],
        "dt_init_floor": 0.0001,
        "dt_limit": [0.0, math.inf],
        "dt_max": 0.1,
        "dt_min": 0.001,
        "eos_token_id": 2,
        "expand": 2,
        "fuse_cross_entropy": True,
        "fuse_norm": True,
        "head_dim": sizes["P"],
        "hidden_act": "silu",
        "hidden_size": sizes["d"],
        "initializer_range": 0.02,
        "model_type": "mamba2",
        "n_groups": sizes["G"],
        "norm_before_gate": False,
        "norm_eps": 1e-05,
        "num_heads": 2 * sizes["d"] // sizes["P"],
        "num_hidden_layers": sizes["L"],
        "pad_token_id": 0,
        "residual_in_fp32": True,
        "rmsnorm": True,
        "state_size": sizes["N"],
        "tie_word_embeddings": tied,
        "use_bias": sizes.get("bias", False),
        "use_cache": True,
        "use_conv_bias": True,
        "vocab_size": sizes["V"],
    } | changes


def write_mamba_ssm(folder: Path, sizes: dict[str, Any], dtype: torch.dtype = torch.float32, **changes: Any) -> dict:
    """A folder of state-spaces/mamba2*-*: a pickle with the head beside the embedding that it repeats."""
    tensors = values(mamba2_shapes("embedding", sizes), dtype)
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    return write_folder(folder, "pytorch_model.bin", tensors, "config.json", mamba_ssm_config(sizes, **changes))


def write_codestral(folder: Path, sizes: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict:
    """A folder of Mistral's own files: one file of safetensors, every name behind "model.", a head of its own."""
    tensors = values(mamba2_shapes("embedding", sizes, "model.", head=True), dtype)
    return write_folder(folder, "consolidated.safetensors", tensors, "params.json", params_json(sizes))


def write_familiar(
    folder: Path,
    sizes: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    fla: bool = False,
    tied: bool = True,
    **more: Any,
) -> dict:
    """A folder of transformers or of fla, which name the tensors alike."""
    tensors = values(mamba2_shapes("embeddings", sizes, head=not tied), dtype)
    config = (fla_config if fla else transformers_config)(sizes, tied, **more)
    return write_folder(folder, "model.safetensors", tensors, "config.json", config)


def write_folder(folder: Path, weights: str, tensors: dict, config_name: str, config: dict) -> dict:
    """Write a folder of one file of weights, pickled where it is a .bin, and a configuration; returns the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / config_name).write_text(json.dumps(config, indent=2), encoding="utf-8")
    if weights.endswith(".bin"):
        torch.save(tensors, folder / weights)
    else:
        save_file(tensors, folder / weights, metadata={"format": "pt"})
    return tensors
