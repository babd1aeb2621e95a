"""Comparisons of the Triton kernels of recycle.py and release.py with references and with PyTorch's path, which tests
make and which the deliberate errors of `test_triton_recycle_mutants.py` have to fail. Each raises OutOfBoundError."""

import torch
from kernel_cases import BF16, F16, F32, F64, OutOfBoundError, error
from recycled_cases import padded

from scrubjay.kernels import recycle, release

# Measured in the interpreter, worst of 20 seeds over RATIOS and padding (`worst`), relative to the largest, times 5.
OUTPUT = {F32: 5 * 6.0e-7, F16: 5 * 4.7e-4, BF16: 5 * 6.8e-3}
LOGP = 5 * 1.6e-7  # whatever the inputs' dtype: the reference reads the same numbers
RATIOS = [(3, 3), (8, 2), (7, 1), (17, 1)]  # (heads, key heads): 1, 4, 7 and 17 heads a key head


def draw(H, G, n=70, B=2, P=8, dtype=F32, seed=0):
    """q (B, H, P), k, v (B, G, n, P)."""
    torch.manual_seed(seed)
    q, k, v = 2 * torch.randn(B, H, P), torch.randn(B, G, n, P), torch.randn(B, G, n, P)
    return tuple(x.to(dtype) for x in (q, k, v))


def within(name, got, want, bound):
    """Equal within the bound where `want` is finite, and to the bit elsewhere."""
    finite = want.isfinite()
    if got.shape != want.shape or not torch.equal(got[~finite].double(), want[~finite].double()):
        raise OutOfBoundError(f"{name}: shape {tuple(got.shape)}, or what is infinite, differs")
    found = error(got[finite], want[finite])
    if not found <= bound:
        raise OutOfBoundError(f"{name}: error {found:.1e}, bound {bound:.0e}")


def same(name, got, want):
    """To the bit; NaN is NaN."""
    equal = (got == want) | ((got != got) & (want != want)) if got.shape == want.shape else torch.zeros(1)
    if got.dtype != want.dtype or not equal.all():
        raise OutOfBoundError(f"{name} differs in {(~equal.bool()).sum()} of {equal.numel()} places")


def check_decode(H, G, n=70, P=8, dtype=F32, real=None, B=2, scale=0.3):
    """Outputs and log-probabilities are the reference's, in float64 on the same numbers."""
    q, k, v = draw(H, G, n, B, P, dtype)
    want, logp = recycle.decode_reference(q.double(), k.double(), v.double(), scale, real)
    out, found = recycle.decode_with_scores(q, k, v, scale, real, backend="triton")
    within("decode", recycle.decode(q, k, v, scale, real, backend="triton"), want, OUTPUT[dtype])
    within("decode_with_scores", out, want, OUTPUT[dtype])
    within("its log-probabilities", found, logp, LOGP)
    same("scores_of", recycle.scores_of(q, k, scale, real, backend="triton"), found)


def check_long():
    """Parts of more than one tile."""
    check_decode(2, 1, n=2080, B=1)


def check_holes():
    """Other keys of each key head are no tokens, and are NaN."""
    q, k, v = draw(8, 2)
    real = torch.rand(2, 2, 70) < 0.6
    k[~real] = v[~real] = torch.nan
    clean = [x.masked_fill(~real[..., None], 0).double() for x in (k, v)]
    want, logp = recycle.decode_reference(q.double(), *clean, 0.3, real)
    out, found = recycle.decode_with_scores(q, k, v, 0.3, real, backend="triton")
    within("decode", recycle.decode(q, k, v, 0.3, real, backend="triton"), want, OUTPUT[F32])
    within("decode_with_scores", out, want, OUTPUT[F32])
    within("its log-probabilities", found, logp, LOGP)


