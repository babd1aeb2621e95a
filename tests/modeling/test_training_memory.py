"""What a training step makes, read off its own operations: no clock and no machine changes it."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(TorchDispatchMode):
    """Names of the operations that made a tensor of some shape, or of its transpose, in memory of its own. Nothing is
    held: autograd works in place on what nobody else has."""

    def __init__(self, shape):
        super().__init__()
        self.shapes, self.names = {tuple(shape), tuple(shape)[::-1]}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        taken = {x.untyped_storage().data_ptr() for x in strided((args, kwargs))}
        out = function(*args, **(kwargs or {}))
        made = [x for x in strided(out) if x.untyped_storage().data_ptr() not in taken]
        self.names += [str(function) for x in made if tuple(x.shape) in self.shapes]
        return out


def strided(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and x.layout == torch.strided]


def test_embedding_and_head_have_one_gradient_between_them(recurrent):
    """In one matrix, where torch makes three: of the head, of the embedding, and of their sum."""
    model = recurrent.build(tie_word_embeddings=True).train()
    ids = torch.randint(0, model.config.vocab_size, (2, 9))
    with Made(model.lm_head.weight.shape) as made:
        model(input_ids=ids, labels=ids).loss.backward()
    assert len(made.names) == 1, made.names  # the product, by either library


def test_what_acts_on_either_sees_its_call(recurrent):
    """A hook on the embedding or on the head, and gradients are the same."""
    model = recurrent.build(tie_word_embeddings=True)
    ids, called = torch.randint(0, model.config.vocab_size, (2, 9)), []
    model(input_ids=ids, labels=ids).loss.backward()
    want = model.lm_head.weight.grad
    for layer in (model.lm_head, model.model.embed_tokens):
        model.zero_grad()
        hook = layer.register_forward_hook(lambda *call: called.append(call[0]))
        model(input_ids=ids, labels=ids).loss.backward()
        hook.remove()
        assert called.pop() is layer
        torch.testing.assert_close(model.lm_head.weight.grad, want, rtol=0, atol=1e-6 * float(want.abs().max()))
