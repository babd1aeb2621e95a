"""Attention of one new token that also tells what it looked at, and the choice of the keys worth keeping
(Recycled Attention / RefreshKV, arXiv:2411.05787; SnapKV, arXiv:2404.14469; H2O, arXiv:2306.14048).

    p_h = softmax_j(scale q_h . k_j)     o_h = sum_j p_hj v_j              decode, decode_with_scores
    u_j = max over the heads h that share a key head of log p_hj           pooled: then the largest of 7 neighbours
    kept = the M keys with the largest u, the smallest first               top

B batch, H query heads, G key heads, R = H / G (head h reads key head h // R), n keys, T queries, P head size, M budget.
q: (B, H, P)   k, v: (B, G, n, P)   real: (B, n) bool, which keys are tokens; None: all of them.
q, k and v may be of three dtypes, as autocast makes them: products are taken in the widest, o has q's.
On a CPU without products in 16 bits (`linear.product_dtype`) k and v are widened block by block, where that is faster.
The logarithm orders keys as the probability does, without a floor at which small ones become equal.
"""

import itertools
import math

import torch
import torch.nn.functional as F

from scrubjay.kernels.dispatch import alike, choose, traced, without_autocast
from scrubjay.kernels.largest import largest, largest_columns
from scrubjay.kernels.linear import WIDENED, product_dtype
from scrubjay.kernels.recycle_triton import (
    decode_fits,
    decode_triton,
    decode_with_scores_triton,
    gather_pair_triton,
    order_fits,
    order_triton,
    pooled_fits,
    pooled_triton,
    put_triton,
    rows_fit,
    scores_of_triton,
)
from scrubjay.kernels.release import COLUMN, ordered
from scrubjay.kernels.slots import NARROW, put_rows, take_rows

BLOCK = 64  # queries whose scores are held at a time by `received`
REDUCTIONS = ("max", "mean", "first")


def decode_reference(q, k, v, scale, real=None):
    """The equations, in float32 (float64 for float64): (B, H, P) in q's dtype and log-probabilities (B, H, n)."""
    dtype, (q, k, v) = q.dtype, alike(q, k, v)
    wide = torch.promote_types(q.dtype, torch.float32)
    R = q.shape[1] // k.shape[1]
    keys, values = (x.to(wide).repeat_interleave(R, 1) for x in (k, v))
    scores = torch.einsum("bhp,bhnp->bhn", q.to(wide), keys) * scale
    if real is not None:
        scores = scores.masked_fill(~_by_head(real, q.shape[1]), -torch.inf)
    logp = scores.log_softmax(-1)
    return torch.einsum("bhn,bhnp->bhp", logp.exp(), values).to(dtype), logp


