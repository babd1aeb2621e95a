"""Causal attention over all that came before, in whole sequences and beside keys that are kept.

    o_t = sum_j softmax_j(scale q_t . k_j) v_j        j up to t

B batch, T time, S slots, H query heads, K key heads, P head size.
q: (B, T, H, P)   k, v: (B, T, K, P)   keys, values: (B, K, S, P), of which slot j of a row holds its j-th token
K divides H; query head h reads key head h // (H / K), the grouped order of transformers and of the authors of Mamba-2.
"""

import torch
import torch.nn.functional as F

from scrubjay.kernels.dispatch import alike, compiled, traced, without_autocast
from scrubjay.kernels.operators import Operator
from scrubjay.kernels.recurrence import documents

ROWS = 256  # queries of a key head that are solved as one call beside kept keys: bounds the memory of what they see


def causal_attention_reference(q, keys, values, before, *, scale=None):
    """`cached_attention` with dense scores, in float32 (float64 for float64 inputs). The law for the other paths."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = (x.to(wide).repeat_interleave(q.shape[2] // x.shape[1], 1) for x in (keys, values))
    scores = torch.einsum("bthp,bhsp->bhts", q.to(wide), keys) * _scale(q, scale)
    scores = scores.masked_fill(~_seen(before, 0, q.shape[1], keys.shape[2])[:, None], -torch.inf)
    return torch.einsum("bhts,bhsp->bthp", scores.softmax(-1), values)


@without_autocast
def causal_attention(q, k, v, cu_seqlens=None, *, scale=None):
    """Attend over whole sequences, in O(T^2) time and O(T) memory.

    Args:
        q, k, v: shapes in the header; positions already encoded.
        cu_seqlens: (D + 1,) offsets of the documents packed into the batch's one row; no query sees another's keys.
        scale: of the scores; None is P ** -0.5.

    Returns: (B, T, H, P).

    Raises:
        ValueError: shapes that do not fit each other, a sequence of length 0, offsets that do not fit.
    """
    _check(q, k.transpose(1, 2), v.transpose(1, 2))
    scale = _scale(q, scale)
    if cu_seqlens is not None and compiled():
        return _DOCUMENTS([q, k, v, cu_seqlens], [], [scale])[0]
    q, k, v = alike(q, k, v)
    if cu_seqlens is None:
        return _whole(q, k, v, scale)
    cuts = [stop - start for _, start, stop in documents(cu_seqlens, *q.shape[:2])]
    packed = zip(*(x.split(cuts, 1) for x in (q, k, v)), strict=True)
    return torch.cat([_whole(*x, scale) for x in packed if x[0].shape[1]], 1)


@without_autocast
def cached_attention(q, keys, values, before, *, scale=None):
    """Attend to keys that are kept, the newest of which are the queries' own.

    Args:
        q: (B, T, H, P). keys, values: (B, K, S, P); positions already encoded.
        before: (B,) int64, tokens of each row before the first query: query t sees the slots 0 to before + t. What lies
            in later slots has no effect, as long as it is finite.
        scale: of the scores; None is P ** -0.5.

    Returns: (B, T, H, P). In exported and compiled programs the memory is O(T S), elsewhere O(S).

    Raises:
        ValueError: shapes that do not fit each other, a sequence of length 0.
    """
    _check(q, keys, values)
    (B, T, H, P), (K, S), dtype = q.shape, keys.shape[1:3], q.dtype
    scale = _scale(q, scale)
    q, keys, values = alike(q, keys, values)
    q = q.view(B, T, K, H // K, P).permute(0, 2, 3, 1, 4)  # (B, K, H / K, T, P)
    size = max(1, ROWS * K // H)
    if traced() or size >= T:
        o = _grouped(q, keys, values, _seen(before, 0, T, S), scale)
    else:
        outs = []
        for start in range(0, T, size):
            stop = min(start + size, T)
            reach = S - T + stop  # `before` is at most S - T
            seen = _seen(before, start, stop, reach)
            outs.append(_grouped(q[:, :, :, start:stop], keys[:, :, :reach], values[:, :, :reach], seen, scale))
        o = torch.cat(outs, 3)
    return o.permute(0, 3, 1, 2, 4).reshape(B, T, H, P).to(dtype)


def _documents(tensors, integers, floats):
    return [causal_attention(*tensors, scale=floats[0])]


def _shapes(tensors, integers):
    return [torch.empty_like(tensors[0], memory_format=torch.contiguous_format)]


_DOCUMENTS = Operator("causal_attention", _documents, _shapes)


def _whole(q, k, v, scale):
    """One document, (B, T, H, P)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (_repeated(x, q.shape[1]) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)


def _repeated(x, heads):
    """(B, K, S, P) -> (B, H, S, P)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _grouped(q, keys, values, seen, scale):
    """q (B, K, R, Q, P), keys, values (B, K, S, P), seen (B, Q, S) -> (B, K, R, Q, P). The queries of the heads that
    share a key head are rows of one product, so that no key is repeated."""
    B, K, R, Q, P = q.shape
    seen = seen[:, None].expand(-1, R, -1, -1).reshape(B, 1, R * Q, -1) if R > 1 else seen[:, None]
    o = F.scaled_dot_product_attention(q.reshape(B, K, R * Q, P), keys, values, seen, scale=scale)
    return o.view(B, K, R, Q, P)


def _seen(before, start, stop, size):
    """(B, stop - start, size) bool: which of the first slots the queries [start, stop) see."""
    last = before[:, None] + torch.arange(start, stop, device=before.device)
    return torch.arange(size, device=before.device) <= last[..., None]


def _scale(q, scale):
    return q.shape[-1] ** -0.5 if scale is None else scale


def _check(q, keys, values):
    fits = q.ndim == 4 and keys.ndim == 4 and keys.shape == values.shape and q.shape[0] == keys.shape[0]
    if not fits or q.shape[3] != keys.shape[3] or q.shape[2] % keys.shape[1] or q.shape[1] > keys.shape[2]:
        raise ValueError(
            "causal attention needs queries (B, T, H, P), keys and values (B, K, S, P) with K dividing H and T at most "
            f"S; got {tuple(q.shape)}, {tuple(keys.shape)} and {tuple(values.shape)}."
        )
    if q.shape[1] == 0:
        raise ValueError("causal attention needs at least one step; got a sequence of length 0.")
