"""The cache of SSD (Mamba-2): a convolution's last inputs and a recurrent state for each block."""

from scrubjay.modeling.caches.cache_state import StateCache


class SSDCache(StateCache):
    """Convolution window and recurrent state of each SSD block.

    Bytes a row: layers * ((K - 1) * (d_inner + 2 G N) * itemsize + H * N * P * 4 + 8).
    """

    @staticmethod
    def layout(config) -> dict:
        conv = [config.conv_kernel - 1, config.conv_size]
        state = [config.num_heads, config.state_size, config.head_dim]
        return {"num_layers": config.num_hidden_layers, "shapes": {"conv": conv, "state": state}}
