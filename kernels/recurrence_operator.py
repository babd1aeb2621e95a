"""The loop of a linear recurrence over chunks, and the loop back, as operators of torch.compile."""

from types import SimpleNamespace

import torch

from scrubjay.kernels.operators import Operator
from scrubjay.kernels.recurrence import ChunkedRecurrence, chunked


def as_operator(name: str):
    """Decorate a `piece` of `chunked`: torch.compile calls an operator of this name, kept as `piece.operator`, on
    (state, cu_seqlens, q, k, v, ...) and the size of chunks."""

    def decorated(piece):
        def forward(tensors, integers, floats):
            state, cu_seqlens, *sequences = tensors
            return chunked(piece, integers[0], state, cu_seqlens, *sequences)

        def shapes(tensors, integers):
            contiguous = torch.contiguous_format
            return [torch.empty_like(x, memory_format=contiguous) for x in (tensors[4], tensors[0])]

        def backward(tensors, integers, floats, douts):
            kept = SimpleNamespace(saved_tensors=tensors, piece=piece, size=integers[0])
            _, _, dstate, dcu_seqlens, *grads = ChunkedRecurrence.backward(kept, *douts)
            return [dstate, dcu_seqlens, *grads]

        piece.operator = Operator(name, forward, shapes, backward)
        return piece

    return decorated
