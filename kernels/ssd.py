"""SSD: linear attention with one scalar decay per head and step (Mamba-2, arXiv:2405.21060, section 6).

    S_t = exp(a_t) S_{t-1} + g_t k_t v_t^T        S: (N, P) state per head
    y_t = S_t^T q_t

B batch, T time, H heads, G groups of heads that share q and k, N state (key) size, P head (value) size, Q chunk.
q, k: (B, T, G, N)   v: (B, T, H, P)   a, g: (B, T, H) log-decay in nats, <= 0, and gain   state: (B, H, N, P) float32
Head h reads group h // (H / G). Mamba-2's names: q = C, k = B, v = x, a = dt * A, g = dt.

The chunked form (the loop over chunks is `chunked` in recurrence.py), for a chunk that starts with state S and has
inclusive sums c_i = a_1 + ... + a_i:
    y_i = sum_{j<=i} exp(c_i - c_j) g_j (q_i . k_j) v_j  +  exp(c_i) S^T q_i
    S'  = exp(c_Q) S  +  sum_j exp(c_Q - c_j) g_j k_j v_j^T
Sums are taken in float64 and differences rounded once: with float32 sums the gradient of `a` lost two digits.
In its gradient every a_t gathers only the pairs (i >= t > j) that it decays, so nothing large cancels.
"""

import math
from functools import partial

import torch
from torch.autograd.function import once_differentiable

from scrubjay.kernels.dispatch import choose, without_autocast
from scrubjay.kernels.linear import matmul, product_dtype
from scrubjay.kernels.recurrence import (
    LOG2_E,
    OuterSum,
    by_steps,
    chunked,
    crossing,
    decay,
    decay_to_end,
    decayed,
    initial_or_zeros,
    locked,
    num_states,
    reuse,
    wants_gradient,
)
from scrubjay.kernels.recurrence_operator import as_operator
from scrubjay.kernels.ssd_triton import ssd_fits, ssd_step_triton, ssd_triton


