"""DDTS: linear attention with one decay per key channel and step, one head (Rodimus, arXiv:2410.06577, section 3).

    S_t = diag(exp(a_t)) S_{t-1} + k_t v_t^T        S: (N, M)
    y_t = S_t^T q_t

B batch, T time, N key size, M value size, Q chunk.
q, k, a: (B, T, N)   v: (B, T, M)   a is a log-decay in nats, <= 0   state: (B, N, M) float32
The paper's names: q = its query times n^(-1/2), k = its normalised, gated key, v = its gated value, a = log alpha.

The chunked form, for a chunk that starts with state S and has inclusive sums c_i = a_1 + ... + a_i (per channel n):
    y_i = sum_{j<=i} (sum_n q_in k_jn exp(c_in - c_jn)) v_j  +  S^T (q_i exp(c_i))
    S'  = diag(exp(c_Q)) S  +  sum_j (k_j exp(c_Q - c_j)) v_j^T
The decay depends on n, so the scores are no masked product of q and k, and k exp(-c) would overflow: the differences
are taken first, (Q, Q, N) numbers a chunk, which is why chunks are short. Sums are taken in float64 and differences
rounded once. In its gradient every a_t gathers only the pairs (i >= t > j) that it decays: nothing large cancels.
"""

from functools import partial

import torch

from scrubjay.kernels.ddts_triton import ddts_fits, ddts_step_triton, ddts_triton
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
    num_states,
    reuse,
    wants_gradient,
)
from scrubjay.kernels.recurrence_operator import as_operator


@without_autocast
def ddts_step(q, k, v, a, state, overwrite=False):
    """One token. q, k, a (B, N), v (B, M), state (B, N, M) -> y (B, M) in v's dtype, new state.

    `overwrite`: the new state may take the memory of the old one, which saves a pass over memory.
    """
    wide = state.dtype
    state = decayed(state, a.to(wide).exp()[..., None], overwrite)
    state.addcmul_(k.to(wide)[..., None], v.to(wide)[:, None])
    return torch.matmul(q.to(wide)[:, None], state)[:, 0].to(v.dtype), state


def ddts_reference(q, k, v, a, initial_state=None, cu_seqlens=None):
    """The recurrence, one step at a time, in float32 (float64 for float64). Slow; the law for every other path."""
    return by_steps(ddts_step, _initial(q, v, initial_state, cu_seqlens), cu_seqlens, q, k, v, a)


def ddts(q, k, v, a, initial_state=None, cu_seqlens=None, *, chunk=16, overwrite=False, backend=None):
    """DDTS over whole sequences.

    Args:
        q, k, v, a: shapes in the header; float32, bfloat16, float16 or float64, each its own.
        initial_state: (B, N, M), or (D, N, M) with D packed documents; None is zero.
        cu_seqlens: (D + 1,) offsets of the documents packed into the one row of the batch; no state crosses them.
        chunk: Q, steps solved as one product; changes speed, never the result beyond rounding. The Triton kernels
            have their own.
        overwrite: whether the memory of `initial_state` may be used for the new state.
        backend: None chooses by device; "torch" and "triton" are obeyed or refused.

    Returns:
        y (B, T, M) in v's dtype, and the state after the last step, (B or D, N, M) in float32.
        Error against `ddts_reference`, gradients included: 1e-6 of the largest value in float32, 1e-2 in bfloat16
        (whose own spacing is 4e-3).

    Raises:
        ValueError: shapes that do not fit each other, a sequence of length 0, a backend that cannot run.
    """
    _check(q, k, v, a, chunk)
    fused = choose(backend, "ddts", q, k, v, a, fused=partial(ddts_fits, q, k, v, a)) == "triton"
    single = q.shape[1] == 1 and cu_seqlens is None and not wants_gradient(q, k, v, a, initial_state)
    state = _initial(q, v, initial_state, cu_seqlens, read=not (fused or single))
    if single:
        step = ddts_step_triton if fused else ddts_step
        y, state = step(q[:, 0], k[:, 0], v[:, 0], a[:, 0], state, overwrite)
        return y[:, None], state
    if fused:
        return ddts_triton(q, k, v, a, state, cu_seqlens)
    return chunked(_Chunk, chunk, state, cu_seqlens, q, k, v, a)


def ddts_change_reference(k, v, a):
    """`ddts_change`, one step at a time. Slow; the law."""
    return a.to(torch.promote_types(v.dtype, torch.float32)).sum(1), ddts_reference(k, k, v, a)[1]


@without_autocast
def ddts_change(k, v, a):
    """What whole sequences do to the state before them, S' = diag(exp(A)) S + Z, at a fraction of what their outputs
    cost.

    Returns:
        A (B, N) and Z (B, N, M), in float32 (float64 for float64). Error against `ddts_change_reference`, gradients
        included: 1e-6 of the largest value, 2e-2 in gradients that are bfloat16.

    Raises:
        ValueError: as `ddts`.
    """
    _check(k, k, v, a, 1)
    total, later = decay_to_end(a)
    keys = k.to(later.dtype) * later.exp()
    return total, OuterSum.apply(keys[:, :, None], v[:, :, None])[:, 0]


