"""What tests of hybrid Mamba-2 conversions share: small checkpoints with attention layers and MLPs, written by hand."""

import torch
from conversion_cases import SMALL

from scrubjay.conversion.checkpoint import Checkpoint
from scrubjay.conversion.reference_mamba2 import hybrid_logits
from scrubjay.examples.benchmarks.published_layouts import write_mamba_ssm

ATTENTION = dict(causal=True, d_conv=4, head_dim=16, num_heads=3, out_proj_bias=False, qkv_proj_bias=False)
ATTENTION |= dict(rotary_emb_dim=8)
# Biases, and no convolution: what the authors' code takes where nothing is said.
SHARED = dict(causal=True, num_heads=4, num_heads_kv=2, rotary_emb_dim=6, rotary_emb_interleaved=True)
NETWORK = ATTENTION | dict(mlp_dim=200, softmax_scale=0.4, rotary_emb_base=100.0, d_conv=3)
LLAMA = dict(causal=True, num_heads=4, num_heads_kv=2, rotary_emb_dim=8, qkv_proj_bias=False, out_proj_bias=False)

HYBRIDS = {
    "attention": SMALL | dict(L=3, A=[1], attention=ATTENTION),
    "attention and MLP": SMALL | dict(L=4, A=[1, 3], attention=ATTENTION, F=100),
    "MLP": SMALL | dict(F=128),
    "shared keys, first": SMALL | dict(L=3, A=[0], attention=SHARED, G=2, bias=True),
    "network beside": SMALL | dict(L=2, A=[1], attention=NETWORK, F=128),
    "attention alone": SMALL | dict(L=2, A=[0, 1], attention=LLAMA, F=128),
}


def hybrid(name, folder, dtype=torch.float32, **changes):
    """Write one; returns its tensors."""
    more = {"ssm_cfg": {}} if name == "attention alone" else {}
    return write_mamba_ssm(folder, HYBRIDS[name], dtype, **dict(pad=16, unpadded=37) | more | changes)


def judge(folder, ids, settings=None):
    """(B, T, V) logits in float64 of a folder in the authors' layout."""
    return hybrid_logits(Checkpoint(folder), ids, settings or {})
