"""Rodimus and Rodimus+ from the names of the authors' and fla's files alone, in float64: the judge of a conversion.

Nothing of the tables of names, of the translation of configurations and of the model is used. Only the kernels' slow
references are, a step at a time; everything around them is written out. One layer's weights are held at a time.

B batch, T time, D hidden size, M inner width, N state size, H heads, P head size, V vocabulary.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from scrubjay.conversion.checkpoint import Checkpoint
from scrubjay.conversion.reference_parts import logits, rms, turn
from scrubjay.kernels.ddts import ddts_reference
from scrubjay.kernels.window import window_attention_reference


@torch.no_grad()
def codefuse_logits(checkpoint: Checkpoint, ids: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """(B, T) ids to (B, T, V) float64 logits, from the authors' names and config.json, before which `settings` hold."""
    config = _config(checkpoint)
    mixer, attention = config.get("mixer_cfg") or {}, config.get("attn_cfg") or {}
    window, heads = attention.get("window_size"), attention.get("num_heads") or config["d_model"] // 128
    rotary = attention.get("rotary_emb_dim", -1)
    sizes = SimpleNamespace(
        layers=config["n_layer"],
        plus=config.get("block_type") == "rodimus_plus",
        rms_norm_eps=config.get("norm_epsilon", 1e-5),
        k_norm_eps=mixer.get("normalize_epsilon") or 1e-12,
        heads=heads,
        sliding_window=window // 2 + 1 if window and window > 0 else ids.shape[1],
        rope_theta=attention.get("rotary_emb_base", 10000.0),
        rotary_dim=config["d_model"] // max(heads, 1) if rotary < 0 else rotary,
        rope_interleaved=attention.get("rotary_emb_interleaved", False),
        scale_embedding=config.get("use_scale_embedding", False),
        norm_embedding=config.get("use_norm_embedding", False),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
    )
    _set(sizes, settings)

    def part(i):
        def of(name):
            return checkpoint.read(f"model.layers.{i}.{name}").double()

        inner = "mixer.inner_mixer."
        values = {
            "x_z": of("mixer.fc.weight").chunk(2),
            "conv": (of(f"{inner}short_conv.conv1d.weight"), of(f"{inner}short_conv.conv1d.bias")),
            "q_k": of(f"{inner}in_proj.weight").chunk(2),
            "gates": of(f"{inner}mem_gate_proj.weight").chunk(2),
            "gates_bias": of(f"{inner}mem_gate_proj.bias").chunk(2),
            "rank": [of(f"{inner}ch_gate_proj.{name}") for name in ("0.weight", "1.weight", "1.bias")],
            "through": of(f"{inner}residual_weight"),
            "norms": [of("mixer_norm.weight"), of("mixer.act_norm.weight")],
            "out": of("mixer.out_proj.weight"),
        }
        if sizes.plus:
            values["attention"] = [of(f"attn.{name}_proj.weight") for name in ("q", "k", "v", "out")]
            values["norms"] += [of("attn_norm.weight"), of("ffn_norm.weight")]
            values["up_gate_down"] = (*of("ffn.fc.weight").chunk(2), of("ffn.out_proj.weight"))
        return SimpleNamespace(**values)

    x = _embedded(checkpoint, ids)
    if sizes.scale_embedding:
        x = x * mixer.get("mem_size", 64) ** 0.5
    if sizes.norm_embedding:
        x = rms(x, checkpoint.read("model.embed_norm.weight").double(), sizes.rms_norm_eps)
    return _head(checkpoint, _blocks(x, part, sizes), "model.norm_f.weight", sizes)


