"""Products of matrices, by the library of PyTorch's that is faster for them on this CPU.

In float32 PyTorch calls Intel's MKL, which on processors of other makers leaves AVX-512 unused and is slow with few
rows: there oneDNN, which PyTorch carries too, is the faster. Its products of one or two rows run in one thread, and
reach the speed of memory where the weight is given to it in pieces. On a processor without products in bfloat16 (no
AVX-512, no AMX) the weight is widened, block by block, and multiplied in float32. What each choice gains on a
processor: `python examples/benchmarks/benchmark.py --cpu --causes`.

linear: x (..., I), weight (O, I), bias (O,) -> x weight^T + bias (..., O).
"""

import math
import platform
from pathlib import Path

import torch
import torch.nn.functional as F

from scrubjay.kernels.dispatch import exported, traced, watched

# Multiplications below which MKL's lower cost per call wins: about 10 microseconds.
WORTH_IT = 2**20
LONG = 2**14  # sums over more terms (gradients through a head of many words) are taken in blocks
BLOCK = 1024  # rows of a transposed operand; 512 to 4096 were tried on gradients of weights of 3352 and 50288 rows
WIDENED = 2**20  # numbers of a bfloat16 operand that are held in float32 at a time
FEW_ROWS = 32  # up to here oneDNN is the faster with AVX2 too; from 64 on they are alike
PIECES = 16  # of a weight at most, for MKL's threads; 2 to 8 measured alike
ROWS_IN_PIECES = 2  # up to here, with short sums up to 5, MKL in pieces is faster than oneDNN
SHORT_ROWS, SHORT = 5, 1024
MANY_ROWS = 8  # from here on widening pays; at one row bfloat16 halves what is read

_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def _maker() -> str:
    """Who made this x86 processor, as it says itself ("GenuineIntel", "AuthenticAMD"); "" of any other."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ""
    found = Path("/proc/cpuinfo")
    lines = found.read_text(errors="replace").splitlines() if found.is_file() else [f": {platform.processor()}"]
    names = [line.split(":")[-1].split()[-1:] for line in lines if line.startswith(("vendor_id", ":"))]
    return names[0][0].strip(",") if names and names[0] else ""


def _without_products() -> frozenset[torch.dtype]:
    """The 16-bit dtypes in which oneDNN has no products on this processor, so that PyTorch's own loops do them."""
    ops, answers = torch.ops.mkldnn, {}
    for dtype, name in ((torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported")):
        ask = getattr(ops, name, None) if _onednn is not None else None
        answers[dtype] = ask is not None and not ask()
    return frozenset(dtype for dtype, missing in answers.items() if missing)


# Whether MKL is slower than oneDNN: with few rows, and with many, where it does not use AVX-512.
SLOW_VECTORS = _onednn is not None and torch.backends.mkl.is_available() and _maker() not in ("", "GenuineIntel")
SLOW_MATRICES = SLOW_VECTORS and torch.backends.cpu.get_cpu_capability() == "AVX512"
WITHOUT_PRODUCTS = _without_products()


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which products of `x` run: its own, or float32 on a CPU that has none in it."""
    slow = x.dtype in WITHOUT_PRODUCTS and x.device.type == "cpu" and not exported()
    return torch.float32 if slow else x.dtype


def linear(x, weight, bias=None):
    """`torch.nn.functional.linear`, differentiable as often. Error against it in float32: 1e-6 of the largest value;
    in 16 bits it is as near to the product of the same numbers in float32."""
    if not wins(x, weight):
        return F.linear(x, weight, bias)
    return multiplied(x, weight, bias)


def multiplied(x, weight, bias=None):
    """`linear` of operands for which `wins` has been asked."""
    rows = x.reshape(-1, x.shape[-1])
    y = torch.mv(weight, rows[0]) if _one_of_16_bits(x, len(rows)) else plain_product(rows, weight)
    y = shaped(y, x, weight)
    return y if bias is None else y + bias


def shaped(y, x, weight):
    """The product of x and a weight, in its shape and, like torch's own, no view, of which FSDP2 would warn."""
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], len(weight)])