@as_operator("ddts")
class _Chunk:
    """One chunk of Q steps. Products over steps of the chunk run in v's dtype, what enters the state in float32."""

    def __init__(self, memory, q, k, v, a):
        self.memory = memory
        self.low, self.wide = product_dtype(v), torch.promote_types(v.dtype, torch.float32)
        self.q, self.k, self.v = q.to(self.wide), k.to(self.wide), v.to(self.low)
        # (B, Q, N), in units of log 2, because on some CPUs exp is many times slower than exp2
        self.sums = (a.double() * LOG2_E).cumsum(1)
        self.into = decay(self.sums, self.wide)  # exp(c_i)
        self.out_of = decay(self.sums[:, -1:] - self.sums, self.wide)  # exp(c_Q - c_j)

    def decays(self):
        """exp(c_i - c_j), (B, Q, Q, N); 1 for j > i. Clamped before exp: never inf."""
        (B, Q, N), i, j = self.sums.shape, self.sums[:, :, None], self.sums[:, None]
        differences = reuse(self.memory, (B, Q, Q, N), i.dtype, i.device)
        return decay(torch.sub(i, j, out=differences).clamp_(max=0), self.wide)

    def keys(self):
        """k_j exp(c_i - c_j) for j <= i, else 0: (B, Q, Q, N)."""
        return self.decays().mul_(self.k[:, None]).mul_(_lower(self.sums.shape[1], self.k)[..., None])

    def outputs(self, s, out=None):
        """y (B, Q, M), from the state before the chunk."""
        scores = torch.matmul(self.keys(), self.q[..., None])[..., 0]  # (B, Q, Q)
        within = torch.matmul(scores.to(self.low), self.v)
        return torch.add(within, matmul((self.q * self.into).to(self.low), s.to(self.low)), out=out)

    def total(self):
        """c_Q in units of log 2: (B, N)."""
        return self.sums[:, -1]

    def summed(self, weights, states):
        """Sums of states over chunks."""
        return torch.einsum("bnts,bsnm->btnm", weights, states)

    def kept(self):
        """exp(c_Q), what is left of a state: (B, N, 1)."""
        return self.into[:, -1, :, None]

    def added(self, out=None):
        """What the chunk adds to a state."""
        return matmul((self.k * self.out_of).mT, self.v.to(self.wide), out)

    def returned(self, dy, out):
        """What the outputs add to the gradient of a state."""
        return matmul((self.q * self.into).mT, dy.to(self.wide), out)

    def gradients(self, dy, s, ds):
        """dq, dk, da (B, Q, N), dv (B, Q, M), from the state `s` before the chunk and the gradient `ds` of the state
        after it."""
        q, k, low, wide = self.q, self.k, self.low, self.wide
        keys = self.keys()
        scores = torch.matmul(keys, q[..., None])[..., 0]
        dscores = torch.matmul(dy.to(low), self.v.mT).to(wide)  # (B, Q, Q)
        dy, v = dy.to(wide), self.v.to(wide)

        dq_carried = torch.matmul(dy, s.mT) * self.into
        dk_leaving = torch.matmul(v, ds.mT) * self.out_of
        dv = torch.matmul(scores.mT.to(low), dy.to(low)) + torch.matmul(k * self.out_of, ds)
        dq = torch.matmul(dscores[:, :, None], keys)[:, :, 0]
        pairs = keys.mul_(q[:, :, None]).mul_(dscores[..., None])  # q_i k_j exp(c_i - c_j) dscores_ij: (B, Q, Q, N)

        da = crossing(pairs, 1, self.memory)
        da += (q * dq_carried).flip(1).cumsum(1).flip(1)  # y_i sees the state through a_1 .. a_i
        da[:, 1:] += (k * dk_leaving)[:, :-1].cumsum(1)  # step j reaches the next state through a_(j+1) .. a_Q
        da += (s * ds).sum(-1)[:, None] * self.into[:, -1:]

        dk = self._key_gradient(dscores)
        return dq + dq_carried, dk + dk_leaving, dv, da

    def _key_gradient(self, dscores):
        """sum over i >= j of dscores_ij q_i exp(c_i - c_j): (B, Q, N)."""
        decays = self.decays()
        weights = (dscores * _lower(self.sums.shape[1], decays)).mT[:, :, None]  # (B, j, 1, i)
        return torch.matmul(weights, decays.mul_(self.q[:, :, None]).transpose(1, 2))[:, :, 0]


def _lower(size, like):
    """(Q, Q): 1 where step j may reach step i."""
    return torch.ones(size, size, dtype=like.dtype, device=like.device).tril_()


def _initial(q, v, state, cu_seqlens, *, read=False):
    shape = (num_states(cu_seqlens, *v.shape[:2]), q.shape[2], v.shape[2])
    return initial_or_zeros(state, shape, v, "ddts", read=read)


def _check(q, k, v, a, chunk):
    if q.ndim != 3 or v.ndim != 3 or not (q.shape == k.shape == a.shape) or v.shape[:2] != q.shape[:2]:
        raise ValueError(
            "ddts needs q, k, a (B, T, N) and v (B, T, M); "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, a {tuple(a.shape)}, v {tuple(v.shape)}."
        )
    if v.shape[1] == 0:
        raise ValueError("ddts needs at least one step; got a sequence of length 0.")
    if chunk < 1:
        raise ValueError(f"ddts: chunk must be at least 1; got {chunk}.")