def check_pooled(reduce="max", kernel=7, side=None, by_head=False, H=8, G=2, n=40):
    """To the bit what PyTorch's path gives; the mean of probabilities within float32's rounding."""
    torch.manual_seed(0)
    real = None if side is None else padded((n - 4, 2), n, side)
    logp = torch.randn(2, H, n).log_softmax(-1)
    logp[0, :, 0], logp[1, :, -1] = 0.0, 0.0  # what is beyond a border would be seen, and what is before it missed
    if by_head:
        real = torch.stack([real, real.roll(1, -1)], 1)
    if real is not None:
        logp.masked_fill_(~recycle._by_head(real, H), -torch.inf)
    got, want = (recycle.pooled(logp, G, reduce, kernel, real, backend=path) for path in ("triton", "torch"))
    if reduce == "mean":
        within("pooled", got, want.double(), LOGP)
    else:
        same("pooled", got, want)


def check_top(recent=0, sinks=0, side=None, ties=True, n=40):
    """To the bit what PyTorch's path gives, with infinities, NaN and both zeros among the scores."""
    torch.manual_seed(0)
    scores = 2 * torch.randn(2, 3, n)
    scores = scores.round() if ties else scores
    scores[0, 0, ::5], scores[0, 0, 1::5], scores[1, 1, ::7] = 0.0, -0.0, torch.nan
    scores[1, 2, 2::9] = -torch.inf
    real = None if side is None else padded((n - 4, 2), n, side)
    args = (scores, n // 2, recent, sinks, real)
    same("top", recycle.top(*args, backend="triton"), recycle.top(*args, backend="torch"))


def check_gather(dtype=F32, n=40, M=19, P=12):
    """Rows of slices, into the beginning of larger buffers, whose end nothing touches."""
    torch.manual_seed(0)
    k, v = (torch.randn(2, 3, n + 8, P).to(dtype)[:, :, :n] for _ in "kv")
    index = torch.randint(0, n, (2, 3, 2 * M))[..., ::2]
    out = [torch.full((2, 3, M + 5, P), 7.0).to(dtype) for _ in "kv"]
    got = recycle.gather_pair(k, v, index, out, backend="triton")
    fresh = recycle.gather_pair(k, v, index, backend="triton")
    for i, (x, name) in enumerate(((k, "keys"), (v, "values"))):
        same(name, got[i], recycle.gather(x, index))
        same(name, fresh[i], got[i])
        same(f"the buffer of {name}", out[i][:, :, :M], got[i])
        same(f"behind {name}", out[i][:, :, M:], torch.full_like(out[i][:, :, M:], 7.0))


def slots(C, dtype=F32, reals=False, ties=True):
    """keys, values, index, rank, real of C slots, and a new row."""
    torch.manual_seed(0)
    rank = torch.randint(-4, 9, (3, 2, C)).double() if ties else torch.randperm(6 * C).view(3, 2, C).double()
    rank[0, 0, -1] = -5  # the lowest
    held = [torch.randn(3, 2, C, 12).to(dtype), torch.randn(3, 2, C, 12).to(dtype), torch.arange(6 * C).view(3, 2, C)]
    held += [rank, torch.rand(3, 2, C) < 0.5 if reals else None]
    k, v = (torch.randn(3, 1, 2, 12).to(dtype).transpose(1, 2) for _ in "kv")
    return held, k, v


def check_put(filled=9, C=9, dtype=F32, real=None, reals=False, ties=True, sealed=False):
    """Slots, and all that is held, to the bit what PyTorch's path makes of them."""
    held, k, v = slots(C, dtype, reals or real is not None, ties)
    if sealed:
        held[3].fill_(torch.inf)
        held[3][1:, :, 3::1024] = -torch.inf
    rank = torch.tensor([70.0, torch.inf, 2.0**30 + 1], dtype=F64)
    found = {}
    for path in ("triton", "torch"):
        mine = [None if x is None else x.clone() for x in held]
        found[path] = [recycle.put_row(mine, k, v, 12345, rank, real, filled, backend=path), *mine]
    for name, got, want in zip(("slot", "keys", "values", "index", "rank", "real"), *found.values(), strict=True):
        if want is not None:
            same(name, got, want)


NUMBERS = [torch.nan, -torch.inf, -3e38, -1.0, -1e-45, 0.0, -0.0, 1e-45, 1.0, 3e38, torch.inf, -5.0]


def check_ranking(dtype=F32, protected=True, n=12):
    """Every kind of number, to the bit."""
    score = torch.tensor(NUMBERS).repeat(2, -(-n // 12))[:, :n].to(dtype)
    pos = torch.stack([torch.arange(n), torch.arange(n).flip(0) + 2**30]).int()
    real, above = torch.arange(n) % 5 != 3, torch.arange(n) % 4 == 1
    args = (score, pos, real.expand(2, n), above.expand(2, n) if protected else None)
    same("ranking", release.ranking(*args, backend="triton"), release.ranking(*args, backend="torch"))


def drawn_step(width, budget, new, all_real=False, rows=3, seed=0):
    """Arguments of `release_step`, with many equal scores."""
    torch.manual_seed(seed)
    C = width + new
    score = torch.randint(-3, 4, (rows, C)).float() / 2
    pos = torch.stack([torch.randperm(C + 3)[:C] for _ in range(rows)])
    real = torch.rand(rows, C) < (2 if all_real else 0.8)
    columns = torch.randint(0, 1000, (rows, C))
    held = torch.nn.functional.pad(columns[:, :width], (0, budget - width), value=-1)
    return score, pos, real, columns, held, width, torch.tensor([C + 3, C + 1, C])[:rows], 2, 3


def release_step_law(score, pos, real, columns, slots, width, counts, sinks, recent):
    """With lists, a row at a time."""
    kept, target, after = [], [], []
    for b, m in enumerate([slots.shape[1]] * len(score)):
        protected = [at < sinks or at >= counts[b] - recent for at in pos[b].tolist()]
        rank = [(p, 0 if p else x, at) for p, x, at in zip(protected, score[b].tolist(), pos[b].tolist(), strict=True)]
        best = sorted((i for i in range(len(rank)) if real[b, i]), key=rank.__getitem__)[-m:]
        row = [column if i < width and i in best else -1 for i, column in enumerate(slots[b].tolist())]
        free = [i for i in range(m) if i >= width or i not in best]
        target.append([free.pop(0) if i in best else m for i in range(width, len(rank))])
        for slot, column in zip(target[-1], columns[b, width:].tolist(), strict=True):
            row = [column if i == slot else held for i, held in enumerate(row)]
        kept.append([i in best for i in range(width)])
        after.append(row)
    return torch.tensor(kept, dtype=torch.bool).view(len(score), width), torch.tensor(target), torch.tensor(after)


def check_release_step(width=9, budget=9, new=4, all_real=False, backend="triton"):
    """What stays, where others go and the slots after it are the law's."""
    for seed in range(3):
        args = drawn_step(width, budget, new, all_real, seed=seed)
        got = release.release_step(*args, backend=backend)
        for name, x, want in zip(("kept", "target", "slots"), got, release_step_law(*args), strict=True):
            same(name, x, want)


def worst(dtype, seeds=20):
    """(output, log-probability) errors behind OUTPUT and LOGP."""
    found = [0.0, 0.0]
    for seed in range(seeds):
        for H, G in RATIOS:
            for real in (None, padded((70, 5), 70)):
                q, k, v = draw(H, G, dtype=dtype, seed=seed)
                want, logp = recycle.decode_reference(q.double(), k.double(), v.double(), 0.3, real)
                out, got = recycle.decode_with_scores(q, k, v, 0.3, real, backend="triton")
                found[0] = max(found[0], error(out, want))
                found[1] = max(found[1], error(got[logp.isfinite()], logp[logp.isfinite()]))
    return found
