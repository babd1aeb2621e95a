"""Rodimus and Rodimus+ against the recurrence of `recurrences.py`: logits, caches and gradients."""

from functools import cache

import pytest
import torch
from parity_cases import (
    BOUND,
    PLUS,
    RODIMUS,
    error,
    errors_by_length,
    gradient_errors,
    long_errors,
    mistaken_error,
    shake,
    through,
    tokens,
)
from recurrences import rodimus_logits

from scrubjay import RodimusConfig, RodimusForCausalLM

RODIMUS_CASES = {
    "rodimus": RODIMUS,
    "rodimus, rounded width, gate of rank 3": RODIMUS | dict(expand=1.45, input_gate_rank=3, chunk_size=4),
    "rodimus, three taps, untied, state of 5": RODIMUS
    | dict(conv_kernel=3, tie_word_embeddings=False, state_size=5, chunk_size=1, rms_norm_eps=1e-2),
    "rodimus, small keys": RODIMUS | dict(k_norm_eps=1e-5),
    "rodimus, scaled embedding": RODIMUS | dict(scale_embedding=True, chunk_size=64),
    "rodimus, no temperature": RODIMUS | dict(temperature_gate=False),
    "rodimus, full input gate": RODIMUS | dict(input_gate="full"),
    "rodimus, no input gate": RODIMUS | dict(input_gate="none"),
    "rodimus, no convolution": RODIMUS | dict(short_conv=False),
    "rodimus, nothing but the recurrence": RODIMUS
    | dict(temperature_gate=False, input_gate="none", short_conv=False, chunk_size=5),
    "plus": PLUS,
    "plus, window 1": PLUS | dict(sliding_window=1),
    "plus, window 2": PLUS | dict(sliding_window=2, rope_theta=100.0),
    "plus, window 100": PLUS | dict(sliding_window=100),
    "plus, no positions": PLUS | dict(rotary_dim=0),
    "plus, some channels turned": PLUS | dict(rotary_dim=4),
    "plus, neighbours turned": PLUS | dict(rope_interleaved=True),
    "plus, some neighbours turned": PLUS | dict(rope_interleaved=True, rotary_dim=2, sliding_window=13),
    "plus, 2 key heads": PLUS | dict(num_key_heads=2),
    "plus, 2 value heads": PLUS | dict(num_value_heads=2),
    "plus, 2 key heads, 1 value head": PLUS | dict(num_key_heads=2, num_value_heads=1),
    "plus, as many key heads as heads": PLUS | dict(num_key_heads=4),
    "plus, 6 heads, 3 and 2 shared": PLUS | dict(num_attention_heads=6, num_key_heads=3, num_value_heads=2),
    "plus, 1 key head, 1 value head": PLUS | dict(num_value_heads=1),
    "plus, 2 key heads, 2 value heads": PLUS | dict(num_key_heads=2, num_value_heads=2),
    "plus, attention kept in the stream": PLUS | dict(two_hop=False),
    "plus, every part switched off": PLUS
    | dict(temperature_gate=False, input_gate="none", short_conv=False, two_hop=False, num_value_heads=1),
    "plus, one head": PLUS | dict(num_attention_heads=1),
    "plus, normalised embedding": PLUS | dict(norm_embedding=True),
    "plus, scaled and normalised embedding": PLUS
    | dict(norm_embedding=True, scale_embedding=True, tie_word_embeddings=False, rms_norm_eps=1e-1),
    "plus, small keys, narrow ffn": PLUS | dict(k_norm_eps=1e-5, intermediate_size=10, num_hidden_layers=3),
}


@cache
def rodimus_case(name, batch=2, length=60):
    """Model in float64, ids and the recurrence's logits."""
    config = RodimusConfig(**RODIMUS_CASES[name])
    model = shake(RodimusForCausalLM(config).double())
    if config.k_norm_eps > 1e-6:  # keys on either side of the smallest norm by which they are divided
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mixer.in_proj.weight[config.state_size :] *= config.k_norm_eps
    ids = tokens(config.vocab_size, batch, length)
    return model, ids, rodimus_logits(model.state_dict(), config, ids)


@pytest.mark.parametrize("name", RODIMUS_CASES)
def test_rodimus_equals_its_recurrence(name):
    model, ids, want = rodimus_case(name)
    errors = errors_by_length(model, ids, want, (1, 2, 5, 17, 60))
    assert max(errors.values()) < BOUND, errors


