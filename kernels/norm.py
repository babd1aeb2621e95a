"""Root-mean-square norms: the plain one, and the gated one behind Mamba-2's and Rodimus' recurrence.

    rms_norm:        x * rsqrt(mean(x^2) + eps) * w
    gated_rms_norm:  u = (y + skip * x) * silu(z);   u * rsqrt(mean over its group(u^2) + eps) * w      gate, then norm

C channels, in G equal groups. y, x, z: (..., C)   weight, skip: (C,). Computed in float32 (float64 for float64 inputs).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from scrubjay.kernels.dispatch import choose, traced, without_autocast
from scrubjay.kernels.norm_triton import gated_rms_norm_triton, norm_fits, rms_norm_triton
from scrubjay.kernels.recurrence import wants_gradient

# Elements of one tile of rows on a CPU: a tile and what is computed from it stay in one core's second-level cache, so
# that a chain of elementwise operations reads memory once. 2^16 to 2^18 measured alike, a single tile 2x slower.
TILE = 2**17
WIDE = (torch.float32, torch.float64)  # computed in as they are


def rms_norm(x, weight, eps, *, backend=None):
    """(..., C) -> (..., C) in weight's dtype: a float32 residual stream goes in, the layer's own dtype comes out.

    On a CPU torch's own takes twice the calls for one token and, with a gradient, thrice the time and memory. On a GPU
    it is one kernel, but of one dtype; where there are two, Triton's kernel reads and writes each number once.

    Args:
        backend: None chooses by device and dtypes; "torch" and "triton" are obeyed or refused.

    Raises:
        ValueError: a backend that cannot run.
    """

    def fused():
        return (x.dtype != weight.dtype or backend == "triton") and norm_fits(1, x, weight)

    if choose(backend, "rms_norm", x, weight, fused=fused) == "triton":
        return rms_norm_triton(x, weight, eps)
    if x.device.type == "cpu":
        return _RMSNorm.apply(x, weight, eps) if wants_gradient(x, weight) else _normed(x, weight, eps)[0]
    if x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = torch.promote_types(x.dtype, weight.dtype)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(weight.dtype)


def _normed(x, weight, eps):
    """The norm and rsqrt(mean(x^2) + eps) of each row, (..., 1)."""
    if x.dtype != weight.dtype or x.dtype not in WIDE:
        x = x.to(torch.promote_types(_wide(x), weight.dtype))
    scale = _scale(x, eps)
    normed = (x * scale).mul_(weight)
    return normed if normed.dtype == weight.dtype else normed.to(weight.dtype), scale


class _RMSNorm(torch.autograd.Function):
    """Keeps its inputs and one number a row."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        out, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dout):
        x, weight, scale = ctx.saved_tensors
        normed, d, wide = x.to(scale.dtype) * scale, dout.to(scale.dtype), weight.to(scale.dtype)
        products = d * normed
        dweight = products.reshape(-1, x.shape[-1]).sum(0)
        mean = torch.matmul(products, wide)[..., None].div_(x.shape[-1])
        dx = torch.addcmul(normed.mul_(mean), d, wide, value=-1).mul_(-scale)
        return dx.to(x.dtype), dweight.to(weight.dtype), None


def gated_rms_norm_reference(y, z, weight, eps, groups=1, x=None, skip=None):
    """The formula. The law for the other path."""
    wide = torch.promote_types(y.dtype, torch.float32)
    u = y.to(wide) if x is None else y.to(wide) + skip.to(wide) * x.to(wide)
    u = (u * F.silu(z.to(wide))).unflatten(-1, (groups, -1))
    u = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)
    return (u.flatten(-2) * weight.to(wide)).to(y.dtype)


def gated_rms_norm(y, z, weight, eps, groups=1, x=None, skip=None, *, backend=None):
    """Skip, gate and norm in one pass over memory, and one back.

    Args:
        y, z: (..., C) the recurrence's output and the gate before its SiLU.
        weight: (C,).
        groups: G, divides C; the mean is taken over C / G channels.
        x, skip: (..., C) and (C,): adds skip * x to y before the gate. Both or neither.
        backend: None chooses by device; "torch" and "triton" are obeyed or refused.

    Returns: (..., C) in y's dtype.
    Error against `gated_rms_norm_reference`, gradients included: 2e-6 of the largest value in float32.

    Raises:
        ValueError: shapes that do not fit each other, a backend that cannot run.
    """
    if y.shape != z.shape or weight.shape != y.shape[-1:] or y.shape[-1] % groups:
        raise ValueError(
            f"gated_rms_norm needs y, z (..., C), weight (C,) and groups dividing C; got y {tuple(y.shape)}, "
            f"z {tuple(z.shape)}, weight {tuple(weight.shape)}, groups {groups}."
        )
    if (x is None) != (skip is None) or (x is not None and (x.shape != y.shape or skip.shape != weight.shape)):
        raise ValueError("gated_rms_norm needs x in y's shape together with skip in weight's shape, or neither.")
    fused = partial(norm_fits, groups, y, z, weight, x, skip)
    if choose(backend, "gated_rms_norm", y, z, fused=fused) == "triton":
        return gated_rms_norm_triton(y, z, weight, eps, groups, x, skip)
    if traced():  # tiles are many where rows are many, and a compiler fuses the formula
        return gated_rms_norm_reference(y, z, weight, eps, groups, x, skip)
    if wants_gradient(y, z, x, weight, skip):
        return _GatedRMSNorm.apply(y, z, x, weight, skip, eps, groups)
    return _gated(y, z, x, weight, skip, eps, groups)


