"""The cache of SSD (Mamba-2): a convolution's last inputs and a recurrent state for each block; of a hybrid's attention
layers, keys and values."""

from transformers.cache_utils import CacheLayerMixin

from scrubjay.modeling.caches.attention_layer import AttentionLayer
from scrubjay.modeling.caches.cache_state import StateCache, StateLayer


class SSDCache(StateCache):
    """Convolution window and recurrent state of each SSD block, keys and values of each attention layer.

    Bytes a row: blocks * ((K - 1) * (d_inner + 2 G N) * itemsize + H * N * P * 4 + 8) for the SSD blocks; of a hybrid
    also attention layers * ((d_conv - 1) * (heads + 2 * key heads) * head_dim * itemsize + 8), and for each token
    attention layers * 2 * key heads * head_dim * itemsize, with room ahead for up to an eighth more tokens, or for 64
    (`attention_layer.room`).
    """

    @staticmethod
    def layout(config) -> dict:
        conv = [config.conv_kernel - 1, config.conv_size]
        state = [config.num_heads, config.state_size, config.head_dim]
        layout = {"num_layers": config.num_hidden_layers, "shapes": {"conv": conv, "state": state}}
        if places := getattr(config, "attn_layer_idx", None):
            sizes = config.attn_cfg
            shared, size = sizes["num_heads_kv"], sizes["head_dim"]
            convolved = (sizes["num_heads"] + 2 * shared) * size
            attention = {"conv": [max(sizes["d_conv"] - 1, 0), convolved], "keys": [shared, size]}
            layout |= {"attention_layers": list(places), "attention": attention}
        return layout

    @staticmethod
    def make_layers(layout: dict) -> list[CacheLayerMixin]:
        """An `AttentionLayer` for each attention layer, a `StateLayer` for each other block."""
        places = layout.get("attention_layers", ())
        return [
            AttentionLayer(**layout["attention"]) if i in places else StateLayer(**layout["shapes"])
            for i in range(layout["num_layers"])
        ]
