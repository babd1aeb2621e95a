"""SSD, Rodimus and Rodimus+ once more, for tests: float64, one token at a time, heads in a loop, all memory explicit.

Nothing is taken from the library but the names of its parameters and sizes. Both functions take (state_dict,
configuration, ids (B, T)) and return logits (B, T, V). B batch, T time, V vocabulary; the rest as in the papers.

`wrong` names one deliberate mistake, None is the truth: tests show that each mistake would be found.
"""

import math

import torch


def ssd_logits(weights, sizes, ids, wrong=None):
    """Mamba-2 (arXiv:2405.21060): S_t = exp(dt_t A) S_(t-1) + dt_t x_t B_t^T, y_t = S_t C_t + D x_t in every head."""
    weights = {name: weight.double() for name, weight in weights.items()}
    memory = [{} for _ in range(sizes.num_hidden_layers)]
    return torch.stack([_ssd_token(weights, sizes, token, memory, wrong) for token in ids.T], 1)


def _ssd_token(weights, sizes, token, memory, wrong):
    eps = sizes.layer_norm_epsilon
    X = weights["model.embed_tokens.weight"][token]
    for i in range(sizes.num_hidden_layers):
        w = _under(weights, f"model.layers.{i}.")
        normed = _rms(X, w["norm.weight"], eps)
        stream = normed if wrong == "residual after the norm" else X
        X = stream + _ssd_mixer(_under(w, "mixer."), sizes, normed, memory[i], wrong)
    if wrong != "no final norm":
        X = _rms(X, weights["model.norm.weight"], eps)
    return X @ weights["lm_head.weight"].T


def _ssd_mixer(w, sizes, u, memory, wrong):
    H, P, N, G = sizes.num_heads, sizes.head_dim, sizes.state_size, sizes.n_groups
    inner = int(sizes.expand * sizes.hidden_size)
    packed = u @ w["in_proj.weight"].T + w.get("in_proj.bias", 0)
    z, raw, B, C, dt = packed.split([inner, inner, G * N, G * N, H], -1)
    if wrong == "z and x exchanged":
        z, raw = raw, z
    convolved = _conv(w, sizes.conv_kernel, torch.cat([raw, B, C], -1), memory, wrong)
    x, *keys = convolved.split([inner, G * N, G * N], -1)
    if wrong != "B and C not convolved":
        B, C = keys
    if wrong == "B and C exchanged":
        B, C = C, B

    low, high = sizes.time_step_limit
    if wrong == "clamp before softplus":
        dt = _softplus((dt + w["dt_bias"]).clip(low, high))
    else:
        dt = _softplus(dt) + w["dt_bias"] if wrong == "dt_bias after softplus" else _softplus(dt + w["dt_bias"])
        dt = dt if wrong == "clamp ignored" else dt.clip(low, high)
    A = -w["A_log"].exp()
    if wrong == "A_log taken for the rate":
        A = -w["A_log"].abs()

    heads = []
    for h in range(H):
        own = slice(h * P, (h + 1) * P)
        group = h % G if wrong == "groups tiled" else h // (H // G)
        B_h, C_h = (t[:, None, group * N : (group + 1) * N] for t in (B, C))
        x_h, dt_h = x[:, own], dt[:, h, None]
        scaled = x_h if wrong == "input not times dt" else dt_h * x_h
        decay = torch.exp(dt_h * A[h])
        if wrong == "decay not applied":
            decay = torch.ones_like(decay)
        before = memory.get(f"state {h}", torch.zeros(len(u), P, N, dtype=u.dtype))
        after = memory[f"state {h}"] = decay[:, :, None] * before + scaled[:, :, None] * B_h
        S = before if wrong == "state read before its update" else after
        through = {"skip of dt times x": scaled, "skip of x before the convolution": raw[:, own]}.get(wrong, x_h)
        heads.append((S * C_h).sum(-1) + w["D"][h] * through)
    groups = 1 if wrong == "gated norm over all channels" else G
    y = _gated_norm(torch.cat(heads, -1), z, w["norm.weight"], sizes.layer_norm_epsilon, groups, wrong)
    return y @ w["out_proj.weight"].T + w.get("out_proj.bias", 0)