@without_autocast
def decode(q, k, v, scale, real=None, *, backend=None):
    """o (B, H, P). The heads that share a key are its rows, so that each key is read once.

    `real` may also be (B, G, n). Error against `decode_reference`: 1e-6 of the largest value in float32.

    Args:
        backend: here and below: None chooses by device; "torch" and "triton" are obeyed or refused.
    """
    if choose(backend, "decode", q, k, v, fused=decode_fits(q, k, v, real)) == "triton":
        return decode_triton(q, k, v, scale, real)
    (B, H, P), G, dtype, (q, k, v) = q.shape, k.shape[1], q.dtype, alike(q, k, v)
    slow = _widens(q, k, v)
    if slow and q.dtype == torch.float16:  # PyTorch's attention is the slower one there
        p = scores_of(q, k, scale, real, backend="torch").exp_()
        if real is not None:
            p.masked_fill_(~_by_head(real, H), 0.0)  # a row without tokens gives zeros, as there
        return _products(p.view(B, G, H // G, -1), v).view(B, H, P).to(dtype)
    mask = None if real is None else (real[:, None, None] if real.ndim == 2 else real[:, :, None])
    packed = q.reshape(B, G, -1, P)
    if slow and H == G:  # its products of one row are slower than of two
        packed = packed.expand(-1, -1, 2, -1)
    return F.scaled_dot_product_attention(packed, k, v, mask, scale=scale)[:, :, : H // G].reshape(B, H, P).to(dtype)


@without_autocast
def decode_with_scores(q, k, v, scale, real=None, *, backend=None):
    """`decode`, and the log-probabilities (B, H, n) in float32, with one pass over k and one over v."""
    if choose(backend, "decode_with_scores", q, k, v, fused=decode_fits(q, k, v, real)) == "triton":
        return decode_with_scores_triton(q, k, v, scale, real)
    (B, H, P), G, dtype, (q, k, v) = q.shape, k.shape[1], q.dtype, alike(q, k, v)
    logp = scores_of(q, k, scale, real, backend="torch")
    o = _products(logp.exp().view(B, G, H // G, -1), v)
    return o.view(B, H, P).to(dtype), logp


@without_autocast
def scores_of(q, k, scale, real=None, *, backend=None):
    """Log-probabilities (B, H, n) of queries q (B, H, P) alone."""
    if choose(backend, "scores_of", q, k, fused=decode_fits(q, k, real=real)) == "triton":
        return scores_of_triton(q, k, scale, real)
    power, (q, k) = _power(scale), alike(q, k)
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
    (B, H, T, P), G, (q, k) = q.shape, k.shape[1], alike(q, k)
    wide = torch.promote_types(q.dtype, torch.float32)
    total = torch.zeros(B, G, k.shape[2], dtype=wide, device=q.device)
    seen, power = seen.expand(B, G, -1, -1)[:, :, None], _power(scale)
    for start in range(0, T, BLOCK):
        block = q[:, :, start : start + BLOCK].reshape(B, G, -1, P) * power
        scores = _widened(block, k, transposed=True) if _widens(block, k) else torch.matmul(block, k.mT).to(wide)
        scores = scores.view(B, G, H // G, -1, k.shape[2]) * (scale / power)
        p = scores.masked_fill(~seen[:, :, :, start : start + BLOCK], -torch.inf).softmax(-1).nan_to_num(0.0)
        total += p.amax(2).sum(2)
    return total


@without_autocast
def attend_received(q, k, v, scale):
    """Causal attention of a prompt, and what `received` says of it, in one pass: (B, T, H, P) and (B, G, T).

    q: (B, H, T, P), k, v: (B, G, T, P). Blocks of queries read no key that comes later. No gradient.
    """
    (B, H, T, P), G, dtype, (q, k, v) = q.shape, k.shape[1], q.dtype, alike(q, k, v)
    if _widens(q, k, v):
        q, k, v = q.float(), k.float(), v.float()
    wide, power = torch.promote_types(q.dtype, torch.float32), _power(scale)
    out, total = q.new_empty(B, H, T, P), torch.zeros(B, G, T, dtype=wide, device=q.device)
    later = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).triu(1)
    for b, g, start in itertools.product(range(B), range(G), range(0, T, BLOCK)):
        stop, heads = min(T, start + BLOCK), slice(g * H // G, (g + 1) * H // G)
        rows = (q[b, heads, start:stop] * power).flatten(0, 1)
        scores = torch.mm(rows, k[b, g, :stop].T).to(wide).mul_(scale / power).view(H // G, stop - start, stop)
        scores[..., start:].masked_fill_(later[: stop - start, : stop - start], -torch.inf)
        p = scores.softmax(-1)
        total[b, g, :stop] += (p.amax(0) if H > G else p[0]).sum(0)
        out[b, heads, start:stop] = torch.mm(p.to(v.dtype).flatten(0, 1), v[b, g, :stop]).view_as(
            q[b, heads, start:stop]
        )
    return out.transpose(1, 2).to(dtype), total


def pooled(logp, groups, reduce="max", kernel=7, real=None, *, backend=None):
    """Scores of keys (B, G, n) from log-probabilities of query heads (B, H, n).

    Args:
        groups: G.
        reduce: over the heads of a group: "max", "mean" (of probabilities) or "first".
        kernel: odd; each score becomes the largest among that many neighbouring tokens. 1: no pooling.
        real: keys that are not tokens score -inf, and tokens on both sides of them are neighbours.
    """
    if choose(backend, "pooled", logp, fused=pooled_fits(logp, kernel)) == "triton":
        return pooled_triton(logp, groups, reduce, kernel, real)
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


def top(scores, budget, recent=0, sinks=0, real=None, *, backend=None):
    """Indices (B, G, M) of the keys to keep, in ascending order of their scores (B, G, n); M = min(budget, n).

    Of equal scores, which pooling makes many of, the later key is the higher: wherever a row stands in a padded batch.
    What is no number is the lowest. Nothing here waits for the device.

    Args:
        recent: last tokens that are kept whatever they score. sinks: first ones likewise; they stand last of all.
    """
    M = min(budget, scores.shape[-1])
    if choose(backend, "top", scores, fused=order_fits(scores)) == "triton":
        rank = order_triton(scores, recent, sinks, real)
    else:
        scores = _forced(scores, recent, sinks, real)
        if scores.dtype == torch.float64:  # has no room for the column beside it
            return scores.argsort(dim=-1, stable=True)[..., scores.shape[-1] - M :]
        rank = ordered(scores, torch.arange(scores.shape[-1], device=scores.device))
    return largest(rank, M).sort(-1).values.bitwise_and_(COLUMN)


def best(scores, budget, recent=0, sinks=0, real=None, *, backend=None):
    """`top` in any order, where equal scores may be decided either way: what is read once needs no more.

    scores: (B, G, n), which are written into.
    """
    if backend == "triton" or scores.device.type != "cpu":
        return top(scores, budget, recent, sinks, real, backend=backend)
    if real is None:
        scores[:, :, scores.shape[2] - recent :] = torch.inf
        scores[:, :, :sinks] = torch.inf
    else:
        scores = _forced(scores, recent, sinks, real)
    return largest_columns(scores, min(budget, scores.shape[2]))


def _forced(scores, recent, sinks, real):
    """Scores (B, G, n) in which the newest stand above all others but the first, and padding below."""
    G = scores.shape[1]
    real = torch.ones(1, scores.shape[-1], dtype=torch.bool, device=scores.device) if real is None else real
    newest, first = real.flip(-1).cumsum(-1).flip(-1) <= recent, real.cumsum(-1) <= sinks
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    scores = scores.masked_fill(_by_head(newest, G), torch.finfo(scores.dtype).max)
    return scores.masked_fill(_by_head(first, G), torch.inf).masked_fill(~_by_head(real, G), -torch.inf)


def gather(x, index):
    """Rows `index` (B, G, M) of x (B, G, n, P), contiguous. One copy of whole rows a head: many times faster on a CPU
    than a gather of single numbers."""
    if x.device.type != "cpu":
        return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))
    return take_rows([x], index, [x.new_empty(*index.shape, x.shape[3])])[0]


def gather_pair(k, v, index, out=None, *, backend=None):
    """Rows `index` (B, G, M) of k and of v, (B, G, n, P) each: two (B, G, M, P).

    Args:
        out: two buffers (B, G, C, P), C at least M: the rows become their first M, and those are
            returned. None: new ones. Each of its tensor's dtype.
    """
    M = index.shape[2]
    out = [x.new_empty(*index.shape, x.shape[3]) if out is None else out[i][:, :, :M] for i, x in enumerate((k, v))]
    if choose(backend, "gather_pair", k, v, *out, fused=rows_fit((k, out[0]), (v, out[1]))) == "triton":
        gather_pair_triton(k, v, index, out)
    elif k.device.type == "cpu":
        take_rows((k, v), index, out)
    else:
        for x, rows in zip((k, v), out, strict=True):
            rows.copy_(gather(x, index))
    return out[0], out[1]


def put_row(held, k, v, column, rank, real, filled, *, backend=None):
    """Write one new row, in place: into slot `filled`, or, where all C are taken, the first of the lowest rank.

    In a row of the batch where it is no token it gets rank -inf, and nothing is evicted for it.

    Args:
        held: keys, values (B, G, C, P), index (B, G, C) int64, rank (B, G, C) float64 and which are tokens, (B, G, C)
            bool, or None where all are.
        k, v: (B, G, 1, P), rounded to the dtypes of keys and values. column: int, where it comes from. rank: (B,)
            float64. real: (B,) bool, None: a token in all.
        filled: slots taken.

    Returns: its slots, (B, G, 1).
    """
    keys, values, index, ranks, reals = held
    fits = rows_fit((k, keys), (v, values)) and all(x is None or x.is_contiguous() for x in held)
    if choose(backend, "put_row", keys, k, v, fused=fits) == "triton":
        return put_triton(held, k, v, column, rank, real, filled)
    room = filled < index.shape[2]
    at = torch.full_like(index[:, :, :1], filled) if room else ranks.argmin(-1, keepdim=True)
    if real is not None:
        rank = rank.masked_fill(~real, -torch.inf)
    new = [k, v, torch.full_like(at, column), rank[:, None, None].expand_as(at)]
    if reals is not None:
        new.append(torch.ones_like(at, dtype=torch.bool) if real is None else real[:, None, None].expand_as(at))
    for buffer, value in zip(held, new, strict=False):
        value = value.to(buffer.dtype)
        if real is not None and not room:
            rows = at[..., None].expand_as(value) if value.ndim == 4 else at
            value = torch.where(real.view(-1, *(1,) * (value.ndim - 1)), value, buffer.gather(2, rows))
        put_rows(buffer, at, value)
    return at


@without_autocast
def attend_seen(q, k, v, seen, scale):
    """Several queries under a mask for each key head: q (B, H, T, P), k and v (B, G, n, P), seen (B, G, T, n) bool
    -> (B, T, H, P). Keys are not repeated over heads."""
    (B, H, T, P), G, dtype, (q, k, v) = q.shape, k.shape[1], q.dtype, alike(q, k, v)
    packed, mask = q.reshape(B, G, -1, P), seen.repeat(1, 1, H // G, 1)
    return F.scaled_dot_product_attention(packed, k, v, mask, scale=scale).view(B, H, T, P).transpose(1, 2).to(dtype)


def attend_tail(q, k, v, scale, tail, budget, *, reduce="max", kernel=7, recent=1, sinks=0):
    """Causal attention of T tokens in which the last `tail` see only the keys that a cache would have kept for them.

    That is: the `budget` keys which the token before them chooses, in each key head, and themselves. The form in which
    the paper continues to pre-train (RefreshKV, section "continued pre-training"): no second choice, and the choice has
    no gradient. q: (B, H, T, P), k and v: (B, G, T, P) -> (B, T, H, P). Under autocast all is done in its dtype, as
    attention is.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    q, k, v = alike(q, k, v)
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

    In x's dtype, or in float32 where the CPU has no products in it.
    """
    if _widens(rows, x) and not (transposed and rows.shape[2] == 1):  # sums of one row read x at the speed of memory
        return _widened(rows, x, transposed)
    rows = rows.to(x.dtype)
    return torch.matmul(rows, _whole(x).mT)[..., : x.shape[2]] if transposed else torch.matmul(rows, x)


def _whole(x):
    """x (B, G, n, P), or, of 16 bits on a CPU, the memory of which it is the first n columns: there a product with a
    transposed part of a buffer copies that part first. What else is in that memory may be anything, in columns of
    their own."""
    (B, G, n, P), columns = x.shape, x.stride(1) // x.shape[3]
    if x.dtype not in NARROW or x.device.type != "cpu" or traced() or x.is_contiguous() or not n <= columns <= 2 * n:
        return x
    strides = (G * columns * P, columns * P, P, 1)
    end = x.storage_offset() + B * G * columns * P
    if x.stride()[1:] != strides[1:] or (B > 1 and x.stride(0) != strides[0]):
        return x
    if end * x.element_size() > x.untyped_storage().nbytes() or (x.requires_grad and torch.is_grad_enabled()):
        return x
    return x.as_strided((B, G, columns, P), strides)


def _widens(*tensors):
    """Whether products with the last of `tensors` are taken in float32, block by block, which has no gradient."""
    x = tensors[-1]
    if product_dtype(x) == x.dtype or traced():
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def _widened(rows, x, transposed):
    """`_products` in float32, in which `WIDENED` numbers of x are held at a time."""
    (B, G, n, P), rows = x.shape, rows.float()
    out, block = rows.new_zeros(*rows.shape[:3], n if transposed else P), max(1, min(n, WIDENED // P))
    wide = rows.new_empty(block, P)
    for b, g, start in itertools.product(range(B), range(G), range(0, n, block)):
        at = slice(start, min(n, start + block))
        part = wide[: at.stop - start].copy_(x[b, g, at])
        if transposed:
            torch.mm(rows[b, g], part.t(), out=out[b, g, :, at])
        else:
            out[b, g].addmm_(rows[b, g, :, at], part)
    return out


def _power(scale):
    """The power of two next to `scale`: by it queries are multiplied exactly, and float16 holds their products."""
    return 2.0 ** round(math.log2(scale))


def _by_head(real, heads):
    """(B, n) or (B, G, n) -> broadcast against (B, H, n)."""
    return real[:, None] if real.ndim == 2 else real.repeat_interleave(heads // real.shape[1], 1)
