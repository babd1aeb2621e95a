"""The models that every contract test runs over: one line each, small, with every part of the architecture in it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.configuration_utils import PreTrainedConfig

from scrubjay import (
    AdoreConfig,
    AdoreForCausalLM,
    RecycledConfig,
    RecycledForCausalLM,
    RodimusConfig,
    RodimusForCausalLM,
    SSDConfig,
    SSDForCausalLM,
    TaipanConfig,
    TaipanForCausalLM,
)

VOCAB = 97


@dataclass(frozen=True)
class Entry:
    """A name, how to make the configuration, and the model's class.

    recurrent: its cache is a state that sums tokens up; otherwise it is a decoder of transformers around a cache.
    samples: training draws from torch's generator, so that two passes differ unless it is set back between them.
    """

    name: str
    config: Callable
    model: type
    recurrent: bool = True
    samples: bool = False

    def build(self, dtype=torch.float32, seed=0, **changes):
        """A model in eval mode whose every parameter matters: norms, biases and gates are moved off their start."""
        torch.manual_seed(seed)
        model = self.model(self.config(**changes)).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return model


def _sizes(**more):
    return dict(hidden_size=48, num_hidden_layers=2, vocab_size=VOCAB, state_size=16, pad_token_id=None) | more


def _decoder(**more):
    return dict(hidden_size=48, num_hidden_layers=2, vocab_size=VOCAB, num_attention_heads=4, pad_token_id=None) | more


def _hybrid(num_hidden_layers=2, **changes):
    """Attention, with key heads that are shared, in the last block. All channels are turned: of others softmax does not
    see what the convolution's bias adds to every key, so their gradient is rounding, which AdamW makes as large as any
    step. `test_attention_mixer.py` has heads of which a part is turned."""
    sizes = _sizes(head_dim=16, num_hidden_layers=num_hidden_layers, intermediate_size=96)
    attention = dict(num_heads=4, num_heads_kv=2, head_dim=16, rotary_emb_dim=16, rotary_emb_base=50.0)
    return SSDConfig(**sizes | dict(attn_layer_idx=[num_hidden_layers - 1], attn_cfg=attention) | changes)


ZOO = (
    Entry("ssd", lambda **c: SSDConfig(**_sizes(head_dim=16, n_groups=3, use_bias=True) | c), SSDForCausalLM),
    Entry("rodimus", lambda **c: RodimusConfig(**_sizes(block_type="rodimus") | c), RodimusForCausalLM),
    Entry(
        "rodimus_plus",
        lambda **c: RodimusConfig(**_sizes(num_attention_heads=4, sliding_window=9) | c),
        RodimusForCausalLM,
    ),
    Entry(
        "taipan",
        lambda **c: TaipanConfig(
            **_sizes(num_hidden_layers=3, attention_every=1, num_attention_heads=4, num_key_value_heads=2)
            | dict(head_dim=16, sliding_window=9)
            | c
        ),
        TaipanForCausalLM,
        samples=True,
    ),
    Entry("ssd_hybrid", _hybrid, SSDForCausalLM),
    Entry(
        "adore", lambda **c: AdoreConfig(**_decoder(cache_size=200, controller_hidden=16) | c), AdoreForCausalLM, False
    ),
    Entry("recycled", lambda **c: RecycledConfig(**_decoder(budget=200) | c), RecycledForCausalLM, False),
)


def own_fields(config_class):
    """The fields, by name, that a configuration has beyond those of transformers' own base class."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {field.name: field for field in dataclasses.fields(config_class) if field.name not in inherited}


def trainable(model):
    """The parameters that a loss of the model trains; a controller that is trained apart is not among them."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def tokens(batch, length, seed=1):
    """(batch, length) random token ids."""
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(got, want):
    """Largest difference over the largest value wanted."""
    return float((got.detach().double() - want.detach().double()).abs().max() / want.detach().double().abs().max())
