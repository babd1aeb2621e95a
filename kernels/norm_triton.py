"""The norms of norm.py as one pass over memory forward and one backward.

    s = y + skip x    u = s silu(z)    r = 1 / sqrt(mean(u^2) + eps)    out = u r w
    du = r (w dout - u r^2 mean(w dout u))    dy = du silu(z)    dz = du s silu'(z)    dx = skip dy
    dw = sum of dout u r    dskip = sum of dy x                                        sums over all rows

Without z, silu(z) is 1: the plain norm. R rows of C channels in G groups of S. A program takes a group of several rows
at a time and goes on to others; it loads each number once, and backward it computes everything again from the inputs.
While it computes, the rows that it takes next are on their way.
Its sums over the rows that it saw are one row of a table, which torch adds up: no atomics, the same result every time.
"""

import torch
from torch.autograd.function import once_differentiable

from scrubjay.kernels.triton_tools import append, jit, launch, tl, triton

NARROW = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 8192  # channels of a group: a program holds one whole
WHOLE = 4096  # channels of a group up to which the backward pass holds it in registers; of others
PIECE = 2048  # it takes so many at a time, twice


def norm_fits(groups, *tensors):
    """Whether the kernels cover these operands (None: not there): (..., C) and (C,), no float64, small groups."""
    tensors = [x for x in tensors if x is not None]
    return all(x.dtype in NARROW for x in tensors) and tensors[0].shape[-1] // groups <= LARGEST


def rms_norm_triton(x, weight, eps):
    """`rms_norm` on a GPU: the same shapes, dtypes and result."""
    return _Norm.apply(x, None, None, weight, None, eps, 1, weight.dtype)


def gated_rms_norm_triton(y, z, weight, eps, groups, x, skip):
    """`gated_rms_norm` on a GPU: the same shapes, dtypes and result."""
    return _Norm.apply(y, z, x, weight, skip, eps, groups, y.dtype)


class _Norm(torch.autograd.Function):
    """Keeps its inputs alone."""

    @staticmethod
    def forward(ctx, y, z, x, weight, skip, eps, groups, dtype):
        ctx.save_for_backward(y, z, x, weight, skip)
        ctx.eps, ctx.groups = eps, groups
        out = torch.empty(y.shape, dtype=dtype, device=y.device)
        inputs, row_strides = _rows(y, z, x)
        grid, sizes, meta = _sizes(y, groups, 64, LARGEST)
        weight, skip = _vectors(weight, skip)
        launch(_forward, grid, *inputs, weight, skip, out, *row_strides, *sizes, eps, **meta)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        y, z, x, weight, skip = ctx.saved_tensors
        grads = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (y, z, x)]
        inputs, row_strides = _rows(y, z, x, dout)
        size = y.shape[-1] // ctx.groups
        grid, sizes, meta = _sizes(y, ctx.groups, 32, WHOLE if size <= WHOLE else PIECE)
        meta |= {"PIECES": triton.cdiv(size, meta["BLOCK"]), "STAGES": 2 if size <= WHOLE else 1}
        parts = y.new_empty(2 if x is not None else 1, grid[0], y.shape[-1], dtype=torch.float32)
        vectors = _vectors(weight, skip)
        launch(_backward, grid, *inputs, *vectors, *grads, parts, *row_strides, *sizes, ctx.eps, **meta)
        dweight, *dskip = parts.sum(1)
        return *grads, dweight.to(weight.dtype), dskip[0].to(skip.dtype) if dskip else None, None, None, None


def _rows(*tensors):
    """Each (..., C) as rows (R, C) whose channels lie side by side, and the strides between rows; 0 for None."""
    rows = [None if t is None else t.reshape(-1, t.shape[-1]) for t in tensors]
    rows = [t if t is None or t.stride(1) == 1 else t.contiguous() for t in rows]
    return rows, [0 if t is None else t.stride(0) for t in rows]


def _vectors(weight, skip):
    return weight.contiguous(), None if skip is None else skip.contiguous()


