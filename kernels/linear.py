"""The product of a linear layer, y = x W^T + b, by the library that is faster for it on a CPU.

In float32 PyTorch calls Intel's MKL, which takes its slow path on processors of other makers: on an AMD EPYC with
AVX-512 oneDNN, which PyTorch carries too and uses in bfloat16, was 2.2 times faster on matrices and on vectors.

x: (..., I)   W: (O, I)   b: (O,)   y: (..., O)
"""

import torch
import torch.nn.functional as F

# Multiplications below which MKL's lower cost per call wins: about 10 microseconds.
WORTH_IT = 2**20
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(x, weight, bias=None):
    """`torch.nn.functional.linear`, differentiable as often. Error against it in float32: 1e-6 of the largest value."""
    if not _wins(x, weight):
        return F.linear(x, weight, bias)
    y = _product(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def _wins(x, weight):
    plain = type(x) in _TENSORS and type(weight) in _TENSORS and x.dtype == weight.dtype == torch.float32
    if _onednn is None or not plain or x.device.type != "cpu" or weight.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or not torch.backends.mkldnn.enabled:
        return False
    if torch._C._are_functorch_transforms_active():  # torch.func: their tensors hide behind the plain type
        return False
    return x.numel() * weight.shape[0] >= WORTH_IT


# A subclass (a tensor of several devices, a quantized one) brings its own product.
_TENSORS = (torch.Tensor, torch.nn.Parameter)


def _product(a, b):
    """a b^T of (R, I) and (O, I)."""
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _Product.apply(a, b)
    return _onednn(a, b, None, "none", [], "")


class _Product(torch.autograd.Function):
    """Its gradients are products of the same kind, so that they can be differentiated again."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return _onednn(a, b, None, "none", [], "")

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return (
            _product(grad, b.t()) if ctx.needs_input_grad[0] else None,
            _product(grad.t(), a.t()) if ctx.needs_input_grad[1] else None,
        )
