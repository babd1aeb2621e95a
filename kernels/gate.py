"""Taipan's gate: which tokens attend, and how much of what they find they take (arXiv:2410.18572, section 3).

    x = RMSNorm(h);   s = W x + b in R^2;   delta = s_1 - s_0 = (W_1 - W_0) . x + (b_1 - b_0)     drop: s_0, keep: s_1
    a = softmax(s)_1 = sigmoid(delta)
    training:   m = [delta + g_1 - g_0 > 0],  g_0, g_1 ~ Gumbel(0, 1)        P(m = 1) = a, whatever the temperature is
    inference:  m = [a > t] = [delta - logit(t) > 0],  t a threshold; with noise  m = [delta - logit(t) + g_1 - g_0 > 0]
    backward:   m is given the gradient of p = sigmoid(score / tau), score what is compared with 0
    h <- (1 - a) h + a o  where m = 1                                        h as it is where m = 0

D hidden size, n inner width of a gate with a SiLU network before W. h: (..., D)   delta, a, m, p: (...)   all float32,
float64 for float64 inputs.

The choice is discontinuous: one bit of delta decides whether a token attends. So delta of a token has the same
bits whatever other tokens are computed with it. A library's reduction or product does not promise that (the order of
its sum depends on how many rows there are); here sums over D are trees of elementwise additions, whose order is fixed.
"""

import math

import torch
import torch.nn.functional as F

from scrubjay.kernels.dispatch import choose, without_autocast
from scrubjay.kernels.gate_triton import gate_fits, gate_logit_triton, norm_gate_triton, row_norm_triton

BELOW_ONE = 1 - 2**-24  # the largest float32 below 1
THRESHOLDS = (1e-300, 1 - 2**-53)  # the least and the largest that are told from 0 and 1


def gate_logit_reference(h, weight, bias, norm_weight=None, eps=1e-5, hidden=None):
    """The formula from the residual stream to delta, with torch's own sums. The law for the other path."""
    wide = torch.promote_types(h.dtype, torch.float32)
    x = h.to(wide)
    if norm_weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_weight.to(wide)
    if hidden is not None:
        x = F.silu(F.linear(x, *(t.to(wide) for t in hidden)))
    s = F.linear(x, weight.to(wide), bias.to(wide))
    return s[..., 1] - s[..., 0]


def row_norm(h, weight, eps, *, backend=None):
    """RMSNorm, (..., D) -> (..., D) in float32 (float64 for float64 h), with bits that depend on a token's own h alone.

    Error against x * rsqrt(mean(x^2) + eps) * weight, gradients included: 1e-6 of the largest value in float32.
    """
    if choose(backend, "row_norm", h, weight, fused=gate_fits(h, weight)) == "triton":
        return row_norm_triton(h, weight, eps)
    x = h.to(torch.promote_types(h.dtype, torch.float32))
    # a square root and a division are rounded alike wherever an element stands; rsqrt is not
    scale = 1 / (tree_sum(x * x) / x.shape[-1] + eps).sqrt()
    return x * scale[..., None] * weight.to(x.dtype)


@without_autocast
def gate_logit(x, weight, bias, hidden=None, *, backend=None):
    """delta, (..., D) -> (...), with bits that depend on a token's own x alone.

    With `hidden` the inner products are taken in float64 and rounded once: what is left of another order of summation
    is 2^-29 of the last bit.

    Args:
        x: (..., D) from `row_norm`, or the residual stream.
        weight, bias: (2, D) and (2,), or (2, n) with `hidden`; row 0 drops, row 1 keeps.
        hidden: weight (n, D) and bias (n,) of a SiLU layer in front, or None.
        backend: None chooses by device; "torch" and "triton" are obeyed or refused.

    Returns: (...) float32, float64 for float64 x. Error of both functions against `gate_logit_reference`, gradients
        included: 2e-6 of the largest value in float32.

    Raises:
        ValueError: shapes that do not fit each other, a backend that cannot run.
    """
    inner = x.shape[-1] if hidden is None else hidden[0].shape[0]
    fits = weight.shape == (2, inner) and bias.shape == (2,)
    fits &= hidden is None or (hidden[0].shape == (inner, x.shape[-1]) and hidden[1].shape == (inner,))
    if not fits:
        got = [tuple(t.shape) for t in (x, weight, bias, *(() if hidden is None else hidden))]
        raise ValueError(
            "gate_logit needs x (..., D), weight (2, D) and bias (2,); with hidden = (n, D), (n,) a weight (2, n); "
            f"got x, weight, bias, hidden {got}."
        )
    fused = hidden is None and gate_fits(x, weight, bias)
    if choose(backend, "gate_logit", x, weight, fused=fused) == "triton":
        return gate_logit_triton(x, weight, bias)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = x.dtype
    if hidden is not None:
        x = F.silu(F.linear(x.double(), hidden[0].double(), hidden[1].double())).to(wide)
    row = weight[1].to(wide) - weight[0].to(wide)
    return tree_sum(x * row) + (bias[1].to(wide) - bias[0].to(wide))


