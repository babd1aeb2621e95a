"""Taipan's gate on a GPU: the norm in front of it and delta from one pass over the residual stream, and one back.

    x = h s w,  s = 1 / sqrt(mean(h^2) + eps)      delta = (W_1 - W_0) . g + (b_1 - b_0),  g = x, or h without a norm
    dx' = dx + ddelta (W_1 - W_0);   dh = s (w dx' - h s mean(w dx' h s))      dw = sum_rows dx' h s
    d(W_1 - W_0) = sum_rows ddelta g

The bits of delta are those of a token's own h alone, because nothing that they depend on knows of other tokens:
    a program takes one row, whose sums are trees of additions written out here, so that neither the compiler nor the
    layout of registers chooses an order: halves are added to each other, D padded with zeros to a power of two;
    no product is fused with an addition, which would round once where another compilation rounds twice;
    square root and division are rounded correctly;
    the number of rows is no argument of the kernel, which would be compiled anew for some numbers of them.
Where D is a power of two, `gate_logit` has the bits of the torch path on a CPU.
"""

import torch
from torch.autograd.function import once_differentiable

from scrubjay.kernels.triton_tools import jit, launch, tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 16384  # channels that the registers of one program hold
PROGRAMS = 1024  # of the backward pass, where each sums the gradients of the parameters over its rows
LEAST = 8  # rows of each


def gate_fits(x, *parameters):
    """Whether the kernels cover a call: numbers of at most 32 bits, at most LARGEST channels."""
    return all(t.dtype in DTYPES for t in (x, *parameters)) and 0 < x.shape[-1] <= LARGEST


def row_norm_triton(h, weight, eps):
    """`row_norm` of kernels/gate.py, for calls that fit."""
    return _Gate.apply(h, weight, None, None, eps, True, torch.float32)[0]


def gate_logit_triton(x, weight, bias):
    """`gate_logit` of kernels/gate.py without an inner network, for calls that fit."""
    return _Gate.apply(x, None, weight, bias, 0.0, False, None)[1]


def norm_gate_triton(h, norm_weight, eps, weight, bias, normed):
    """`norm_gate` of kernels/gate.py without an inner network, for calls that fit."""
    return _Gate.apply(h, norm_weight, weight, bias, eps, normed, norm_weight.dtype)


class _Gate(torch.autograd.Function):
    """(x, delta) of h; x only where there is a `norm`, delta only where there is a `weight`."""

    @staticmethod
    def forward(ctx, h, norm, weight, bias, eps, normed, dtype):
        norm, weight, bias = (None if t is None else _aligned(t) for t in (norm, weight, bias))
        flat = _aligned(h).view(-1, h.shape[-1])
        x = scales = delta = None
        if norm is not None:
            x = torch.empty(flat.shape, dtype=dtype, device=h.device)
            scales = torch.empty(len(flat), dtype=torch.float32, device=h.device)
        if weight is not None:
            delta = torch.empty(len(flat), dtype=torch.float32, device=h.device)
        launch(
            _forward,
            (len(flat),),
            *(flat, norm, weight, bias, x, scales, delta, eps),
            **_constants(h, normed, 2048),
            enable_fp_fusion=False,
        )
        ctx.save_for_backward(flat, norm, weight, bias, scales)
        ctx.shape, ctx.normed = h.shape, normed
        return None if x is None else x.view(h.shape), None if delta is None else delta.view(h.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, ddelta):
        h, norm, weight, bias, scales = ctx.saved_tensors
        (rows, D), device = h.shape, h.device
        share = max(LEAST, -(-rows // PROGRAMS))
        programs = -(-rows // share)
        dh = torch.empty_like(h)
        dx, ddelta = None if norm is None else dx.contiguous(), None if weight is None else ddelta.contiguous()
        dnorm, drow = (
            None if t is None else torch.empty((programs, D), dtype=torch.float32, device=device)
            for t in (norm, weight)
        )
        launch(
            _backward,
            (programs,),
            *(h, norm, weight, scales, dx, ddelta, dh, dnorm, drow, rows, share),
            **_constants(h, ctx.normed, 512),
        )
        dnorm = None if norm is None else dnorm.sum(0).to(norm.dtype)
        if weight is None:
            return dh.view(ctx.shape), dnorm, None, None, None, None, None
        drow, total = drow.sum(0), ddelta.sum()
        dweight, dbias = torch.stack([-drow, drow]).to(weight.dtype), torch.stack([-total, total]).to(bias.dtype)
        return dh.view(ctx.shape), dnorm, dweight, dbias, None, None, None


def _aligned(x):
    """x in one piece that starts at a multiple of 16 bytes: a kernel is compiled anew for arguments that do not."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _constants(h, normed, share):
    """`share`: channels of a warp. Forward one warp holds a row of 2048, so that its sums wait for no other warp."""
    D = h.shape[-1]
    block = max(2, 1 << (D - 1).bit_length())
    return {"D": D, "BLOCK": block, "NORMED": normed, "num_warps": min(16, max(1, block // share)), "num_stages": 1}


@jit
def _tree_sum(x):
    """Sum of (2^n,) in the order of kernels/gate.py's tree_sum."""
    for _ in tl.static_range(20):
        if x.shape[0] > 2:
            x = tl.sum(tl.reshape(x, (2, x.shape[0] // 2)), 0)
    return tl.sum(x, 0)


@jit
def _difference(weight, at, inside, D: tl.constexpr):
    drop = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    return tl.load(weight + D + at, mask=inside, other=0.0).to(tl.float32) - drop


@jit
def _forward(
    h, norm, weight, bias, x, scales, delta, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = d < D
    own = tl.load(h + row * D + d, mask=inside, other=0.0).to(tl.float32)
    read = own
    if norm is not None:
        mean = tl.div_rn(_tree_sum(own * own), D * 1.0)
        scale = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
        normal = own * scale * tl.load(norm + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + row * D + d, normal.to(x.dtype.element_ty), mask=inside)
        tl.store(scales + row, scale)
        if NORMED:
            read = normal
    if weight is not None:
        found = _tree_sum(read * _difference(weight, d, inside, D))
        offset = tl.load(bias + 1).to(tl.float32) - tl.load(bias).to(tl.float32)
        tl.store(delta + row, found + offset)


@jit
def _backward(
    h, norm, weight, scales, dx, ddelta, dh, dnorm, drow, rows, share,
    D: tl.constexpr, BLOCK: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    program, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = d < D
    of_norm, of_gate = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if norm is not None:
        factor = tl.load(norm + d, mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        gate = _difference(weight, d, inside, D)
    for row in range(program * share, tl.minimum(program * share + share, rows)):
        own = tl.load(h + row * D + d, mask=inside, other=0.0).to(tl.float32)
        if weight is not None:
            given = tl.load(ddelta + row)
        if norm is not None:
            scale = tl.load(scales + row)
            normal = own * scale
            gradient = tl.load(dx + row * D + d, mask=inside, other=0.0).to(tl.float32)
            if weight is not None and NORMED:
                gradient += given * gate
                of_gate += given * normal * factor
            of_norm += gradient * normal
            gradient *= factor
            gradient = scale * (gradient - normal * (tl.sum(gradient * normal, 0) / D))
            if weight is not None and not NORMED:
                gradient += given * gate
                of_gate += given * own
        else:
            gradient = given * gate
            of_gate += given * own
        tl.store(dh + row * D + d, gradient.to(dh.dtype.element_ty), mask=inside)
    if norm is not None:
        tl.store(dnorm + program * D + d, of_norm, mask=inside)
    if weight is not None:
        tl.store(drow + program * D + d, of_gate, mask=inside)