@without_autocast
def ssd_step(q, k, v, a, g, state, overwrite=False):
    """One token. q, k (B, G, N), v (B, H, P), a, g (B, H), state (B, H, N, P) -> y (B, H, P) in v's dtype, new state.

    `overwrite`: the new state may take the memory of the old one, which saves a pass over memory.
    """
    (B, H, N, _), G, wide = state.shape, q.shape[1], state.dtype
    q, k = q.to(wide), k.to(wide)
    if G > 1:
        q, k = (x[:, :, None].expand(B, G, H // G, N).reshape(B, H, N) for x in (q, k))
    state = decayed(state, a.to(wide).exp()[..., None, None], overwrite)
    state.addcmul_(k[..., None], (v.to(wide) * g.to(wide)[..., None])[..., None, :])
    return torch.matmul(q[..., None, :], state)[..., 0, :].to(v.dtype), state


def ssd_reference(q, k, v, a, g, initial_state=None, cu_seqlens=None):
    """The recurrence, one step at a time, in float32 (float64 for float64). Slow; the law for every other path."""
    return by_steps(ssd_step, _initial(q, v, initial_state, cu_seqlens), cu_seqlens, q, k, v, a, g)


def ssd(q, k, v, a, g, initial_state=None, cu_seqlens=None, *, chunk=64, overwrite=False, backend=None):
    """SSD over whole sequences.

    Args:
        q, k, v, a, g: shapes in the header; float32, bfloat16, float16 or float64.
        initial_state: (B, H, N, P), or (D, H, N, P) with D packed documents; None is zero.
        cu_seqlens: (D + 1,) offsets of the documents packed into the one row of the batch; no state crosses them.
        chunk: Q, steps solved as one product; changes speed, never the result beyond rounding. The Triton kernels
            have their own.
        overwrite: whether the memory of `initial_state` may be used for the new state.
        backend: None chooses by device; "torch" and "triton" are obeyed or refused.

    Returns:
        y (B, T, H, P) in v's dtype, and the state after the last step, (B or D, H, N, P) in float32.
        Error against `ssd_reference`, gradients included: 1e-6 of the largest value in float32, 2e-2 in bfloat16
        (whose own spacing is 4e-3).

    Raises:
        ValueError: shapes that do not fit each other, a sequence of length 0, a backend that cannot run.
    """
    sequences = q, k, v, a, g
    _check(*sequences, chunk)
    fused = choose(backend, "ssd", *sequences, fused=partial(ssd_fits, *sequences)) == "triton"
    single = q.shape[1] == 1 and cu_seqlens is None and not wants_gradient(*sequences, initial_state)
    if fused and initial_state is not None:
        initial_state = _initial(q, v, initial_state, cu_seqlens)
    if fused and not single:
        num_states(cu_seqlens, *v.shape[:2])  # refuses offsets that name no documents
        return ssd_triton(*sequences, initial_state, cu_seqlens)
    if fused:
        out = initial_state if overwrite and not locked(initial_state) else None
        y, state = ssd_step_triton(*(x[:, 0] for x in sequences), initial_state, out)
        return y[:, None], state
    if single:
        y, state = ssd_step(*(x[:, 0] for x in sequences), _initial(q, v, initial_state, None), overwrite)
        return y[:, None], state
    state = _grouped(_initial(q, v, initial_state, cu_seqlens, read=True), q.shape[2])
    y, state = chunked(_Chunk, chunk, state, cu_seqlens, *sequences)
    return y, _per_head(state, v.shape[3])


def ssd_change_reference(k, v, a, g):
    """`ssd_change`, one step at a time. Slow; the law."""
    return a.to(torch.promote_types(v.dtype, torch.float32)).sum(1), ssd_reference(k, k, v, a, g)[1]


@without_autocast
def ssd_change(k, v, a, g):
    """What whole sequences do to the state before them, S' = exp(A) S + Z, at a fraction of what their outputs cost.

    Returns:
        A (B, H) and Z (B, H, N, P), in float32 (float64 for float64). Error against `ssd_change_reference`, gradients
        included: 1e-6 of the largest value, 2e-2 in gradients that are bfloat16.

    Raises:
        ValueError: as `ssd`.
    """
    _check(k, k, v, a, g, 1)
    total, later = decay_to_end(a)
    return total, OuterSum.apply(k, v, later.exp() * g.to(later.dtype))


def log_decay(step, log_rate):
    """-step * exp(log_rate), the log-decays of Mamba-2: step (B, T, H) >= 0, log_rate (H,) -> (B, T, H).

    0 where the step is 0, whatever the rate: exp(89) is inf in float32, and 0 * inf no number. Gradients are finite
    too; those of a step are cut off at half of the largest number, which leaves room for what is added to them.
    """
    if wants_gradient(step, log_rate):
        return _LogDecay.apply(step, log_rate)
    rate, more = _rates(log_rate)
    return step * rate * more


def _rates(log_rate):
    """-exp(log_rate) as two factors. The second is 1 up to exp(44) in float32: then products have the bits of the
    formula. Beyond exp(132) a rate makes no difference: the smallest step forgets everything."""
    half = math.log(torch.finfo(log_rate.dtype).max) // 4 * 2
    return log_rate.clamp(max=half).exp().neg(), (log_rate - half).clamp(0, 2 * half).exp()


class _LogDecay(torch.autograd.Function):
    """Keeps its result: the gradient of the rate's logarithm is a sum over that."""

    @staticmethod
    def forward(ctx, step, log_rate):
        rate, more = _rates(log_rate)
        a = step * rate * more
        ctx.save_for_backward(rate, more, a)
        return a

    @staticmethod
    @once_differentiable
    def backward(ctx, da):
        rate, more, a = ctx.saved_tensors
        top = torch.finfo(a.dtype).max / 2
        dlog = da * a.clamp(min=-top)  # da is 0 where a is -inf
        return (da * rate * more).clamp(-top, top), dlog.flatten(0, -2).sum(0).to(rate.dtype)


@as_operator("ssd")
class _Chunk:
    """One chunk of Q steps. R = H / G heads share a group; states are grouped, (B, G, N, R * P), so that one product
    serves all heads of a group and q, k are never repeated. Products over steps of the chunk run in the inputs' dtype,
    what enters the state in float32.
    """

    def __init__(self, memory, q, k, v, a, g):
        self.memory = memory
        (B, Q, H, P), G = v.shape, q.shape[2]
        self.B, self.Q, self.H, self.P, self.G, self.R = B, Q, H, P, G, H // G
        self.low, self.wide = product_dtype(v), torch.promote_types(v.dtype, torch.float32)
        q, k, self.v = (x.to(self.low) for x in (q, k, v))  # v (B, Q, H, P)
        self.q, self.k = q.transpose(1, 2), k.transpose(1, 2)  # (B, G, Q, N)
        # (B, H, Q), time fastest: what is computed from it then has the layout that batched products want. In units of
        # log 2, because on some CPUs exp is many times slower than exp2.
        self.sums = (a.transpose(1, 2).contiguous().double() * LOG2_E).cumsum(2)
        sums = self.sums.transpose(1, 2)
        self.into = decay(sums, self.wide)[..., None]  # exp(c_i), (B, Q, H, 1)
        self.out_of = decay(sums[:, -1:] - sums, self.wide)[..., None]  # exp(c_Q - c_j)
        self.g = g.to(self.wide)[..., None]  # (B, Q, H, 1)
        self.gain = self.g.permute(0, 2, 3, 1).contiguous()  # (B, H, 1, Q), of the pairs' second step

    def group(self, x):
        """(B, Q, H, P) -> (B, G, Q, R * P)."""
        return x.reshape(self.B, self.Q, self.G, self.R * self.P).transpose(1, 2)

    def ungroup(self, x):
        """(B, G, Q, R * P) -> (B, Q, H, P)."""
        return x.transpose(1, 2).reshape(self.B, self.Q, self.H, self.P)

    def decays(self):
        """exp(c_i - c_j), (B, H, Q, Q); 1 above the diagonal, where the scores are 0. Clamped before exp: never inf."""
        i, j = self.sums[..., :, None], self.sums[..., None, :]
        differences = reuse(self.memory, (self.B, self.H, self.Q, self.Q), i.dtype, i.device)
        return decay(torch.sub(i, j, out=differences).clamp_(max=0), self.wide)

    def scores(self):
        """q_i . k_j for j <= i, else 0: (B, G, 1, Q, Q)."""
        return torch.matmul(self.q, self.k.mT).tril_().to(self.wide)[:, :, None]

    def times(self, decays, scores):
        """Decayed scores, (B, H, Q, Q)."""
        return (decays.view(self.B, self.G, self.R, self.Q, self.Q) * scores).view_as(decays)

    def outputs(self, s, out=None):
        """y (B, Q, H, P), from the state before the chunk."""
        weights = self.decays().mul_(self.gain)
        weights.view(self.B, self.G, self.R, self.Q, self.Q).mul_(self.scores())
        within = torch.matmul(weights.to(self.low), self.v.transpose(1, 2)).transpose(1, 2)
        carried = self.ungroup(matmul(self.q, s.to(self.low)))
        return torch.addcmul(within.to(self.wide), carried.to(self.wide), self.into, out=out)

    def total(self):
        """c_Q in units of log 2: (B, H)."""
        return self.sums[..., -1]

    def summed(self, weights, states):
        """Sums of grouped states over chunks."""
        weights, states = weights.unflatten(1, (self.G, self.R)), states.unflatten(-1, (self.R, self.P))
        return torch.einsum("bgrts,bsgnrp->btgnrp", weights, states).flatten(-2)

    def kept(self):
        """exp(c_Q), what is left of a grouped state: (B, G, 1, R * P)."""
        left = self.into[:, -1].expand(-1, -1, self.P)
        return left.reshape(self.B, self.G, 1, self.R * self.P)

    def added(self, out=None):
        """What the chunk adds to a grouped state."""
        return matmul(self.k.mT.to(self.wide), self.group(self.v * (self.out_of * self.g)), out)

    def returned(self, dy, out):
        """What the outputs add to the gradient of a grouped state."""
        return matmul(self.q.mT.to(self.wide), self.group(dy * self.into), out)

    def gradients(self, dy, s, ds):
        """dq, dk (B, Q, G, N), dv (B, Q, H, P), da, dg (B, Q, H), from the state `s` before the chunk and the gradient
        `ds` of the state after it. The gain multiplies v: of (g v) everything else is made."""
        q, k, low, wide = self.q, self.k, self.low, self.wide
        dy, decays, scores = dy.to(low), self.decays(), self.scores()
        weights = self.times(decays, scores)
        dweights = torch.matmul(dy.transpose(1, 2), self.v.permute(0, 2, 3, 1)).to(wide).mul_(self.gain)  # (B, H, Q, Q)
        dscores = decays.mul_(dweights).view(self.B, self.G, self.R, self.Q, self.Q).sum(2).tril_().to(low)

        dy_in = dy * self.into  # (B, Q, H, P): what reaches the carried state
        carried = self.ungroup(matmul(q.to(wide), s))
        returned = self.ungroup(matmul(k.to(wide), ds)) * self.out_of
        dv = torch.matmul(weights.mT.to(low), dy.transpose(1, 2)).transpose(1, 2) + returned  # of g v
        dq = torch.matmul(dscores, k) + matmul(self.group(dy_in), s.mT)
        dk = torch.matmul(dscores.mT, q) + matmul(self.group(self.v * (self.out_of * self.g)), ds.mT)

        da = crossing(weights.mul_(dweights), 2, self.memory).transpose(1, 2)
        da += (dy_in * carried).sum(-1).flip(1).cumsum(1).flip(1)  # y_i sees the state through a_1 .. a_i
        leaving = (self.v * returned).sum(-1) * self.g[..., 0]  # step j reaches the next state through a_(j+1) .. a_Q
        da[:, 1:] += leaving[:, :-1].cumsum(1)
        kept = (
            torch.mul(s, ds, out=reuse(self.memory, tuple(s.shape), s.dtype, s.device))
            .view(self.B, self.G, s.shape[2], self.R, self.P)
            .sum((2, 4))
            .view(self.B, 1, self.H)
        )
        da += kept * self.into[:, -1:, :, 0]

        dg = (self.v * dv).sum(-1)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.mul_(self.g), da, dg


def _grouped(state, groups):
    """(B, H, N, P) -> (B, G, N, R * P)."""
    B, H, N, P = state.shape
    return state.view(B, groups, H // groups, N, P).transpose(2, 3).reshape(B, groups, N, H // groups * P)


def _per_head(state, head_dim):
    """(B, G, N, R * P) -> (B, H, N, P)."""
    B, G, N, width = state.shape
    heads = state.view(B, G, N, width // head_dim, head_dim).transpose(2, 3)
    return heads.reshape(B, width // head_dim * G, N, head_dim).contiguous()


def _initial(q, v, state, cu_seqlens, *, read=False):
    shape = (num_states(cu_seqlens, *v.shape[:2]), v.shape[2], q.shape[3], v.shape[3])
    return initial_or_zeros(state, shape, v, "ssd", read=read)


def _check(q, k, v, a, g, chunk):
    fits = q.ndim == 4 and q.shape == k.shape and v.ndim == 4 and a.ndim == 3 and a.shape == g.shape
    fits = fits and q.shape[:2] == v.shape[:2] == a.shape[:2] and v.shape[2] == a.shape[2]
    if not fits or v.shape[2] % q.shape[2]:
        raise ValueError(
            "ssd needs q, k (B, T, G, N), v (B, T, H, P), a, g (B, T, H) with H a multiple of G; got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, a {tuple(a.shape)}, g {tuple(g.shape)}."
        )
    if v.shape[1] == 0:
        raise ValueError("ssd needs at least one step; got a sequence of length 0.")
    if chunk < 1:
        raise ValueError(f"ssd: chunk must be at least 1; got {chunk}.")
