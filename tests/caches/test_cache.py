"""The caches: their bytes, their rows, their files."""

import copy

import pytest
import torch
from zoo import ZOO, relative, tokens

from scrubjay import RodimusCache, RodimusConfig, RodimusForCausalLM, SSDCache


@pytest.fixture
def entry(recurrent):
    return recurrent


@pytest.fixture
def model(entry):
    return entry.build(torch.float64)


@torch.no_grad()
def filled(model, ids):
    return model(ids, use_cache=True).cache


@torch.no_grad()
def logits(model, ids, cache):
    return model(ids, cache=cache).logits


def test_bytes_are_those_of_the_docstring_and_constant():
    ssd, rodimus, plus = (entry.build() for entry in ZOO[:3])
    for model in (ssd, rodimus, plus):
        sizes = {filled(model, tokens(2, n)).nbytes for n in (1, 10, 200)}
        assert len(sizes) == 1
    c, layers = ssd.config, 2
    conv = (c.conv_kernel - 1) * (c.inner_size + 2 * c.n_groups * c.state_size) * 4
    want = layers * (conv + c.num_heads * c.state_size * c.head_dim * 4 + 8)
    assert filled(ssd, tokens(2, 5)).nbytes == 2 * want
    c = plus.config
    mixer = (c.conv_kernel - 1) * c.inner_size * 4 + c.state_size * c.inner_size * 4 + 8
    window = c.sliding_window * (c.num_key_heads + c.num_value_heads) * c.head_dim * 4
    assert filled(rodimus, tokens(3, 5)).nbytes == 3 * layers * mixer
    assert filled(plus, tokens(3, 5)).nbytes == 3 * layers * (mixer + window)


def test_bytes_are_the_same_after_a_thousand_and_a_million_tokens():
    sizes = dict(hidden_size=8, num_hidden_layers=1, vocab_size=16, state_size=4, num_attention_heads=1, chunk_size=64)
    model = RodimusForCausalLM(RodimusConfig(**sizes, sliding_window=16)).eval()
    ids = torch.randint(0, 16, (1, 50_000))
    cache = RodimusCache(model)
    with torch.no_grad():
        model(ids[:, :1000], cache=cache, logits_to_keep=1)
        early = cache.nbytes
        model(ids[:, 1000:], cache=cache, logits_to_keep=1)
        for _ in range(19):
            out = model(ids, cache=cache, logits_to_keep=1)
    assert cache.get_seq_length() == 1_000_000
    assert cache.nbytes == early
    assert torch.isfinite(out.logits).all()
    # the window turned its keys by positions near 10^6; only differences may count
    with torch.no_grad():
        late = model(ids[:, :1], cache=cache).logits
    assert torch.isfinite(late).all()


def test_positions_near_a_million_rotate_as_those_near_zero():
    entry = ZOO[2]
    model = entry.build(num_hidden_layers=1)
    ids, near = tokens(1, 30), filled(model, tokens(1, 30))
    far = copy.deepcopy(near)
    shift = 999_999  # a multiple of the window of 9: slots stay where they are
    keys = model.model.layers[0].attn
    far.layers[0].counts += shift
    from scrubjay.kernels.rotary import rotary_table, rotate

    positions = torch.arange(21, 30)[None]
    slots = positions[0] % 9
    unturned = rotate(
        near.layers[0].keys[:, :, slots].transpose(1, 2), _inverse(rotary_table(positions, 12, 1e4, torch.float32))
    )
    turned = rotate(unturned, rotary_table(positions + shift, 12, 1e4, torch.float32))
    far.layers[0].keys[:, :, slots] = turned.transpose(1, 2)
    assert keys.window == 9
    assert relative(logits(model, ids[:, :3], far), logits(model, ids[:, :3], near)) < 2e-5


def _inverse(table):
    return table[0], -table[1]


