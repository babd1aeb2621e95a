"""The loss of a language model, as transformers computes it."""

import torch
import torch.nn.functional as F

from scrubjay.kernels.loss import cross_entropy
from scrubjay.modeling.inputs.columns import are_integers


def causal_lm_loss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs):
    """transformers' loss of a language model, as a scalar: the mean over labels asked for, or the sum over
    `num_items_in_batch`.

    Raises:
        ValueError: labels of another shape than the logits, or that are no integers.
    """
    if shift_labels is None:
        shift_labels = F.pad(whole_numbers(labels), (0, 1), value=ignore_index)[..., 1:]
    if shift_labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have shape {tuple(logits.shape[:-1])}, one for each token that logits are computed of; got "
            f"{tuple(shift_labels.shape)}. With labels, leave logits_to_keep at 0."
        )
    return label_loss(
        logits, labels=None, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch, ignore_index=ignore_index
    )


def label_loss(logits, *, labels=None, shift_labels, num_items_in_batch=None, ignore_index=-100):
    """The loss of logits (..., V), of which each has its label in `shift_labels` (...): as `causal_lm_loss`. It is
    called as a loss over a sharded sequence is; `labels` would be those still to be shifted."""
    targets = whole_numbers(shift_labels).reshape(-1).to(logits.device)
    nats = cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, ignore_index)
    count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return nats.sum() / (count.to(nats.device) if isinstance(count, torch.Tensor) else count)


def whole_numbers(labels):
    """Labels as int64.

    Raises:
        ValueError: labels that are no integers.
    """
    if not are_integers(labels):
        raise ValueError(f"labels must be integers, the number of one label each; got {labels.dtype}.")
    return labels.long()