def wins(x, weight) -> bool:
    """Whether `linear` does not leave these operands to PyTorch."""
    if x.ndim < 2 or traced() or x.numel() * weight.shape[0] < WORTH_IT or not plain(x, weight):
        return False
    rows = x.numel() // x.shape[-1]
    if x.dtype == torch.float32:
        return _onednn_wins(rows)
    return _one_of_16_bits(x, rows) or (x.dtype in WITHOUT_PRODUCTS and rows >= MANY_ROWS)


def _onednn_wins(rows):
    return SLOW_MATRICES or (SLOW_VECTORS and rows <= FEW_ROWS)


def _one_of_16_bits(x, rows):
    """One row of bfloat16, of which oneDNN makes a matrix, and `torch.mv` reads the weight at the speed of memory."""
    return rows == 1 and x.dtype == torch.bfloat16 and not torch.is_grad_enabled()


def matmul(a, b, out=None):
    """`torch.matmul` of few large matrices: (..., R, I) and (..., I, O) with the same leading axes -> (..., R, O)."""
    large = SLOW_MATRICES and a.shape[-2] * b.shape[-2] * b.shape[-1] >= WORTH_IT
    if not large or traced() or a.dtype != torch.float32 or not plain(a, b):
        return torch.matmul(a, b, out=out)
    pairs = zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), strict=True)
    y = [plain_product(x, w.t()) for x, w in pairs]
    if out is None:
        return (y[0] if len(y) == 1 else torch.stack(y)).view(*a.shape[:-1], -1)
    return torch.stack(y, out=out.view(-1, *out.shape[-2:])).view(out.shape)


# A subclass (a tensor of several devices, a quantized one) brings its own product.
_TENSORS = (torch.Tensor, torch.nn.Parameter)


def plain(a, b):
    """Whether both are nothing but tensors of one dtype on a CPU, which nothing watches or converts."""
    if type(a) not in _TENSORS or type(b) not in _TENSORS or not a.device.type == b.device.type == "cpu":
        return False
    if a.dtype != b.dtype or torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.enabled:
        return False
    return not watched()  # tensors of torch.func hide behind the plain type


def plain_product(a, b):
    """a b^T of (R, I) and (O, I), `plain` ones. Unlike those of torch's own product its gradients are no views, so that
    autograd may add to them in place."""
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _Product.apply(a, b)
    return _multiply(a, b)


def _multiply(a, b):
    if a.dtype == torch.float32 and _onednn_wins(len(a)) and a.numel() * len(b) >= WORTH_IT:
        pieces = _pieces(len(a), b)
        return _in_pieces(a, b, pieces) if pieces else _by_onednn(a, b)
    if a.dtype not in WITHOUT_PRODUCTS:
        return torch.mm(a, b.t())
    product, a = a.new_empty(len(a), len(b)), a.float()
    rows = max(1, WIDENED // max(1, b.shape[1]))
    for start in range(0, len(b), rows):
        product[:, start : start + rows] = _multiply(a, b[start : start + rows].float())
    return product


def _pieces(rows, b):
    """Into how many pieces of rows to cut b for MKL, which then multiplies them in as many threads; 0: not at all."""
    if not SLOW_VECTORS or rows > (SHORT_ROWS if b.shape[1] <= SHORT else ROWS_IN_PIECES) or not b.is_contiguous():
        return 0
    pieces = math.gcd(len(b), PIECES)
    return pieces if pieces >= max(2, torch.get_num_threads()) else 0


def _in_pieces(a, b, pieces):
    y = torch.bmm(b.view(pieces, -1, b.shape[1]), a.t().expand(pieces, -1, -1)).view(len(b), len(a))
    return y.t() if len(a) == 1 else y.t().contiguous()


def _by_onednn(a, b):
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
            plain_product(grad, b.t()) if ctx.needs_input_grad[0] else None,
            plain_product(grad.t(), a.t()) if ctx.needs_input_grad[1] else None,
        )