def test_rows_reorder_repeat_and_select(model):
    ids, more = tokens(3, 25), tokens(3, 4, seed=2)
    want = logits(model, more, filled(model, ids))
    order = torch.tensor([2, 0, 0])
    for method in ("reorder_cache", "batch_select_indices"):
        cache = filled(model, ids)
        getattr(cache, method)(order)
        assert relative(logits(model, more[order], cache), want[order]) < 1e-10
    cache = filled(model, ids)
    cache.batch_repeat_interleave(2)
    assert relative(logits(model, more.repeat_interleave(2, 0), cache), want.repeat_interleave(2, 0)) < 1e-10


def test_reset_forgets(model):
    ids = tokens(2, 25)
    cache = filled(model, ids)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert relative(logits(model, ids, cache), logits(model, ids, None)) < 1e-10


def test_a_copy_is_a_fork(model):
    ids, more = tokens(2, 25), tokens(2, 6, seed=2)
    cache = filled(model, ids)
    fork = copy.deepcopy(cache)
    want = logits(model, more, cache)
    assert torch.equal(logits(model, more, fork), want)
    assert fork.get_seq_length() == cache.get_seq_length() == 31


def test_saved_and_loaded_goes_on_bit_for_bit(entry, model, tmp_path):
    ids, more = tokens(2, 25), tokens(2, 6, seed=2)
    cache = filled(model, ids)
    cache.save(tmp_path / "prompt.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["prompt.safetensors"]
    loaded = entry.model.cache_class.load(tmp_path / "prompt.safetensors")
    assert loaded.get_seq_length() == 25
    assert loaded.nbytes == cache.nbytes
    assert torch.equal(logits(model, more, loaded), logits(model, more, cache))


def test_files_of_another_kind_are_refused(entry, model, tmp_path):
    cls = entry.model.cache_class
    filled(model, tokens(1, 5)).save(tmp_path / "cache.safetensors")
    other = SSDCache if cls is RodimusCache else RodimusCache
    with pytest.raises(ValueError, match=f"holds {cls.__name__}; {other.__name__}.load needs"):
        other.load(tmp_path / "cache.safetensors")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds no cache"):
        cls.load(tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="empty"):
        cls(model).save(tmp_path / "nothing.safetensors")
    assert not (tmp_path / "nothing.safetensors").exists()


def test_a_cache_of_another_model_or_batch_is_refused(entry, model):
    cache = filled(model, tokens(2, 5))
    with pytest.raises(ValueError, match="holds 2 rows, the input has 3"):
        logits(model, tokens(3, 1), cache)
    wider = entry.build(torch.float64, hidden_size=96)
    with pytest.raises(ValueError, match="made for another model"):
        logits(wider, tokens(2, 1), cache)


def test_crop_is_refused_with_what_to_do_instead(model):
    cache = filled(model, tokens(1, 5))
    with pytest.raises(ValueError, match="deepcopy"):
        cache.crop(-1)
    cache.crop(0)
    assert cache.get_seq_length() == 5


def test_a_step_advances_the_state_where_it_is_and_leaves_copies_alone(model):
    """One token takes no new memory for the state: its pages cost more time than its arithmetic."""
    cache = filled(model, tokens(1, 5))
    held, kept = cache.layers[0].state, copy.deepcopy(cache)
    before = held.clone()
    logits(model, tokens(1, 1), cache)
    assert cache.layers[0].state.data_ptr() == held.data_ptr()
    assert not torch.equal(held, before)
    assert torch.equal(kept.layers[0].state, before)


def test_gradients_flow_through_a_cache(entry):
    model, ids = entry.build(torch.float64), tokens(2, 24)
    whole = model(ids).logits.square().sum()
    want = torch.autograd.grad(whole, list(model.parameters()))
    cache, total = entry.model.cache_class(model), 0.0
    for piece in ids.split([10, 1, 13], 1):
        total = total + model(piece, cache=cache).logits.square().sum()
    got = torch.autograd.grad(total, list(model.parameters()))
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-9