@without_autocast
def _gated(y, z, x, weight, skip, eps, groups):
    if y.numel() <= TILE:
        return _gated_tile(y, z, x, weight, skip, eps, groups).to(y.dtype)
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    y, z, x, flat = (None if t is None else t.reshape(-1, t.shape[-1]) for t in (y, z, x, out))
    for rows in _tiles(flat):
        tile = (None if t is None else t[rows] for t in (y, z, x))
        _gated_tile(*tile, weight, skip, eps, groups, out=flat[rows])
    return out


def _gated_tile(y, z, x, weight, skip, eps, groups, out=None):
    u = _skipped(y, x, skip).mul_(F.silu(z if z.dtype == y.dtype in WIDE else z.to(_wide(y))))
    return torch.mul(u.mul_(_scale(u, eps, groups)), weight, out=out)


class _GatedRMSNorm(torch.autograd.Function):
    """Keeps its inputs alone; the backward pass computes the gate and the norm again."""

    @staticmethod
    def forward(ctx, y, z, x, weight, skip, eps, groups):
        ctx.save_for_backward(y, z, x, weight, skip)
        ctx.eps, ctx.groups = eps, groups
        return _gated(y, z, x, weight, skip, eps, groups)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dout):
        y, z, x, weight, skip = ctx.saved_tensors
        shape, wide = y.shape, _wide(y)
        y, z, x, dout = (None if t is None else t.reshape(-1, shape[-1]) for t in (y, z, x, dout))
        dy, dz, dx = (None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (y, z, x))
        dweight, dskip = torch.zeros_like(weight, dtype=wide), torch.zeros_like(weight, dtype=wide)
        for rows in _tiles(y):
            gate, s = z[rows].to(wide), _skipped(y[rows], None if x is None else x[rows], skip)
            silu = F.silu(gate)
            u = s * silu
            scale = _scale(u, ctx.eps, ctx.groups)
            normed, d = u.mul_(scale), dout[rows].to(wide)
            products = d * normed
            dweight += products.sum(0)
            mean = products.mul_(weight).view(len(d), ctx.groups, -1).mean(-1)
            mean = mean if ctx.groups == 1 else mean.repeat_interleave(d.shape[1] // ctx.groups, 1)
            du = torch.addcmul(normed.mul_(mean), d, weight.to(wide), value=-1).mul_(-scale)
            dz[rows] = torch.ops.aten.silu_backward(s.mul_(du), gate)
            torch.mul(du, silu, out=dy[rows])
            if x is not None:
                du.mul_(silu)
                dskip += torch.mul(du, x[rows], out=products).sum(0)
                torch.mul(du, skip, out=dx[rows])
        dx, dskip = (None, None) if x is None else (dx.view(shape), dskip.to(skip.dtype))
        return dy.view(shape), dz.view(shape), dx, dweight.to(weight.dtype), dskip, None, None


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)


def _tiles(rows):
    """Slices over the rows of a matrix, TILE elements each on a CPU; elsewhere one for all."""
    size = max(1, TILE // rows.shape[1]) if rows.device.type == "cpu" else max(1, len(rows))
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _skipped(y, x, skip):
    """y + skip * x in a fresh float32 tensor."""
    if x is not None and y.dtype == x.dtype == skip.dtype in WIDE:
        return torch.addcmul(y, x, skip)
    wide = _wide(y)
    if x is None:
        return y.to(wide, copy=True)
    return torch.addcmul(y.to(wide), x.to(wide), skip.to(wide))


def _scale(u, eps, groups=1):
    """rsqrt(mean(u^2) + eps) of each group, (..., C) or, where one number serves the row, (..., 1)."""
    if groups == 1:
        return torch.linalg.vector_norm(u, dim=-1, keepdim=True).square_().div_(u.shape[-1]).add_(eps).rsqrt_()
    grouped = u.unflatten(-1, (groups, -1))
    size = grouped.shape[-1]
    scale = torch.linalg.vector_norm(grouped, dim=-1).square_().div_(size).add_(eps).rsqrt_()
    return scale.repeat_interleave(size, -1)
