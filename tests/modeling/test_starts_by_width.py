"""How a model starts does not depend on its width: what tells tokens apart is as large at 64 as at published widths."""

import pytest
import torch
import torch.nn.functional as F

from scrubjay import RodimusConfig, RodimusModel, SSDConfig, SSDModel, TaipanConfig, TaipanModel
from scrubjay.modeling.decoder.controller import Controller

WIDTHS = (64, 256, 2048)
TOKENS = 64


def made_by(model, part):
    """What the projection or convolution `part` gives for TOKENS different tokens in a row, (T, channels)."""
    found = []
    handle = part.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        model.eval()(torch.randperm(TOKENS)[None], use_cache=False)
    handle.remove()
    return (found[0][0] if isinstance(found[0], tuple) else found[0])[0]


def collinearity(x):
    """Mean cosine of two different rows of (T, channels)."""
    cosines = F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).T
    return float((cosines.sum() - len(x)) / (len(x) * (len(x) - 1)))


def rodimus_keys(block_type, width, **changes):
    """Keys (T, N) of the first block before their gates."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=width, num_hidden_layers=1, vocab_size=TOKENS, intermediate_size=64)
    model = RodimusModel(RodimusConfig(block_type=block_type, **sizes | changes))
    return made_by(model, model.layers[0].mixer.in_proj).chunk(2, -1)[1]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("block_type", ["rodimus", "rodimus_plus"])
def test_keys_of_different_tokens_start_apart(block_type, width):
    assert collinearity(rodimus_keys(block_type, width)) < 0.4


@pytest.mark.parametrize("block_type", ["rodimus", "rodimus_plus"])
def test_from_the_scale_of_2048_keys_of_a_narrow_model_start_collinear(block_type):
    """What the test above would find."""
    assert collinearity(rodimus_keys(block_type, 64, initializer_range=0.02)) > 0.4


@pytest.mark.parametrize("width", WIDTHS)
def test_keys_of_ssd_start_as_far_apart_at_every_width(width):
    """Its authors start projections by their width: at each the convolution's bias makes them as much alike."""
    torch.manual_seed(0)
    model = SSDModel(SSDConfig(hidden_size=width, num_hidden_layers=1, vocab_size=TOKENS))
    mixer = model.layers[0].mixer
    parts = [mixer.inner, mixer.keys, mixer.keys]
    assert 0.35 < collinearity(made_by(model, mixer.conv1d).split(parts, -1)[1]) < 0.5
    torch.nn.init.zeros_(mixer.conv1d.bias)
    assert collinearity(made_by(model, mixer.conv1d).split(parts, -1)[1]) < 0.05


@pytest.mark.parametrize("width", WIDTHS)
def test_adores_controller_tells_tokens_of_every_width_apart(width):
    """From embeddings as small as decoders start them."""
    torch.manual_seed(0)
    controller = Controller(width)
    with torch.no_grad():
        contexts, _ = controller.contexts(0.02 * torch.randn(1, TOKENS, width))
        assert collinearity(contexts[0]) < 0.1
        assert collinearity(controller.first(contexts)[0]) < 0.25


def taipan_spread(width, **changes):
    """Standard deviations of the scores of attention, the gate's delta and what enters the feed-forward network."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=width, num_hidden_layers=2, attention_every=1, vocab_size=TOKENS, intermediate_size=64)
    model = TaipanModel(TaipanConfig(**sizes, **dict(expand=1, state_size=16) | changes))
    block, size = model.layers[1], model.config.attention_head_dim
    with torch.no_grad():
        x = made_by(model, block.attn.norm)
        q, k = (proj(x).unflatten(-1, (-1, size)).transpose(0, 1) for proj in (block.attn.q_proj, block.attn.k_proj))
    scores = q @ k.mT * size**-0.5
    return {
        "scores": float(scores.std()),
        "delta": float(made_by(model, block.attn.gate).std()),
        "feed-forward": float(made_by(model, block.ffn.fc).std()),
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_selective_attention_starts_as_peaked_at_every_width(width):
    spread = taipan_spread(width)
    assert 0.7 < spread["scores"] < 0.95  # 0.905 ** 2 = 0.82: 0.02 ** 2 times 2048
    assert 0.8 < spread["feed-forward"] < 1.0
    assert spread["delta"] > 0.8


def test_from_the_scale_of_2048_selective_attention_of_a_narrow_model_sees_all_keys_alike():
    """What the test above would find."""
    spread = taipan_spread(64, initializer_range=0.02)
    assert spread["scores"] < 0.05
    assert spread["feed-forward"] < 0.2
    assert spread["delta"] < 0.4
