"""kernels/recycle.py against laws in float64, in Python loops where that is short enough."""

import math

import pytest
import torch
import torch.nn.functional as F
from recycled_cases import assert_close, dense, padded

from scrubjay.kernels.recycle import (
    attend_received,
    attend_seen,
    attend_tail,
    best,
    decode,
    decode_reference,
    decode_with_scores,
    gather,
    pooled,
    received,
    scores_of,
    top,
)

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# Measured on a CPU with torch 2.13 over all cases below, worst of 20 seeds, relative to the largest value, times 5.
OUTPUT = {F64: 1e-12, F32: 5 * 8.1e-7, F16: 5 * 2.1e-3, BF16: 5 * 1.4e-2}
LOGP = {F64: 1e-12, F32: 5 * 1.6e-7, F16: 5 * 2.7e-4, BF16: 5 * 2.4e-3}
RATIOS = [(3, 3), (8, 2), (7, 1), (16, 2)]  # (heads, key heads): 1, 4, 7 and 8 heads a key head


def draw(H, G, n=33, B=2, P=8, T=None, seed=0):
    """q (B, H, P) or (B, H, T, P), k, v (B, G, n, P) in float64."""
    torch.manual_seed(seed)
    q = torch.randn(B, H, P, dtype=F64) if T is None else torch.randn(B, H, T, P, dtype=F64)
    return 2 * q, torch.randn(B, G, n, P, dtype=F64), torch.randn(B, G, n, P, dtype=F64)


def law(q, k, v, scale, real=None):
    """(o, log p) one head at a time, over real keys alone."""
    B, H, P = q.shape
    o, logp = torch.zeros(B, H, P, dtype=F64), torch.full((B, H, k.shape[2]), -torch.inf, dtype=F64)
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[1])
            at = range(k.shape[2]) if real is None else real[b].nonzero()[:, 0].tolist()
            scores = torch.stack([scale * (q[b, h] * k[b, g, j]).sum() for j in at])
            logs = scores - scores.max() - (scores - scores.max()).exp().sum().log()
            o[b, h] = sum(weight * v[b, g, j] for weight, j in zip(logs.exp(), at, strict=True))
            logp[b, h, list(at)] = logs
    return o, logp


def assert_logs(got, want, bound):
    """Equal within the bound where the law is finite, and -inf elsewhere."""
    finite = want > -torch.inf
    assert got[~finite].eq(-torch.inf).all()
    assert_close(got, want, finite, bound)


@pytest.mark.parametrize("dtype", OUTPUT, ids=str)
@pytest.mark.parametrize("counts", [None, (33, 5)], ids=["whole", "padded"])
@pytest.mark.parametrize(("H", "G"), RATIOS)
def test_recycled_decode_scores_and_outputs_follow_the_law(H, G, counts, dtype):
    q, k, v = (x.to(dtype) for x in draw(H, G))
    real = None if counts is None else padded(counts, 33)
    o, logp = law(q.double(), k.double(), v.double(), 0.3, real)
    got, got_logp = decode_with_scores(q, k, v, 0.3, real)
    assert decode(q, k, v, 0.3, real).dtype == got.dtype == dtype
    assert got_logp.dtype == torch.promote_types(dtype, F32)
    assert_close(got, o, bound=OUTPUT[dtype])
    assert_close(decode(q, k, v, 0.3, real), o, bound=OUTPUT[dtype])
    assert_close(decode_reference(q, k, v, 0.3, real)[0], o, bound=OUTPUT[dtype])
    for found in (got_logp, scores_of(q, k, 0.3, real), decode_reference(q, k, v, 0.3, real)[1]):
        assert_logs(found, logp, LOGP[dtype])


