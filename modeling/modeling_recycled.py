"""Decoders that carry Recycled Attention (RefreshKV, arXiv:2411.05787): Llama, Qwen2, Qwen3 or Mistral, whose own
checkpoints load as they are, with a `RecycledCache` as the cache that generate() and forward make.
"""

from transformers.generation import GenerationMixin

from scrubjay.configuration.configuration_recycled import RecycledConfig
from scrubjay.modeling.attention_recycled import stand_in
from scrubjay.modeling.cache_argument import takes_cache
from scrubjay.modeling.cache_recycled import RecycledCache
from scrubjay.modeling.wrapped import ZooWrapperForCausalLM, ZooWrapperModel


class RecycledModel(ZooWrapperModel):
    """The decoder without a head."""

    config_class = RecycledConfig
    cache_class = RecycledCache
    _is_stateful = False  # the cache gives tokens back, so another model may propose some

    @takes_cache
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, **kwargs):
        """As `ZooWrapperModel.forward`; in train mode with `train_tail` as the paper continues to pre-train.

        Raises:
            ValueError: with `train_tail`, rows that are padded, packed or no longer than it.
        """
        if self.training and self.config.train_tail:
            kwargs["recycled_tail"] = self._tail(input_ids, attention_mask, position_ids, cache, kwargs)
        return super().forward(input_ids, attention_mask, position_ids, cache, **kwargs)

    def _tail(self, input_ids, attention_mask, position_ids, cache, kwargs):
        config, columns = self.config, (kwargs["inputs_embeds"] if input_ids is None else input_ids).shape[1]
        padded = attention_mask is not None and not bool(attention_mask.all())
        packed = any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx"))
        packed |= position_ids is not None and columns > 1 and bool((position_ids.diff(dim=-1) != 1).any())
        if padded or packed or cache is not None or columns <= config.train_tail:
            raise ValueError(
                f"train_tail = {config.train_tail} needs rows of more tokens than that, without padding, packing or a "
                f"cache; got {columns} columns. Cut the text into rows of equal length, or set config.train_tail = 0."
            )
        stand_in(self.decoder)  # for good: a layer that is run again in the backward pass must find it, too
        settings = {"recent": config.keep_recent, "kernel": config.pool_kernel, "reduce": config.group_reduce}
        settings |= {"tail": config.train_tail, "budget": config.budget, "sinks": config.sinks}
        return settings, config.full_layers


class RecycledForCausalLM(ZooWrapperForCausalLM, GenerationMixin):
    """The decoder and its head."""

    config_class = RecycledConfig
    cache_class = RecycledCache
    model_class = RecycledModel
    _is_stateful = False


__all__ = ["RecycledForCausalLM", "RecycledModel"]
