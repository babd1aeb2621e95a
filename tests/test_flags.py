"""What is asked of a model by its configuration, and of a model in another state than it was made in."""

import copy

import pytest
import torch
from adore_cases import decoder
from torch import nn
from zoo import ZOO, relative, tokens, trainable

from scrubjay import AdoreCache, RecycledCache
from scrubjay.modeling.cache_argument import CACHE, named

OPTIONS = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)


def test_a_model_that_returns_tuples_returns_the_same(entry):
    model, ids = entry.build(torch.float64), tokens(2, 9)
    want, text = model(ids, labels=ids), model.generate(ids, **OPTIONS)
    by_call = model(ids, labels=ids, return_dict=False)
    model.config.return_dict = False
    by_flag = model(ids, labels=ids)
    for got in (by_call, by_flag):
        assert isinstance(got, tuple)
        assert torch.equal(got[0], want.loss)
        assert torch.equal(got[1], want.logits)
    assert isinstance(model.model(ids), tuple)
    assert torch.equal(model.model(ids)[0], model.model(ids, return_dict=True).last_hidden_state)
    assert torch.equal(model.generate(ids, **OPTIONS), text)


def test_hidden_states_that_the_configuration_asks_for_are_returned(entry):
    model, ids = entry.build(torch.float64), tokens(2, 9)
    assert model(ids).hidden_states is None
    by_call = model(ids, output_hidden_states=True).hidden_states
    model.config.output_hidden_states = True
    for got in (model(ids).hidden_states, model.model(ids).hidden_states):
        assert len(got) == len(by_call) == model.config.num_hidden_layers + 1
        assert all(torch.equal(a, b) for a, b in zip(got, by_call, strict=True))
    torch.testing.assert_close(model.lm_head(by_call[-1]), model(ids).logits.to(by_call[-1].dtype))
    assert model(ids, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("entry", [entry for entry in ZOO if not entry.recurrent], ids=lambda entry: entry.name)
def test_probabilities_that_the_configuration_asks_for_are_the_decoders(entry):
    model, ids = entry.build(torch.float64), tokens(2, 9)
    model.set_attn_implementation("eager")
    want = model.get_decoder()(ids, output_attentions=True, use_cache=False).attentions
    by_call = model(ids, output_attentions=True, use_cache=False).attentions
    model.config.output_attentions = True
    for got in (by_call, model(ids, use_cache=False).attentions):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert want[0].shape == (2, 4, 9, 9)


def packed(length):
    """position_ids of rows that hold two documents."""
    return torch.cat([torch.arange(4), torch.arange(length - 4)]).expand(2, -1)


@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
def test_hidden_states_hang_on_the_graph(entry, kind):
    """The gradient at a hidden state is the loss's: along the state itself it is what scaling the state does."""
    model, ids = entry.build(torch.float64), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    inputs = {"plain": {}, "padded": {"attention_mask": mask}, "packed": {"position_ids": packed(12)}}[kind]
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    layers = model.get_decoder().layers
    handle = layers[1].register_forward_pre_hook(lambda module, args: (args[0] * scale, *args[1:]))
    ours = model(ids, labels=ids, **inputs)
    ours.loss.backward()
    handle.remove()
    out = model(ids, labels=ids, output_hidden_states=True, use_cache=False, **inputs)
    for state in out.hidden_states:
        state.retain_grad()
    out.loss.backward()
    assert all(state.grad is not None and state.grad.abs().sum() > 0 for state in out.hidden_states)
    assert relative((out.hidden_states[1].grad * out.hidden_states[1]).sum(), scale.grad) < 1e-10


def test_a_model_in_train_mode_that_checkpoints_generates(entry):
    model, ids = entry.build(torch.float64), tokens(2, 9)
    want = model.generate(ids, **OPTIONS)
    model.train().gradient_checkpointing_enable()
    got = model.generate(ids, return_dict_in_generate=True, **OPTIONS)
    if not entry.samples:
        assert torch.equal(got.sequences, want)
    assert got[CACHE].get_seq_length() == want.shape[1] - 1, "the cache was advanced"
    cache = entry.model.cache_class(model)
    again = model.generate(ids, **named(cache), **OPTIONS)
    assert entry.samples or torch.equal(again, want)
    out = model(ids, labels=ids)  # and trains afterwards
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in trainable(model))


