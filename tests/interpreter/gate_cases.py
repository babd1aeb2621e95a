"""Inputs of the gate, and comparisons of its Triton kernels: with the formula in float64, and of the bits of delta."""

import torch
from kernel_cases import BF16, F16, F32, F64, OutOfBoundError, error

from scrubjay.kernels import gate
from scrubjay.kernels.gate import gate_logit_reference

EPS = 1e-5
# Five times the worst of 8 seeds, three widths and both ways to read: 8.1e-7, of delta 2.1e-7; of low precision, whose
# stores the interpreter truncates, 7.3e-3 and 4.6e-4.
BOUND, BOUND_OF_DELTA = {F32: 4e-6, BF16: 3.6e-2, F16: 2.3e-3}, 1e-6


def draw(rows, D, stream=F32, dtype=F32):
    """h, the norm's weight, the gate's weight and bias; the gate is in float32 in every model."""

    def normal(*shape):
        return torch.randn(shape, dtype=F64)

    return (3 * normal(rows, D)).to(stream), (1 + 0.3 * normal(D)).to(dtype), *gate_of(D)


def gate_of(D):
    return (torch.randn(2, D, dtype=F64) * D**-0.5).to(F32), torch.randn(2)


def delta_of(h, norm, weight, bias):
    return gate.norm_gate(h, norm, EPS, weight, bias, backend="triton")[1]


def expect(name, got, want, bound):
    found = error(got.detach(), want.detach())
    if got.shape != want.shape or not found <= bound:
        raise OutOfBoundError(f"{name}: error {found:.2e}, bound {bound:.0e}")


def expect_bits(name, got, want):
    if not torch.equal(got, want):
        raise OutOfBoundError(f"{name}: {int((got != want).sum())} of {got.numel()} differ")


def formula(h, norm, weight, bias, normed=True):
    x = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS) * norm
    return x, gate_logit_reference(x if normed else h, weight, bias)


def check(operands, normed=True):
    """x, delta and every gradient of both, against the formula in float64."""
    bound = max(BOUND[t.dtype] for t in operands)
    leaves = [t.requires_grad_() for t in operands]
    wide = [t.detach().double().requires_grad_() for t in operands]
    h, norm, weight, bias = leaves
    got = gate.norm_gate(h, norm, EPS, weight, bias, normed=normed, backend="triton")
    want = formula(*wide, normed=normed)
    assert (got[0].dtype, got[1].dtype) == (norm.dtype, F32)
    expect("x", got[0], want[0], bound)
    expect("delta", got[1], want[1], BOUND_OF_DELTA)
    given = [torch.randn_like(y).to(g.dtype) for y, g in zip(want, got, strict=True)]
    grads = torch.autograd.grad(got, leaves, given)
    expected = torch.autograd.grad(want, wide, [g.double() for g in given])
    for name, grad, e in zip(("h", "norm", "weight", "bias"), grads, expected, strict=True):
        expect(f"d {name}", grad, e, bound)


def check_alone(D=100):
    """A token among 37, at any place, in the bits that it has alone."""
    h, *rest = draw(37, D)
    want = delta_of(h, *rest)
    expect_bits("alone", torch.cat([delta_of(row[None], *rest) for row in h]), want)
    expect_bits("backwards", delta_of(h.flip(0), *rest).flip(0), want)


def check_low_precision(D=48):
    h, norm, weight, bias = draw(33, D, BF16, BF16)
    expect_bits("delta", delta_of(h, norm, weight, bias), delta_of(h.float(), norm.float(), weight, bias))


def check_parts(D=100):
    """Both at once are what `row_norm` and `gate_logit` give, one after the other."""
    h, norm, weight, bias = draw(33, D)
    x, delta = gate.norm_gate(h, norm, EPS, weight, bias, backend="triton")
    alone = gate.row_norm(h, norm, EPS, backend="triton")
    expect_bits("x", x, alone)
    expect_bits("delta", delta, gate.gate_logit(alone, weight, bias, backend="triton"))
    raw = gate.norm_gate(h, norm, EPS, weight, bias, normed=False, backend="triton")[1]
    expect_bits("delta of the stream", raw, gate.gate_logit(h, weight, bias, backend="triton"))
