"""The two gradients of a weight that embedding and head share are their sum, made in the memory of the head's."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import error

from scrubjay.kernels.tied import looked_up, scores, shared

V, D = 13, 8
IDS = torch.tensor([[3, 1, 3, 12], [0, 3, 1, 3]])  # some of them more than once


def loss_of(x, h, logits, weights):
    """Whichever of the two there is: the sum of both, weighed."""
    return sum((y * w).sum() for y, w in zip((x, logits), weights, strict=True) if y is not None)


def gradient(weight, h, weights, parts, padding_idx=None, **options):
    rows, matrix = shared(weight)
    x = looked_up(IDS, rows, padding_idx) if "embedding" in parts else None
    logits = scores(h, matrix) if "head" in parts else None
    wanted = [weight, h] if "head" in parts else [weight]
    return torch.autograd.grad(loss_of(x, h, logits, weights), wanted, **options)


def expected(weight, h, weights, parts, padding_idx=None):
    x = F.embedding(IDS, weight, padding_idx) if "embedding" in parts else None
    logits = F.linear(h, weight) if "head" in parts else None
    wanted = [weight, h] if "head" in parts else [weight]
    return torch.autograd.grad(loss_of(x, h, logits, weights), wanted)


def drawn(dtype=torch.float32):
    weight, h = torch.randn(V, D, dtype=dtype).requires_grad_(), torch.randn(2, 4, D, dtype=dtype).requires_grad_()
    return weight, h, (torch.randn(2, 4, D, dtype=dtype), torch.randn(2, 4, V, dtype=dtype))


def wide(weight, h, weights):
    weight, h = (x.detach().double().requires_grad_() for x in (weight, h))
    return weight, h, tuple(w.double() for w in weights)


@pytest.mark.parametrize("parts", [("embedding", "head"), ("embedding",), ("head",)], ids="+".join)
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("options", [{}, {"create_graph": True}], ids=str)
def test_gradients_equal_torchs(parts, padding_idx, options):
    case = drawn()
    got, want = gradient(*case, parts, padding_idx, **options), expected(*wide(*case), parts, padding_idx)
    assert not got[0].is_sparse
    for mine, exact in zip(got, want, strict=True):
        assert error(mine, exact) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_16_bits(dtype):
    """As near as torch's own, give or take a rounding."""
    case = drawn(dtype)
    parts = ("embedding", "head")
    got, theirs, want = gradient(*case, parts), expected(*case, parts), expected(*wide(*case), parts)
    for mine, other, exact in zip(got, theirs, want, strict=True):
        assert error(mine, exact) <= error(other, exact) + torch.finfo(dtype).eps


def test_outputs_equal_torchs():
    weight, h, _ = drawn()
    rows, matrix = shared(weight)
    assert torch.equal(looked_up(IDS, rows), F.embedding(IDS, weight))
    logits = scores(h, matrix)
    assert error(logits, F.linear(h.double(), weight.double())) <= 1e-6
    assert not logits._is_view()


def test_a_retained_graph_gives_the_same_gradient_again_and_sums_them():
    weight, h, weights = drawn()
    rows, matrix = shared(weight)
    loss = loss_of(looked_up(IDS, rows), h, scores(h, matrix), weights)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    assert torch.equal(weight.grad, 2 * once)


def test_without_a_gradient_torch_does_the_work():
    weight, _, _ = drawn()
    assert shared(weight.detach()) is None
    with torch.no_grad():
        assert shared(weight) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert shared(weight) is None
