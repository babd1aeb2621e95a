"""Language models that have equally many parameters: those of the zoo, and a plain Llama.

The measure is an SSD model of `blocks` blocks. Every other family has the same vocabulary, tied, the depth at which the
proportions of its paper come nearest to that number, and one spare size that makes up for the rest. Nothing else is
chosen for the sake of the count, and the embedding is counted.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from scrubjay import (
    RodimusConfig,
    RodimusForCausalLM,
    SSDConfig,
    SSDForCausalLM,
    TaipanConfig,
    TaipanForCausalLM,
)
from scrubjay.configuration.starts import initial_std

CLASSES: dict[type, type] = {
    LlamaConfig: LlamaForCausalLM,
    RodimusConfig: RodimusForCausalLM,
    SSDConfig: SSDForCausalLM,
    TaipanConfig: TaipanForCausalLM,
}


@dataclass(frozen=True)
class Sizes:
    """What all models of a comparison share.

    Args:
        blocks: of the SSD model whose parameters all others equal.
        state_size: key channels of SSD's state, in Taipan too. Rodimus has half of it, as the papers have 128 and 64.
        head_dim: channels of a head, of attention and of SSD.
        window: keys that a query of Rodimus+ and Taipan sees.
    """

    hidden_size: int = 256
    blocks: int = 9
    vocab_size: int = 4096
    state_size: int = 128
    head_dim: int = 64
    window: int = 64

    @property
    def heads(self) -> int:
        return self.hidden_size // self.head_dim

    def shared(self, blocks: int) -> dict:
        """Fields that every configuration has. The first token of the vocabulary is the end of a text."""
        sizes = {"hidden_size": self.hidden_size, "num_hidden_layers": blocks, "vocab_size": self.vocab_size}
        return sizes | dict.fromkeys(("bos_token_id", "eos_token_id"), 0) | {"pad_token_id": None}


def places(blocks: int, attention: int) -> list[int]:
    """Where attention stands in so many blocks: in the middle of each of as many equal parts."""
    return [math.floor((i + 0.5) * blocks / attention) for i in range(attention)]


def _llama(sizes: Sizes, blocks: int, spare: int | None = None) -> LlamaConfig:
    """As it comes, but for its start, which is by the width as in the zoo: from transformers' 0.02 it learns less."""
    return LlamaConfig(
        **sizes.shared(blocks),
        intermediate_size=spare or 8 * sizes.hidden_size // 3,
        num_attention_heads=sizes.heads,
        max_position_embeddings=1 << 20,
        initializer_range=initial_std(sizes.hidden_size),
        tie_word_embeddings=True,
    )


def _ssd(sizes: Sizes, blocks: int, spare: int | None = None, **switches) -> SSDConfig:
    return SSDConfig(**sizes.shared(blocks), state_size=sizes.state_size, head_dim=sizes.head_dim, **switches)


def _ssd_mlp(sizes: Sizes, blocks: int, spare: int | None = None) -> SSDConfig:
    """Behind each mixer a feed-forward network, of widths that are multiples of 128 as in the authors' code."""
    return _ssd(sizes, blocks, intermediate_size=spare or 3 * sizes.hidden_size)