def in_one_pass(h, norm_weight, weight, bias, hidden=None) -> bool:
    """Whether `norm_gate` takes these operands faster than `row_norm` and `gate_logit` do: a kernel reads h once."""
    fused = hidden is None and gate_fits(h, norm_weight, weight, bias)
    return choose(None, "norm_gate", h, norm_weight, weight, fused=fused) == "triton"


def norm_gate(h, norm_weight, eps, weight, bias, hidden=None, *, normed=True, backend=None):
    """The norm of the residual stream for what follows, and delta, whose bits depend on a token's own h alone.

    Args:
        h: (..., D), the residual stream. norm_weight: (D,), eps: as for `row_norm`.
        weight, bias, hidden: as for `gate_logit`.
        normed: whether the gate reads the norm's output, before it is rounded; else h.
        backend: None chooses by device; "torch" and "triton" are obeyed or refused.

    Returns: `row_norm`, (..., D) in norm_weight's dtype, and `gate_logit`, (...), bit for bit.
    """
    fused = hidden is None and gate_fits(h, norm_weight, weight, bias)
    if choose(backend, "norm_gate", h, norm_weight, weight, fused=fused) == "triton":
        return norm_gate_triton(h, norm_weight, eps, weight, bias, normed)
    x = row_norm(h, norm_weight, eps, backend=backend)
    return x.to(norm_weight.dtype), gate_logit(x if normed else h, weight, bias, hidden, backend=backend)


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis, (..., D) -> (...), in an order that depends on D alone: halves are added to each other.

    Its rounding error grows with log2(D).
    """
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        low, high, *odd = x.split([half, half] + [1] * (x.shape[-1] % 2), -1)
        x = torch.cat([low + high, *odd], -1) if odd else low + high
    return x[..., 0]


def gumbel_difference(like: torch.Tensor) -> torch.Tensor:
    """g_1 - g_0 of two Gumbel variables, which is logistic, from torch's generator; shape and dtype of `like`."""
    u = torch.rand_like(like).clamp(torch.finfo(torch.float32).tiny, BELOW_ONE)
    return u.log() - (-u).log1p()


def logit(threshold: float) -> float:
    """The delta at which a is the threshold."""
    return math.log(threshold) - math.log1p(-threshold)


def select(delta, threshold=0.5, noise=None, real=None):
    """The hard choice m, (...) bool. A tie drops.

    Args:
        delta: (...) from `gate_logit`.
        threshold: without noise, a token is selected where a is greater; with it, with probability
            sigmoid(delta - logit(threshold)). Compared on delta: a rounds, delta does not.
        noise: (...) from `gumbel_difference`, or None: no chance.
        real: (...) bool, tokens that are no padding; None: all.
    """
    kept = (delta if noise is None else delta + noise) > logit(threshold)
    return kept if real is None else kept & real


def threshold_for(delta, rate: float, sampled: bool = False) -> float:
    """The threshold at which `select` takes a share `rate` of the tokens: to the token as far as their deltas differ,
    or with noise (`sampled`) on average.

    Args:
        delta: (n,), n > 0.
        rate: between 0 and 1.
    """
    delta = delta.double().sort().values
    if sampled:
        low, high = (float(edge) - logit(rate) for edge in (delta[0], delta[-1]))
        for _ in range(64):
            middle = (low + high) / 2
            low, high = (middle, high) if float(torch.sigmoid(delta - middle).mean()) > rate else (low, middle)
    else:
        dropped = len(delta) - round(rate * len(delta))
        edges = torch.cat([delta[:1] - 1, delta, delta[-1:] + 1])
        low, high = (float(edge) for edge in edges[dropped : dropped + 2])
    between = float(torch.sigmoid(torch.tensor((low + high) / 2, dtype=torch.float64)))
    return min(max(between, THRESHOLDS[0]), THRESHOLDS[1])


def straight_through(m, p):
    """m exactly, with p's gradient. (m + p) - p would be off by a rounding, and unselected tokens would move."""
    return m.to(p.dtype) + (p - p.detach())


def mix(h, o, a, refine="convex"):
    """Equation 5: (1 - a) h + a o ("convex"), or h + a o ("residual"); h, o (n, D), a (n,) -> (n, D) in h's dtype."""
    wide = torch.promote_types(h.dtype, a.dtype)
    found = o.to(wide) - h.to(wide) if refine == "convex" else o.to(wide)
    return (h.to(wide) + a[..., None] * found).to(h.dtype)
