"""The cross-entropy equals torch's, gradient included, in value and in what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import error
from transformers.loss.loss_utils import ForCausalLMLoss

from scrubjay.kernels import loss as module
from scrubjay.kernels.loss import cross_entropy
from scrubjay.modeling.losses import causal_lm_loss


def drawn(rows, vocab, dtype=torch.float32, scale=1.0):
    torch.manual_seed(0)
    logits = (torch.randn(rows, vocab, dtype=dtype) * scale).requires_grad_()
    labels = torch.randint(0, vocab, (rows,))
    labels[::3] = -100
    return logits, labels


@pytest.mark.parametrize("tile", [1, 100, 2**18])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_equals_torch(monkeypatch, tile, scale):
    monkeypatch.setattr(module, "TILE", tile)
    logits, labels = drawn(7, 33, scale=scale)
    wide = logits.detach().double().requires_grad_()
    weights = torch.rand(7)
    got, want = cross_entropy(logits, labels), F.cross_entropy(wide, labels, reduction="none")
    assert error(got, want) <= 1e-6
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    assert error(logits.grad, wide.grad) <= 1e-6
    assert (got[::3] == 0).all()
    assert (logits.grad[::3] == 0).all()


def test_gradient_in_float64():
    logits, labels = drawn(6, 9, torch.float64)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels), (logits,))


def test_a_retained_graph_gives_the_same_gradient_again():
    """The first backward pass writes the gradient over what the forward pass kept."""
    logits, labels = drawn(7, 33)
    nats = cross_entropy(logits, labels)
    weights = torch.rand(2, 7)
    first, second = (torch.autograd.grad((nats * w).sum(), logits, retain_graph=True)[0] for w in weights)
    for got, w in zip((first, second), weights, strict=True):
        (want,) = torch.autograd.grad((cross_entropy(logits, labels) * w).sum(), logits)
        assert error(got, want) <= 1e-6


@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(5)], ids=str)
@pytest.mark.parametrize("shifted", [False, True])
def test_the_models_loss_is_that_of_transformers(num_items, shifted):
    logits, labels = drawn(12, 17)
    logits, labels = logits.view(2, 6, 17), labels.view(2, 6)
    named = {"shift_labels": labels} if shifted else {}
    got, want = (
        function(logits, None if shifted else labels, 17, num_items_in_batch=num_items, **named)
        for function in (causal_lm_loss, ForCausalLMLoss)
    )
    assert error(got, want) <= 1e-6


def test_no_label_at_all_is_not_a_number_as_in_torch():
    logits = torch.randn(1, 3, 5)
    assert causal_lm_loss(logits, torch.full((1, 3), -100), 5).isnan()


def test_a_label_outside_the_vocabulary_is_refused():
    logits, labels = drawn(4, 5)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        cross_entropy(logits, labels.fill_(5))