def _ssd_hybrid(sizes: Sizes, blocks: int, spare: int | None = None, attention: int = 1) -> SSDConfig:
    """`attention` of the blocks are attention, by nature half as wide again as the stream, a half of it rotary: the
    authors' proportions. The spare size is the number of its heads."""
    if not attention:
        return _ssd(sizes, blocks)
    heads = spare or 3 * sizes.heads // 2
    cfg = {"num_heads": heads, "head_dim": sizes.head_dim, "d_conv": 4, "rotary_emb_dim": sizes.head_dim // 2}
    return _ssd(sizes, blocks, attn_layer_idx=places(blocks, attention), attn_cfg=cfg)


def _rodimus(sizes: Sizes, blocks: int, spare: int | None = None, **switches) -> RodimusConfig:
    expand = 2 if spare is None else spare / sizes.hidden_size
    state = sizes.state_size // 2
    return RodimusConfig(**sizes.shared(blocks), block_type="rodimus", state_size=state, expand=expand, **switches)


def _rodimus_plus(sizes: Sizes, blocks: int, spare: int | None = None, **switches) -> RodimusConfig:
    return RodimusConfig(
        **sizes.shared(blocks),
        block_type="rodimus_plus",
        state_size=sizes.state_size // 2,
        num_attention_heads=sizes.heads,
        sliding_window=sizes.window,
        intermediate_size=spare,
        **switches,
    )


def _taipan(sizes: Sizes, blocks: int, spare: int | None = None, **switches) -> TaipanConfig:
    return TaipanConfig(
        **sizes.shared(blocks),
        state_size=sizes.state_size,
        head_dim=sizes.head_dim,
        attention_head_dim=sizes.head_dim,
        sliding_window=sizes.window,
        intermediate_size=spare,
        **switches,
    )


@dataclass(frozen=True)
class Family:
    """A configuration by sizes, number of blocks, and the spare size: None is the paper's, else a multiple of `step`.

    Args:
        spare: what the spare size is, in words; empty where there is none and the depth alone decides.
    """

    make: Callable[..., PreTrainedConfig]
    spare: str = ""
    step: int = 8
    depth_of_measure: bool = False


FAMILIES = {
    "llama": Family(_llama, "feed-forward width"),
    "ssd": Family(_ssd, depth_of_measure=True),
    "ssd_mlp": Family(_ssd_mlp, "feed-forward width", step=128),
    "ssd_hybrid": Family(_ssd_hybrid, "attention heads", step=1, depth_of_measure=True),
    "rodimus": Family(_rodimus, "inner width"),
    "rodimus_plus": Family(_rodimus_plus, "feed-forward width"),
    "taipan": Family(_taipan, "feed-forward width"),
}


def count(config: PreTrainedConfig) -> int:
    """Parameters of a model, the embedding among them."""
    with torch.device("meta"):
        return CLASSES[type(config)](config).num_parameters()


@cache
def target(sizes: Sizes) -> int:
    """Parameters that every model is to have."""
    return count(_ssd(sizes, sizes.blocks))


@cache
def fitted(name: str, sizes: Sizes, switches: tuple = ()) -> tuple[int, int | None]:
    """(blocks, spare size) of a family.

    Args:
        switches: pairs of a name and a value that `Family.make` takes and that change what a block holds.
    """
    family, goal, given = FAMILIES[name], target(sizes), dict(switches)
    blocks = sizes.blocks if family.depth_of_measure else _nearest_depth(family, sizes, goal, given)
    if not family.spare or given.get("attention") == 0:
        return blocks, None
    # parameters are a straight line over the spare size
    low, high = (count(family.make(sizes, blocks, times * family.step, **given)) for times in (1, 2))
    return blocks, max(1, 1 + round((goal - low) / (high - low))) * family.step


def _nearest_depth(family: Family, sizes: Sizes, goal: int, given: dict) -> int:
    last, blocks = math.inf, 1
    while (off := abs(count(family.make(sizes, blocks, **given)) - goal)) <= last:
        last, blocks = off, blocks + 1
    return blocks - 1


def configured(name: str, sizes: Sizes, *, shape: Sequence[tuple] = (), **switches) -> PreTrainedConfig:
    """The configuration of a model as large as the others.

    Args:
        shape: switches by which depth and spare size are found.
        switches: others, which leave the sizes as they are without them: a switch that adds parameters shows them.
    """
    blocks, spare = fitted(name, sizes, tuple(shape))
    return FAMILIES[name].make(sizes, blocks, spare, **dict(shape), **switches)


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """A freshly initialised model of float32."""
    return CLASSES[type(config)](config)
