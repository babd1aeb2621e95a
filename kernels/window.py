"""Causal sliding-window attention in which heads may share keys or values (SW-SKA, arXiv:2410.06577, section 4).

    o_i = sum_j softmax_j(scale q_i . k_j) v_j        j in (i - W, i]: W keys, the query's own among them

B batch, T time, H query heads, K key heads, V value heads, P head size, W window, S past steps.
q: (B, T, H, P)   k: (B, T, K, P)   v: (B, T, V, P)   K and V divide H; query head h reads key head h mod K and value
head h mod V (tiled, not the grouped order of other models). SW-SKA has K = 1 and V = H: one key for all heads.
"""

import torch
import torch.nn.functional as F

from scrubjay.kernels.dispatch import alike, choose, compiled, exported, without_autocast
from scrubjay.kernels.operators import Operator
from scrubjay.kernels.recurrence import documents, wants_gradient
from scrubjay.kernels.window_triton import window_fits, window_step_triton, window_triton

# Queries solved as one call on the keys that they can see. 64 was the fastest of 64, 128, 256 for W = 512 on a CPU.
BLOCK = 64


def window_attention_reference(q, k, v, window, past=None, cu_seqlens=None, *, scale=None):
    """Dense scores in float32 (float64 for float64 inputs). Slow, T x T; the law for the other paths."""
    wide = torch.promote_types(q.dtype, torch.float32)
    real = torch.ones(q.shape[0], k.shape[1], dtype=torch.bool, device=q.device)
    if past is not None:
        k, v, real = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1), torch.cat([past[2], real], 1)
    T, S = q.shape[1], k.shape[1] - q.shape[1]
    i, j = torch.arange(S, S + T, device=q.device)[:, None], torch.arange(S + T, device=q.device)
    seen = ((j <= i) & (i - j < window))[None, None] & real[:, None, None]
    if cu_seqlens is not None:
        doc = torch.searchsorted(cu_seqlens.to(q.device), torch.arange(T, device=q.device), right=True)
        seen = seen & (doc[:, None] == doc)
    q, k, v = (_tiled(x, q.shape[2]).transpose(1, 2).to(wide) for x in (q, k, v))
    scores = torch.matmul(q, k.mT) * _scale(q, scale)
    return torch.matmul(scores.masked_fill(~seen, -torch.inf).softmax(-1), v).transpose(1, 2)


