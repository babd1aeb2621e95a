"""What the tests of classifiers share: each model of the zoo with another head."""

from dataclasses import replace

import torch

import scrubjay

KINDS = ("ForSequenceClassification", "ForTokenClassification")


def with_head(entry, kind):
    """The entry whose model has this head."""
    return replace(entry, model=getattr(scrubjay, entry.model.__name__.removesuffix("ForCausalLM") + kind))


def texts(entry, dtype=torch.float64, **changes):
    """A classifier of texts with three labels."""
    return with_head(entry, KINDS[0]).build(dtype, **dict(num_labels=3) | changes)


def each_token(entry, dtype=torch.float64, **changes):
    """A classifier of tokens with three labels."""
    return with_head(entry, KINDS[1]).build(dtype, **dict(num_labels=3) | changes)


def same_weights(one, other):
    """Whether two modules hold the same parameters by the same names."""
    one, other = dict(one.named_parameters()), dict(other.named_parameters())
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