def rodimus_logits(weights, sizes, ids, wrong=None):
    """Rodimus and Rodimus+ (arXiv:2410.06577): S_t = diag(alpha_t) S_(t-1) + k_t^T v_t and o_t = n^(-1/2) q_t S_t."""
    weights = {name: weight.double() for name, weight in weights.items()}
    memory = [{"seen": []} for _ in range(sizes.num_hidden_layers)]
    return torch.stack([_rodimus_token(weights, sizes, token, t, memory, wrong) for t, token in enumerate(ids.T)], 1)


def _rodimus_token(weights, sizes, token, t, memory, wrong):
    eps = sizes.rms_norm_eps
    X = weights["model.embed_tokens.weight"][token]
    if sizes.scale_embedding and wrong != "embedding not scaled":
        X = X * math.sqrt(sizes.hidden_size if wrong == "embedding times sqrt(hidden_size)" else sizes.state_size)
    if sizes.norm_embedding and wrong != "embedding not normalised":
        X = _rms(X, weights["model.embed_norm.weight"], eps)
    for i in range(sizes.num_hidden_layers):
        w = _under(weights, f"model.layers.{i}.")
        X = X + _rodimus_mixer(_under(w, "mixer."), sizes, _rms(X, w["mixer_norm.weight"], eps), memory[i], wrong)
        if sizes.block_type == "rodimus_plus":
            h = _rms(X, w["attn_norm.weight"], eps)
            attended = _shared_key_window(_under(w, "attn."), sizes, h, t, memory[i]["seen"], wrong)
            Y = X + attended
            if wrong == "attention replaces the stream":
                Y = attended
            kept = Y if wrong == "attention kept in the stream" or not sizes.two_hop else X
            X = kept + _swiglu(_under(w, "ffn."), _rms(Y, w["ffn_norm.weight"], eps), wrong)
    return _rms(X, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def _rodimus_mixer(w, sizes, h, memory, wrong):
    n, m = sizes.state_size, 8 * math.ceil(int(sizes.expand * sizes.hidden_size) / 8)
    x, z = (h @ w["fc.weight"].T).split([m, m], -1)
    if wrong == "x and z exchanged":
        x, z = z, x
    x_hat = _conv(w, sizes.conv_kernel, x, memory, wrong) if sizes.short_conv else x
    q, k = (x_hat @ w["in_proj.weight"].T).split([n, n], -1)
    if wrong == "q and k exchanged":
        q, k = k, q
    a = x_hat @ w["mem_gate_proj.weight"].T + w["mem_gate_bias"]
    a, b = a.split([n, n], -1) if sizes.temperature_gate else (a, None)
    if wrong == "selection and temperature exchanged":
        a, b = b, a

    g, tau = _softplus(a), 1 if b is None else _sigmoid(b)
    alpha = torch.exp(-g * tau)
    beta = g if b is None or wrong == "selection without temperature" else torch.exp(tau * torch.log(g))
    if wrong == "decay without temperature":
        alpha = torch.exp(-g)
    if wrong == "decay not applied":
        alpha = torch.ones_like(alpha)
    norm = k.square().sum(-1, keepdim=True).sqrt()
    norm = norm + sizes.k_norm_eps if wrong == "eps added to the norm" else norm.clip(min=sizes.k_norm_eps)
    if wrong == "k not normalised":
        norm = torch.ones_like(norm)
    k = k / norm * beta
    if wrong == "q normalised":
        q = q / q.square().sum(-1, keepdim=True).sqrt()

    gate = 1
    if sizes.input_gate != "none":
        gated = x_hat if wrong == "input gate of the convolved stream" else x
        gated = gated @ w["ch_gate_down.weight"].T if sizes.input_gate == "low_rank" else gated
        gate = _sigmoid(gated @ w["ch_gate_up.weight"].T + w["ch_gate_up.bias"])
    v = gate * (x_hat if wrong == "v of the convolved stream" else x)

    before = memory.get("state", torch.zeros(len(h), n, m, dtype=h.dtype))
    after = memory["state"] = alpha[:, :, None] * before + k[:, :, None] * v[:, None, :]
    S = before if wrong == "state read before its update" else after
    o = (q[:, :, None] * S).sum(1)
    if wrong != "q not scaled":
        o = o / math.sqrt(n)
    o = o + w["residual_weight"] * (x if wrong == "feed-through of x before the convolution" else x_hat)
    return _gated_norm(o, z, w["act_norm.weight"], sizes.rms_norm_eps, 1, wrong) @ w["out_proj.weight"].T


def _shared_key_window(w, sizes, h, t, seen, wrong):
    """`seen`: (k, v) of every token so far, k already turned; the window is cut when it is read."""
    H, p = sizes.num_attention_heads, sizes.hidden_size // sizes.num_attention_heads
    q, k, v = ((h @ w[f"{name}_proj.weight"].T).split(p, -1) for name in "qkv")
    q, k = ([_turn(head, t, sizes, wrong) for head in heads] for heads in (q, k))
    seen.append((torch.stack(k, 1), torch.stack(v, 1)))
    window = sizes.sliding_window - (wrong == "window one key short") + (wrong == "window one key long")
    keys, values = (torch.stack(held, 1) for held in zip(*seen[-window:], strict=True))  # (B, W, heads, p)
    heads = []
    for head in range(H):
        j, l = head % len(k), head % len(v)
        if wrong == "key and value heads grouped":
            j, l = head * len(k) // H, head * len(v) // H
        scores = (keys[:, :, j] * q[head][:, None]).sum(-1)
        if wrong != "scores not scaled":
            scores = scores / math.sqrt(p)
        weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
        weights = weights / weights.sum(-1, keepdim=True)
        heads.append((weights[:, :, None] * values[:, :, l]).sum(1))
    return torch.cat(heads, -1) @ w["o_proj.weight"].T


def _turn(x, t, sizes, wrong):
    """RoPE of the first channels of a head x (B, p) at position t."""
    dim = x.shape[-1] if wrong == "all channels turned" else sizes.rotary_dim
    if dim == 0 or wrong == "no positions":
        return x
    angle = torch.tensor([t * sizes.rope_theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=x.dtype)
    if wrong == "turned backwards":
        angle = -angle
    first, second = list(range(dim // 2)), list(range(dim // 2, dim))
    if sizes.rope_interleaved != (wrong == "other pairs turned"):
        first, second = list(range(0, dim, 2)), list(range(1, dim, 2))
    a, b, turned = x[:, first], x[:, second], x.clone()
    turned[:, first] = a * angle.cos() - b * angle.sin()
    turned[:, second] = b * angle.cos() + a * angle.sin()
    return turned


def _swiglu(w, h, wrong):
    up, gate = (h @ w["fc.weight"].T).chunk(2, -1)
    if wrong == "up and gate exchanged":
        up, gate = gate, up
    return (_silu(gate) * up) @ w["out_proj.weight"].T


def _conv(w, taps, x, memory, wrong):
    """Causal depthwise convolution, then SiLU; the memory keeps what came in."""
    window = [*memory.get("conv", [torch.zeros_like(x)] * (taps - 1)), x]
    memory["conv"] = window[1:]
    kernel = w["conv1d.weight"][:, 0]
    if wrong == "taps reversed":
        kernel = kernel.flip(-1)
    y = sum(kernel[:, tap] * window[tap] for tap in range(taps)) + w.get("conv1d.bias", 0)
    return y if wrong == "no activation after the convolution" else _silu(y)


def _gated_norm(y, z, weight, eps, groups, wrong):
    """Gate, then norm over each of `groups` equal slices of the channels."""
    eps = 0 if wrong == "gated norm without eps" else eps
    gate = z if wrong == "gate without its activation" else _silu(z)
    if wrong != "norm before gate":
        y = y * gate
    y = torch.cat([_rms(part, 1, eps) for part in y.split(y.shape[-1] // groups, -1)], -1) * weight
    return y * gate if wrong == "norm before gate" else y


def _rms(x, weight, eps):
    return x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight


def _sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def _silu(x):
    return x * _sigmoid(x)


def _softplus(x):
    return torch.logaddexp(x, torch.zeros_like(x))


def _under(weights, prefix):
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
