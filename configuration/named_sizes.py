"""Sizes of models by name: of checkpoints that are published, and Taipan's, which are reconstructed."""

import copy
from collections.abc import Mapping
from typing import Any

Sizes = Mapping[str, dict[str, Any]]

# https://huggingface.co/state-spaces/mamba2-130m to -2.7b, mamba2attn-2.7b; mistralai/Mamba-Codestral-7B-v0.1
MAMBA2: Sizes = {
    "130m": {"hidden_size": 768, "num_hidden_layers": 24},
    "370m": {"hidden_size": 1024, "num_hidden_layers": 48},
    "780m": {"hidden_size": 1536, "num_hidden_layers": 48},
    "1.3b": {"hidden_size": 2048, "num_hidden_layers": 48},
    "2.7b": {"hidden_size": 2560, "num_hidden_layers": 64},
    "2.7b-hybrid": {
        "hidden_size": 2560,
        "num_hidden_layers": 64,
        "attn_layer_idx": [9, 18, 27, 36, 45, 56],
        "attn_cfg": {
            "causal": True,
            "d_conv": 4,
            "head_dim": 128,
            "num_heads": 30,
            "out_proj_bias": False,
            "qkv_proj_bias": False,
            "rotary_emb_dim": 64,
        },
    },
    "codestral-7b": {
        "hidden_size": 4096,
        "num_hidden_layers": 64,
        "n_groups": 8,
        "vocab_size": 32768,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    },
}

CODEFUSE = {"vocab_size": 126464, "bos_token_id": 126080, "eos_token_id": 126081}
CODER = CODEFUSE | {"block_type": "rodimus_plus", "sliding_window": 2049, "k_norm_eps": 1e-5}
CODER |= {"max_position_embeddings": 4096}
# https://huggingface.co/codefuse-admin/rodimus_1B4_base_20241001, codefuse-ai/Rodimus-Plus-Coder-1.6B-Base and -4B-Base
RODIMUS: Sizes = {
    "1.4b": CODEFUSE | {"block_type": "rodimus", "hidden_size": 2048, "num_hidden_layers": 48, "k_norm_eps": 1e-12},
    "plus-coder-1.6b": CODER | {"hidden_size": 2048, "num_hidden_layers": 24},
    "plus-coder-4b": CODER | {"hidden_size": 3072, "num_hidden_layers": 32, "tie_word_embeddings": False},
}

LLAMA_3_VOCABULARY = {"vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": 128001}
# Widths and depths that give the parameter counts in the paper's names; the paper prints no sizes.
TAIPAN: Sizes = {
    "190M": LLAMA_3_VOCABULARY | {"hidden_size": 768, "num_hidden_layers": 21},
    "450M": LLAMA_3_VOCABULARY | {"hidden_size": 1024, "num_hidden_layers": 42},
    "1.3B": LLAMA_3_VOCABULARY | {"hidden_size": 2048, "num_hidden_layers": 35},
}


def named(sizes: Sizes, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the configuration that has this name, some of them changed.

    Raises:
        ValueError: another name, with those that there are.
    """
    if name not in sizes:
        raise ValueError(f"name must be one of {tuple(sizes)}; got {name!r}.")
    return copy.deepcopy(sizes[name]) | dict(changes)
