"""Weights of 8 and 4 bits, and products with them on a CPU.

    w[o, i] = scale[o] * integer[o, i]
    8 bits:  integer = code                                          code in -127..127
    4 bits:  integer = factor[o, i // group] * code                  code in -8..7, factor in -15..15

So 4 bits are integers of 8 bits as well (8 * 15 = 120), and both widths run in the same products, which are those of
FBGEMM that PyTorch carries. A matrix of up to SMALL numbers is held as float16, in which the integers are exact, and
multiplied with x in float32: one call. A larger one is held as integers, one byte a weight, which halves what a row
reads and what the model takes. The other operand has 7 bits there (more would overflow sums of 16 bits on AVX2), so
each row of x goes in as two, and reading the weights is shared:

    x = step * (high + low / 126)       step = max|x| / 63, high and low in -63..63

PyTorch's other packed products (`_weight_int8pack_mm`, `_weight_int4pack_mm_for_cpu`, which torchao calls too) are made
for inputs in bfloat16.

O outputs, I inputs, G = ceil(I / group) groups of a row, M rows of x.
8 bits: codes int8 (O, I), factors none. 4 bits: codes uint8 (O, G * group / 2), the code + 8 of an even place in the
lower half of a byte; factors int8 (O, G). scales float32 (O,).
"""

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BITS = (8, 4)
GROUPS = (32, 64, 128, 256)
SMALL = 2**23  # numbers of a matrix for which fewer calls are worth more than fewer bytes
UNIT = 2**7  # more than any integer
STEPS = 63  # of a row's largest value in `high`, which FBGEMM takes as unsigned numbers of 7 bits around 63
PARTS = 2 * STEPS  # of one of them in `low`
SMALLEST = 1e-30  # a row below is taken for zeros: its steps would have no reciprocal
ROWS = 1024  # of x at a time, which bounds what is kept beside it
AT_A_TIME = 2**18  # weights that are quantized together: what is computed of them stays in a processor's cache
FACTOR, CODE = 15, 8  # largest magnitudes
TRIED = 3  # factors of a group: the one that reaches its largest value, and those that clip it


def check_bits(bits, group_size) -> None:
    """Refuse widths and groups that there are none of.

    Raises:
        ValueError: what came, and what there is.
    """
    if bits not in BITS or isinstance(bits, bool):
        raise ValueError(f"Weights have 8 or 4 bits here; got bits = {bits!r}.")
    if bits == 4 and group_size not in GROUPS:
        raise ValueError(
            f"group_size, the inputs that share a factor in 4 bits, is one of {GROUPS}; got {group_size!r}."
        )


