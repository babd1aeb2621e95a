"""Several threads call one model at once, each with a cache of its own, with one of transformers', or with none."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from recycled_cases import decoder, tokens
from transformers import DynamicCache

from scrubjay import AdoreCache, AdoreConfig, AdoreForCausalLM, RecycledCache, RecycledConfig, RecycledForCausalLM
from scrubjay.modeling.inputs.cache_argument import CACHE, named

ROUNDS = 10  # of 4 calls each
ADORE = dict(cache_size=8, rebuild=3)
RECYCLED = dict(budget=8, stride=3)


def stock(kind, implementation):
    return lambda: decoder(kind, torch.float32, attn_implementation=implementation)


def carrying(config_class, model_class, settings):
    return lambda: model_class(config_class(base_config=decoder().config, **settings)).eval()


MODELS = {
    "llama": stock("llama", "sdpa"),
    "llama, eager": stock("llama", "eager"),
    "qwen3": stock("qwen3", "sdpa"),
    "recycled": carrying(RecycledConfig, RecycledForCausalLM, RECYCLED),
    "adore": carrying(AdoreConfig, AdoreForCausalLM, ADORE | {"label_k": 4}),
}


def kinds(model):
    """{name: makes the arguments of a call}."""
    return {
        "A": lambda: named(AdoreCache(model, **ADORE, controller="random")),
        "C": lambda: named(RecycledCache(model, **RECYCLED)),
        "C dynamic": lambda: named(RecycledCache(model, budget=8, schedule="dynamic", qc=2)),
        "H2O": lambda: named(RecycledCache(model, budget=8, policy="h2o")),
        "transformers'": lambda: named(DynamicCache(config=model.config)),
        "the model's own": lambda: {},
        "none": lambda: {"use_cache": False},
    }


@torch.no_grad()
def forward(model, given, ids):
    """Logits of a prompt and of steps after it; without a cache, of all at once."""
    if not given.get(CACHE):
        return model(ids, **given).logits
    pieces = (ids[:, :14], *ids[:, 14:].split(1, 1)) if ids.shape[1] > 1 else (ids,)
    return torch.cat([model(piece, **given).logits for piece in pieces if piece.shape[1]], 1)


def generate(model, given, ids):
    return model.generate(ids[:, :14], max_new_tokens=7, do_sample=False, eos_token_id=None, **given)


def fresh(call, model, kind, ids):
    """The call, with a cache of its own."""
    return call(model, kinds(model)[kind](), ids)


def at_once(*calls):
    """What each call gives, when all begin together."""
    gate = threading.Barrier(len(calls))

    def run(call):
        gate.wait(60)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(run, call) for call in calls]]


@pytest.fixture
def impatient():
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


MIXES = [
    ("C", "C"),
    ("A", "A"),
    ("A", "C"),
    ("C", "transformers'", "none"),
    ("A", "H2O", "C dynamic", "the model's own"),
]


@pytest.mark.parametrize("mix", MIXES, ids=" and ".join)
@pytest.mark.parametrize("name", MODELS)
def test_each_thread_gets_what_it_gets_alone(name, mix, impatient):
    model, texts = MODELS[name](), [tokens(1, 20, seed) for seed in range(len(mix))]
    for call, rounds in ((forward, ROUNDS), (generate, 2)):
        want = [call(model, kinds(model)[kind](), ids) for kind, ids in zip(mix, texts, strict=True)]
        for _ in range(rounds):
            jobs = [partial(fresh, call, model, kind, ids) for kind, ids in zip(mix, texts, strict=True)]
            got = at_once(*jobs)
            assert [torch.equal(one, other) for one, other in zip(got, want, strict=True)] == [True] * len(mix)
    assert model.get_decoder().config._attn_implementation in ("sdpa", "eager")


def stopping(model, error, where=1):
    """The model, whose layer raises `error` in calls of this thread."""
    me = threading.current_thread()

    def stop(*_):
        if threading.current_thread() is me:
            raise error

    return model.get_decoder().layers[where].register_forward_hook(stop)


@pytest.mark.parametrize("kind", ["A", "C", "H2O"])
@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()], ids=["exception", "Ctrl-C"])
def test_a_call_that_fails_in_one_thread_changes_no_other(kind, error, impatient):
    model, ids = decoder(dtype=torch.float32), tokens(1, 20)
    want = {name: forward(model, make(), ids) for name, make in kinds(model).items()}

    def fail():
        for _ in range(5):
            given = kinds(model)[kind]()
            forward(model, given, ids[:, :14])
            hook = stopping(model, error)
            with pytest.raises(type(error)):
                forward(model, given, ids[:, 14:15])
            hook.remove()
            given[CACHE].reset()
            assert torch.equal(forward(model, given, ids), want[kind])
        return want["A"]

    for other in ("A", "C", "transformers'"):
        jobs = [lambda name=name: [forward(model, kinds(model)[name](), ids) for _ in range(5)] for name in [other] * 2]
        _, *got = at_once(fail, *jobs)
        assert all(torch.equal(x, want[other]) for thread in got for x in thread)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["A", "C", "H2O"])
def test_one_cache_in_two_threads_is_refused_and_the_call_in_progress_goes_on(kind):
    model, ids = decoder(dtype=torch.float32), tokens(1, 20)
    want = forward(model, kinds(model)[kind](), ids)
    given, inside, checked, main = (
        kinds(model)[kind](),
        threading.Event(),
        threading.Event(),
        threading.current_thread(),
    )

    def wait(*_):
        if threading.current_thread() is not main:
            inside.set()
            assert checked.wait(60)

    hook = model.model.layers[0].register_forward_hook(wait)
    with ThreadPoolExecutor(1, "reader") as pool:
        other = pool.submit(forward, model, given, ids)
        assert inside.wait(60)
        try:
            with pytest.raises(ValueError, match=r"progress in another thread \(reader.*Give each thread a cache"):
                model(ids[:, :14], **given)
            assert torch.equal(forward(model, kinds(model)[kind](), ids), want)
        finally:
            checked.set()
        assert torch.equal(other.result(), want)
    hook.remove()
    given[CACHE].reset()
    assert torch.equal(forward(model, given, ids), want)  # one thread after the other


@torch.no_grad()
def test_a_cache_of_a_thread_that_was_broken_off_can_be_reset():
    model, ids = decoder(dtype=torch.float32), tokens(1, 20)
    given = kinds(model)["C"]()

    def broken():
        hook = stopping(model, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            model(ids, **given)
        hook.remove()

    with ThreadPoolExecutor(1, "reader") as pool:  # a pool's threads live on
        pool.submit(broken).result()
        with pytest.raises(ValueError, match=r"thread \(reader.*reset\(\)"):
            model(ids, **given)
        given[CACHE].reset()
        assert torch.equal(forward(model, given, ids), forward(model, kinds(model)["C"](), ids))


@torch.no_grad()
def test_handles_of_others_hooks_outlive_a_cache():
    model, called = decoder(), []
    with RecycledCache(model, **RECYCLED):
        handle = model.model.register_forward_hook(lambda *_: called.append(1))
    model(tokens(1, 5))
    handle.remove()
    model(tokens(1, 5))
    assert called == [1]
    assert not model.model._forward_hooks


def test_the_configuration_is_never_touched(impatient):
    """Neither while a cache lives nor while its call runs; a copy of the model is a plain model."""
    model, found = decoder(dtype=torch.float32), []
    hook = model.model.layers[0].register_forward_hook(lambda *_: found.append(model.config._attn_implementation))
    before = {name: layer.self_attn.config for name, layer in enumerate(model.model.layers)}
    cache = RecycledCache(model, **RECYCLED)
    forward(model, named(cache), tokens(1, 20))
    assert set(found) == {"sdpa"}
    hook.remove()
    copied = copy.deepcopy(model)
    assert {type(layer.self_attn.config) for layer in copied.model.layers} == {type(model.config)}
    assert copied.model.layers[0].self_attn.config is copied.model.config
    assert torch.equal(
        forward(copied, kinds(copied)["C"](), tokens(1, 20)), forward(model, kinds(model)["C"](), tokens(1, 20))
    )
    model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation.endswith("eager")
    assert model(tokens(1, 5), output_attentions=True).attentions[0].shape == (1, 4, 5, 5)
    cache.close()
    assert all(layer.self_attn.config is before[name] for name, layer in enumerate(model.model.layers))
