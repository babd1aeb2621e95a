"""Products of large matrices, by the library that is faster for them on a CPU.

In float32 PyTorch calls Intel's MKL, which takes its slow path on processors of other makers: on an AMD EPYC with
AVX-512 oneDNN, which PyTorch carries too and uses in bfloat16, was 2.2 times faster on matrices and on vectors.

linear: x (..., I), weight (O, I), bias (O,) -> x weight^T + bias (..., O).
"""

import torch
import torch.nn.functional as F

from scrubjay.kernels.dispatch import traced

# Multiplications below which MKL's lower cost per call wins: about 10 microseconds.
WORTH_IT = 2**20
LONG = 2**14  # sums over more terms (gradients through a head of many words) are taken in blocks: 104 ms, not 125
BLOCK = 1024  # rows of a transposed operand; 512 to 4096 were tried on gradients of weights of 3352 and 50288 rows
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(x, weight, bias=None):
    """`torch.nn.functional.linear`, differentiable as often. Error against it in float32: 1e-6 of the largest value."""
    if not wins(x, weight):
        return F.linear(x, weight, bias)
    y = _product(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def wins(x, weight) -> bool:
    """Whether `linear` does not leave these operands to PyTorch."""
    return x.ndim >= 2 and _wins(x, weight, x.numel() * weight.shape[0])


def matmul(a, b):
    """`torch.matmul` of few large matrices: (..., R, I) and (..., I, O) with the same leading axes -> (..., R, O)."""
    if not _wins(a, b, a.shape[-2] * b.shape[-2] * b.shape[-1]):
        return torch.matmul(a, b)
    pairs = zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), strict=True)
    y = [_product(x, w.t()) for x, w in pairs]
    return (y[0] if len(y) == 1 else torch.stack(y)).view(*a.shape[:-1], -1)


# A subclass (a tensor of several devices, a quantized one) brings its own product.
_TENSORS = (torch.Tensor, torch.nn.Parameter)


def _wins(a, b, multiplications):
    if _onednn is None or traced():
        return False
    if multiplications < WORTH_IT or not a.dtype == b.dtype == torch.float32:
        return False
    if type(a) not in _TENSORS or type(b) not in _TENSORS or not a.device.type == b.device.type == "cpu":
        return False
    if torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.enabled:
        return False
    return not torch._C._are_functorch_transforms_active()  # torch.func: its tensors hide behind the plain type


def _product(a, b):
    """a b^T of (R, I) and (O, I)."""
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _Product.apply(a, b)
    return _multiply(a, b)


def _multiply(a, b):
    if not (b.is_contiguous() or b.t().is_contiguous()):
        b = b.contiguous()  # oneDNN's reference code, a thousand times slower, would take any other layout
    if a.shape[1] > LONG and not b.is_contiguous():  # it would lay out all of b anew first
        product = _onednn(a[:, :BLOCK], b[:, :BLOCK], None, "none", [], "")
        for start in range(BLOCK, a.shape[1], BLOCK):
            inner = slice(start, start + BLOCK)
            product += _onednn(a[:, inner], b[:, inner], None, "none", [], "")
        return product
    if len(a) <= BLOCK or a.is_contiguous():
        return _onednn(a, b, None, "none", [], "")
    # A transposed operand is copied: a block at a time, the copy stays in cache and need not be as large as a.
    product = a.new_empty(len(a), len(b))
    for start in range(0, len(a), BLOCK):
        product[start : start + BLOCK] = _onednn(a[start : start + BLOCK], b, None, "none", [], "")
    return product


class _Product(torch.autograd.Function):
    """Its gradients are products of the same kind, so that they can be differentiated again."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return _multiply(a, b)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return (
            _product(grad, b.t()) if ctx.needs_input_grad[0] else None,
            _product(grad.t(), a.t()) if ctx.needs_input_grad[1] else None,
        )
