"""Products by oneDNN equal torch's own, gradients of gradients included; what does not fit is left to torch."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import error

from scrubjay.kernels import linear as module
from scrubjay.kernels.linear import linear, matmul

BOUND = 2e-6


@pytest.fixture(params=["every product", "large products"])
def taken(request, monkeypatch):
    """The calls that oneDNN got, over both sides of the threshold."""
    if module._onednn is None:
        pytest.skip("torch was built without oneDNN")
    if request.param == "every product":
        monkeypatch.setattr(module, "WORTH_IT", 0)
    calls, multiply = [], module._multiply
    monkeypatch.setattr(module, "_multiply", lambda a, b: calls.append((a, b)) or multiply(a, b))
    yield calls
    assert request.param == "large products" or calls, "no product went to oneDNN"


def drawn(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def gradients(function, inputs):
    """Outputs, gradients, and gradients of a function of the gradients."""
    y = function(*inputs)
    cotangent = torch.rand(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
    first = torch.autograd.grad(y, inputs, cotangent, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first if g.requires_grad), inputs, allow_unused=True)
    return y, *first, *(g for g in second if g is not None)


def assert_same(fast, law, inputs):
    wide = [x.detach().double().requires_grad_() for x in inputs]
    for got, want in zip(gradients(fast, inputs), gradients(law, wide), strict=True):
        assert got.shape == want.shape
        assert error(got, want) <= BOUND


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 5, 8), (1, 1, 8), (2, 300, 64)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_equals_torch(taken, shape, bias):
    inputs = drawn(shape, (96, shape[-1]), (96,))[: 2 + bias]
    if len(shape) == 1:
        taken.append("left to torch")
    assert_same(linear, F.linear, inputs)


@pytest.mark.parametrize("batch", [(), (1, 1), (2, 3)], ids=str)
def test_matmul_equals_torch(taken, batch):
    assert_same(matmul, torch.matmul, drawn((*batch, 64, 128), (*batch, 128, 192)))


def layouts(rows, columns):
    yield torch.randn(rows, columns)
    yield torch.randn(columns, rows).t()
    yield torch.randn(rows, 2 * columns)[:, :columns]
    yield torch.randn(columns, rows + 8)[:, :rows].t()
    yield torch.randn(rows, 2 * columns)[:, ::2]
    yield torch.randn(1, columns).expand(rows, columns)


@pytest.mark.parametrize("long", [2**14, 90])
def test_every_layout_of_memory(taken, monkeypatch, long):
    """oneDNN's fallback for a weight with gaps is a thousand times slower: it must be given none."""
    monkeypatch.setattr(module, "BLOCK", 50)
    monkeypatch.setattr(module, "LONG", long)  # above and below the 96 terms of a sum
    for x in layouts(128, 96):
        for weight in layouts(160, 96):
            assert error(linear(x, weight), F.linear(x.double(), weight.double())) <= BOUND
    handed = []
    original, module._onednn = module._onednn, lambda a, b, *rest: handed.append(b) or a @ b.t()
    try:
        for weight in layouts(160, 96):
            module._multiply(torch.randn(128, 96), weight)
    finally:
        module._onednn = original
    assert all(b.is_contiguous() or b.t().is_contiguous() for b in handed)
    blocked = sum(not b.is_contiguous() for b in handed)
    assert len(handed) == 6 + blocked * (long < 96) // 2  # two blocks each
    assert blocked


def test_other_dtypes_and_modes_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(module, "WORTH_IT", 0)
    monkeypatch.setattr(module, "_multiply", lambda a, b: pytest.fail("given to oneDNN"))
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(linear(x.to(dtype), weight.to(dtype)), F.linear(x.to(dtype), weight.to(dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    torch.func.grad(lambda w: linear(x, w).sum())(weight)
    torch.func.vmap(lambda row: linear(row[None], weight))(x)
    assert linear(x.to("meta"), weight.to("meta")).shape == (4, 6)
    with pytest.raises(RuntimeError):
        linear(x, weight.bfloat16())
