"""kernels/recycle.py on a CPU without products in 16 bits, where they are taken in float32, block by block."""

import pytest
import torch
from recycled_cases import assert_close, padded
from test_recycled_kernels import BF16, F16, F32, LOGP, OUTPUT, RATIOS, draw, law, mass_law

from scrubjay.kernels import linear, recycle
from scrubjay.kernels.recycle import decode, decode_with_scores, received, scores_of

NARROW = [F16, BF16]
ROUNDED = {F16: 2.0**-11, BF16: 2.0**-8}  # of an output, which is all that is rounded


@pytest.fixture(params=[10 * 8, 2**20], ids=["blocks of 10", "one block"])
def without(request, monkeypatch):
    """Such a processor, and so many numbers (heads of 8) held in float32 at a time."""
    monkeypatch.setattr(linear, "WITHOUT_PRODUCTS", frozenset(NARROW))
    monkeypatch.setattr(recycle, "WIDENED", request.param)


def narrow(dtype, *args, **kwargs):
    return [x.to(dtype) for x in draw(*args, **kwargs)]


@pytest.mark.usefixtures("without", "uninitialised_memory_is_nan")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("counts", [None, (33, 5)], ids=["whole", "padded"])
@pytest.mark.parametrize(("H", "G"), RATIOS)
def test_recycled_products_are_as_exact_as_float32(H, G, counts, dtype):
    q, k, v = narrow(dtype, H, G)
    real = None if counts is None else padded(counts, 33)
    want, logp = law(q.double(), k.double(), v.double(), 0.3, real)
    seen = logp > -torch.inf
    out, got = decode_with_scores(q, k, v, 0.3, real)
    assert out.dtype == decode(q, k, v, 0.3, real).dtype == dtype
    for found in (got, scores_of(q, k, 0.3, real)):
        assert found.dtype == F32
        assert found[~seen].eq(-torch.inf).all()
        assert_close(found, logp, seen, LOGP[dtype if H == G else F32])  # one row is summed in its own dtype
    assert_close(out, want, bound=OUTPUT[dtype] if H == G else ROUNDED[dtype])
    assert_close(decode(q, k, v, 0.3, real), want, bound=OUTPUT[dtype])


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(("H", "G"), RATIOS)
def test_recycled_mass_is_as_exact_as_float32(H, G, dtype):
    q, k = narrow(dtype, H, G, n=14, T=11)[:2]
    seen = torch.ones(11, 14, dtype=torch.bool).tril(3).expand(2, G, -1, -1)
    want = mass_law(q.double(), k.double(), 0.3, seen)
    assert_close(received(q, k, 0.3, seen), want, bound=OUTPUT[F32])


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(("H", "G"), RATIOS)
def test_recycled_decode_of_a_row_without_tokens_is_zero(H, G, dtype):
    q, k, v = narrow(dtype, H, G)
    real = padded((33, 0), 33)
    out = decode(q, k, v, 0.3, real)
    assert out[1].eq(0).all()
    assert torch.equal(out[0], decode(q, k, v, 0.3)[0])


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(("H", "G"), RATIOS)
def test_recycled_products_keep_their_gradients(H, G, dtype, monkeypatch):
    inputs = [x.requires_grad_() for x in narrow(dtype, H, G)]
    found = []
    for missing in (frozenset(NARROW), frozenset()):
        monkeypatch.setattr(linear, "WITHOUT_PRODUCTS", missing)
        outputs = [decode(*inputs, 0.3), *decode_with_scores(*inputs, 0.3)]
        found.append([*outputs, *torch.autograd.grad([x.float().sum() for x in outputs], inputs)])
    assert all(torch.equal(got, want) for got, want in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_recycled_products_are_widened_where_the_processor_has_none_alone(dtype, monkeypatch):
    inputs, widened, calls = narrow(dtype, 8, 2), recycle._widened, []
    monkeypatch.setattr(recycle, "_widened", lambda *args: calls.append(args) or widened(*args))
    for missing, count in ((frozenset(NARROW), 2), (frozenset(NARROW) - {dtype}, 0)):
        monkeypatch.setattr(linear, "WITHOUT_PRODUCTS", missing)
        decode_with_scores(*inputs, 0.3)
        assert len(calls) == count
        calls.clear()
