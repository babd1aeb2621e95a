"""Products by every library equal torch's own, gradients of gradients included; what does not fit is left to torch."""

import platform

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import error
from torch.autograd import forward_ad

from scrubjay.kernels import linear as module
from scrubjay.kernels.linear import linear, matmul, product_dtype

BOUND = 2e-6


@pytest.fixture
def as_on(monkeypatch):
    """Choose as on a processor where MKL is slow with vectors, or with matrices too, and that has no such products."""

    def choose(slow_vectors=False, slow_matrices=False, without=()):
        monkeypatch.setattr(module, "SLOW_VECTORS", slow_vectors)
        monkeypatch.setattr(module, "SLOW_MATRICES", slow_matrices)
        monkeypatch.setattr(module, "WITHOUT_PRODUCTS", frozenset(without))

    return choose


@pytest.fixture(params=["every product", "large products"])
def taken(request, monkeypatch, as_on):
    """The calls that oneDNN got, over both sides of the threshold."""
    if module._onednn is None:
        pytest.skip("torch was built without oneDNN")
    if request.param == "every product":
        monkeypatch.setattr(module, "WORTH_IT", 0)
    as_on(slow_vectors=True, slow_matrices=True)
    calls, multiply = [], module._by_onednn
    monkeypatch.setattr(module, "_by_onednn", lambda a, b: calls.append((a, b)) or multiply(a, b))
    monkeypatch.setattr(module, "_pieces", lambda rows, b: 0)
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
    if module.wins(*inputs[:2]):
        assert not linear(*inputs[:2])._is_view()


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
            module._by_onednn(torch.randn(128, 96), weight)
    finally:
        module._onednn = original
    assert all(b.is_contiguous() or b.t().is_contiguous() for b in handed)
    blocked = sum(not b.is_contiguous() for b in handed)
    assert len(handed) == 6 + blocked * (long < 96) // 2  # two blocks each
    assert blocked


@pytest.mark.parametrize("maker", ["GenuineIntel", "AuthenticAMD", "HygonGenuine", ""])
def test_the_maker_is_what_the_processor_says(maker, monkeypatch, tmp_path):
    """On Windows the name is a word of `platform.processor()`, elsewhere a line of a file; not x86: none."""
    found = tmp_path / "cpuinfo"
    monkeypatch.setattr(module, "Path", lambda _: found)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64" if maker else "aarch64")
    monkeypatch.setattr(platform, "processor", lambda: f"Intel64 Family 6 Model 143 Stepping 8, {maker}")
    assert module._maker() == maker
    found.write_text(f"processor\t: 0\nvendor_id\t: {maker}\nmodel name\t: Some: Xeon\n\nprocessor\t: 1\n")
    assert module._maker() == maker
    found.write_text("processor\t: 0\n")
    assert module._maker() == ""


@pytest.mark.parametrize("rows", [1, module.FEW_ROWS, module.FEW_ROWS + 1])
def test_with_avx2_alone_only_few_rows_leave_mkl(rows, as_on, monkeypatch):
    monkeypatch.setattr(module, "WORTH_IT", 0)
    calls = []
    monkeypatch.setattr(module, "_by_onednn", lambda a, b: calls.append(len(a)) or a @ b.t())
    as_on(slow_vectors=True)
    x, weight = torch.randn(rows, 8), torch.randn(7, 8)
    assert error(linear(x, weight), F.linear(x.double(), weight.double())) <= BOUND
    assert calls == [rows] * (rows <= module.FEW_ROWS)
    as_on()
    assert not module.wins(x, weight)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("terms", [module.SHORT, module.SHORT + 1])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6])
