"""Copies of a cache in progress: outside of no_grad too, where what it holds was computed and has a gradient."""

import copy

import pytest
import torch
from recycled_cases import decoder
from recycled_cases import tokens as small
from test_wrapped import caches
from zoo import tokens

from scrubjay.modeling.inputs.cache_argument import CACHE, named


def goes_on(model, cache, ids):
    """A copy does what the original does, and has no gradient."""
    fork, before = copy.deepcopy(cache), cache.get_seq_length()
    with torch.no_grad():
        want = torch.cat([model(x, **named(cache), use_cache=True).logits for x in ids.split(1, 1)], 1)
        assert fork.get_seq_length() == before
        got = torch.cat([model(x, **named(fork), use_cache=True).logits for x in ids.split(1, 1)], 1)
    assert torch.equal(got, want)
    again = copy.deepcopy(fork)
    assert again.nbytes == fork.nbytes == cache.nbytes


def test_the_cache_of_every_model_is_forked_with_gradients_on(entry):
    model, ids = entry.build(), tokens(2, 22)
    cache = model(ids[:, :12], use_cache=True)[CACHE]
    for x in ids[:, 12:14].split(1, 1):
        cache = model(x, **named(cache), use_cache=True)[CACHE]
    goes_on(model, cache, ids[:, 14:])


@pytest.mark.parametrize("which", range(7))
def test_the_cache_of_an_unmodified_decoder_is_forked_with_gradients_on(which):
    model, ids = decoder(), small(2, 30)
    with list(caches(model))[which]() as cache:
        model(ids[:, :20], **named(cache))
        goes_on(model, copy.deepcopy(cache), ids[:, 20:24])
        model(ids[:, 20:21], **named(cache))
        goes_on(model, cache, ids[:, 21:])
