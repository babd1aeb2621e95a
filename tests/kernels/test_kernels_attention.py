"""Causal attention: whole sequences and documents, keys that are kept, their memory, what is refused."""

import pytest
import torch
from kernel_cases import BF16, F16, F32, F64, error
from torch.utils._python_dispatch import TorchDispatchMode

from scrubjay.kernels import causal_attention as module
from scrubjay.kernels.causal_attention import cached_attention, causal_attention, causal_attention_reference

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")
BOUNDS = {F64: 1e-12, F32: 4e-6, F16: 6e-3, BF16: 5e-2}  # five times what was measured: 6.2e-7, 1.1e-3, 9.1e-3
SHARED = pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (4, 1), (6, 3)])
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def draw(T, heads=4, shared=2, dtype=F64, batch=2, size=7, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(batch, T, h, size, dtype=F64).to(dtype) for h in (heads, shared, shared)]


def law(q, k, v, scale=None):
    """The reference on whole sequences, in float64."""
    before = torch.zeros(len(q), dtype=torch.int64)
    return causal_attention_reference(
        q.double(), k.double().transpose(1, 2), v.double().transpose(1, 2), before, scale=scale
    )


def test_the_reference_equals_its_formula_on_three_tokens():
    q, k, v = draw(3, 2, 1, batch=1, size=2)
    got = law(q, k, v, 0.7)
    for h in range(2):
        for t in range(3):
            weights = torch.stack([(0.7 * q[0, t, h] @ k[0, s, 0]).exp() for s in range(t + 1)])
            want = sum(w * v[0, s, 0] for s, w in enumerate(weights / weights.sum()))
            assert torch.allclose(got[0, t, h], want, atol=1e-14)


@DTYPES
@SHARED
def test_whole_sequences_equal_the_reference(heads, shared, dtype):
    for T in (1, 2, 65, 300):
        for scale in (None, 0.3):
            leaves = [x.requires_grad_() for x in draw(T, heads, shared, dtype)]
            got, want = causal_attention(*leaves, scale=scale), law(*leaves, scale=scale)
            assert got.dtype == dtype
            assert error(got, want) <= BOUNDS[dtype]
            given = torch.randn(want.shape, dtype=F64)
            pairs = [torch.autograd.grad((y * given).sum(), leaves, retain_graph=True) for y in (got, want)]
            assert all(error(a, b) <= BOUNDS[dtype] for a, b in zip(*pairs, strict=True))


def test_packed_documents_do_not_see_each_other():
    q, k, v = draw(20, batch=1)
    cuts = torch.tensor([0, 7, 7, 8, 20], dtype=torch.int32)
    got = causal_attention(q, k, v, cuts)
    for a, b in ((0, 7), (7, 8), (8, 20)):
        assert error(got[:, a:b], law(q[:, a:b], k[:, a:b], v[:, a:b])) < 1e-12


@DTYPES
@SHARED
@pytest.mark.parametrize("rows", [4, 256])
def test_kept_keys_equal_the_reference(heads, shared, dtype, rows, monkeypatch):
    """Rows with pasts of their own, fewer and more queries than are solved at once."""
    monkeypatch.setattr(module, "ROWS", rows)
    before = torch.tensor([0, 5, 17])
    for T in (1, 2, 9, 40):
        q = draw(T, heads, shared, dtype, batch=3)[0]
        keys, values = (x.transpose(1, 2) for x in draw(17 + T, heads, shared, dtype, batch=3, seed=1)[1:])
        leaves = [x.detach().requires_grad_() for x in (q, keys, values)]
        got = cached_attention(*leaves, before)
        want = causal_attention_reference(*(x.double() for x in leaves), before)
        assert got.dtype == dtype
        assert error(got, want) <= BOUNDS[dtype]
        given = torch.randn(want.shape, dtype=F64)
        pairs = [torch.autograd.grad((y * given).sum(), leaves, retain_graph=True) for y in (got, want)]
        assert all(error(a, b) <= BOUNDS[dtype] for a, b in zip(*pairs, strict=True))