@pytest.mark.parametrize(("H", "G"), RATIOS)
def test_recycled_decode_takes_a_mask_for_each_key_head(H, G):
    q, k, v = draw(H, G, n=9)
    real = torch.rand(2, G, 9) < 0.6
    real[..., 0] = True
    want = dense(q[:, :, None], k, v, real[:, :, None], 0.3)[:, 0]
    assert_close(decode(q, k, v, 0.3, real), want, bound=1e-12)
    assert_close(decode_with_scores(q, k, v, 0.3, real)[0], want, bound=1e-12)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_recycled_kernels_read_views_of_a_larger_buffer(dtype):
    """As a cache gives them: the first n of more columns, the rest NaN, and a query out of a transposed tensor."""
    q, k, v = (x.to(dtype) for x in draw(8, 2))
    buffers = torch.full((2, *k.shape[:2], 50, 8), torch.nan, dtype=dtype)
    buffers[:, :, :, :33] = torch.stack([k, v])
    views = [buffer[:, :, :33] for buffer in buffers]
    turned = torch.stack([q, q + 1], 1).transpose(1, 2)[:, :, 0]
    assert not turned.is_contiguous()
    index = torch.randint(0, 33, (2, 2, 7))
    for op in (decode, lambda *a: decode_with_scores(*a)[0]):
        assert_close(op(turned, *views, 0.3), op(q, k, v, 0.3), bound=OUTPUT[dtype])
    assert_close(scores_of(turned, views[0], 0.3), scores_of(q, k, 0.3), bound=OUTPUT[dtype])
    assert torch.equal(gather(views[0], index), gather(k, index))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_recycled_scores_of_one_key_head_shown_as_many(dtype):
    """Strides of zero, which no buffer has."""
    q, k, _ = (x.to(dtype) for x in draw(8, 2))
    shared = k[:, :1].expand(-1, 2, -1, -1)
    assert_close(scores_of(q, shared, 0.3), scores_of(q, shared.contiguous(), 0.3), bound=LOGP[dtype])


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_recycled_kernels_stay_finite_where_scores_are_large(dtype):
    q, k, v = (x.to(dtype) for x in draw(8, 2))
    q, k = 70 * q, 70 * k
    products = q.double().view(2, 2, 4, 8) @ k.double().mT
    assert products.abs().max() > torch.finfo(F16).max
    out, logp = decode_with_scores(q, k, v, 1e-2)
    assert_logs(logp, law(q.double(), k.double(), v.double(), 1e-2)[1], LOGP[dtype])
    assert torch.isfinite(out).all()
    assert torch.isfinite(decode(q, k, v, 1e-2)).all()
    causal = torch.ones(1, 33, dtype=torch.bool)
    assert torch.isfinite(received(q[:, :, None], k, 1e-2, causal)).all()