@pytest.mark.parametrize(
    "pieces", [[1] * 60, [17] + [1] * 43, [3, 1, 1, 2, 5, 1, 6, 30, 1, 10]], ids=["steps", "prefill", "pieces"]
)
@pytest.mark.parametrize("name", RODIMUS_CASES)
def test_rodimus_prefill_and_steps_equal_its_recurrence(name, pieces):
    model, ids, want = rodimus_case(name)
    assert error(through(model, ids, pieces), want) < BOUND


@pytest.mark.parametrize("name", ["rodimus", "plus", "plus, window 100"])
def test_long_rodimus_prompt_equals_its_recurrence(name):
    model, ids, want = rodimus_case(name, batch=1, length=530)
    assert max(long_errors(model, ids, want)) < BOUND
    assert error(through(model, ids, [520] + [1] * 10), want) < BOUND


RODIMUS_MISTAKES = [
    ("all channels turned", "plus, some channels turned"),
    ("attention kept in the stream", "plus"),
    ("attention kept in the stream", "plus, normalised embedding"),
    ("attention replaces the stream", "plus"),
    ("decay not applied", "rodimus"),
    ("decay without temperature", "rodimus"),
    ("embedding not normalised", "plus, normalised embedding"),
    ("embedding not scaled", "rodimus, scaled embedding"),
    ("embedding times sqrt(hidden_size)", "rodimus, scaled embedding"),
    ("eps added to the norm", "plus, small keys, narrow ffn"),
    ("eps added to the norm", "rodimus, small keys"),
    ("feed-through of x before the convolution", "rodimus"),
    ("gate without its activation", "rodimus"),
    ("gated norm without eps", "rodimus"),
    ("input gate of the convolved stream", "rodimus"),
    ("k not normalised", "rodimus"),
    ("key and value heads grouped", "plus, 2 key heads"),
    ("key and value heads grouped", "plus, 2 value heads"),
    ("no activation after the convolution", "rodimus"),
    ("no positions", "plus"),
    ("norm before gate", "rodimus"),
    ("other pairs turned", "plus"),
    ("q and k exchanged", "rodimus"),
    ("q normalised", "rodimus"),
    ("q not scaled", "rodimus"),
    ("scores not scaled", "plus"),
    ("selection and temperature exchanged", "rodimus"),
    ("selection without temperature", "rodimus"),
    ("state read before its update", "rodimus"),
    ("taps reversed", "rodimus"),
    ("turned backwards", "plus"),
    ("up and gate exchanged", "plus"),
    ("v of the convolved stream", "rodimus"),
    ("window one key long", "plus"),
    ("window one key short", "plus"),
    ("window one key short", "plus, window 2"),
    ("x and z exchanged", "rodimus"),
]


@pytest.mark.parametrize(("wrong", "name"), RODIMUS_MISTAKES)
def test_a_wrong_rodimus_recurrence_is_found(wrong, name):
    model, ids, _ = rodimus_case(name)
    assert mistaken_error(model, rodimus_logits, ids, wrong) > 100 * BOUND


WITH_GRADIENTS = (
    "rodimus, small keys",
    "rodimus, no temperature",
    "rodimus, full input gate",
    "rodimus, no convolution",
    "plus",
    "plus, 6 heads, 3 and 2 shared",
    "plus, normalised embedding",
    "plus, attention kept in the stream",
    "plus, every part switched off",
)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_rodimus_gradients_equal_those_of_its_recurrence(name):
    model, ids, _ = rodimus_case(name)
    errors = gradient_errors(model, rodimus_logits, ids[:, :40])
    assert max(errors.values()) < BOUND, errors


def test_float32_gradients_survive_gates_that_are_all_but_closed():
    """softplus(-110) is no float32 number, its logarithm and the gradient of that are."""
    model, ids, _ = rodimus_case("rodimus")
    narrow = RodimusForCausalLM(model.config)
    narrow.load_state_dict(model.state_dict())
    ids, name = ids[:, :40], "model.layers.0.mixer.mem_gate_bias"
    weights = model.state_dict() | {name: model.state_dict()[name].clone().requires_grad_()}
    (want,) = torch.autograd.grad(rodimus_logits(weights, model.config, ids).logsumexp(-1).sum(), weights[name])
    narrow(ids).logits.logsumexp(-1).sum().backward()
    got = narrow.get_parameter(name).grad
    assert want[0].abs() > 1e-3 * want.abs().max()  # the gate at -110 matters
    assert error(got, want) < 1e-4
