"""Whole models whose every kernel is Triton's equal themselves on PyTorch's kernels: the ways into the kernels, the
caches between them, padding and packed documents."""

import copy
import sys

import pytest
import torch
from zoo import ZOO, relative, tokens

from scrubjay.kernels import triton_tools
from scrubjay.kernels.dispatch import choose
from scrubjay.modeling import base

# float32: worst seen 3e-6; gradients are relative to the largest of each parameter
BOUND = 2e-5


@pytest.fixture
def on_triton(monkeypatch):
    """A copy of a model that runs on Triton's kernels wherever one covers the call, and the names of those calls."""
    taken = set()

    def fused_wherever_possible(backend, op, *tensors, fused=False):
        fused = fused() if callable(fused) else fused
        taken.update([op] if fused else [])
        return choose("triton" if fused else backend, op, *tensors, fused=fused)

    def use(model):
        if not triton_tools.interpreted():
            return copy.deepcopy(model).to("cuda"), taken
        for name, module in list(sys.modules.items()):
            if name.startswith("scrubjay.kernels.") and vars(module).get("choose") is choose and "dispatch" not in name:
                monkeypatch.setattr(module, "choose", fused_wherever_possible)
        monkeypatch.setattr(base, "one_token", lambda x: False)  # a CPU's own short way
        return copy.deepcopy(model), taken

    return use


def cpu(call):
    """What `call` gives with new tensors on the CPU."""
    before = torch.get_default_device()
    torch.set_default_device("cpu")
    try:
        return call()
    finally:
        torch.set_default_device(before)


def moved(model, **inputs):
    return {name: x.to(model.device) for name, x in inputs.items()}


@torch.no_grad()
def pieces(model, ids, mask, cuts):
    """Logits of ids given to a cache piece by piece."""
    cache, logits, done = None, [], 0
    for piece in ids.split(cuts, 1):
        done += piece.shape[1]
        out = model(**moved(model, input_ids=piece, attention_mask=mask[:, :done]), cache=cache, use_cache=True)
        cache = out.cache
        logits.append(out.logits.cpu())
    return torch.cat(logits, 1)


# so small that keys are chosen and let go in these short texts
CHANGES = {"recycled": {"budget": 6, "stride": 2}, "adore": {"cache_size": 6, "label_k": 6}}
EXPECTED = {  # operations that must have run on Triton
    "ssd": {"ssd", "causal_conv", "gated_rms_norm"},
    "ssd_hybrid": {"ssd", "causal_conv", "gated_rms_norm"},
    "rodimus": {"ddts", "causal_conv", "gated_rms_norm"},
    "rodimus_plus": {"ddts", "causal_conv", "gated_rms_norm", "window_attention"},
    "taipan": {"ssd", "causal_conv", "gated_rms_norm", "select_attention"},
    "adore": {"release_step", "ranking"},
    "recycled": {"decode", "pooled", "scores_of", "top"},
}


@pytest.mark.parametrize("cuts", [[14], [9, 1, 1, 3]], ids=["one pass", "prefill, steps, piece"])
def test_a_padded_batch(entry, on_triton, cuts):
    model = cpu(lambda: entry.build(**CHANGES.get(entry.name, {})))
    ids, mask = cpu(lambda: tokens(2, 14)), cpu(lambda: torch.ones(2, 14, dtype=torch.long))
    mask[1, :4] = 0
    want = pieces(model, ids, mask, cuts)
    fused, taken = on_triton(model)
    got = pieces(fused, ids, mask, cuts)
    assert relative(got[mask.bool()], want[mask.bool()]) < BOUND
    if triton_tools.interpreted() and len(cuts) > 1:
        assert taken >= EXPECTED[entry.name]


def test_rodimus_without_its_parts(on_triton):
    """The gates' kernel without a temperature, values that are a slice of a projection, a cache without a window."""
    entry = next(entry for entry in ZOO if entry.name == "rodimus_plus")
    off = dict(temperature_gate=False, input_gate="none", short_conv=False, two_hop=False, num_value_heads=1)
    model = cpu(lambda: entry.build(**off))
    ids, mask = cpu(lambda: tokens(2, 14)), cpu(lambda: torch.ones(2, 14, dtype=torch.long))
    mask[1, :4] = 0
    want = pieces(model, ids, mask, [9, 1, 1, 3])
    fused, taken = on_triton(model)
    assert relative(pieces(fused, ids, mask, [9, 1, 1, 3])[mask.bool()], want[mask.bool()]) < BOUND
    if triton_tools.interpreted():
        assert taken >= {"rodimus_gates", "ddts", "gated_rms_norm", "window_attention"}
        assert "causal_conv" not in taken


def test_packed_documents_and_gradients(entry, on_triton):
    model, ids = cpu(entry.build), cpu(lambda: tokens(1, 13))
    position_ids = torch.cat([torch.arange(n, device="cpu") for n in (1, 8, 4)])[None]
    fused, _ = on_triton(model)
    grads = []
    for one in (model, fused):
        out = one(**moved(one, input_ids=ids, labels=ids, position_ids=position_ids), use_cache=False)
        out.loss.backward()
        grads.append({name: p.grad.cpu() for name, p in one.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, want in grads[0].items():
        assert relative(grads[1][name], want) < BOUND, name


def test_greedy_generation(entry, on_triton):
    model, ids = cpu(lambda: entry.build(**CHANGES.get(entry.name, {}))), cpu(lambda: tokens(2, 6))
    fused, _ = on_triton(model)
    want, got = (one.generate(ids.to(one.device), max_new_tokens=4, do_sample=False).cpu() for one in (model, fused))
    assert torch.equal(got, want)
