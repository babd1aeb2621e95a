"""The attention function that a decoder runs while it has a `RecycledCache`: what transformers' own would have done,
unless the keys come from such a cache, whose layer then decides. So it may run in any call, from any thread.
"""

import sys
import zlib
from functools import partial
from typing import cast

from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from scrubjay.kernels.recycle import attend_tail
from scrubjay.modeling.decoder.decoder_call import ATTENTION, attendable

# the code that travels with a checkpoint is another copy of this module, with an attention of its own
_COPY = "" if __name__.startswith("scrubjay.") else f"_{zlib.crc32(__name__.encode()):08x}"
NAMES = {stock: f"scrubjay_recycled{_COPY}_{stock}" for stock in ATTENTION}


def recycled_attention(stock, module, query, key, value, attention_mask, *, scaling, recycled_tail=None, **kwargs):
    """transformers' interface: query (B, H, T, P), key and value (B, G, n, P) -> (B, T, H, P), None.

    `recycled_tail`: in continued pre-training, arguments of `attend_tail` and the layers that do without it.
    """
    if recycled_tail is not None and module.layer_idx not in recycled_tail[1]:
        return attend_tail(query, key, value, scaling, **recycled_tail[0]), None
    if stock == "eager":  # lives in each model's own file
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[stock]
    if (layer := getattr(key, "scrubjay_layer", None)) is not None:
        if (out := layer.attend(query, key, value, scaling)) is not None:
            layer.call.answered.add(module.layer_idx)
            return out, None
        key, value = attendable(key, value, like=query)
    return function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


for _stock, _name in NAMES.items():
    AttentionInterface.register(_name, partial(recycled_attention, _stock))
    # without a mask function of the same name transformers would build no mask, and padding would be seen
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_stock])


class AttentionConfig:
    """A configuration as its attention layers see it: the model's own, but for the name of the attention function.

    The model's configuration itself names what it always named, to users, to masks and to files.
    """

    def __init__(self, config):
        self.__dict__["config"] = config

    @property
    def _attn_implementation(self):
        stock = self.config._attn_implementation
        return NAMES.get(stock, stock)

    def __getattr__(self, name):
        if name == "config":  # not yet there, in a copy
            raise AttributeError(name)
        return getattr(self.config, name)

    def __setattr__(self, name, value):
        """What is written, the model's own configuration gets."""
        setattr(self.config, name, value)

    def __reduce__(self):
        """A copy of the model is without it, and its pickle needs no line of this library."""
        return cast, (None, self.config)  # gives what it is given


def stand_in(decoder) -> None:
    """Let the decoder's attention layers run `recycled_attention`, until `stand_back`."""
    if all(isinstance(layer.self_attn.config, AttentionConfig) for layer in decoder.layers):
        return
    for layer in decoder.layers:
        for module in layer.self_attn.modules():
            own = module.__dict__.get("config")
            if own is not None and not isinstance(own, AttentionConfig):
                module.config = AttentionConfig(own)


def stand_back(decoder) -> None:
    """Undo `stand_in`."""
    for layer in decoder.layers:
        for module in layer.self_attn.modules():
            if isinstance(own := module.__dict__.get("config"), AttentionConfig):
                module.config = own.config
