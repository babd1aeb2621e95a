"""Layers repeated, left out and exchanged after a model was made, as depth pruning and merging do."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from zoo import ZOO, tokens

from scrubjay import AdoreCache, RecycledCache
from scrubjay.modeling.inputs.cache_argument import named

CHANGES = {
    "a copy more": lambda layers: [*layers, *copy.deepcopy(layers)],
    "the same twice": lambda layers: [*layers, *layers],
    "one left out": lambda layers: layers[: len(layers) // 2],
    "exchanged": lambda layers: [*layers[len(layers) // 2 :], *layers[: len(layers) // 2]],
}
ATTACHED = {
    "adore": lambda model: AdoreCache(model, cache_size=8, recent=2),
    "recycled": lambda model: RecycledCache(model, budget=8, stride=3),
}


def changed(entry, change, count=True):
    """A model whose layers were changed, in whole groups; `count`: with its configuration."""
    layers = 4 if entry.name == "taipan" else 2  # taipan: a Mamba-2 block and a selective one, twice
    model = entry.build(num_hidden_layers=layers)
    model.model.layers = nn.ModuleList(CHANGES[change](list(model.model.layers)))
    if count:
        counted(model)
    return model


def counted(model):
    """Its configuration says what the model has: how many blocks, and which of a hybrid are of attention."""
    model.config.num_hidden_layers = len(model.model.layers)
    if getattr(model.config, "attn_layer_idx", None):
        model.config.attn_layer_idx = [i for i, block in enumerate(model.model.layers) if block.attends]


def stepped(model, ids):
    """Logits of a prompt of 9 tokens and single ones after it."""
    cache, found = None, []
    for piece in (ids[:, :9], *ids[:, 9:].split(1, 1)):
        out = model(piece, use_cache=True, **named(cache))
        cache = out.past_key_values if hasattr(out, "past_key_values") else out.cache
        found.append(out.logits)
    return torch.cat(found, 1)


def check(model, ids):
    """Steps on a cache give what one pass gives, and generation what an argmax loop does."""
    want = model(ids, use_cache=False).logits
    assert (stepped(model, ids) - want).abs().max() < 1e-5 * want.abs().max()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
    return want


def renumber(model):
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_state_is_that_of_a_place(recurrent, change, tmp_path):
    model, ids = changed(recurrent, change), tokens(2, 14)
    want = check(model, ids)
    if change != "the same twice":  # of which a file has one
        model.save_pretrained(tmp_path)
        assert torch.equal(check(recurrent.model.from_pretrained(tmp_path), ids), want)


@torch.no_grad()
@pytest.mark.parametrize("change", ["a copy more", "one left out"])
def test_a_number_of_blocks_that_the_configuration_does_not_know_is_refused(recurrent, change):
    model, ids = changed(recurrent, change, count=False), tokens(2, 14)
    held, said = len(model.model.layers), model.config.num_hidden_layers
    with pytest.raises(ValueError, match=rf"has {held} blocks, and num_hidden_layers = {said}"):
        model(ids, use_cache=True)
    counted(model)
    check(model, ids)


@pytest.mark.parametrize("change", ["a copy more", "one left out"])
def test_a_number_of_blocks_that_no_folder_would_give_back_is_refused_before_anything_is_lost(entry, change, tmp_path):
    model, ids = changed(entry, change, count=False), tokens(2, 14)
    message = (
        rf"has {len(model.model.layers)} blocks, and num_hidden_layers = {model.config.num_hidden_layers} .*deepcopy"
    )
    for call in (
        lambda: model(ids, use_cache=False),
        lambda: model.train()(ids, labels=ids),
        lambda: model.save_pretrained(tmp_path),
        lambda: model.model.save_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not list(tmp_path.iterdir())


def test_a_block_that_stands_twice_is_not_saved_once(entry, tmp_path):
    model = changed(entry, "the same twice")
    with pytest.raises(ValueError, match=r"stands twice .*copy\.deepcopy"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_selective_blocks_out_of_their_places_are_refused():
    (entry,) = (entry for entry in ZOO if entry.name == "taipan")
    model = entry.build(num_hidden_layers=4)
    one, other, *rest = model.model.layers
    model.model.layers = nn.ModuleList([other, one, *rest])
    with torch.no_grad(), pytest.raises(ValueError, match=r"selective blocks at .* and its configuration at"):
        model(tokens(1, 9), use_cache=True)


def test_attention_layers_out_of_their_places_are_refused(tmp_path):
    (entry,) = (entry for entry in ZOO if entry.name == "ssd_hybrid")
    model, ids = entry.build(num_hidden_layers=4), tokens(1, 9)
    model.model.layers = nn.ModuleList(reversed(list(model.model.layers)))
    message = r"attention layers at \[0\] and its configuration at \[3\] \(attn_layer_idx\)"
    for call in (lambda: model(ids, use_cache=True), lambda: model.save_pretrained(tmp_path)):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            call()
    model.config.attn_layer_idx = [0]
    with torch.no_grad():
        check(model, tokens(2, 14))


@torch.no_grad()
@pytest.mark.parametrize("change", [name for name in CHANGES if name != "the same twice"])
@pytest.mark.parametrize("kind", [entry for entry in ZOO if not entry.recurrent], ids=lambda entry: entry.name)
def test_layers_of_a_decoder_are_numbered_by_hand(kind, change, tmp_path):
    model, ids = changed(kind, change), tokens(2, 14)
    if change != "one left out":  # the first ones keep their numbers
        with pytest.raises(ValueError, match=r"layer\.self_attn\.layer_idx = i"):
            model(ids, use_cache=True)
    renumber(model)
    want = check(model, ids)
    model.save_pretrained(tmp_path)
    assert torch.equal(check(kind.model.from_pretrained(tmp_path), ids), want)


@torch.no_grad()
@pytest.mark.parametrize("kind", ATTACHED)
def test_layers_of_a_decoder_of_transformers_are_numbered_by_hand(kind):
    config = next(entry for entry in ZOO if not entry.recurrent).config(num_hidden_layers=3).base_config
    model, ids = AutoModelForCausalLM.from_config(config).eval(), tokens(2, 7)
    cache = ATTACHED[kind](model)
    model.model.layers = nn.ModuleList([model.model.layers[i] for i in (2, 0)])
    with pytest.raises(ValueError, match=r"has 2 layers, this .* was made for 3"):
        model(ids, **named(cache))
    cache.close()
    model.config.num_hidden_layers = 2
    with ATTACHED[kind](model) as cache:
        with pytest.raises(ValueError, match=r"the order \[2, 0\]"):
            model(ids, **named(cache))
        renumber(model)
        got = torch.cat([model(piece, **named(cache)).logits for piece in (ids[:, :3], *ids[:, 3:].split(1, 1))], 1)
    want = model(ids, use_cache=False).logits
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
