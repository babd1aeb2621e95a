"""Continued pre-training of Recycled Attention: the last tokens of a row see what a cache would have kept for them."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from zoo import relative, tokens

from scrubjay import RecycledCache, RecycledConfig, RecycledForCausalLM
from scrubjay.modeling.inputs.cache_argument import named

TAIL, LENGTH = 5, 30


def build(**changes):
    """A model whose attention is peaked, in float64 and train mode."""
    sizes = dict(hidden_size=48, num_hidden_layers=2, vocab_size=97, num_attention_heads=4, num_key_value_heads=2)
    config = RecycledConfig(**sizes | dict(budget=6, train_tail=TAIL, initializer_range=0.3) | changes)
    torch.manual_seed(0)
    return RecycledForCausalLM(config).double().train()


@pytest.mark.parametrize("settings", [{}, {"group_reduce": "mean"}, {"pool_kernel": 1}, {"n_sink": 2}], ids=str)
def test_a_recycled_tail_sees_what_the_cache_keeps(settings):
    """One layer: the kept keys of deeper ones differ once the prompt's last layers do not run with a cache."""
    model, ids = build(num_hidden_layers=1, **settings), tokens(2, LENGTH)
    got = model(ids).logits
    model.eval()
    cache = RecycledCache(model, evict_first=False, stride=10**6)
    with torch.no_grad():
        prompt = model(ids[:, :-TAIL], **named(cache)).logits
        step = model(ids[:, -TAIL : 1 - TAIL], **named(cache)).logits
    assert relative(got[:, :-TAIL], prompt) < 1e-10
    assert relative(got[:, -TAIL : 1 - TAIL], step) < 1e-10
    cache = RecycledCache(model, budget=100, stride=1)
    with torch.no_grad():
        everything = model(ids, **named(cache)).logits
    assert relative(got[:, -TAIL:], everything[:, -TAIL:]) > 1e-2


def test_a_recycled_tail_of_a_budget_that_holds_all_is_ordinary_attention():
    model, ids = build(budget=100), tokens(2, LENGTH)
    got = model(ids).logits
    model.config.train_tail = 0
    assert relative(got, model(ids).logits) < 1e-10


def test_a_recycled_tail_leaves_full_layers_alone():
    ids = tokens(2, LENGTH)
    whole, one = (build(full_layers=layers)(ids).logits for layers in ([0, 1], [1]))
    model = build(train_tail=0)
    assert relative(whole, model(ids).logits) < 1e-10
    assert relative(one, model(ids).logits) > 1e-2
    assert relative(one, build()(ids).logits) > 1e-2
    assert RecycledCache(build(), policy="full").settings.train_tail == 0  # a cache trains nothing
    with pytest.raises(Exception, match="other policies than 'recycled' have no such training; got 5 and 'full'"):
        build(policy="full")


def test_a_recycled_tail_has_no_effect_outside_train_mode():
    model, ids = build().eval(), tokens(2, LENGTH)
    with torch.no_grad():
        got = model(ids, use_cache=False).logits
        model.config.train_tail = 0
        assert torch.equal(got, model(ids, use_cache=False).logits)


def test_documents_are_apart_after_a_recycled_tail_was_trained():
    """Its attention function stays in the decoder for good."""
    model, ids = build(), tokens(1, 20)
    model(ids)
    model.eval()
    with torch.no_grad():
        packed = model(ids, attention_mask=torch.tensor([[1] * 8 + [2] * 10 + [0] * 2])).logits
        parts = [model(part, use_cache=False).logits for part in (ids[:, :8], ids[:, 8:18])]
    assert (packed[:, :18] - torch.cat(parts, 1)).abs().max() < 1e-12


@pytest.mark.parametrize("reentrant", [True, False])
def test_recycled_tail_gradients_under_checkpointing_are_the_same(reentrant):
    model, ids = build(), tokens(2, LENGTH)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(grad.abs().max() > 0 for grad in grads[0])


def test_recycled_tail_gradients_equal_finite_differences(monkeypatch):
    # transformers' norm rounds to float32 inside, which a difference of 1e-6 would magnify
    norm = lambda self, x: F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)  # noqa: E731
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    model, ids = build(), tokens(1, 12)
    weight = model.model.layers[0].self_attn.k_proj.weight
    model(ids, labels=ids).loss.backward()
    direction = torch.randn_like(weight)
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            weight += sign * 1e-6 * direction
            losses.append(model(ids, labels=ids).loss)
            weight -= sign * 1e-6 * direction
    slope = (losses[0] - losses[1]) / 2e-6
    assert abs(slope - (weight.grad * direction).sum()) < 1e-6 * abs(slope)


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_ids": tokens(2, TAIL)},
        {"input_ids": tokens(2, 20), "attention_mask": torch.ones(2, 20).tril(10)},
        {"input_ids": tokens(1, 20), "position_ids": torch.cat([torch.arange(8), torch.arange(12)])[None]},
        {"input_ids": tokens(1, 20), "cu_seq_lens_q": torch.tensor([0, 8, 20])},
        {"input_ids": tokens(1, 20), "attention_mask": torch.tensor([[1] * 8 + [2] * 12])},
        {"input_ids": tokens(1, 20), "seq_idx": torch.tensor([[0] * 18 + [-1] * 2])},
    ],
    ids=["short", "padded", "packed", "packed by offsets", "packed by a mask", "padded by numbers"],
)
def test_recycled_tail_refuses_what_it_is_not_defined_for(arguments):
    with pytest.raises(ValueError, match="train_tail = 5 needs rows of more tokens"):
        build()(**arguments)
