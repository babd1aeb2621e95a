"""Taipan once more, for tests: float64, one token of one row at a time, heads in a loop, every key ever written kept.

As in `recurrences.py`, from which the Mamba-2 block and the feed-forward network come: nothing is taken from the
library but the names of its parameters and sizes, and `wrong` names one deliberate mistake.
"""

import math

import torch
from recurrences import _rms, _sigmoid, _silu, _ssd_mixer, _swiglu, _under


def taipan_logits(weights, sizes, ids, wrong=None, chosen=None):
    """Logits (B, T, V) of ids (B, T). `chosen`, a list, is given (selective layer, row, token, delta, selected)."""
    weights = {name: weight.double() for name, weight in weights.items()}
    memory = [{"entries": [[] for _ in ids]} for _ in range(sizes.num_hidden_layers)]
    return torch.stack([_token(weights, sizes, token, t, memory, wrong, chosen) for t, token in enumerate(ids.T)], 1)


def is_selective(sizes, i):
    """K blocks, then a selective layer, and so on; the last layer where there is no other."""
    unit = sizes.attention_every + 1
    return i % unit == unit - 1 or (sizes.num_hidden_layers < unit and i == sizes.num_hidden_layers - 1)


def _token(weights, sizes, token, t, memory, wrong, chosen):
    eps = sizes.layer_norm_epsilon
    h = weights["model.embed_tokens.weight"][token]
    for i in range(sizes.num_hidden_layers):
        w = _under(weights, f"model.layers.{i}.")
        if not is_selective(sizes, i):
            h = h + _ssd_mixer(_under(w, "mixer."), sizes, _rms(h, w["norm.weight"], eps), memory[i], wrong)
            if sizes.mamba_mlp and wrong != "no network after a Mamba-2 block":
                h = h + _swiglu(_under(w, "ffn."), _rms(h, w["ffn_norm.weight"], eps), wrong)
            continue
        rows = []
        for b, row in enumerate(h):
            entries, threshold = memory[i]["entries"][b], _threshold(sizes, i, wrong)
            found, delta, selected = _selective(_under(w, "attn."), sizes, row, t, entries, threshold, wrong)
            if chosen is not None:
                chosen.append((i, b, t, float(delta), selected))
            if selected or wrong != "feed-forward network for selected tokens alone":
                found = found + _swiglu(_under(w, "ffn."), _rms(found, w["ffn_norm.weight"], eps), wrong)
            rows.append(found)
        h = torch.stack(rows)
    return _rms(h, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def _threshold(sizes, i, wrong):
    """Of layer i: one for all, or the one that stands at its place among the selective layers."""
    if wrong == "threshold ignored":
        return 0.5
    if not isinstance(sizes.eval_threshold, list):
        return sizes.eval_threshold
    place = sum(is_selective(sizes, earlier) for earlier in range(i))
    return sizes.eval_threshold[0 if wrong == "threshold of the first layer" else place]


def _selective(w, sizes, h, t, entries, threshold, wrong):
    """(h after equation 5, delta, whether the token is selected). `entries`: (t, k, v) of the tokens that wrote."""
    x = _rms(h, w["norm.weight"], sizes.layer_norm_epsilon)
    delta = _delta(w, sizes, h if sizes.gate_norm == (wrong == "gate reads the other stream") else x)
    keep = _sigmoid(delta)
    selected = bool(keep > threshold)
    if wrong == "all selected":
        selected = True
    share = 1 - keep if wrong == "a exchanged" else keep

    value_input = h if wrong == "v of h before the norm" else x
    if selected or (sizes.kv_scope == "all" and wrong != "unselected tokens write nothing"):
        k, v = _turn(w["k_proj.weight"] @ x, t, sizes, wrong), w["v_proj.weight"] @ value_input
        entries.append((t, k, v))
    if not selected:
        return h, delta, False

    q_input = x * (1 - share) if sizes.refine_first and wrong != "queries not refined" else x
    q = _turn(w["q_proj.weight"] @ q_input, t, sizes, wrong)
    o = w["o_proj.weight"] @ _attend(q, _visible(entries, sizes, t, wrong), sizes, wrong)
    if sizes.sal_post_norm and wrong != "no norm after attention":
        o = _rms(o, w["post_norm.weight"], sizes.layer_norm_epsilon)
    convex = (sizes.refine == "convex") != (wrong == "other refinement")
    return (1 - share if convex else 1) * h + share * o, delta, True


def _delta(w, sizes, x):
    if sizes.gate_hidden:
        x = _silu(w["gate.hidden_weight"] @ x + w["gate.hidden_bias"])
    drop, keep = w["gate.weight"] @ x + w["gate.bias"]
    return keep - drop


def _visible(entries, sizes, t, wrong):
    window = sizes.sliding_window + (wrong == "window one key long") - (wrong == "window one key short")
    if (sizes.window_axis == "position") != (wrong == "other window axis"):
        entries = [entry for entry in entries if t - entry[0] < window]
    else:
        entries = entries[-window:]
    cap = sizes.kv_cap + (wrong == "cap one key long") if sizes.kv_cap and wrong != "cap ignored" else len(entries)
    entries = entries[-cap:]
    return entries[:-1] if wrong == "own key not seen" and len(entries) > 1 else entries


def _attend(q, entries, sizes, wrong):
    H, K, p = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.attention_head_dim
    heads = []
    for head in range(H):
        j = head % K if wrong == "heads tiled" else head * K // H
        own, shared = slice(head * p, (head + 1) * p), slice(j * p, (j + 1) * p)
        scores = torch.stack([(q[own] * k[shared]).sum() for _, k, _ in entries])
        if wrong != "scores not scaled":
            scores = scores / math.sqrt(p)
        weights = torch.exp(scores - scores.max())
        weights = weights / weights.sum()
        heads.append(sum(weight * v[shared] for weight, (_, _, v) in zip(weights, entries, strict=True)))
    return torch.cat(heads)


def _turn(x, t, sizes, wrong):
    """RoPE of every head of x at position t, channel i with i + half."""
    if (sizes.sal_pos == "none") != (wrong == "other positions"):
        return x
    p = sizes.attention_head_dim
    half, out = p // 2, []
    angle = torch.tensor([t * sizes.rope_theta ** (-2 * i / (2 * half)) for i in range(half)], dtype=x.dtype)
    for head in x.split(p):
        a, b = head[:half], head[half : 2 * half]
        turned = [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), head[2 * half :]]
        out.append(torch.cat(turned))
    return torch.cat(out)
