"""Weights of 8 and 4 bits against what they are made of, and products with them against float64."""

import pytest
import torch

from scrubjay.kernels import bits as few
from scrubjay.kernels.bits import dequantize_weight, has_product, integers, multiply, pack, quantize_weight

KINDS = [(8, 32), (4, 32), (4, 64), (4, 128), (4, 256)]
NORMAL = {32: 0.084, 64: 0.0915, 128: 0.0985, 256: 0.104}  # errors of normal weights, as the docstring says


@pytest.fixture(params=[2**23, 0], ids=["held in 16 bits", "held in 8 bits"])
def small(request, monkeypatch):
    """How many numbers a matrix has that is held in 16 bits."""
    monkeypatch.setattr(few, "SMALL", request.param)
    return request.param


def weight(outputs=40, inputs=193, seed=0):
    """Rows of very different sizes; inputs that no group divides."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=draw) * torch.logspace(-6, 3, outputs)[:, None]


def product(x, w, bits, group):
    """multiply, and the float64 product with what the codes stand for."""
    held = quantize_weight(w, bits, group)
    whole = dequantize_weight(*held, w.shape[1])
    return multiply(x, pack(*held, w.shape[1])), x.double() @ whole.double().t(), whole


def test_this_processor_has_the_product():
    """All that is tested below is x86's; another processor has its own tests of `has_product` to pass."""
    assert has_product()


def test_8_bits_round_to_the_nearest_code():
    w = weight()
    codes, factors, scales = quantize_weight(w, 8)
    assert factors is None
    assert (codes.dtype, codes.shape, scales.dtype) == (torch.int8, w.shape, torch.float32)
    error = (dequantize_weight(codes, factors, scales, w.shape[1]) - w).abs()
    assert (error <= w.abs().amax(1, keepdim=True) / 254 * (1 + 1e-5)).all()
    assert torch.equal(codes.abs().amax(1), torch.full((len(w),), 127, dtype=torch.int8))


