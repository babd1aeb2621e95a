"""Cross-entropy of a large vocabulary with one new tensor of the logits' size, the gradient, where torch makes three.

    nats_r = log(sum_v exp(logits_rv)) - logits_(r, label_r)

R rows, V vocabulary. logits: (R, V)   labels: (R,) int64, `ignore_index` where nothing is asked.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from scrubjay.kernels.dispatch import traced
from scrubjay.kernels.recurrence import LOG2_E

TILE = 2**18  # logits worked on at a time: they and what is computed from them stay in cache


def cross_entropy(logits, labels, ignore_index=-100):
    """Nats of every row, (R,) in the logits' dtype, 0 where the label is `ignore_index`; differentiable once on a CPU.

    Error against `torch.nn.functional.cross_entropy`, gradient included: 1e-6 of the largest value in float32.

    Raises:
        IndexError, RuntimeError: a label outside the vocabulary, from torch.
    """
    if logits.device.type != "cpu" or traced():
        return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    return _CrossEntropy.apply(logits, labels, ignore_index)


class _CrossEntropy(torch.autograd.Function):
    """Keeps the probabilities, which the first backward pass turns into the gradient where they are; another one (of a
    graph that was retained) computes them again."""

    @staticmethod
    def forward(ctx, logits, labels, ignore_index):
        asked = labels != ignore_index
        if not ctx.needs_input_grad[0]:
            totals = torch.cat([logits[rows].logsumexp(1) for rows in _tiles(logits)])
        else:
            ctx.probabilities, totals = _softmax(logits)
            ctx.save_for_backward(logits, labels, asked, totals)
        picked = logits.gather(1, labels.where(asked, 0)[:, None])[:, 0]
        return (totals - picked).masked_fill_(~asked, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, dnats):
        logits, labels, asked, totals = ctx.saved_tensors
        dlogits, ctx.probabilities = ctx.probabilities, None
        if dlogits is None:
            dlogits = torch.sub(logits, totals[:, None]).mul_(LOG2_E).exp2_()
        dlogits.scatter_add_(1, labels.where(asked, 0)[:, None], dlogits.new_full((len(labels), 1), -1))
        return dlogits.mul_(dnats.where(asked, 0)[:, None]), None, None


def _softmax(logits):
    """Probabilities (R, V), and log sum exp of each row (R,)."""
    probabilities, totals = torch.empty_like(logits), logits.new_empty(len(logits))
    for rows in _tiles(logits):
        highest = logits[rows].amax(1, keepdim=True)
        p = torch.sub(logits[rows], highest, out=probabilities[rows]).mul_(LOG2_E).exp2_()
        total = p.sum(1, keepdim=True)
        p.mul_(total.reciprocal())
        totals[rows] = (highest + total.log())[:, 0]
    return probabilities, totals


def _tiles(logits):
    size = max(1, TILE // logits.shape[1])
    return [slice(start, start + size) for start in range(0, max(1, len(logits)), size)]
