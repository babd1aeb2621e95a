"""Pickles of caches and of outputs that hold one: the state alone, which goes on where it was."""

import io
import pickle
import threading

import pytest
import torch
from recycled_cases import decoder
from recycled_cases import tokens as small
from test_wrapped import caches
from zoo import tokens

from scrubjay import AdoreCache, RecycledCache
from scrubjay.modeling.decoder.attached import AttachedCache
from scrubjay.modeling.decoder.controller import Controller
from scrubjay.modeling.inputs.cache_argument import CACHE, named


def by_torch(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "torch.save": by_torch}


@torch.no_grad()
def steps(model, cache, ids):
    return torch.cat([model(x, **named(cache)).logits for x in ids.split(1, 1)], 1)


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


def test_an_output_and_its_cache_go_on_after_a_pickle(entry, way):
    model, ids = entry.build(), tokens(2, 22)
    with torch.no_grad():
        out = model(ids[:, :16], use_cache=True)
    again = way(out)
    assert torch.equal(again.logits, out.logits)
    cache = again[CACHE]
    assert type(cache) is type(out[CACHE])
    assert cache.nbytes == out[CACHE].nbytes
    if isinstance(cache, AttachedCache):
        with pytest.raises(ValueError, match=r"comes from a pickle .*cache\.attach\(model\)"):
            model(ids[:, 16:17], **named(cache))
        cache.attach(model)
    assert torch.equal(steps(model, cache, ids[:, 16:]), steps(model, out[CACHE], ids[:, 16:]))


@pytest.mark.parametrize("which", range(7))
def test_a_cache_of_an_unmodified_decoder_goes_on_after_a_pickle(which, way):
    model, ids = decoder(), small(2, 26)
    cache = list(caches(model))[which]()
    want_cache = list(caches(model))[which]()
    with torch.no_grad():
        model(ids[:, :16], **named(cache))
        model(ids[:, :16], **named(want_cache))
    steps(model, cache, ids[:, 16:20])
    want = steps(model, want_cache, ids[:, 16:])
    again = way(cache)
    cache.close()
    assert not again.attached
    with pytest.raises(ValueError, match=r"comes from a pickle .*cache\.attach\(model\)"):
        model(ids[:, 20:21], **named(again))
    again.attach(model)
    assert torch.equal(steps(model, again, ids[:, 20:]), want[:, 4:])
    again.close()
    want_cache.close()
    assert not model.model._forward_hooks


def test_a_pickle_holds_no_weights_and_none_of_the_model():
    model = decoder()
    controller = Controller(32, 4096, "query")
    for cache in (AdoreCache(model, cache_size=8, controller=controller), RecycledCache(model, budget=8)):
        with torch.no_grad():
            model(small(1, 4), **named(cache))
        held = len(pickle.dumps(cache))
        assert held < cache.nbytes + 50_000  # settings and names; measured: 4 to 5 thousand
    assert sum(p.nbytes for p in controller.parameters()) > 10**8


def test_a_pickle_is_attached_to_an_equal_model_alone():
    model, ids = decoder(), small(1, 12)
    for make in (lambda: RecycledCache(model, budget=8), lambda: AdoreCache(model, cache_size=8)):
        cache = make()
        with torch.no_grad():
            model(ids, **named(cache))
        again = pickle.loads(pickle.dumps(cache))
        for other in (decoder(layers=3), decoder(groups=4)):
            with pytest.raises(ValueError, match=r"was made for .* (the model|this one) has"):
                again.attach(other)
            assert not again.attached
            assert not other.model._forward_hooks
        equal = decoder()
        again.attach(equal)
        assert torch.equal(steps(equal, again, ids), steps(model, cache, ids))


def test_a_pickle_asks_for_the_controller_that_the_cache_had():
    model, ids, controller = decoder(), small(1, 20), Controller(32, 8, "query").double()
    cache = AdoreCache(model, cache_size=8, rebuild=2, controller=controller)
    with torch.no_grad():
        model(ids, **named(cache))
    again = pickle.loads(pickle.dumps(cache))
    with pytest.raises(ValueError, match=r"made with a Controller, here is none. Pass the same as controller="):
        again.attach(model)
    again = pickle.loads(pickle.dumps(again))  # a pickle of one that belongs to no model
    again.attach(model, controller)
    assert torch.equal(steps(model, again, ids), steps(model, cache, ids))


@pytest.mark.parametrize("make", [lambda m: RecycledCache(m, budget=8), lambda m: AdoreCache(m, cache_size=8)])
def test_a_model_with_a_living_cache_can_be_pickled(make):
    model, ids = decoder(dtype=torch.float32), small(1, 12)
    cache = make(model)
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        want = model(ids, **named(cache)).logits
        assert torch.equal(again(ids, **named(make(again))).logits, want)
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.model.layers[0].self_attn.config is again.model.config


def test_a_cache_is_pickled_by_another_thread_than_its_calls():
    model, ids, found = decoder(), small(1, 20), []
    cache = RecycledCache(model, budget=8)
    with torch.no_grad():
        model(ids, **named(cache))
    thread = threading.Thread(target=lambda: found.append(pickle.loads(pickle.dumps(cache))))
    thread.start()
    thread.join()
    found[0].attach(model)
    assert torch.equal(steps(model, found[0], ids), steps(model, cache, ids))


@pytest.mark.parametrize("which", [0, 6])
def test_a_pickle_of_a_decoder_with_a_living_cache_needs_nothing_of_the_library(which):
    model, ids = decoder(dtype=torch.float32), small(1, 12)
    with list(caches(model))[which]() as cache, torch.no_grad():
        model(ids, **named(cache))
        held = pickle.dumps(model)
        assert b"scrubjay" not in held
        again = pickle.loads(held)
        assert again.model.layers[0].self_attn.config is again.config
        want = model(ids).logits
        assert torch.equal(again(ids).logits, want)
        with list(caches(again))[which]() as other, list(caches(model))[which]() as fresh:
            assert torch.equal(steps(again, other, ids), steps(model, fresh, ids))