@without_autocast
def window_attention_step(q, keys, values, held, scale=None, *, backend=None):
    """One token against a window in any order.

    q (B, H, P), keys (B, K, W, P), values (B, V, W, P), held (B, W) bool: which entries there are -> (B, H, P).
    backend: as in `window_attention`; the Triton kernel has no gradient.
    """
    (B, H, P), K, V = q.shape, keys.shape[1], values.shape[1]
    fused = window_fits(q, keys, values, scale=_scale(q, scale)) and not wants_gradient(q, keys, values)
    if choose(backend, "window_attention_step", q, keys, values, fused=fused) == "triton":
        return window_step_triton(q, keys, values, held, _scale(q, scale))
    dtype, (q, keys, values) = q.dtype, alike(q, keys, values)
    wide = torch.promote_types(q.dtype, torch.float32)
    by_key = q.view(B, H // K, K, P).transpose(1, 2)  # (B, K, H / K, P): a shared key is read once for its heads
    scores = torch.matmul(by_key, keys.mT).to(wide) * _scale(q, scale)
    weights = scores.masked_fill(~held[:, None, None], -torch.inf).softmax(-1).to(values.dtype)
    by_value = weights.transpose(1, 2).reshape(B, H // V, V, -1).transpose(1, 2)
    return torch.matmul(by_value, values).transpose(1, 2).reshape(B, H, P).to(dtype)


def window_attention(q, k, v, window, past=None, cu_seqlens=None, *, scale=None, dropout=0.0, backend=None):
    """Attend over whole sequences in O(T * W) time and memory; keys are never repeated over heads. Exported, in O(T^2).

    Args:
        q, k, v: shapes in the header; positions already encoded.
        window: W, keys that a query sees, itself included.
        past: (k, v, real) of the S steps before, in order: (B, S, K, P), (B, S, V, P) and (B, S) bool.
        cu_seqlens: (D + 1,) offsets of the documents packed into the batch's one row; no query sees another's keys.
        scale: of the scores; None is P ** -0.5.
        dropout: probability with which a weight is zeroed.
        backend: None chooses by device; "torch" and "triton" are obeyed or refused. The Triton kernels know no dropout.

    Returns: (B, T, H, P).

    Raises:
        ValueError: shapes that do not fit each other, a sequence of length 0, a backend that cannot run.
    """
    _check(q, k, v, window, past, cu_seqlens)
    scale = _scale(q, scale)
    pieces = [] if compiled() else documents(cu_seqlens, *q.shape[:2])  # the operator looks at values
    fused = window_fits(q, k, v, *(past or ())[:2], scale=scale, dropout=dropout)
    if choose(backend, "window_attention", q, k, v, fused=fused) == "triton":
        return window_triton(q, k, v, window, past, cu_seqlens, scale)
    if compiled():
        seed = torch.randint(2**62, (), dtype=torch.int64) if dropout else None
        return _OPERATOR([q, k, v, *(past or (None,) * 3), cu_seqlens, seed], [window], [scale, dropout])[0]
    if cu_seqlens is None:
        return _banded(q, k, v, window, past, scale, dropout)
    cuts = [stop - start for _, start, stop in pieces]
    packed = zip(*(x.split(cuts, 1) for x in (q, k, v)), strict=True)
    return torch.cat([_banded(*x, window, None, scale, dropout) for x in packed if x[0].shape[1]], 1)


def _run(tensors, integers, floats):
    """`window_attention`; the dropout of a forward and a backward pass is one seed's."""
    q, k, v, *past, cu_seqlens, seed = tensors
    past = None if past[0] is None else past
    scale, dropout = floats
    with torch.random.fork_rng([q.device] if q.device.type == "cuda" else [], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(int(seed))
        options = {"scale": scale, "dropout": dropout, "backend": "torch"}
        return [window_attention(q, k, v, integers[0], past, cu_seqlens, **options)]


def _shapes(tensors, integers):
    q, v = tensors[0], tensors[2]
    return [q.new_empty(*q.shape[:3], v.shape[3])]


_OPERATOR = Operator("window_attention", _run, _shapes)


def _banded(q, k, v, window, past, scale, dropout):
    """One document. Blocks of queries against the blocks of keys that they reach; split and cat, because the gradient
    of a slice is as large as what it was cut from."""
    T, H = q.shape[1:3]
    k, v = (_tiled(x, H) for x in (k, v))
    if past is None and not exported() and window >= T:
        return _attend(q, k, v, None, scale, dropout)
    S = 0
    real = None
    if past is not None:
        k, v = torch.cat([_tiled(past[0], H), k], 1), torch.cat([_tiled(past[1], H), v], 1)
        S, real = past[0].shape[1], F.pad(past[2], (0, T), value=True)
    time = torch.arange(S + T, device=q.device)
    if exported():  # T may be any: blocks are not to be counted
        return _attend(q, k, v, _seen(time[S:], time, window, real), scale, dropout)
    ks, vs, outs = k.split(BLOCK, 1), v.split(BLOCK, 1), []
    for start, block in zip(range(S, S + T, BLOCK), q.split(BLOCK, 1), strict=True):
        stop = start + block.shape[1]
        first, last = max(0, start - window + 1) // BLOCK, (stop - 1) // BLOCK + 1
        reach = slice(first * BLOCK, last * BLOCK)
        seen = _seen(time[start:stop], time[reach], window, None if real is None else real[:, reach])
        keys, values = (torch.cat(x[first:last], 1) if last - first > 1 else x[first] for x in (ks, vs))
        outs.append(_attend(block, keys, values, seen, scale, dropout))
    return torch.cat(outs, 1)


def _seen(i, j, window, real):
    """(1 | B, 1, Q, S) bool: which keys at times j (S,), `real` (B, S) of them, queries at times i (Q,) see."""
    back = i[:, None] - j
    seen = ((back >= 0) & (back < window))[None, None]
    return seen if real is None else seen & real[:, None, None]


def _attend(q, k, v, seen, scale, dropout):
    """(B, T, H, P) queries, keys (B, S, 1 | H, P): a shared key is a view over heads, its gradient is summed once."""
    dtype, mixed = q.dtype, not q.dtype == k.dtype == v.dtype
    q, k, v = (x.transpose(1, 2) for x in alike(q, k, v))
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, seen, dropout, is_causal=seen is None, scale=scale)
    return out.transpose(1, 2).to(dtype) if mixed else out.transpose(1, 2)


def _tiled(x, heads):
    """(B, T, K, P) -> (B, T, 1, P) as it is, or (B, T, H, P) with head h reading h mod K."""
    return x if x.shape[2] in (1, heads) else x.repeat(1, 1, heads // x.shape[2], 1)


def _scale(q, scale):
    return q.shape[-1] ** -0.5 if scale is None else scale


def _check(q, k, v, window, past, cu_seqlens):
    fits = all(x.ndim == 4 for x in (q, k, v)) and q.shape[:2] == k.shape[:2] == v.shape[:2]
    fits = fits and q.shape[3] == k.shape[3] and not q.shape[2] % k.shape[2] and not q.shape[2] % v.shape[2]
    if not fits:
        raise ValueError(
            "window_attention needs q (B, T, H, P), k (B, T, K, P), v (B, T, V, P) with K and V dividing H; "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        )
    if q.shape[1] == 0:
        raise ValueError("window_attention needs at least one step; got a sequence of length 0.")
    if window < 1:
        raise ValueError(f"window_attention: window must be at least 1, the query's own key; got {window}.")
    if past is not None:
        S, (pk, pv, real) = past[0].shape[1], past
        wanted = (k.shape[0], S, *k.shape[2:]), (v.shape[0], S, *v.shape[2:]), (k.shape[0], S)
        got = tuple(pk.shape), tuple(pv.shape), tuple(real.shape)
        if got != wanted:
            raise ValueError(f"window_attention needs past of shapes {wanted} for k {tuple(k.shape)}; got {got}.")
    if past is not None and cu_seqlens is not None:
        raise ValueError("window_attention takes past keys or packed documents, not both.")