@pytest.mark.parametrize("make", [AdoreCache, RecycledCache])
def test_a_decoder_that_checkpoints_is_told_what_to_do(make):
    model, ids = decoder(), tokens(2, 9) % 61
    with make(model) as cache:
        model.train().gradient_checkpointing_enable()
        with pytest.raises(ValueError, match=r"pass none, or call model.eval\(\)"):
            model(ids, **named(cache))
        model(ids, use_cache=False, labels=ids).loss.backward()
        model.eval()
        assert torch.equal(model(ids, **named(cache)).logits, model(ids, use_cache=False).logits)


# Blocks by their place.


def rearranged(model, order):
    """The model with copies of its blocks in another order."""
    inner = model.get_decoder()
    inner.layers = nn.ModuleList(copy.deepcopy(inner.layers[i]) for i in order)
    return model


def check_cached(model, ids):
    """Steps, one prompt and generate() give what no cache gives."""
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, steps = None, []
        for piece in ids.split([5, 1, 1, ids.shape[1] - 7], 1):
            out = model(piece, cache=cache, use_cache=True)
            cache, _ = out.cache, steps.append(out.logits)
    assert relative(torch.cat(steps, 1), whole) < 1e-9
    assert torch.equal(model.generate(ids, **OPTIONS), model.generate(ids, use_cache=False, **OPTIONS))


@pytest.mark.parametrize("order", [(1, 0), (0, 0, 1), (1,), (1, 1, 1, 0)])
def test_blocks_are_repeated_dropped_and_exchanged(entry, order, tmp_path):
    if entry.name == "taipan":
        order = tuple(2 * i + j for i in order for j in (0, 1))  # a group is a Mamba-2 and a selective block
    sizes = dict(num_hidden_layers=4) if entry.name == "taipan" else {}
    model, ids = entry.build(torch.float64, **sizes), tokens(2, 14)
    before = model(ids, use_cache=False).logits
    rearranged(model, order)
    configs = [model.config] + ([model.get_decoder().config] if not entry.recurrent else [])
    for config in configs:
        config.num_hidden_layers = len(order)
    if not entry.recurrent:
        for place, layer in enumerate(model.get_decoder().layers):
            layer.self_attn.layer_idx = place
    assert relative(model(ids, use_cache=False).logits, before) > 1e-3
    check_cached(model, ids)
    if entry.recurrent:
        model.save_pretrained(tmp_path)
        again = entry.model.from_pretrained(tmp_path, dtype=torch.float64).eval()
        assert relative(again(ids).logits, model(ids).logits) < 1e-12  # products round by where their operands lie


def test_a_number_of_blocks_that_the_configuration_does_not_know_is_refused(recurrent):
    model, ids = recurrent.build(), tokens(1, 5)
    count = len(model.model.layers)
    rearranged(model, range(count - 1))
    model(ids, use_cache=False)
    with pytest.raises(ValueError, match=f"has {count - 1} blocks, and num_hidden_layers = {count}"):
        model(ids, use_cache=True)
    with pytest.raises(ValueError, match=f"has {count - 1} blocks, and num_hidden_layers = {count}"):
        model.generate(ids, **OPTIONS)


def test_selective_blocks_in_other_places_are_refused():
    entry = next(entry for entry in ZOO if entry.name == "taipan")
    model = rearranged(entry.build(num_hidden_layers=4), (1, 0, 2, 3))
    with pytest.raises(ValueError, match=r"selective blocks at \[0, 3\] and its configuration at \[1, 3\]"):
        model(tokens(1, 5), use_cache=True)


@pytest.mark.parametrize("make", [AdoreCache, RecycledCache])
@pytest.mark.parametrize("order", [(1, 0, 2), (0, 0, 1), (0, 2)])
def test_layers_of_a_decoder_out_of_place_are_refused_until_they_are_numbered(make, order):
    model, ids = rearranged(decoder(), order), tokens(2, 9) % 61
    model.config.num_hidden_layers = len(order)
    with make(model) as cache, pytest.raises(ValueError, match="number them anew"):
        model(ids, **named(cache))
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    with torch.no_grad(), make(model) as cache:
        got = torch.cat([model(piece, **named(cache)).logits for piece in ids.split([5, 1, 3], 1)], 1)
        assert relative(got, model(ids, use_cache=False).logits) < 1e-9
