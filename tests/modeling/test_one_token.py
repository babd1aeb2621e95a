"""Models give the same on the short way of one token as on the long one, and what acts on a layer acts there too."""

import copy

import pytest
import torch
from torch import nn
from zoo import VOCAB, ZOO

from scrubjay.modeling import base, modeling_rodimus, modeling_ssd
from scrubjay.modeling.layers import GatedRMSNorm, RMSNorm

PROMPTS = {"none": 0, "shorter than the window": 5, "longer": 14}


@pytest.fixture
def mixers(monkeypatch):
    """Names of the mixers that took the short way."""
    taken = []

    def noted(short):
        return lambda self, *args: taken.append(self) or short(self, *args)

    for kind in (modeling_ssd.SSDMixer, modeling_rodimus.RodimusMixer):
        monkeypatch.setattr(kind, "_one_token", noted(kind._one_token))
    return taken


@pytest.fixture
def long_way(monkeypatch):
    def choose():
        monkeypatch.setattr(base, "one_token", lambda x: False)

    return choose


@torch.no_grad()
def decoded(model, ids, prompt, mask=None):
    """Logits of the steps after a prompt, and the cache's tensors after them."""
    cache, logits = type(model).cache_class(model), []
    if prompt:
        model(ids[:, :prompt], attention_mask=mask, cache=cache, logits_to_keep=1)
    for t in range(prompt, ids.shape[1]):
        logits.append(model(ids[:, t : t + 1], cache=cache).logits)
    return [torch.cat(logits, 1)] + [t for layer in cache.layers for t in layer.tensors().values()]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2.5e-2)], ids=str)
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("batch", [1, 5])
def test_steps_equal_those_of_the_long_way(recurrent, mixers, long_way, batch, prompt, dtype, bound):
    model, ids = recurrent.build(dtype), torch.randint(VOCAB, (batch, prompt + 12))
    mask = torch.ones(batch, prompt, dtype=torch.long) if prompt and batch > 1 else None
    if mask is not None:
        mask[1, : prompt // 2] = 0
    short = decoded(model, ids, prompt, mask)
    assert len(mixers) >= 12
    mixers.clear()
    long_way()
    for got, want in zip(short, decoded(model, ids, prompt, mask), strict=True):
        assert got.dtype == want.dtype
        assert (got.double() - want.double()).norm() <= bound * want.double().norm()
    assert not mixers


def hooked(model, mixer):
    mixer.conv1d.register_forward_hook(lambda module, args, out: (torch.zeros_like(out[0]), out[1]))


def own_forward(model, mixer):
    mixer.conv1d.forward = lambda x, *args: (
        torch.zeros_like(x),
        mixer.conv1d.__class__.forward(mixer.conv1d, x, *args)[1],
    )


def replaced(model, mixer):
    class Other(type(mixer.conv1d)):
        def forward(self, *args):
            y, state = super().forward(*args)
            return torch.zeros_like(y), state

    mixer.conv1d.__class__ = Other


@pytest.mark.parametrize("change", [hooked, own_forward, replaced])
def test_a_changed_layer_acts_in_steps_too(recurrent, mixers, long_way, change):
    model, ids = recurrent.build(), torch.randint(VOCAB, (1, 4))
    mixer = next(m for m in model.modules() if hasattr(m, "conv1d"))
    plain = decoded(model, ids, 0)[0]
    change(model, mixer)
    mixers.clear()
    changed = decoded(model, ids, 0)[0]
    assert mixers.count(mixer) == 4
    assert not torch.allclose(changed, plain, atol=1e-3)
    long_way()
    assert torch.allclose(changed, decoded(model, ids, 0)[0], atol=1e-5)


@torch.no_grad()
def test_a_step_leaves_what_its_layers_took_and_gave_as_it_was(recurrent, mixers):
    """Hooks keep it, or give what is somebody else's."""
    model, ids, seen = recurrent.build(), torch.randint(VOCAB, (2, 5)), []

    def keep(module, args, out):
        tensors = [t for t in (*args, *(out if isinstance(out, tuple) else (out,))) if isinstance(t, torch.Tensor)]
        seen.extend((type(module).__name__, t, t.clone()) for t in tensors)

    for module in model.model.layers.modules():
        module.register_forward_hook(keep)
    decoded(model, ids, 0)
    assert mixers
    assert not {name for name, now, then in seen if not torch.equal(now, then)}


class OthersNorm(nn.Module):
    """A norm that somebody put in place of ours, and that knows no other arguments than ours had."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return 2 * self.norm(x)


class OthersGatedNorm(OthersNorm):
    def forward(self, y, z, x, skip):
        return 2 * self.norm(y, z, x, skip)


def test_norms_of_others_act_in_steps_too(recurrent, mixers):
    model, ids = recurrent.build(), torch.randint(VOCAB, (1, 6))
    others = {RMSNorm: OthersNorm, GatedRMSNorm: OthersGatedNorm}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in others:
                setattr(parent, name, others[type(child)](child))
    whole = model(ids, use_cache=False).logits
    assert torch.allclose(decoded(model, ids, 0)[0], whole, atol=1e-4)
    assert not mixers


@torch.no_grad()
@pytest.mark.parametrize("before", [torch.float64, torch.bfloat16], ids=str)
def test_a_cache_of_another_dtype_goes_on(recurrent, mixers, long_way, before):
    ids = torch.randint(VOCAB, (2, 9))
    first, model = recurrent.build(before), recurrent.build()
    cache = type(model).cache_class(model)
    first(ids[:, :6], cache=cache)
    fork = copy.deepcopy(cache)
    short = [model(ids[:, t : t + 1], cache=cache).logits for t in range(6, 9)]
    assert mixers
    long_way()
    for t, got in enumerate(short, 6):
        assert torch.allclose(got, model(ids[:, t : t + 1], cache=fork).logits, atol=1e-5)


def test_a_step_with_a_gradient_takes_the_long_way(recurrent, mixers):
    model, ids = recurrent.build(), torch.randint(VOCAB, (1, 3))
    cache = type(model).cache_class(model)
    model(ids[:, :2], cache=cache)
    model(ids[:, 2:], cache=cache).logits.sum().backward()
    assert not mixers
    assert any(isinstance(p, nn.Parameter) and p.grad is not None for p in model.parameters())


def test_the_step_size_has_its_limits(mixers):
    entry = next(entry for entry in ZOO if entry.name == "ssd")
    ids = torch.randint(VOCAB, (1, 6))
    free, limited = (entry.build(time_step_limit=limit) for limit in ((0.0, float("inf")), (0.2, 0.3)))
    whole = limited(ids, use_cache=False).logits
    assert not torch.allclose(whole, free(ids, use_cache=False).logits, atol=1e-3)
    assert torch.allclose(decoded(limited, ids, 0)[0], whole, atol=1e-5)
    assert len(mixers) == 12
