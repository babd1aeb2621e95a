"""Attention of one new token that also tells what it looked at, and the choice of the keys worth keeping
(Recycled Attention / RefreshKV, arXiv:2411.05787; SnapKV, arXiv:2404.14469; H2O, arXiv:2306.14048).

    p_h = softmax_j(scale q_h . k_j)     o_h = sum_j p_hj v_j              decode, decode_with_scores
    u_j = max over the heads h that share a key head of log p_hj           pooled: then the largest of 7 neighbours
    kept = the M keys with the largest u, the smallest first               top

B batch, H query heads, G key heads, R = H / G (head h reads key head h // R), n keys, T queries, P head size, M budget.
q: (B, H, P)   k, v: (B, G, n, P)   real: (B, n) bool, which keys are tokens; None: all of them.
The logarithm orders keys as the probability does, without a floor at which small ones become equal.
"""

import math

import torch
import torch.nn.functional as F

from scrubjay.kernels.dispatch import without_autocast

BLOCK = 64  # queries whose scores are held at a time by `received`
REDUCTIONS = ("max", "mean", "first")


def decode_reference(q, k, v, scale, real=None):
    """The equations, in float32 (float64 for float64): (B, H, P) in v's dtype and log-probabilities (B, H, n)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    R = q.shape[1] // k.shape[1]
    keys, values = (x.to(wide).repeat_interleave(R, 1) for x in (k, v))
    scores = torch.einsum("bhp,bhnp->bhn", q.to(wide), keys) * scale
    if real is not None:
        scores = scores.masked_fill(~_by_head(real, q.shape[1]), -torch.inf)
    logp = scores.log_softmax(-1)
    return torch.einsum("bhn,bhnp->bhp", logp.exp(), values).to(v.dtype), logp


@without_autocast
def decode(q, k, v, scale, real=None):
    """o (B, H, P). The heads that share a key are its rows, so that each key is read once.

    `real` may also be (B, G, n). Error against `decode_reference`: 1e-6 of the largest value in float32.
    """
    B, H, P = q.shape
    mask = None if real is None else (real[:, None, None] if real.ndim == 2 else real[:, :, None])
    packed = q.reshape(B, k.shape[1], -1, P)
    return F.scaled_dot_product_attention(packed, k, v, mask, scale=scale).reshape(B, H, P)


@without_autocast
def decode_with_scores(q, k, v, scale, real=None):
    """`decode`, and the log-probabilities (B, H, n) in float32, with one pass over k and one over v."""
    (B, H, P), G = q.shape, k.shape[1]
    logp = scores_of(q, k, scale, real)
    o = _products(logp.exp().to(v.dtype).view(B, G, H // G, -1), v)
    return o.view(B, H, P), logp


@without_autocast
def scores_of(q, k, scale, real=None):
    """Log-probabilities (B, H, n) of queries q (B, H, P) alone."""
    power = _power(scale)
    scores = _products((q * power).unflatten(1, (k.shape[1], -1)), k, transposed=True).flatten(1, 2)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)).mul_(scale / power)
    if real is not None:
        scores.masked_fill_(~_by_head(real, q.shape[1]), -torch.inf)
    return scores.log_softmax(-1)


@without_autocast
def received(q, k, scale, seen):
    """What each key received from T queries (H2O): sum over queries of the largest probability in its group, (B, G, n).

    q: (B, H, T, P). seen: (T, n) or (B, G, T, n) bool; a query that sees nothing gives nothing.
    Holds the scores of `BLOCK` queries at a time, never T x n.
    """
    (B, H, T, P), G = q.shape, k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    total = torch.zeros(B, G, k.shape[2], dtype=wide, device=q.device)
    seen, power = seen.expand(B, G, -1, -1)[:, :, None], _power(scale)
    for start in range(0, T, BLOCK):
        block = q[:, :, start : start + BLOCK].reshape(B, G, -1, P) * power
        scores = torch.matmul(block, k.mT).to(wide).view(B, G, H // G, -1, k.shape[2]) * (scale / power)
        p = scores.masked_fill(~seen[:, :, :, start : start + BLOCK], -torch.inf).softmax(-1).nan_to_num(0.0)
        total += p.amax(2).sum(2)
    return total


def pooled(logp, groups, reduce="max", kernel=7, real=None):
    """Scores of keys (B, G, n) from log-probabilities of query heads (B, H, n).

    Args:
        groups: G.
        reduce: over the heads of a group: "max", "mean" (of probabilities) or "first".
        kernel: odd; each score becomes the largest among that many neighbouring tokens. 1: no pooling.
        real: keys that are not tokens score -inf, and tokens on both sides of them are neighbours.
    """
    by_group = logp.view(logp.shape[0], groups, -1, logp.shape[-1])
    if reduce == "max":
        scores = by_group.amax(2)
    elif reduce == "mean":
        scores = by_group.logsumexp(2)  # the mean of probabilities, up to a constant
    else:
        scores = by_group[:, :, 0]
    if kernel > 1 and real is None:
        scores = F.max_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    elif kernel > 1:
        order = _by_head(real, groups).expand_as(scores).int().argsort(dim=-1, stable=True)  # tokens become neighbours
        near = F.max_pool1d(scores.gather(-1, order), kernel, stride=1, padding=kernel // 2)
        scores = torch.empty_like(scores).scatter_(-1, order, near)
    return scores if real is None else scores.masked_fill(~_by_head(real, groups), -torch.inf)


def top(scores, budget, recent=0, sinks=0, real=None):
    """Indices (B, G, M) of the keys to keep, in ascending order of their scores (B, G, n); M = min(budget, n).

    Of equal scores, which pooling makes many of, the later key is the higher: wherever a row stands in a padded batch.
    What is no number is the lowest.

    Args:
        recent: last tokens that are kept whatever they score. sinks: first ones likewise; they stand last of all.
    """
    (B, G, n), M = scores.shape, min(budget, scores.shape[-1])
    real = torch.ones(1, n, dtype=torch.bool, device=scores.device) if real is None else real
    newest, first = real.flip(-1).cumsum(-1).flip(-1) <= recent, real.cumsum(-1) <= sinks
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    scores = scores.masked_fill(_by_head(newest, G), torch.finfo(scores.dtype).max)
    scores = scores.masked_fill(_by_head(first, G), torch.inf).masked_fill(~_by_head(real, G), -torch.inf)
    least = scores.topk(M).values[..., -1:]
    above, equal = scores > least, scores == least
    equal &= equal.flip(-1).cumsum(-1).flip(-1) <= M - above.sum(-1, keepdim=True)
    index = (above | equal).nonzero()[:, -1].view(B, G, M)
    return index.gather(-1, scores.gather(-1, index).argsort(dim=-1, stable=True))


def gather(x, index):
    """Rows `index` (B, G, M) of x (B, G, n, P), contiguous. One copy of whole rows a head: many times faster on a CPU
    than a gather of single numbers."""
    if x.device.type != "cpu":
        return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))
    B, G, M = index.shape
    out = x.new_empty(B, G, M, x.shape[3])
    for b in range(B):
        for g in range(G):
            torch.index_select(x[b, g], 0, index[b, g], out=out[b, g])
    return out


@without_autocast
def attend_seen(q, k, v, seen, scale):
    """Several queries under a mask for each key head: q (B, H, T, P), k and v (B, G, n, P), seen (B, G, T, n) bool
    -> (B, T, H, P). Keys are not repeated over heads."""
    (B, H, T, P), G = q.shape, k.shape[1]
    packed, mask = q.reshape(B, G, -1, P), seen.repeat(1, 1, H // G, 1)
    return F.scaled_dot_product_attention(packed, k, v, mask, scale=scale).view(B, H, T, P).transpose(1, 2)


def attend_tail(q, k, v, scale, tail, budget, *, reduce="max", kernel=7, recent=1, sinks=0):
    """Causal attention of T tokens in which the last `tail` see only the keys that a cache would have kept for them.

    That is: the `budget` keys which the token before them chooses, in each key head, and themselves. The form in which
    the paper continues to pre-train (RefreshKV, section "continued pre-training"): no second choice, and the choice has
    no gradient. q: (B, H, T, P), k and v: (B, G, T, P) -> (B, T, H, P).
    """
    n = q.shape[2] - tail
    groups = q.shape[1] // k.shape[1]
    with torch.no_grad():
        scores = pooled(scores_of(q[:, :, n - 1], k[:, :, :n], scale), k.shape[1], reduce, kernel)
        index = top(scores, budget, recent, sinks)
    rows = index[..., None].expand(-1, -1, -1, k.shape[3])
    keys, values = (torch.cat([x[:, :, :n].gather(2, rows), x[:, :, n:]], 2) for x in (k, v))
    causal = torch.ones(tail, tail, dtype=torch.bool, device=q.device).tril()
    seen = F.pad(causal, (index.shape[2], 0), value=True).expand(*k.shape[:2], -1, -1)
    repeated = (x[:, :, :n].repeat_interleave(groups, 1) for x in (k, v))
    first = F.scaled_dot_product_attention(q[:, :, :n], *repeated, is_causal=True, scale=scale).transpose(1, 2)
    return torch.cat([first, attend_seen(q[:, :, n:], keys, values, seen, scale)], 1)


def _products(rows, x, transposed=False):
    """rows (B, G, R, P) x^T -> (B, G, R, n), or rows (B, G, R, n) x -> (B, G, R, P), for x (B, G, n, P).

    On a CPU head by head: a batched product of a narrow type takes twenty times as long when x is part of a larger
    buffer.
    """
    if x.device.type != "cpu":
        return torch.matmul(rows, x.mT if transposed else x)
    B, G = x.shape[:2]
    heads = [(x[b, g] @ rows[b, g].t()).t() if transposed else rows[b, g] @ x[b, g] for b in range(B) for g in range(G)]
    return torch.stack(heads).view(B, G, *heads[0].shape)


def _power(scale):
    """The power of two next to `scale`: by it queries are multiplied exactly, and float16 holds their products."""
    return 2.0 ** round(math.log2(scale))


def _by_head(real, heads):
    """(B, n) or (B, G, n) -> broadcast against (B, H, n)."""
    return real[:, None] if real.ndim == 2 else real.repeat_interleave(heads // real.shape[1], 1)
