"""One token of each row, on a CPU and outside autograd, in few calls of PyTorch.

There a call costs as much as its arithmetic, and what is asked of shapes, dtypes and modes before it as much again. So
the formulas of conv.py, norm.py, ssd.py, ddts.py and rodimus_gates.py stand here once more without a question, for
layers whose model has asked on behalf of all of them (`Layout.one_token`). The law of each is the function whose name
is in its docstring; errors are those stated there.

B batch, C channels, K taps, H heads, G groups, N state size, P head size, M inner width. What comes in is float32 or of
16 bits, what is computed float32.
"""

import functools
import math

import torch
import torch.nn.functional as F

from scrubjay.kernels.recurrence import chunks, locked

TILE = 2**21  # numbers of the states that a token is added to at a time: they stay in cache
MANY = 4  # rows from which on the weight of a convolution is laid out anew for them


@functools.cache
def _number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _scale(x, eps):
    """rsqrt(mean(x^2) + eps) over the last axis, (..., 1)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_number(eps), length, length, value=1 / x.shape[-1]).rsqrt_()


def rms_norm_token(x, weight, eps):
    """`rms_norm`: (B, 1, C) -> (B, 1, C) in weight's dtype."""
    x = x.float()
    return (x * _scale(x, eps)).mul_(weight).to(weight.dtype)


def gated_rms_norm_token(u, z, weight, eps, groups=1):
    """`gated_rms_norm` of u = y + skip * x, (B, 1, C) float32: (B, 1, C) in z's dtype."""
    u = u * F.silu(z.float())
    grouped = u if groups == 1 else u.unflatten(-1, (groups, -1))
    grouped.mul_(_scale(grouped, eps))
    return u.mul_(weight).to(z.dtype)


def causal_conv_token(x, weight, bias, state, activate=True):
    """`causal_conv`: x (B, 1, C), weight (C, K), state (B, K - 1, C) in x's dtype -> y (B, 1, C), new state."""
    window, taps = torch.cat([state, x], 1), weight.T
    y = (window * (taps if len(x) < MANY else taps.contiguous())).sum(1, keepdim=True)
    y = y if bias is None else y.add_(bias)
    return F.silu(y, inplace=True) if activate else y, window[:, 1:]


def decay_token(step, log_rate):
    """exp of `log_decay`, (B, 1, H) float32, with a logarithm where that has a product: nothing overflows."""
    return step.log().add_(log_rate).exp_().neg_().exp_()


def rodimus_gates_token(qk, gates, bias, eps):
    """`rodimus_gates`, with exp(a) for a: q, k, keep (B, 1, N), float32."""
    q, k = qk.float().chunk(2, -1)
    length, gates = torch.linalg.vector_norm(k, dim=-1, keepdim=True).clamp_(min=eps), gates.float() + bias
    if gates.shape[-1] == k.shape[-1]:  # no temperature
        gate = F.softplus(gates)
        return q * q.shape[-1] ** -0.5, (gate * k).div_(length), gate.neg_().exp_()
    selection, temperature = gates.chunk(2, -1)
    gate, temperature = F.softplus(selection), torch.sigmoid(temperature)
    # ln(softplus(s)) >= s - e^s / 2, which it is where softplus underflows
    power = torch.maximum(gate.log(), torch.sub(selection, selection.exp(), alpha=0.5)).mul_(temperature).exp_()
    return q * q.shape[-1] ** -0.5, power.mul_(k).div_(length), gate.mul_(temperature).neg_().exp_()


def ssd_token(q, k, v, keep, gain, state):
    """`ssd`: q, k (B, G, N), v (B, H, P), keep, gain (B, 1, H), all float32 -> y (B, H, P), and the state, in its own
    memory where that may be written."""
    state = _own(state)
    (B, G, N), (H, P) = k.shape, v.shape[1:]
    given = (v * gain.view(B, H, 1)).view(B, G, H // G, 1, P)
    parts = q.view(B, G, 1, 1, N), k.view(B, G, 1, N, 1), given, keep.view(B, G, H // G, 1, 1)
    return _advanced(*parts, state.unflatten(1, (G, H // G))).view(B, H, P), state


def ddts_token(q, k, v, keep, state):
    """`ddts`: q, k, keep (B, 1, N), v (B, 1, M), all float32 -> y (B, 1, M), and the state, in its own memory where
    that may be written."""
    state = _own(state)
    return _advanced(q, k.mT, v, keep.mT, state), state


def _own(state):
    """A float32 state that may be written: a cache may come from a model of another dtype."""
    return state.to(torch.float32, copy=locked(state))


def _advanced(q, k, given, keep, state):
    """state <- keep * state + k given, and q state."""
    rows = max(1, TILE // max(1, math.prod(state.shape[1:])))
    if len(state) <= rows:
        return torch.matmul(q, state.mul_(keep).addcmul_(k, given))
    tiles = chunks(0, len(state), rows)
    return torch.cat([torch.matmul(q[t], state[t].mul_(keep[t]).addcmul_(k[t], given[t])) for t in tiles])