@torch.no_grad()
def fla_logits(checkpoint: Checkpoint, ids: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """(B, T) ids to (B, T, V) float64 logits, from fla's names and config.json, before which `settings` hold."""
    config = _config(checkpoint)
    attention = config.get("ska_attn") or {"num_heads": 1}
    sizes = SimpleNamespace(
        layers=config["num_hidden_layers"],
        plus=config.get("block_type", "rodimus_plus") == "rodimus_plus",
        rms_norm_eps=config.get("norm_eps", 1e-5),
        k_norm_eps=config.get("k_norm_eps") or 1e-12,
        short_conv=config.get("use_short_conv", True),
        heads=attention["num_heads"],
        sliding_window=attention.get("window_size", 1024) or ids.shape[1],
        rope_theta=attention.get("rope_theta", 10000.0),
        rotary_dim=config["hidden_size"] // attention["num_heads"],
        rope_interleaved=False,
        scale_embedding=False,
        tie_word_embeddings=config.get("tie_word_embeddings", True),
    )
    _set(sizes, settings)

    def part(i):
        def of(*names):
            return [checkpoint.read(f"model.layers.{i}.{name}").double() for name in names]

        values = {
            "x_z": of("mixer.up_proj.weight", "mixer.gate_proj.weight"),
            "conv": of("mixer.short_conv.weight", "mixer.short_conv.bias") if sizes.short_conv else None,
            "q_k": of("mixer.q_proj.weight", "mixer.k_proj.weight"),
            "gates": of("mixer.g_gate_proj.weight", "mixer.tau_gate_proj.weight"),
            "gates_bias": of("mixer.g_gate_proj.bias", "mixer.tau_gate_proj.bias"),
            "rank": of(*(f"mixer.i_gate_proj.{name}" for name in ("0.weight", "1.weight", "1.bias"))),
            "through": of("mixer.residual_weight")[0],
            "norms": of("mixer_norm.weight", "mixer.activation_norm.weight"),
            "out": of("mixer.down_proj.weight")[0],
        }
        if sizes.plus:
            values["attention"] = of(*(f"ska_attn.{name}_proj.weight" for name in "qkvo"))
            values["norms"] += of("ska_attn_norm.weight", "mlp_norm.weight")
            values["up_gate_down"] = of(*(f"mlp.{name}_proj.weight" for name in ("up", "gate", "down")))
        return SimpleNamespace(**values)

    x = _embedded(checkpoint, ids)
    if sizes.scale_embedding:
        x = x * config["expand_ratio"] ** 0.5
    return _head(checkpoint, _blocks(x, part, sizes), "model.norm.weight", sizes)


def _blocks(x: torch.Tensor, part: Any, sizes: SimpleNamespace) -> torch.Tensor:
    """All layers. part: number of a layer -> its weights."""
    for i in range(sizes.layers):
        w = part(i)
        x = x + _mixer(rms(x, w.norms[0], sizes.rms_norm_eps), w, sizes)
        if sizes.plus:
            y = x + _attention(rms(x, w.norms[2], sizes.rms_norm_eps), w, sizes)
            up, gate, down = w.up_gate_down
            h = rms(y, w.norms[3], sizes.rms_norm_eps)
            x = x + (F.silu(h @ gate.T) * (h @ up.T)) @ down.T
    return x


def _mixer(h, w, sizes):
    x, z = (h @ weight.T for weight in w.x_z)
    seen = x
    if w.conv is not None:
        kernel, bias = w.conv
        taps = kernel.shape[2]
        seen = F.silu(F.conv1d(F.pad(x.mT, (taps - 1, 0)), kernel, bias, groups=kernel.shape[0]).mT)
    q, k = (seen @ weight.T for weight in w.q_k)
    select, temperature = (seen @ weight.T + b for weight, b in zip(w.gates, w.gates_bias, strict=True))
    g, tau = torch.logaddexp(select, torch.zeros_like(select)), torch.sigmoid(temperature)
    k = k / k.square().sum(-1, keepdim=True).sqrt().clamp(min=sizes.k_norm_eps) * (tau * g.log()).exp()
    down, up, up_bias = w.rank
    v = torch.sigmoid(x @ down.T @ up.T + up_bias) * x
    o, _ = ddts_reference(q / q.shape[-1] ** 0.5, k, v, -g * tau)
    y = (o + w.through * seen) * F.silu(z)
    return rms(y, w.norms[1], sizes.rms_norm_eps) @ w.out.T


def _attention(h, w, sizes):
    size = h.shape[-1] // sizes.heads
    *projections, out = w.attention
    q, k, v = ((h @ weight.T).unflatten(-1, (-1, size)) for weight in projections)
    o = window_attention_reference(_turn(q, sizes), _turn(k, sizes), v, sizes.sliding_window)
    return o.flatten(2) @ out.T


def _turn(x, sizes):
    channels = x.shape[-1] if sizes.rotary_dim is None else sizes.rotary_dim
    return turn(x, sizes.rope_theta, channels, sizes.rope_interleaved)


def _config(checkpoint):
    if not checkpoint.config:
        raise ValueError(
            "The check needs the configuration file of the source: shapes do not tell all that the model computes. Put "
            "it beside the weights, or convert without the check."
        )
    return checkpoint.config


def _embedded(checkpoint, ids):
    return checkpoint.read("model.embeddings.weight")[ids].double()


def _set(sizes, settings):
    vars(sizes).update({name: settings[name] for name in settings if name in vars(sizes)})


def _head(checkpoint, x, norm, sizes):
    x = rms(x, checkpoint.read(norm).double(), sizes.rms_norm_eps)
    head = checkpoint.read("model.embeddings.weight" if sizes.tie_word_embeddings else "lm_head.weight")
    return logits(x, head)
