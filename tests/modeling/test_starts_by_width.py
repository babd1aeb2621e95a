"""How a model starts does not depend on its width: what tells tokens apart is as large at 64 as at published widths."""

import pytest
import torch
import torch.nn.functional as F

from scrubjay import RodimusConfig, RodimusModel

WIDTHS = (64, 256, 2048)
TOKENS = 64


def made_by(model, part):
    """What the projection `part` gives for TOKENS different tokens in a row, (T, channels)."""
    found = []
    handle = part.register_forward_hook(lambda module, args, output: found.append(output[0]))
    with torch.no_grad():
        model.eval()(torch.randperm(TOKENS)[None], use_cache=False)
    handle.remove()
    return found[0]


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