def test_few_rows_are_multiplied_in_pieces_of_the_weight(rows, terms, threads, as_on, monkeypatch):
    """As many for each thread, where that many divide it, and where MKL is slow with few rows alone."""
    as_on(slow_vectors=True)
    monkeypatch.setattr(module, "WORTH_IT", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    few = rows <= (module.SHORT_ROWS if terms == module.SHORT else module.ROWS_IN_PIECES)
    for outputs, pieces in ((96, 16), (1024, 16), (1026, 2), (1025, 0)):
        x, weight = torch.randn(rows, terms), torch.randn(outputs, terms)
        cut = module._pieces(rows, weight)
        assert cut == (pieces if few and pieces >= threads else 0)
        assert module._pieces(rows, torch.randn(terms, outputs).t()) == 0
        y = module._in_pieces(x, weight, cut or 1)
        assert y.is_contiguous()
        assert error(y, F.linear(x.double(), weight.double())) <= BOUND
        assert torch.equal(module._multiply(x, weight), y) or not cut
    as_on()
    assert module._pieces(rows, weight) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 7, 8, 70])
@pytest.mark.parametrize("slow", [False, True])
def test_a_processor_without_16_bit_products_multiplies_in_float32(dtype, rows, slow, as_on, monkeypatch):
    """The result is the rounded product of the same numbers, gradients included; blocks of the weight make no seam."""
    monkeypatch.setattr(module, "WORTH_IT", 0)
    monkeypatch.setattr(module, "WIDENED", 100)
    as_on(slow, slow, [dtype])
    inputs = [x.detach().to(dtype).requires_grad_() for x in drawn((rows, 24), (50, 24))]
    assert module.wins(*inputs) == (rows >= module.MANY_ROWS)
    if rows < module.MANY_ROWS:
        return
    wide = [x.detach().float().requires_grad_() for x in inputs]
    for got, want in zip(gradients(linear, inputs)[:3], gradients(F.linear, wide)[:3], strict=True):
        assert got.dtype == dtype
        assert error(got, want) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("without", [(), (torch.bfloat16,)])
def test_one_row_of_bfloat16_is_a_vector(without, as_on, monkeypatch):
    monkeypatch.setattr(module, "WORTH_IT", 0)
    as_on(without=without)
    x, weight, bias = (t.bfloat16() for t in (torch.randn(1, 1, 24), torch.randn(50, 24), torch.randn(50)))
    calls, mv = [], torch.mv
    monkeypatch.setattr(torch, "mv", lambda *args: calls.append(1) or mv(*args))
    with torch.no_grad():
        got = linear(x, weight, bias)
    assert calls
    assert got.shape == (1, 1, 50)
    assert error(got, F.linear(x.double(), weight.double(), bias.double())) <= 2 * torch.finfo(torch.bfloat16).eps
    assert torch.equal(linear(x, weight), F.linear(x, weight))  # with gradients: left to torch
    assert len(calls) == 1


def test_the_dtype_of_products(as_on):
    x = torch.zeros(1)
    as_on(without=[torch.bfloat16])
    assert [product_dtype(x.to(d)) for d in (torch.float32, torch.bfloat16, torch.float16)] == [
        torch.float32,
        torch.float32,
        torch.float16,
    ]
    assert product_dtype(torch.zeros(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16


def test_other_dtypes_and_modes_are_left_to_torch(monkeypatch, as_on):
    monkeypatch.setattr(module, "WORTH_IT", 0)
    as_on(slow_vectors=True, slow_matrices=True)
    monkeypatch.setattr(module, "_multiply", lambda a, b: pytest.fail("not left to torch"))
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


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tangents_and_traces_are_pytorchs(as_on, monkeypatch):
    """Of both oneDNN's operator knows nothing: the tangent would be lost, in silence."""
    monkeypatch.setattr(module, "WORTH_IT", 0)
    as_on(slow_vectors=True, slow_matrices=True)
    x, weight, tangent = torch.randn(4, 8), torch.randn(6, 8), torch.randn(4, 8)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, tangent), weight)).tangent
    assert error(got, tangent @ weight.t()) <= BOUND
    program = torch.jit.trace(lambda x: linear(x, weight), x)
    assert error(program(x), x @ weight.t()) <= BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_no_rows_have_a_product_and_a_gradient(dtype, as_on, monkeypatch):
    monkeypatch.setattr(module, "WORTH_IT", 1)
    as_on(True, True, [torch.bfloat16])
    weight = torch.ones(6, 4, dtype=dtype, requires_grad=True)
    y = module.multiplied(torch.ones(2, 0, 4, dtype=dtype), weight)
    assert y.shape == (2, 0, 6)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
