"""Selections of tokens, and the comparisons of selective attention's Triton kernels with its law in float64."""

import torch
from kernel_cases import BF16, F16, F32, F64, OutOfBoundError, error

from scrubjay.kernels import select_attention as kernel
from scrubjay.kernels.select_attention import pack, select_attention_reference

# Five times the worst of 8 seeds: 3.2e-7; of low precision, whose stores the interpreter truncates, 6.6e-3 and 3.6e-4.
BOUND = {F32: 1.6e-6, BF16: 3.3e-2, F16: 1.8e-3}


def normal(*shape, dtype=F32):
    return torch.randn(shape, dtype=F64).to(dtype)


def draw(T, share, window, *, past=0, B=2, H=2, K=1, P=8, dtype=F32, tiled=None):
    """q, k, v, packed, before of a random selection."""
    packed = pack(torch.rand(B, T) < share, window, tiled=tiled)
    k, v = normal(B, past + T, K, P, dtype=dtype), normal(B, past + T, K, P, dtype=dtype)
    start = torch.randint(0, past + 1, (B, 1))  # of what the past holds for each row
    return normal(len(packed.index), H, P, dtype=dtype), k, v, packed, start + torch.arange(T)


def expect(name, got, want, bound, largest=None):
    found = error(got, want) if largest is None else float((got.double() - want).abs().max()) / largest
    if got.shape != want.shape or not found <= bound:
        raise OutOfBoundError(f"{name}: {tuple(got.shape)}, error {found:.2e}, bound {bound:.0e}")


def check(q, k, v, packed, before, window, *, backend="triton", bound=None, **options):
    """Outputs and gradients against the law in float64; with one key a window the gradient of q is zero."""
    bound = BOUND[q.dtype] if bound is None else bound
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    got = kernel.select_attention(*leaves, packed, before, window, backend=backend, **options)
    want = select_attention_reference(*wide, packed, before, window, **options)
    given = torch.randn_like(want).to(q.dtype)
    expect("o", got.detach(), want.detach(), bound)
    grads = torch.autograd.grad(got, leaves, given)
    expected = torch.autograd.grad(want, wide, given.double())
    largest = max(float(e.abs().max()) for e in expected)
    for name, grad, e in zip("qkv", grads, expected, strict=True):
        expect(f"d {name}", grad, e, bound, largest)


def narrowed():
    """A row of packed documents, and ways to see less of it."""
    q, k, v, packed, _ = draw(130, 0.5, 50, B=1)
    sizes = torch.tensor([30, 1, 59, 40])
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    places, readable = torch.randint(1, 4, (1, 130)).cumsum(1), torch.rand(1, 130) < 0.5
    ways = {
        "documents": {},
        "limit": dict(limits=[(places, 25)]),
        "readable": dict(readable=readable),
        "all": dict(limits=[(places, 60), (readable.cumsum(1), 5)], readable=readable),
    }
    return (q, k, v, packed, torch.arange(130)[None] - starts, 50), ways


def ring(n, H, K, W, P, dtype=F32):
    """q, keys, values and what is seen of W slots: one row sees a single slot, one all."""
    seen = torch.rand(n, W) < 0.5
    seen[:, 3] = True
    seen[0], seen[-1] = torch.arange(W) == W - 1, True
    return (*(normal(n, *shape, P, dtype=dtype) for shape in ((H,), (K, W), (K, W))), seen)


def check_step(operands, rows=None, bound=None, **options):
    q, keys, values, seen = operands
    (H, P), K = q.shape[1:], keys.shape[1]
    got = kernel.select_attention_step(q, keys, values, seen, rows=rows, backend="triton", **options)
    k, v = (x.double().repeat_interleave(H // K, 1) for x in (keys, values))
    scores = torch.einsum("nhp,nhwp->nhw", q.double(), k) * options.get("scale", P**-0.5)
    want = torch.einsum("nhw,nhwp->nhp", scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1), v)
    if rows is not None:
        want = torch.where(rows[:, None, None], want, 0)
    assert got.dtype == q.dtype
    expect("o", got, want, bound or BOUND[q.dtype])


def worst(dtype, seeds=8):
    """The worst error that `check` and `check_step` meet: what the bounds are made of."""
    errors = []

    def collected(name, got, want, bound, largest=None):
        errors.append(error(got, want) if largest is None else float((got.double() - want).abs().max()) / largest)

    globals()["expect"] = collected
    for seed in range(seeds):
        torch.manual_seed(seed)
        check(*draw(150, 0.5, 70, dtype=dtype, past=20), 70)
        check_step(ring(3, 4, 2, 100, 24, dtype))
    return max(errors)
