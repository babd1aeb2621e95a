"""Queries, gated keys and log-decays of Rodimus' recurrence (arXiv:2410.06577, section 3), from two projections.

    q = q' / sqrt(N)
    k = k' / max(|k'|, eps) * g^t        g = softplus(s + b_s)   the selection gate
    a = -g * t                           t = sigmoid(r + b_r)    the temperature; 1 where gates packs s alone

B batch, T time, N state size. qk: (B, T, 2 N), packs [q', k']   gates: (B, T, 2 N), packs [s, r]   bias: (2 N,), packs
[b_s, b_r]. Without a temperature gates is s, (B, T, N), and bias b_s, (N,). The power is formed as exp(t ln g).
"""

from functools import partial

import torch
import torch.nn.functional as F

from scrubjay.kernels.dispatch import choose
from scrubjay.kernels.rodimus_gates_triton import rodimus_gates_fits, rodimus_gates_triton


def rodimus_gates(qk, gates, bias, eps, *, backend=None):
    """q, gated k and log-decay a, (B, T, N) each: q in qk's dtype, k and a in float32 (float64 for float64).

    Args:
        qk, gates, bias: shapes in the header; the gates are formed in float32 or wider, whatever they come in.
        eps: smallest length that a key is divided by.
        backend: None chooses by device; "torch" and "triton" are obeyed or refused.

    Error against the formula, gradients included: 2e-6 of the largest value in float32.

    Raises:
        ValueError: shapes that do not fit each other, a backend that cannot run.
    """
    n = qk.shape[-1] // 2
    fits = gates.shape in ((*qk.shape[:-1], n), (*qk.shape[:-1], 2 * n)) and bias.shape == gates.shape[-1:]
    if qk.shape[-1] % 2 or not fits:
        raise ValueError(
            "rodimus_gates needs qk and gates (B, T, 2 N) and bias (2 N,), or gates (B, T, N) and bias (N,); "
            f"got qk {tuple(qk.shape)}, gates {tuple(gates.shape)}, bias {tuple(bias.shape)}."
        )
    fused = partial(rodimus_gates_fits, qk, gates, bias)
    if choose(backend, "rodimus_gates", qk, gates, bias, fused=fused) == "triton":
        return rodimus_gates_triton(qk, gates, bias, eps)
    wide = torch.promote_types(qk.dtype, torch.float32)
    q, k = qk.chunk(2, -1)
    q, k = q * n**-0.5, F.normalize(k.to(wide), dim=-1, eps=eps)
    gates = gates.to(wide) + bias.to(wide)
    if gates.shape[-1] == n:
        gate = F.softplus(gates)
        return q, k * gate, -gate
    selection, temperature = gates.chunk(2, -1)
    gate, temperature = F.softplus(selection), torch.sigmoid(temperature)
    return q, k * (temperature * log_softplus(selection)).exp(), -gate * temperature


def log_softplus(x):
    """ln(softplus(x)), with its gradient where softplus underflows: ln(softplus(x)) = x - e^x / 2 + ... for x << 0."""
    low = x < -15
    return torch.where(low, x - 0.5 * x.clamp(max=-15).exp(), F.softplus(x.clamp(min=-15)).log())