def quantize_weight(weight: Tensor, bits: int, group_size: int = 32) -> tuple[Tensor, Tensor | None, Tensor]:
    """codes, factors and scales of a weight (O, I).

    Error of a weight in 8 bits: half a scale, max|row| / 254. Root mean square of a group's errors in 4 bits: at most
    max|group| / 8 + max|row| / 120, where a value sits at every edge; of normal weights 8.4 % of the weights' own in
    groups of 32, 9.1 % in 64, 9.8 % in 128.

    Raises:
        ValueError: numbers that are not finite, or see `check_bits`.
    """
    check_bits(bits, group_size)
    w = weight.detach().float()
    if not bool(w.isfinite().all()):
        raise ValueError(
            f"A weight of shape {tuple(w.shape)} holds numbers that are not finite: no few bits hold those."
        )
    top = 127 if bits == 8 else FACTOR * CODE
    scales = w.abs().amax(1) / top
    scales = torch.where(scales > 0, scales, 1.0)
    if bits == 8:
        return (w / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8), None, scales
    rows = max(1, AT_A_TIME // w.shape[1])
    parts = [_in_groups(w[i : i + rows] / scales[i : i + rows, None], group_size) for i in range(0, len(w), rows)]
    codes, factors = (torch.cat(held) for held in zip(*parts, strict=True))
    return codes, factors, scales


def _in_groups(x, group_size):
    """Packed codes and factors of x (O, I), in scales."""
    x = F.pad(x, (0, -x.shape[1] % group_size)).unflatten(1, (-1, group_size))  # (O, G, group)
    low, high = x.aminmax(dim=2, keepdim=True)
    sign = torch.where(high > -low, -1.0, 1.0)  # the code of the largest value is -8, of which there is no +8
    reaching = (torch.maximum(high, -low) / CODE).ceil().clamp(1, FACTOR)
    best = error = None
    for less in range(TRIED):
        factor = sign * (reaching - less).clamp(min=1)
        codes = (x / factor).round_().clamp_(-CODE, CODE - 1)
        wrong = (codes * factor - x).square_().sum(2, keepdim=True)
        if best is None:
            best, error = (codes, factor), wrong
        else:
            better = wrong < error
            best = tuple(torch.where(better, new, old) for new, old in zip((codes, factor), best, strict=True))
            error = torch.minimum(error, wrong)
    codes, factor = best
    halves = (codes.flatten(1) + CODE).to(torch.uint8)
    return halves[:, ::2] | halves[:, 1::2] << 4, factor[..., 0].to(torch.int8)


def integers(codes: Tensor, factors: Tensor | None, inputs: int) -> Tensor:
    """int8 (..., I), of which scale times is the weight."""
    if factors is None:
        return codes
    halves = torch.stack([codes & 15, codes >> 4], -1).to(torch.int8) - CODE
    whole = halves.view(*factors.shape, -1) * factors[..., None]
    return whole.flatten(-2)[..., :inputs]


def dequantize_weight(codes: Tensor, factors: Tensor | None, scales: Tensor, inputs: int) -> Tensor:
    """The float32 weight (..., I) that codes stand for. A product of x with it is the law that `multiply` keeps."""
    return integers(codes, factors, inputs).float() * scales[..., None]


@dataclass(frozen=True)
class Packed:
    """A weight as FBGEMM lays it out: numbers of float16 beside scales (O,), or of 8 bits, which hold theirs."""

    matrix: Any
    scales: Tensor | None = None


def pack(codes: Tensor, factors: Tensor | None, scales: Tensor, inputs: int) -> Packed | None:
    """What `multiply` takes, two bytes a weight or one; None where FBGEMM cannot run."""
    if codes.device.type != "cpu" or not has_product():
        return None
    whole = integers(codes, factors, inputs).contiguous()
    if whole.numel() <= SMALL:
        return Packed(_packed_float16(whole), scales * UNIT)
    return Packed(_packed(whole, scales))


def multiply(x: Tensor, packed: Packed) -> Tensor:
    """x (..., I) times a packed weight, (..., O) in x's dtype. No gradients.

    Error of each output against the float32 product with the dequantized weight: rounding of float32, up to 1e-6 of
    max|row of x| * sum|row of w|, and where the matrix is held in 8 bits 1 / 15876 of that, half a part of `low`; there
    a row's result depends on no other row. A row that holds inf or NaN gives inf and NaN where that product does.
    """
    if packed.scales is not None:
        y = _fbgemm_float16(x.float(), packed.matrix) if x.numel() else x.new_zeros(*x.shape[:-1], len(packed.scales))
        return y.mul_(packed.scales).to(x.dtype)
    rows, matrix = x.reshape(-1, x.shape[-1]).float(), packed.matrix
    if len(rows) == 1:
        return _multiply_row(rows, matrix).view(*x.shape[:-1], -1).to(x.dtype)
    parts = [_multiply(part, matrix) for part in rows.split(ROWS)] if len(rows) > ROWS else [_multiply(rows, matrix)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)


def _multiply_row(x, packed):
    """`_multiply` of one row, whose step is a number: calls cost what products do."""
    step = max(float(torch.linalg.vector_norm(x, torch.inf)), SMALLEST) / STEPS
    in_steps = x / step
    high = torch.round(in_steps)
    y, low = _fbgemm(torch.cat([high, in_steps.sub_(high).mul_(PARTS)]), packed).unbind()
    return torch.add(y, low, alpha=1 / PARTS).mul_(step)


def _multiply(x, packed):
    step = torch.linalg.vector_norm(x, torch.inf, -1, True).clamp_(min=SMALLEST).div_(STEPS)
    halves = x.new_empty(2, *x.shape)
    in_steps = x / step
    torch.round(in_steps, out=halves[0])
    torch.sub(in_steps, halves[0], out=halves[1]).mul_(PARTS)
    y = _fbgemm(halves.view(2 * len(x), x.shape[1]), packed)
    y = torch.add(y[: len(x)], y[len(x) :], alpha=1 / PARTS).mul_(step)
    if not math.isfinite(float(step.sum())):  # or the sum alone overflows
        for row in (~step[:, 0].isfinite()).nonzero()[:, 0].tolist():
            y[row] = _not_finite(x[row], packed)
    return y


def _not_finite(x, packed):
    """The product of a row (I,) that holds inf or NaN, (O,): NaN of any NaN; else the sum of each inf times its weight,
    beside which all finite numbers are nothing."""
    places = x.isinf().nonzero()[:, 0]
    alone = x.new_zeros(len(places), len(x))
    alone[torch.arange(len(places)), places] = 1.0
    return (_fbgemm(alone, packed) * x[places, None]).sum(0) + x[x.isnan()].sum()


def _packed_float16(whole):
    """Below 1, so that a sum overflows no earlier than the one it stands for."""
    return torch.ops.quantized.linear_prepack_fp16(whole / UNIT, None)


def _fbgemm_float16(x, matrix):
    return torch.ops.quantized.linear_dynamic_fp16.default(x, matrix)


def _packed(whole, scales):
    zeros = torch.zeros(len(scales), dtype=torch.long)
    with warnings.catch_warnings():  # that tensors of quantized types will go: `has_product` will say no then
        warnings.simplefilter("ignore")
        weight = torch._make_per_channel_quantized_tensor(whole, scales.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(weight, None)


def _fbgemm(x, matrix):
    """x of integers in -63..63: rounded, they are unsigned with 63 as their zero."""
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default(x, 1.0, STEPS, matrix)


@functools.cache
def has_product() -> bool:
    """Whether this PyTorch has FBGEMM's products on this processor, and they are exact: it is asked for one of each."""
    names = (
        "linear_prepack",
        "linear_with_input_q_dq_qweight_dq_output_fp32",
        "linear_prepack_fp16",
        "linear_dynamic_fp16",
    )
    if not all(hasattr(torch.ops.quantized, name) for name in names):
        return False
    if not hasattr(torch, "_make_per_channel_quantized_tensor"):
        return False
    w = (torch.arange(24 * 64).view(24, 64) * 37 % 255 - 127).to(torch.int8)
    x = (torch.arange(3 * 64).view(3, 64) * 29 % 127 - STEPS).float()
    w[0], x[0] = 127, STEPS  # sums that overflow where a processor's instructions saturate
    try:
        products = _fbgemm(x, _packed(w, torch.ones(24))), _fbgemm_float16(x, _packed_float16(w)) * UNIT
    except RuntimeError:  # an engine for other processors (`torch.backends.quantized.engine`) does not know them
        return False
    return all(torch.equal(y, x @ w.float().t()) for y in products)
