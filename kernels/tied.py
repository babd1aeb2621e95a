"""An embedding and a head of one weight, whose two gradients become one in the memory of the head's.

    x_t = W[ids_t]        logits = h W^T        dW = dlogits^T h + sum_t e(ids_t) dx_t^T

V words, D hidden size, ids of any shape. W: (V, D)   x, h: (..., D)   logits: (..., V)   e: unit vectors of size V

torch makes a second matrix (V, D) of the last term, nearly all of it zeros, and of the sum a third. Here the rows that
were read are added to the first term where it lies.
"""

import torch
import torch.nn.functional as F

from scrubjay.kernels.dispatch import traced
from scrubjay.kernels.linear import plain, plain_product, shaped
from scrubjay.kernels.recurrence import wants_gradient


def shared(weight):
    """W for `looked_up` and W for `scores`, each to be used once; or None where torch's own functions are to do the
    work: without a gradient, off a CPU, and where something else watches or converts W."""
    return _Shared.apply(weight) if not traced() and wants_gradient(weight) and plain(weight, weight) else None


def looked_up(ids, weight, padding_idx=None):
    """x, (..., D); the row `padding_idx` learns nothing."""
    return F.embedding(ids, weight, padding_idx, sparse=True)


def scores(h, weight):
    """The logits, (..., V), in W's dtype. Error against `torch.nn.functional.linear`: 1e-6 of the largest value."""
    return shaped(plain_product(h.reshape(-1, h.shape[-1]), weight), h, weight)


class _Shared(torch.autograd.Function):
    """Where the gradients meet: rows of the embedding's, and the head's matrix, which nobody else holds."""

    @staticmethod
    def forward(ctx, weight):
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx, rows, matrix):
        if rows is None or matrix is None:
            return matrix if rows is None else rows.to_dense()
        if torch.is_grad_enabled():
            return matrix + rows
        # rows of one word first, one after the other: from float32 on the sums of torch's own gradient bit for bit
        words, place = rows._indices()[0].unique(return_inverse=True)
        sums = matrix.new_zeros(len(words), matrix.shape[1]).index_add_(0, place, rows._values())
        return matrix.index_add_(0, words, sums)
