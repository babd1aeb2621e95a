"""TaipanCache: bytes, wrapping, files, and what only a ring of selected tokens has to get right."""

import copy

import pytest
import torch
from parity_cases import BOUND, error, tokens
from taipan_cases import build

from scrubjay import SSDCache, TaipanCache, TaipanConfig, TaipanForCausalLM
from scrubjay.modeling.caches.cache_taipan import RingLayer

NAMES = ("defaults", "selected keys", "selected keys by rank, cap of 3")


@torch.no_grad()
def fed(model, ids, cache=None):
    return model(ids, cache=cache, use_cache=True).cache


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_the_docstring_and_constant(name):
    model = build(name, dtype=torch.float32)
    c = model.config
    conv = (c.conv_kernel - 1) * (c.inner_size + 2 * c.n_groups * c.state_size) * 4
    block = conv + c.num_heads * c.state_size * c.head_dim * 4 + 8
    slots = min(c.sliding_window, c.kv_cap or c.sliding_window)
    ring = 2 * slots * c.num_key_value_heads * c.attention_head_dim * 4 + 8
    ring += 8 * (slots + 1) if c.kv_scope == "selected" else 0
    for length in (1, 5, 100):
        assert fed(model, tokens(29, 2, length)).nbytes == 2 * (3 * block + 2 * ring)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["all", "selected"])
def test_bytes_are_the_same_after_4_thousand_and_a_million_tokens(scope):
    sizes = dict(hidden_size=8, num_hidden_layers=2, vocab_size=16, state_size=4, attention_head_dim=8, kv_scope=scope)
    model = TaipanForCausalLM(TaipanConfig(**sizes, head_dim=8, sliding_window=16, intermediate_size=8)).eval()
    ids, cache = torch.randint(0, 16, (1, 50_000)), TaipanCache(model)
    with torch.no_grad():
        model(ids[:, :4000], cache=cache, logits_to_keep=1)
        early = cache.nbytes
        model(ids[:, 4000:], cache=cache, logits_to_keep=1)
        for _ in range(19):
            out = model(ids, cache=cache, logits_to_keep=1)
    assert cache.get_seq_length() == 1_000_000
    assert int(cache.layers[1].counts) == 1_000_000
    assert cache.nbytes == early
    assert torch.isfinite(out.logits).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_ring_holds_the_last_tokens_that_wrote_each_at_its_slot(name):
    """Against a list of everything written: keys, positions, counters, at every length."""
    model, ids = build(name), tokens(29, 2, 61)
    ring_at, written = model.config.selective_layers[0], [[], []]
    original = RingLayer.append

    def noted(self, k, v, positions, lengths):
        if self is cache.layers[ring_at]:
            for row in range(2):
                for t in range(k.shape[1] if lengths is None else int(lengths[row])):
                    written[row].append((int(positions[row, t]), k[row, t], v[row, t]))
        original(self, k, v, positions, lengths)

    cache = TaipanCache(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RingLayer, "append", noted)
        for piece in ids.split([1, 3, 20, 1, 1, 30, 5], 1):
            fed(model, piece, cache)
            ring = cache.layers[ring_at]
            for row in range(2):
                entries = written[row]
                assert int(ring.writes[row]) == len(entries)
                for c in range(max(0, len(entries) - ring.window), len(entries)):
                    slot = c % ring.window
                    assert torch.equal(ring.keys[row, :, slot], entries[c][1])
                    assert torch.equal(ring.values[row, :, slot], entries[c][2])
                    if ring.selected:
                        assert int(ring.places[row, slot]) == entries[c][0]
    if name == "defaults":
        assert [entry[0] for entry in written[0]] == list(range(61))


@pytest.mark.parametrize("name", NAMES)
def test_rows_files_forks_and_reset(name, tmp_path):
    model, ids, more = build(name), tokens(29, 3, 25), tokens(29, 3, 9)
    want = model(torch.cat([ids, more], 1)).logits[:, 25:].detach()

    def goes_on(cache, rows=slice(None)):
        with torch.no_grad():
            got = model(more[rows], cache=cache).logits
        assert error(got, want[rows]) < BOUND

    cache = fed(model, ids)
    fork = copy.deepcopy(cache)
    cache.save(tmp_path / "prompt.safetensors")
    loaded = TaipanCache.load(tmp_path / "prompt.safetensors")
    assert loaded.nbytes == cache.nbytes
    for held in (cache, fork, loaded):
        goes_on(held)
    order = torch.tensor([2, 0, 0])
    chosen = TaipanCache.load(tmp_path / "prompt.safetensors")
    chosen.batch_select_indices(order)
    goes_on(chosen, order)
    doubled = TaipanCache.load(tmp_path / "prompt.safetensors")
    doubled.batch_repeat_interleave(2)
    goes_on(doubled, torch.arange(3).repeat_interleave(2))
    cache.reset()
    assert cache.get_seq_length() == 0
    fed(model, ids, cache)
    goes_on(cache)


def test_what_a_cache_cannot_do_is_refused_with_the_reason(tmp_path):
    model = build()
    cache = fed(model, tokens(29, 2, 5))
    with pytest.raises(ValueError, match="deepcopy"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="read and write"):
        cache.layers[1].update(None, None)
    cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(ValueError, match=r"holds TaipanCache; SSDCache\.load needs"):
        SSDCache.load(tmp_path / "cache.safetensors")
    for changes in (dict(sliding_window=9), dict(kv_scope="selected"), dict(attention_every=2)):
        with pytest.raises(ValueError, match="made for another model"):
            build(**changes)(tokens(29, 2, 1), cache=cache)
    with pytest.raises(ValueError, match="holds 2 rows, the input has 3"):
        model(tokens(29, 3, 1), cache=cache)


def test_a_step_writes_the_ring_where_it_is():
    model = build()
    cache = fed(model, tokens(29, 2, 5))
    held, kept = cache.layers[1].keys, copy.deepcopy(cache)
    before = held.clone()
    fed(model, tokens(29, 2, 1), cache)
    assert cache.layers[1].keys.data_ptr() == held.data_ptr()
    assert not torch.equal(held, before)
    assert torch.equal(kept.layers[1].keys, before)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_through_the_rings(name):
    model, ids = build(name), tokens(29, 2, 24)
    want = torch.autograd.grad(model(ids).logits.square().sum(), list(model.parameters()))
    cache, total = TaipanCache(model), 0.0
    for piece in ids.split([10, 1, 13], 1):
        total = total + model(piece, cache=cache).logits.square().sum()
    got = torch.autograd.grad(total, list(model.parameters()))
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < BOUND


def test_autocast_goes_on_with_a_cache_made_without_it():
    model, ids = build(dtype=torch.float32), tokens(29, 2, 30)
    with torch.no_grad():
        cache = fed(model, ids[:, :20])
        with torch.autocast("cpu", torch.bfloat16):
            outs = [model(piece, cache=cache).logits for piece in ids[:, 20:].split([1, 5, 1, 3], 1)]
    assert torch.isfinite(torch.cat(outs, 1)).all()
