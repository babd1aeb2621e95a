"""Which tokens full attention looks at: what a controller is taught, and what a decoder is tuned to live with
(ADORE, arXiv:2407.02328; the paper's own aggregation is not public).

    p_{h,n,i} = softmax_i(scale q_{h,n} . k_{h,i}),  i <= n                                   probabilities
    a_{n,i} = what heads and layers say of token i at query n, one number                      agreed, merged
    y_{n,i} = [i is among the K largest of a_{n, 0..n}], the newer of equals first             top
    mask_{n,i} = y_{n,i} or n - i < recent                                                     tuning_mask

B batch, H query heads, G key heads, Q queries, T tokens, P head size. q: (B, H, Q, P)   k: (B, G, T, P)
at: (Q,) int64, positions of the queries. Texts are whole and unpadded: token i has position i.
"""

import torch

from scrubjay.kernels.release import ranking, survivors

BLOCK = 64  # queries whose probabilities, of all heads, exist at one time


def probabilities(q: torch.Tensor, k: torch.Tensor, scale: float, at: torch.Tensor) -> torch.Tensor:
    """(B, H, Q, T) causal attention in float32 (float64 for float64)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q @ keys.mT).to(wide) * scale
    return scores.masked_fill(torch.arange(k.shape[2], device=q.device) > at[:, None], -torch.inf).softmax(-1)


def agreed(p: torch.Tensor, at: torch.Tensor, agg: str, k: int) -> torch.Tensor:
    """(B, Q, T) that the heads of one layer say: their mean, their largest, or how many have a token in their top k."""
    if agg == "mean":
        return p.mean(1)
    if agg == "max_head":
        return p.amax(1)
    if agg == "vote":
        return top(p.flatten(0, 1), at, k).view(p.shape).to(p.dtype).sum(1)
    raise ValueError(f"agg must be 'mean', 'max_head' or 'vote'; got {agg!r}.")


def merged(total: torch.Tensor | None, layer: torch.Tensor, agg: str) -> torch.Tensor:
    """What layers say together: the largest for "max_head", else the sum."""
    if total is None:
        return layer
    return torch.maximum(total, layer) if agg == "max_head" else total + layer


def top(a: torch.Tensor, at: torch.Tensor, k: int) -> torch.Tensor:
    """(B, Q, T) bool: the k largest of a (B, Q, T) among the tokens up to each query; all where there are no more."""
    B, Q, T = a.shape
    pos = torch.arange(T, device=a.device)
    real = (pos <= at[:, None]).expand(B, Q, T).flatten(0, 1)
    rank = ranking(a.flatten(0, 1), pos.expand(B * Q, T), real)
    return survivors(rank, k).view(B, Q, T)


def within_horizon(y: torch.Tensor, at: torch.Tensor, horizon: int) -> torch.Tensor:
    """(B, Q, T) bool: labels that hold at any of `horizon` successive queries.

    y: (B, Q * horizon, T), those of at, at + 1, ... for each query in turn. A token after its query stays unlabelled.
    """
    B, _, T = y.shape
    known = torch.arange(T, device=y.device) <= at[:, None]
    return y.view(B, len(at), horizon, T).any(2) & known


def later_share(y: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) share of the queries at or after a token that have it in their top k, and (T,) how many those are.

    What static scores are taught. y: (B, Q, T) bool.
    """
    later = torch.arange(y.shape[2], device=y.device) <= at[:, None]  # (Q, T)
    count = later.sum(0)
    return (y & later).sum(1) / count.clamp(min=1), count


def tuning_mask(y: torch.Tensor, at: torch.Tensor, recent: int) -> torch.Tensor:
    """(B, Q, T) bool: the labelled tokens, the query itself, and the `recent` newest."""
    back = at[:, None] - torch.arange(y.shape[2], device=y.device)
    return y | ((back >= 0) & (back < max(recent, 1)))


@torch.no_grad()
def attended(scores: torch.Tensor, cache_size: int, rebuild: int, recent: int = 1, sinks: int = 0) -> torch.Tensor:
    """(B, T, T) bool: what each token of a text attends under an `AdoreCache` that is given one token at a time.

    scores: (B, T, T), row n those for the current token n. As the cache with rebuild_commit="discard" does it.
    """
    B, T, _ = scores.shape
    pos = torch.arange(T, device=scores.device).expand(B, T)
    cached = torch.zeros(B, T, dtype=torch.bool, device=scores.device)
    seen = torch.zeros(B, T, T, dtype=torch.bool, device=scores.device)
    for n in range(T):
        released = ~cached & (pos < n)
        back = survivors(ranking(scores[:, n], pos, released), rebuild) if rebuild else torch.zeros_like(cached)
        cached = cached | (pos == n)
        seen[:, n] = cached | back
        protected = (pos < sinks) | (pos > n - recent)
        cached = survivors(ranking(scores[:, n], pos, cached, protected), cache_size)
    return seen
