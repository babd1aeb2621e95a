"""The models of the recall study, of equal size: parameters, layers, heads, values; no head is tied to its embedding.

Every recurrent layer holds a state of N keys by 128 values, whatever its model. What a model's projections and gates
cost is made up for by its residual width, and by the width of its feed-forward networks where it has them, until all
have the same number of parameters. Attention has two heads everywhere, and so has the state of SSD; Rodimus' has one.
"""

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from scrubjay import (
    RodimusConfig,
    RodimusForCausalLM,
    SSDConfig,
    SSDForCausalLM,
    TaipanConfig,
    TaipanForCausalLM,
)
from scrubjay.configuration.starts import initial_std

VALUES = 128  # M, values of a state's row: the state of a layer has N * M numbers
HEADS = 2
LAYERS = 2
WINDOW = 16  # keys that Rodimus+'s attention sees, at most: fewer than list and queries span, the state does the rest
CAPACITY = 0.15  # share of tokens that Taipan's attention may see for, the paper's
BUDGET = 5.0  # weight of it: the loss is a mean over few labels, and at 1 twice as many tokens pass


@dataclass(frozen=True)
class Sizes:
    """What a cell's settings say of its model. N is None where there is no state."""

    pairs: int
    length: int
    vocab_size: int
    state_size: int | None
    parameters: int


def _shared(sizes: Sizes, width: int) -> dict:
    return {
        "vocab_size": sizes.vocab_size,
        "hidden_size": width,
        "num_hidden_layers": LAYERS,
        "tie_word_embeddings": False,
    }


def _recurrent(sizes: Sizes, width: int) -> dict:
    """M values at any width; the half is for the product of two floats, which is rounded down."""
    return _shared(sizes, width) | {"state_size": sizes.state_size, "expand": (VALUES + 0.5) / width}


def _ssd(sizes, width):
    return SSDConfig(**_recurrent(sizes, width), head_dim=VALUES // HEADS)


def _ssd_hybrid(sizes, width):
    head = VALUES // HEADS
    attention = {"num_heads": HEADS, "num_heads_kv": HEADS, "head_dim": head, "d_conv": 4, "rotary_emb_dim": head // 2}
    last = [LAYERS - 1]  # what a state has kept is looked up behind it
    return SSDConfig(**_recurrent(sizes, width), head_dim=head, attn_layer_idx=last, attn_cfg=attention)


def _rodimus(sizes, width):
    return RodimusConfig(**_recurrent(sizes, width), block_type="rodimus")


def _rodimus_plus(sizes, width, inner):
    attention = {"num_attention_heads": HEADS, "sliding_window": min(WINDOW, sizes.pairs), "intermediate_size": inner}
    return RodimusConfig(**_recurrent(sizes, width), block_type="rodimus_plus", **attention)


def _taipan(sizes, width, inner):
    attention = {
        "attention_every": LAYERS - 1,
        "num_attention_heads": HEADS,
        "sliding_window": sizes.length // 2,
        "capacity": CAPACITY,
        "budget_lambda": BUDGET,
        "intermediate_size": inner,
    }
    return TaipanConfig(**_recurrent(sizes, width), head_dim=VALUES // HEADS, **attention)


def _llama(sizes, width, inner):
    """Its start is that of the zoo's models; Transformers' own is 0.02 at every width."""
    return LlamaConfig(
        **_shared(sizes, width),
        intermediate_size=inner,
        num_attention_heads=HEADS,
        max_position_embeddings=sizes.length,
        initializer_range=initial_std(width),
    )


def _mamba1(sizes, width):
    config = MambaConfig(**_shared(sizes, width), state_size=sizes.state_size)
    config.intermediate_size = VALUES  # which its constructor derives from a whole number
    return config


def _mamba2(sizes, width):
    if VALUES % width:
        raise ValueError(f"Mamba2Config takes widths that divide {VALUES}; got {width}.")
    shared = _shared(sizes, width) | {"state_size": sizes.state_size, "expand": VALUES // width}
    return Mamba2Config(**shared, head_dim=VALUES // HEADS, num_heads=HEADS, n_groups=1, chunk_size=64)


@dataclass(frozen=True)
class Maker:
    """How a model is made of a width, and of an inner width where it has feed-forward networks.

    Args:
        widths: those that it can have.
        ratio: least inner width over the width, its own paper's; None: no feed-forward network.
    """

    model: type[PreTrainedModel]
    config: Callable[..., PretrainedConfig]
    widths: range = range(8, 1024, 4)
    ratio: float | None = None


EIGHTS = range(8, 1024, 8)  # two heads of rotary pairs
MAKERS = {
    "ssd": Maker(SSDForCausalLM, _ssd),
    "ssd_hybrid": Maker(SSDForCausalLM, _ssd_hybrid),
    "rodimus": Maker(RodimusForCausalLM, _rodimus),
    "rodimus_plus": Maker(RodimusForCausalLM, _rodimus_plus, EIGHTS, 4 / 3),
    "taipan": Maker(TaipanForCausalLM, _taipan, EIGHTS, 8 / 3),
    "llama": Maker(LlamaForCausalLM, _llama, EIGHTS, 8 / 3),
    "mamba1": Maker(MambaForCausalLM, _mamba1),
    "mamba2": Maker(Mamba2ForCausalLM, _mamba2, range(VALUES, VALUES + 1)),
}
STATELESS = ("llama",)


def num_parameters(model: type[PreTrainedModel], config: PretrainedConfig) -> int:
    """Of a model that is not made."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model(config).parameters())


def configuration(name: str, sizes: Sizes) -> PretrainedConfig:
    """The model's configuration with as many parameters as `sizes` says, nearly.

    Raises:
        ValueError: it has no width with which they are met within 2 %.
    """
    maker, wanted = MAKERS[name], sizes.parameters

    def count(*widths: int) -> int:
        return num_parameters(maker.model, maker.config(sizes, *widths))

    if maker.ratio is None:
        above = bisect.bisect_left(maker.widths, wanted, key=count)
        near = maker.widths[max(above - 1, 0) : above + 1]
        chosen = (min(near, key=lambda width: abs(count(width) - wanted)),)
    else:
        above = bisect.bisect_right(maker.widths, wanted, key=lambda width: count(width, int(width * maker.ratio)))
        width = maker.widths[max(above - 1, 0)]
        inner = int(width * maker.ratio)
        a_unit = (count(width, inner + 8) - count(width, inner)) / 8  # of the inner width
        chosen = width, inner + round((wanted - count(width, inner)) / a_unit)
    config = maker.config(sizes, *chosen)
    reached = num_parameters(maker.model, config)
    if abs(reached / wanted - 1) > 0.02:
        raise ValueError(
            f"{name} with a state of {sizes.state_size} has {reached} parameters at width {config.hidden_size}; "
            f"{wanted} are not met within 2 %. Take another number for all."
        )
    return config


def build(name: str, sizes: Sizes, switches: Mapping | None = None) -> PreTrainedModel:
    """The model, freshly initialised in float32. Switches change fields of its configuration, and not the others."""
    config = configuration(name, sizes)
    if switches:
        config = type(config).from_dict({**config.to_dict(), **switches})
    return MAKERS[name].model(config)
