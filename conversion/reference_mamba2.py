"""Mamba-2 with attention layers and MLPs, from the names of the authors' files and config.json alone, in float64: the
judge of a conversion that transformers' Mamba-2, which has neither, cannot judge.

Nothing of the tables of names, of the translation of configurations, of the kernels and of the model is used. Wherever
a token looks back, in states, convolutions and attention, tokens are taken one at a time and heads in a loop. One
layer's weights are held at a time.

    X <- X + Mixer(RMS(X))                                           a Mamba-2 or an attention layer
    X <- X + W_2 (u * SiLU(g)),  [u, g] = W_1 RMS_2(X)               where the layer has an MLP

https://github.com/state-spaces/mamba, commit e9594ce: modules/block.py, mamba2.py, mha.py, mlp.py; what a configuration
leaves out is as there.

B batch, T time, D hidden size, H heads, P head size, G groups, N state size, K convolution taps, V vocabulary.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch

from scrubjay.conversion.checkpoint import Checkpoint
from scrubjay.conversion.reference_parts import logits, rms, turn

# As the constructors of the authors' modules have them.
MAMBA2 = {"ngroups": 1, "dt_limit": (0.0, math.inf)}
MHA: dict[str, Any] = {"num_heads_kv": None, "head_dim": None, "softmax_scale": None, "mlp_dim": 0}
MHA |= {"rotary_emb_dim": 0, "rotary_emb_base": 10000.0, "rotary_emb_interleaved": False}
SETTINGS = ("attn_cfg", "layer_norm_epsilon", "n_groups", "time_step_limit", "tie_word_embeddings")
STATE_SIZE = 128  # of the published models


@torch.no_grad()
def hybrid_logits(checkpoint: Checkpoint, ids: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """(B, T) ids to (B, T, V) float64 logits, from the authors' names and config.json, before which `settings` hold.

    Without a configuration file and settings, groups are those of the published models.
    """
    config = checkpoint.config
    mamba2 = MAMBA2 | (config.get("ssm_cfg") or {})
    sizes = SimpleNamespace(
        attn_cfg=config.get("attn_cfg") or {},
        layer_norm_epsilon=1e-5,
        n_groups=mamba2["ngroups"] if config else None,
        time_step_limit=mamba2["dt_limit"],
        tie_word_embeddings=config.get("tie_embeddings", True),
    )
    vars(sizes).update({name: settings[name] for name in SETTINGS if settings.get(name) is not None})

    def rms_of(x, name):
        return rms(x, checkpoint.read(f"backbone.{name}.weight").double(), sizes.layer_norm_epsilon)

    x = checkpoint.read("backbone.embedding.weight")[ids].double()
    count = sum(name.startswith("backbone.layers.") and name.endswith(".norm.weight") for name in checkpoint.shapes)
    count -= sum(name.endswith(".mixer.norm.weight") for name in checkpoint.shapes)
    for i in range(count):
        w = _below(checkpoint, f"backbone.layers.{i}.mixer.")
        mixer = _mamba2 if "A_log" in w else _attention
        x = x + mixer(rms_of(x, f"layers.{i}.norm"), w, sizes)
        w = _below(checkpoint, f"backbone.layers.{i}.mlp.")
        if w:
            u, g = (rms_of(x, f"layers.{i}.norm2") @ w["fc1.weight"].T).chunk(2, -1)
            x = x + (u * _silu(g)) @ w["fc2.weight"].T
    tied = sizes.tie_word_embeddings
    return logits(rms_of(x, "norm_f"), checkpoint.read("backbone.embedding.weight" if tied else "lm_head.weight"))


def _mamba2(u, w, sizes):
    """S_t = exp(-dt_t A) S_(t-1) + dt_t x_t B_t^T and y_t = S_t C_t + D x_t in every head."""
    H, inner = w["A_log"].shape[0], w["norm.weight"].shape[0]
    keys = (w["conv1d.weight"].shape[0] - inner) // 2
    G = sizes.n_groups or (1 if keys % STATE_SIZE else keys // STATE_SIZE)
    P, N = inner // H, keys // G
    z, xBC, dt = _project(u, w, "in_proj").split([inner, inner + 2 * G * N, H], -1)
    low, high = (float(bound) for bound in sizes.time_step_limit)
    S = [torch.zeros(len(u), P, N, dtype=u.dtype) for _ in range(H)]
    outputs = []
    for t in range(u.shape[1]):
        x, B, C = _silu(_convolved(xBC, t, w)).split([inner, G * N, G * N], -1)
        step = _softplus(dt[:, t] + w["dt_bias"]).clamp(low, high)
        heads = []
        for h in range(H):
            x_h, group = x[:, h * P : (h + 1) * P], slice(h // (H // G) * N, (h // (H // G) + 1) * N)
            decay = torch.exp(-step[:, h] * w["A_log"][h].exp())
            new = step[:, h, None, None] * x_h[:, :, None] * B[:, None, group]
            S[h] = decay[:, None, None] * S[h] + new
            heads.append((S[h] * C[:, None, group]).sum(-1) + w["D"][h] * x_h)
        gated = torch.cat(heads, -1) * _silu(z[:, t])
        parts = [rms(part, torch.ones(()), sizes.layer_norm_epsilon) for part in gated.split(inner // G, -1)]
        outputs.append(torch.cat(parts, -1) * w["norm.weight"])
    return _project(torch.stack(outputs, 1), w, "out_proj")


def _attention(u, w, sizes):
    """softmax(q_t K^T) V over the tokens up to t, of convolved q, k and v and turned q and k; query head h reads key
    head h // (heads per key head). Beside it, where `mlp_dim` is not 0, a gated network from the same projection."""
    cfg = MHA | sizes.attn_cfg
    H = cfg["num_heads"]
    P, groups = cfg["head_dim"] or u.shape[-1] // H, cfg["num_heads_kv"] or H
    scale = P**-0.5 if cfg["softmax_scale"] is None else cfg["softmax_scale"]
    wide = math.ceil(cfg["mlp_dim"] / 256) * 256
    qkv, network = _project(u, w, "in_proj").split([(H + 2 * groups) * P, wide], -1)
    up, gate = network.chunk(2, -1)
    if "conv1d.weight" in w:
        qkv = torch.stack([_convolved(qkv, t, w) for t in range(u.shape[1])], 1)
    q, k, v = (x.unflatten(-1, (-1, P)) for x in qkv.split([H * P, groups * P, groups * P], -1))
    q, k = (turn(x, cfg["rotary_emb_base"], cfg["rotary_emb_dim"], cfg["rotary_emb_interleaved"]) for x in (q, k))
    outputs = []
    for t in range(u.shape[1]):
        heads = []
        for h in range(H):
            keys, values = (x[:, : t + 1, h // (H // groups)] for x in (k, v))  # (B, t + 1, P)
            scores = scale * (keys * q[:, t, h, None]).sum(-1)
            weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
            heads.append((weights[..., None] * values).sum(1) / weights.sum(-1, keepdim=True))
        outputs.append(torch.cat([*heads, up[:, t] * _silu(gate[:, t])], -1))
    return _project(torch.stack(outputs, 1), w, "out_proj")


def _convolved(x, t, w):
    """Of column t of x (B, T, channels): tap K - 1 takes column t itself, and what lies before the text is zero."""
    taps = w["conv1d.weight"].shape[-1]
    y = torch.zeros_like(x[:, t])
    for back in range(min(taps, t + 1)):
        y = y + w["conv1d.weight"][:, 0, taps - 1 - back] * x[:, t - back]
    return y + w.get("conv1d.bias", 0)


def _project(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def _silu(x):
    return x / (1 + torch.exp(-x))


def _softplus(x):
    return torch.logaddexp(x, torch.zeros_like(x))


def _below(checkpoint, prefix):
    names = [name for name in checkpoint.shapes if name.startswith(prefix)]
    return {name.removeprefix(prefix): checkpoint.read(name).double() for name in names}
