"""The loss of a language model, as transformers computes it."""

import torch
import torch.nn.functional as F

from scrubjay.kernels.loss import cross_entropy


def causal_lm_loss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs):
    """transformers' loss of a language model, as a scalar: the mean over labels asked for, or the sum over
    `num_items_in_batch`."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if shift_labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have shape {tuple(logits.shape[:-1])}, one for each token that logits are computed of; got "
            f"{tuple(shift_labels.shape)}. With labels, leave logits_to_keep at 0."
        )
    targets = shift_labels.reshape(-1).to(logits.device)
    nats = cross_entropy(logits.reshape(-1, vocab_size), targets, ignore_index)
    count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return nats.sum() / (count.to(nats.device) if isinstance(count, torch.Tensor) else count)