def test_what_lies_beyond_a_rows_tokens_has_no_effect():
    before = torch.tensor([0, 5])
    q = draw(3)[0]
    keys, values = (x.transpose(1, 2).clone() for x in draw(8, seed=1)[1:])
    want = cached_attention(q, keys, values, before)
    for row, seen in enumerate(before + 3):
        keys[row, :, seen:], values[row, :, seen:] = 1e4, -1e4
    assert torch.equal(cached_attention(q, keys, values, before), want)


def test_any_split_in_two_equals_the_whole():
    q, k, v = draw(33)
    keys, values, want = k.transpose(1, 2), v.transpose(1, 2), causal_attention(q, k, v)
    for at in (1, 16, 32):
        first = causal_attention(q[:, :at], k[:, :at], v[:, :at])
        second = cached_attention(q[:, at:], keys, values, torch.full((2,), at))
        assert error(torch.cat([first, second], 1), want) < 1e-12


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_one_key_with_all_the_weight_and_none_with_more_than_another(scale):
    q, k, v = draw(50, dtype=F32)
    assert error(causal_attention(q, k, v, scale=scale), law(q, k, v, scale)) < 1e-4 * max(1, scale)
    kept = cached_attention(q[:, 10:], k.transpose(1, 2), v.transpose(1, 2), torch.full((2,), 10), scale=scale)
    assert kept.isfinite().all()


def test_operands_of_any_strides_and_of_several_dtypes():
    """A projection's slices; keys that were kept in another dtype than the queries have."""
    packed = torch.randn(2, 9, 8 * 7, dtype=F64).unflatten(-1, (8, 7))
    q, k, v = packed.split([4, 2, 2], 2)
    want = law(q, k, v)
    assert error(causal_attention(q, k, v), want) < 1e-12
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    before = torch.zeros(2, dtype=torch.int64)
    assert error(cached_attention(q, keys, values, before), want) < 1e-12
    mixed = cached_attention(q.to(BF16), keys.float(), values.float(), before)
    assert mixed.dtype == BF16
    assert error(mixed, law(q.to(BF16), k.float(), v.float())) < 5e-3


class Largest(TorchDispatchMode):
    """The elements of the largest memory that an operation inside it returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@torch.no_grad()
def test_memory_does_not_grow_with_the_square_of_the_length():
    q, k, v = draw(2000, 2, 1, F32, batch=1, size=8)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    with Largest() as largest:
        causal_attention(q, k, v)
        cached_attention(q[:, 1000:], keys, values, torch.tensor([1000]))
    assert largest.numel <= 256 * 2000


@pytest.mark.parametrize("shapes", [
    ((2, 3, 4, 7), (2, 3, 3, 7), (2, 3, 3, 7)),
    ((2, 3, 4, 7), (2, 3, 4, 6), (2, 3, 4, 6)),
    ((2, 3, 4, 7), (2, 3, 4, 7), (2, 3, 2, 7)),
    ((2, 3, 4, 7), (1, 3, 4, 7), (1, 3, 4, 7)),
    ((2, 4, 4, 7), (2, 3, 4, 7), (2, 3, 4, 7)),
], ids=str)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(shapes):
    q, k, v = map(torch.zeros, shapes)
    with pytest.raises(ValueError, match="K dividing H and T at most S; got"):
        causal_attention(q, k, v)
    with pytest.raises(ValueError, match="K dividing H and T at most S; got"):
        cached_attention(q, k.transpose(1, 2), v.transpose(1, 2), torch.zeros(2, dtype=torch.int64))


def test_nothing_and_offsets_that_do_not_fit_are_refused():
    nothing = torch.zeros(1, 0, 2, 3)
    with pytest.raises(ValueError, match="got a sequence of length 0"):
        causal_attention(nothing, nothing, nothing)
    with pytest.raises(ValueError, match="must rise from 0 to the sequence length 5"):
        causal_attention(*draw(5, batch=1), torch.tensor([0, 4]))
