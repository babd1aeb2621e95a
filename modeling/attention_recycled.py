"""The attention function that a decoder runs while a `RecycledCache` takes part in its call: what transformers' own
would have done, unless the keys come from such a cache, whose layer then decides.
"""

import sys
import zlib
from functools import partial

from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from scrubjay.kernels.recycle import attend_tail
from scrubjay.modeling.decoder_call import ATTENTION

# the code that travels with a checkpoint is another copy of this module, with an attention of its own
_COPY = "" if __name__.startswith("scrubjay.") else f"_{zlib.crc32(__name__.encode()):08x}"
PREFIX = "scrubjay_recycled"
NAMES = {stock: f"{PREFIX}{_COPY}_{stock}" for stock in ATTENTION}


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
    usual = partial(function, module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    layer = getattr(key, "scrubjay_layer", None)
    out = None if layer is None else layer.attend(query, key, value, scaling)
    return usual() if out is None else (out, None)


for _stock, _name in NAMES.items():
    AttentionInterface.register(_name, partial(recycled_attention, _stock))
    # without a mask function of the same name transformers would build no mask, and padding would be seen
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_stock])
