"""SSD against the recurrence of `recurrences.py`: logits, caches and gradients."""

from functools import cache

import pytest
from parity_cases import (
    BOUND,
    SSD,
    error,
    errors_by_length,
    gradient_errors,
    long_errors,
    mistaken_error,
    shake,
    through,
    tokens,
    whole,
)
from recurrences import ssd_logits

from scrubjay import SSDConfig, SSDForCausalLM

LIMITS = {"no limit": None, "finite limit": (0.1, 0.6)}
OTHER_SSD = {
    "three heads, two taps": dict(expand=1.5, conv_kernel=2, use_conv_bias=False, layer_norm_epsilon=1e-2),
    "one tap, tied": dict(conv_kernel=1, tie_word_embeddings=True, num_hidden_layers=3),
    "untied, five taps": dict(conv_kernel=5, tie_word_embeddings=False, head_dim=4, n_groups=2, chunk_size=7),
}
PIECES = {"steps": [1] * 70, "prefill 65": [65] + [1] * 5, "prefill 2": [2, 1, 1, 3, 1, 4, 5, 1, 1, 50, 1]}
GROUPS_BIASES_LIMITS = [
    pytest.param(
        dict(n_groups=groups, use_bias=bias, use_conv_bias=bias, time_step_limit=LIMITS[limit]),
        id=f"{groups}-{name}-{limit}",
    )
    for limit in LIMITS
    for name, bias in (("plain", False), ("biases", True))
    for groups in (1, 2, 4)
]


@cache
def ssd_case(batch=2, length=150, **sizes):
    """Model in float64, ids and the recurrence's logits. The recurrence knows no chunks."""
    model = shake(SSDForCausalLM(SSDConfig(**SSD | sizes)).double())
    ids = tokens(model.config.vocab_size, batch, length)
    return model, ids, ssd_logits(model.state_dict(), model.config, ids)


def ssd_with_chunk(chunk, **sizes):
    model, ids, want = ssd_case(**sizes)
    rechunked = SSDForCausalLM(SSDConfig(**SSD | sizes | {"chunk_size": chunk})).double().eval()
    rechunked.load_state_dict(model.state_dict())
    return rechunked, ids, want


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("sizes", GROUPS_BIASES_LIMITS)
def test_ssd_equals_its_recurrence(sizes, chunk):
    model, ids, want = ssd_with_chunk(chunk, **sizes)
    lengths = (1, 3, 4, 5, 64, 65, 150)  # below, at and across the taps and the chunks
    errors = errors_by_length(model, ids, want, lengths)
    assert max(errors.values()) < BOUND, errors


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("sizes", GROUPS_BIASES_LIMITS)
def test_ssd_prefill_and_steps_equal_its_recurrence(sizes, pieces):
    model, ids, want = ssd_case(**sizes)
    assert error(through(model, ids[:, :70], PIECES[pieces]), want[:, :70]) < BOUND


@pytest.mark.parametrize("name", OTHER_SSD)
def test_other_ssd_sizes_equal_their_recurrence(name):
    model, ids, want = ssd_case(length=40, **OTHER_SSD[name])
    assert error(whole(model, ids), want) < BOUND
    assert error(through(model, ids, [9] + [1] * 28 + [3]), want) < BOUND


def test_long_ssd_prompt_equals_its_recurrence():
    model, ids, want = ssd_case(batch=1, length=700, n_groups=2)
    assert max(long_errors(model, ids, want)) < BOUND


SSD_MISTAKES = {
    "A_log taken for the rate": {},
    "B and C exchanged": {},
    "B and C not convolved": {},
    "clamp before softplus": {"time_step_limit": (0.1, 0.6)},
    "clamp ignored": {"time_step_limit": (0.1, 0.6)},
    "decay not applied": {},
    "dt_bias after softplus": {},
    "gate without its activation": {},
    "gated norm over all channels": {"n_groups": 2},
    "gated norm without eps": {},
    "groups tiled": {"n_groups": 2},
    "input not times dt": {},
    "no activation after the convolution": {},
    "no final norm": {},
    "norm before gate": {},
    "residual after the norm": {},
    "skip of dt times x": {},
    "skip of x before the convolution": {},
    "state read before its update": {},
    "taps reversed": {},
    "z and x exchanged": {},
}


@pytest.mark.parametrize("wrong", SSD_MISTAKES)
def test_a_wrong_ssd_recurrence_is_found(wrong):
    model, ids, _ = ssd_case(**SSD_MISTAKES[wrong])
    assert mistaken_error(model, ssd_logits, ids, wrong) > 100 * BOUND


@pytest.mark.parametrize(
    "sizes", [{}, {"n_groups": 2, "time_step_limit": (0.1, 0.6), "use_bias": True, "chunk_size": 4}], ids=str
)
def test_ssd_gradients_equal_those_of_its_recurrence(sizes):
    model, ids, _ = ssd_case(**sizes)
    errors = gradient_errors(model, ssd_logits, ids[:, :40])
    assert max(errors.values()) < BOUND, errors


@pytest.mark.parametrize("log_rate", [30.0, 89.0, 800.0])
def test_ssd_heads_that_forget_everything_equal_their_recurrence(log_rate):
    """exp(800) is infinite in float64 too."""
    model = shake(SSDForCausalLM(SSDConfig(**SSD)).double())
    for block in model.model.layers:
        block.mixer.A_log.data[::2] = log_rate
    ids = tokens(model.config.vocab_size, 2, 70)
    want = ssd_logits(model.state_dict(), model.config, ids)
    assert error(whole(model, ids), want) < BOUND
    assert error(through(model, ids, [65] + [1] * 5), want) < BOUND


def test_the_padding_token_of_ssd_learns_like_any_other():
    """Published models pad with the token that ends documents; the authors and transformers exempt it from nothing."""
    model, ids, _ = ssd_case(pad_token_id=0)
    assert (ids[:, :40] == 0).any()
    errors = gradient_errors(model, ssd_logits, ids[:, :40])
    assert max(errors.values()) < BOUND, errors