def _sizes(y, groups, warps_at_once, largest):
    """(programs, G); R, C, S; constants of the kernels, for pieces of at most `largest` channels."""
    channels = y.shape[-1]
    rows, size = y.numel() // channels, channels // groups
    block = min(triton.next_power_of_2(size), largest)
    rows_at_once, warps = max(1, 1024 // block), min(16, max(4, block // 256))  # 8 channels a thread
    enough = max(1, warps_at_once // warps * _processors(y.device) // groups)
    programs = min(triton.cdiv(rows, rows_at_once), enough)
    return (programs, groups), (rows, channels, size), {"ROWS": rows_at_once, "BLOCK": block, "num_warps": warps}


def _processors(device):
    """Of a GPU; elsewhere a number that makes programs loop."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@jit
def _forward(
    y, z, x, weight, skip, out, y_row, z_row, x_row, rows, channels, size, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.arange(0, BLOCK)
    inside = at < size
    c = tl.program_id(1) * size + at
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    if x is not None:
        scale = tl.load(skip + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (row < rows) & inside[None, :]
        u = tl.load(y + row * y_row + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if x is not None:
            u += scale * tl.load(x + row * x_row + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if z is not None:
            gate = tl.load(z + row * z_row + c[None, :], mask=mask, other=0.0).to(tl.float32)
            u *= gate * tl.sigmoid(gate)
        r = tl.rsqrt(tl.sum(u * u, 1) / size + eps)[:, None]
        result = u * r * w
        tl.store(out + row * channels + c[None, :], result.to(out.dtype.element_ty), mask=mask)


@jit
def _inputs(y, z, x, dout, skip, y_row, z_row, x_row, dout_row, row, c, mask):
    """Of one tile: dout, s, z, sigmoid(z), x; dout in place of what is not there."""
    d = tl.load(dout + row * dout_row + c, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(y + row * y_row + c, mask=mask, other=0.0).to(tl.float32)
    gate, sigma, fed = d, d, d
    if x is not None:
        fed = tl.load(x + row * x_row + c, mask=mask, other=0.0).to(tl.float32)
        s += fed * skip
    if z is not None:
        gate = tl.load(z + row * z_row + c, mask=mask, other=0.0).to(tl.float32)
        sigma = tl.sigmoid(gate)
    return d, s, gate, sigma, fed


@jit
def _backward(
    y, z, x, dout, weight, skip, dy, dz, dx, parts, y_row, z_row, x_row, dout_row, rows, channels, size, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Twice over a group of channels, piece by piece: for its two means, then, from the cache, for the gradients."""
    group = tl.program_id(1) * size
    at = tl.arange(0, BLOCK)[None, :]
    weights, skips, dweights, dskips = (), (), (), ()
    for p in tl.static_range(PIECES):
        w = tl.load(weight + group + p * BLOCK + at, mask=p * BLOCK + at < size, other=0.0).to(tl.float32)
        weights, skips = append(weights, w), append(skips, w)
        if x is not None:
            scale = tl.load(skip + group + p * BLOCK + at, mask=p * BLOCK + at < size, other=0.0)
            skips = append(skips[:p], scale.to(tl.float32))
        dweights = append(dweights, tl.zeros((ROWS, BLOCK), tl.float32))
        dskips = append(dskips, tl.zeros((ROWS, BLOCK), tl.float32))
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        squares, products = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
        for p in tl.static_range(PIECES):
            c, mask = group + p * BLOCK + at, (row < rows) & (p * BLOCK + at < size)
            d, u, gate, sigma, fed = _inputs(y, z, x, dout, skips[p], y_row, z_row, x_row, dout_row, row, c, mask)
            if z is not None:
                u *= gate * sigma
            squares += u * u
            products += d * weights[p] * u
        r = tl.where(row < rows, tl.rsqrt(tl.sum(squares, 1) / size + eps)[:, None], 0.0)
        mean = (tl.sum(products, 1) / size)[:, None] * r * r
        old_dweights, old_dskips, dweights, dskips = dweights, dskips, (), ()
        for p in tl.static_range(PIECES):
            c, mask = group + p * BLOCK + at, (row < rows) & (p * BLOCK + at < size)
            d, s, gate, sigma, fed = _inputs(y, z, x, dout, skips[p], y_row, z_row, x_row, dout_row, row, c, mask)
            u = s
            if z is not None:
                u *= gate * sigma
            dweights = append(dweights, old_dweights[p] + d * u * r)
            d = (d * weights[p] - u * mean) * r
            if z is not None:
                dgate = d * s * sigma * (1 + gate * (1 - sigma))
                tl.store(dz + row * channels + c, dgate.to(dz.dtype.element_ty), mask=mask)
                d *= gate * sigma
            tl.store(dy + row * channels + c, d.to(dy.dtype.element_ty), mask=mask)
            if x is not None:
                tl.store(dx + row * channels + c, (d * skips[p]).to(dx.dtype.element_ty), mask=mask)
            dskips = append(dskips, old_dskips[p] + d * fed)
    part = parts + tl.program_id(0).to(tl.int64) * channels + group
    for p in tl.static_range(PIECES):
        within = p * BLOCK + tl.arange(0, BLOCK)
        tl.store(part + within, tl.sum(dweights[p], 0), mask=within < size)
        if x is not None:
            beside = tl.num_programs(0).to(tl.int64) * channels
            tl.store(part + beside + within, tl.sum(dskips[p], 0), mask=within < size)
