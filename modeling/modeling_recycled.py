"""Decoders that carry Recycled Attention (RefreshKV, arXiv:2411.05787): Llama, Qwen2, Qwen3 or Mistral, whose own
checkpoints load as they are, with a `RecycledCache` as the cache that generate() and forward make.
"""

from scrubjay.configuration.configuration_recycled import RecycledConfig
from scrubjay.modeling.cache_recycled import RecycledCache
from scrubjay.modeling.wrapped import ZooWrapperForCausalLM, ZooWrapperModel


class RecycledModel(ZooWrapperModel):
    """The decoder without a head."""

    config_class = RecycledConfig
    cache_class = RecycledCache
    _is_stateful = False  # the cache gives tokens back, so another model may propose some


class RecycledForCausalLM(ZooWrapperForCausalLM):
    """The decoder and its head."""

    config_class = RecycledConfig
    cache_class = RecycledCache
    model_class = RecycledModel
    _is_stateful = False


__all__ = ["RecycledForCausalLM", "RecycledModel"]