def mass_law(q, k, scale, seen):
    """sum over queries of the largest probability in the group."""
    (B, H, T, _), G = q.shape, k.shape[1]
    out = torch.zeros(B, G, k.shape[2], dtype=F64)
    for b in range(B):
        for g in range(G):
            for t in range(T):
                at = seen[b, g, t].nonzero()[:, 0]
                if len(at):
                    heads = range(g * H // G, (g + 1) * H // G)
                    p = torch.stack([(scale * k[b, g, at] @ q[b, h, t]).softmax(0) for h in heads])
                    out[b, g, at] += p.amax(0)
    return out


@pytest.mark.parametrize("T", [1, 63, 64, 65, 130])
def test_recycled_received_in_blocks_is_the_dense_sum(T):
    q, k, _ = draw(4, 2, n=T + 3, T=T)
    causal = torch.ones(T, T + 3, dtype=torch.bool).tril(3)
    want = mass_law(q, k, 0.4, causal.expand(2, 2, T, T + 3))
    assert_close(received(q, k, 0.4, causal), want, bound=1e-12)
    real = padded((T + 3, (T + 3) // 2), T + 3)
    seen = (causal & real[:, None] & real[:, -T:, None])[:, None].expand(-1, 2, -1, -1)
    want = mass_law(q, k, 0.4, seen)
    got = received(q, k, 0.4, seen)
    assert_close(got, want, bound=1e-12)
    assert not got[1, :, : (T + 3) // 2].any()
    assert received(q.bfloat16(), k.bfloat16(), 0.4, seen).dtype == F32


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("T", [1, 63, 64, 130])
def test_recycled_prompt_attention_tells_what_keys_received(T, heads):
    q, k, v = draw(*heads, n=T, T=T)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    out, mass = attend_received(q, k, v, 0.4)
    assert_close(mass, mass_law(q, k, 0.4, causal.expand(2, heads[1], T, T)), bound=1e-12)
    repeated = (x.repeat_interleave(heads[0] // heads[1], 1) for x in (k, v))
    want = F.scaled_dot_product_attention(q, *repeated, is_causal=True, scale=0.4).transpose(1, 2)
    assert_close(out, want, bound=1e-12)
    out, mass = attend_received(*(x.bfloat16() for x in (q, k, v)), 0.4)
    assert (out.dtype, mass.dtype) == (torch.bfloat16, F32)
    assert_close(out.double(), want, bound=2e-2)


@pytest.mark.parametrize("side", [None, "left", "inner"])
@pytest.mark.parametrize(("recent", "sinks"), [(0, 0), (1, 0), (3, 2)])
def test_recycled_best_are_the_top_in_any_order(side, recent, sinks):
    scores, real = torch.randn(2, 3, 40), None if side is None else padded((40, 25), 40, side)
    want = top(scores, 12, recent, sinks, real).sort(-1).values
    assert torch.equal(best(scores.clone(), 12, recent, sinks, real).sort(-1).values, want)
    everything = best(scores.clone(), 99, recent, sinks, real).sort(-1).values
    assert torch.equal(everything, torch.arange(40).expand(2, 3, -1))


def pooled_law(logp, G, reduce, kernel, real):
    """Each token's score is the largest among its neighbours that are tokens."""
    B, H, n = logp.shape
    out = torch.full((B, G, n), -torch.inf, dtype=logp.dtype)
    for b in range(B):
        columns = [j for j in range(n) if real is None or real[b, j]]
        for g in range(G):
            heads = logp[b, g * H // G : (g + 1) * H // G]
            u = {"max": heads.amax(0), "mean": heads.exp().sum(0).log(), "first": heads[0]}[reduce]
            for at, j in enumerate(columns):
                out[b, g, j] = max(u[i] for i in columns[max(0, at - kernel // 2) : at + kernel // 2 + 1])
    return out


@pytest.mark.parametrize("side", [None, "left", "right", "inner"])
@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("reduce", ["max", "mean", "first"])
@pytest.mark.parametrize(("H", "G"), RATIOS)
def test_recycled_scores_are_pooled_over_neighbouring_tokens(H, G, reduce, kernel, side):
    q, k, _ = draw(H, G, n=20)
    real = None if side is None else padded((17, 2), 20, side)
    logp = scores_of(q, k, 1.0, real)
    got = pooled(logp, G, reduce, kernel, real)
    want = pooled_law(logp, G, reduce, kernel, real)
    assert_logs(got, want, 1e-12)


def test_recycled_pooling_leaks_into_no_padded_slot():
    """A key with all attention beside the padding: its neighbours there must not be chosen."""
    q, k, _ = draw(2, 1, n=20, B=1)
    real = padded((8,), 20)
    k[0, 0, 12] = 50 * q[0, 0]
    scores = pooled(scores_of(q, k, 1.0, real), 1, "max", 7, real)
    assert scores[0, 0, :12].eq(-torch.inf).all()
    assert (top(scores, 6, real=real) >= 12).all()
    assert set(top(scores, 4, real=real)[0, 0].tolist()) == {12, 13, 14, 15}


def top_law(row, budget, recent, sinks, columns):
    """The budget's worth of `columns` by (score, column), sinks first and the most recent next."""
    forced = columns[:sinks]
    newest = [c for c in columns[len(columns) - recent :] if c not in forced] if recent else []
    others = sorted((c for c in columns if c not in forced + newest), key=lambda c: (row[c], c))
    room = budget - len(forced) - len(newest)
    return (others[-room:] if room else []) + newest + forced


@pytest.mark.parametrize("side", [None, "left", "right", "inner"])
@pytest.mark.parametrize(("recent", "sinks"), [(0, 0), (1, 0), (3, 2), (0, 4), (6, 0)])
@pytest.mark.parametrize("ties", [False, True])
def test_recycled_top_is_ascending_with_newest_and_sinks_last(recent, sinks, side, ties):
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 24)
    scores = scores.round() if ties else scores
    real = None if side is None else padded((24, 9), 24, side)
    got = top(scores, 8, recent, sinks, real)
    for b in range(2):
        columns = list(range(24)) if real is None else real[b].nonzero()[:, 0].tolist()
        for g in range(3):
            assert got[b, g].tolist() == top_law(scores[b, g], 8, recent, sinks, columns)


@pytest.mark.parametrize("n", [1, 5, 8, 2000])
def test_recycled_top_of_equal_scores_has_its_size_and_is_the_newest(n):
    index = top(torch.zeros(2, 3, n), 8)
    assert index.tolist() == [[list(range(max(0, n - 8), n))] * 3] * 2


def test_recycled_top_takes_padding_last_and_survives_what_is_no_number():
    scores = torch.randn(2, 1, 10)
    real = padded((10, 3), 10)
    index = top(scores, 6, 2, 2, real)
    assert set(index[1, 0, -3:].tolist()) == {7, 8, 9}
    assert index.sort(-1).values.diff(dim=-1).min() > 0
    scores[0, 0, 3:] = math.nan
    index = top(scores, 6)
    assert {0, 1, 2} <= set(index[0, 0].tolist())
    assert index.sort(-1).values.diff(dim=-1).min() > 0


@pytest.mark.parametrize("dtype", OUTPUT, ids=str)
def test_recycled_gather_copies_rows_bit_for_bit(dtype):
    x = torch.randn(3, 2, 40, 8).to(dtype)[:, :, :33]
    index = torch.randint(0, 33, (3, 2, 12))
    got = gather(x, index)
    assert got.is_contiguous()
    for b in range(3):
        for g in range(2):
            assert torch.equal(got[b, g], torch.stack([x[b, g, j] for j in index[b, g]]))


@pytest.mark.parametrize(("H", "G"), RATIOS)
def test_recycled_attend_seen_is_dense_attention_under_the_mask(H, G):
    q, k, v = draw(H, G, n=12, T=5)
    seen = torch.rand(2, G, 5, 12) < 0.5
    seen[..., 3] = True
    assert_close(attend_seen(q, k, v, seen, 0.3), dense(q, k, v, seen, 0.3), bound=1e-12)


@pytest.mark.parametrize(("H", "G"), RATIOS)
def test_recycled_attend_tail_sees_the_choice_of_the_token_before(H, G):
    T, tail, budget = 21, 5, 6
    q, k, v = draw(H, G, n=T, T=T)
    seen = torch.ones(2, G, T, T, dtype=torch.bool).tril()
    n = T - tail
    logp = law(q[:, :, n - 1], k[:, :, :n], v[:, :, :n], 0.3)[1]
    scores = pooled_law(logp, G, "max", 7, None)
    for b in range(2):
        for g in range(G):
            kept = top_law(scores[b, g], budget, 1, 2, list(range(n)))
            seen[b, g, n:, [c for c in range(n) if c not in kept]] = False
    got = attend_tail(q, k, v, 0.3, tail, budget, recent=1, sinks=2)
    assert_close(got, dense(q, k, v, seen, 0.3), bound=1e-12)


def worst(dtype, seeds=20):
    """(output, log-probability) errors behind OUTPUT and LOGP."""
    found = [0.0, 0.0]
    for seed in range(seeds):
        for H, G in RATIOS:
            for real in (None, padded((33, 5), 33)):
                q, k, v = (x.to(dtype) for x in draw(H, G, seed=seed))
                o, logp = law(q.double(), k.double(), v.double(), 0.3, real)
                out, got = decode_with_scores(q, k, v, 0.3, real)
                for x in (out, decode(q, k, v, 0.3, real)):
                    found[0] = max(found[0], float((x.double() - o).abs().max() / o.abs().max()))
                finite = logp > -torch.inf
                error = (got.double() - logp)[finite].abs().max() / logp[finite].abs().max()
                found[1] = max(found[1], float(error))
    return found