@pytest.mark.parametrize("group", NORMAL)
def test_4_bits_of_a_group_stay_below_their_bound(group):
    w = weight()
    codes, factors, scales = quantize_weight(w, 4, group)
    groups = -(-w.shape[1] // group)
    assert (codes.dtype, codes.shape) == (torch.uint8, (len(w), groups * group // 2))
    assert (factors.dtype, factors.shape) == (torch.int8, (len(w), groups))
    error = dequantize_weight(codes, factors, scales, w.shape[1]) - w
    for start in range(0, w.shape[1], group):
        part = slice(start, start + group)
        largest = w[:, part].abs().amax(1) / 8 + w.abs().amax(1) / 120
        assert (error[:, part].square().mean(1).sqrt() <= largest).all()


@pytest.mark.parametrize("group", NORMAL)
def test_4_bits_of_normal_weights_err_as_little_as_is_said(group):
    w = torch.randn(256, 768, generator=torch.Generator().manual_seed(1))
    held = quantize_weight(w, 4, group)
    assert ((dequantize_weight(*held, 768) - w).norm() / w.norm()).item() < NORMAL[group]
    assert ((dequantize_weight(*quantize_weight(w, 8), 768) - w).norm() / w.norm()).item() < 0.008


@pytest.mark.parametrize("sign", [1, -1])
def test_4_bits_hold_what_they_can_hold(sign):
    """Integers factor * code, whose largest factor is 15 and whose groups reach -8 of it, come back as they were."""
    draw = torch.Generator().manual_seed(2)
    codes = torch.randint(-7, 8, (6, 4, 32), generator=draw)
    codes[:, :, 5] = -8
    factors = torch.tensor([15, 11, -13, 9])[None, :, None]
    w = (sign * codes * factors).flatten(1).float() * 0.25
    held = quantize_weight(w, 4, 32)
    assert torch.equal(dequantize_weight(*held, 128), w)
    assert torch.equal(integers(*held[:2], 128).float() * 0.25, w)


@pytest.mark.parametrize(("bits", "group"), KINDS)
@pytest.mark.parametrize("rows", [1, 3, 1100])
@pytest.mark.usefixtures("uninitialised_memory_is_nan")
def test_a_product_equals_that_of_the_dequantized_weight(small, rows, bits, group):
    w = weight()
    x = torch.randn(rows, w.shape[1], generator=torch.Generator().manual_seed(3)) * torch.logspace(-8, 8, rows)[:, None]
    got, want, whole = product(x, w, bits, group)
    largest = x.abs().amax(1, keepdim=True).double() * whole.abs().sum(1).double()
    assert ((got - want).abs() <= largest * (1e-6 if small else 1 / 15876 + 1e-6)).all()
    part = x.abs().amax(1, keepdim=True).double() * whole.double().norm(dim=1) / 15876
    assert rows < 1000 or ((got - want) / part).square().mean() < 0.35  # a third: rounding errors are uniform


def test_a_row_has_the_same_bits_alone_and_in_any_batch(monkeypatch):
    monkeypatch.setattr(few, "SMALL", 0)
    w = weight()
    packed = pack(*quantize_weight(w, 4, 32), w.shape[1])
    x = torch.randn(2, 70, w.shape[1]) * torch.logspace(-3, 3, 70)[None, :, None]
    whole = multiply(x, packed)
    assert whole.shape == (2, 70, len(w))
    assert torch.equal(whole, torch.stack([multiply(row, packed) for row in x.unbind(1)], 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_of_16_bits_are_exact_and_outputs_rounded_once(small, dtype):
    w = weight()[10:20]
    x = torch.randn(5, w.shape[1]).to(dtype)
    packed = pack(*quantize_weight(w, 8), w.shape[1])
    got = multiply(x, packed)
    assert got.dtype == dtype
    assert torch.equal(got, multiply(x.float(), packed).to(dtype))


def test_rows_that_are_zeros_or_no_numbers(small):
    w = weight()[20:]
    packed = pack(*quantize_weight(w, 8), w.shape[1])
    x = torch.ones(4, w.shape[1])
    x[0], x[1, 3], x[2, 3] = 0, torch.nan, torch.inf
    y = multiply(x, packed)
    assert not y[0].any()
    assert not y[1:3].isfinite().any()
    assert y[3].isfinite().all()
    assert multiply(x[:0], packed).shape == (0, len(w))


@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_what_is_no_number_is_that_of_the_float32_product(small, bits, group):
    w = weight()
    w[3] = 0
    x = torch.randn(7, w.shape[1], generator=torch.Generator().manual_seed(4))
    clean = multiply(x, pack(*quantize_weight(w, bits, group), w.shape[1]))
    x[1, 5], x[2, 6], x[4, 7], x[4, 8], x[5, 9], x[5, 10] = torch.inf, -torch.inf, torch.inf, torch.inf, torch.nan, 1e38
    got, want, _ = product(x, w, bits, group)
    odd = [1, 2, 4, 5]
    assert torch.equal(got[odd].isnan(), want[odd].isnan())
    assert torch.equal(got[odd].nan_to_num(0, 1, -1), want[odd].nan_to_num(0, 1, -1).float())
    assert not got[odd].isfinite().any()
    assert torch.equal(got[[0, 3, 6]], clean[[0, 3, 6]])


def test_rows_whose_sizes_add_up_beyond_float32_are_exact(small):
    x = torch.full((200, 64), 3e38)
    x[:, 1:] = 0
    w = torch.eye(64)
    y = multiply(x, pack(*quantize_weight(w, 8), 64))[:, 0]
    assert ((y / x[:, 0] - 1).abs() <= (1.2e-7 if small else 0)).all()


def test_rows_of_weights_that_are_zeros():
    w = weight()
    w[3], w[4, 64:] = 0, 0
    for bits, group in KINDS:
        whole = dequantize_weight(*quantize_weight(w, bits, group), w.shape[1])
        assert not whole[3].any()
        assert not whole[4, 256 if group == 256 else 64 if group < 128 else 128 :].any()


@pytest.mark.parametrize(
    ("bits", "group", "said"),
    [(3, 32, "8 or 4 bits"), (True, 32, "8 or 4 bits"), (4, 48, "group_size.*got 48"), (4, None, "group_size.*None")],
)
def test_other_widths_and_groups_are_refused(bits, group, said):
    with pytest.raises(ValueError, match=said):
        quantize_weight(weight(), bits, group)


def test_a_weight_that_is_no_number_is_refused():
    w = weight()
    w[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"\(40, 193\).*not finite"):
        quantize_weight(w, 8)


def test_without_fbgemm_nothing_is_packed(monkeypatch):
    monkeypatch.setattr(few, "has_product", lambda: False)
    assert pack(*quantize_weight(weight(), 8), 193) is None


def test_another_engine_of_pytorch_is_no_product():
    """oneDNN's packed weights do not know the product with a fixed step."""
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn"
    try:
        assert not has_product.__wrapped__()
    finally:
        torch.backends.quantized.engine = engine
    assert has_product.__wrapped__()
