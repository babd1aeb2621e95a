"""Decoders that carry Recycled Attention (RefreshKV, arXiv:2411.05787): Llama, Qwen2, Qwen3 or Mistral, whose own
checkpoints load as they are, with a `RecycledCache` as the cache that generate() and forward make.
"""

import torch
from transformers.generation import GenerationMixin

from scrubjay.configuration.configuration_recycled import RecycledConfig
from scrubjay.modeling.caches.cache_recycled import RecycledCache
from scrubjay.modeling.decoder.attention_recycled import stand_in
from scrubjay.modeling.heads import ZooForSequenceClassification, ZooForTokenClassification
from scrubjay.modeling.inputs.arguments import given
from scrubjay.modeling.inputs.cache_argument import takes_cache
from scrubjay.modeling.inputs.columns import Marks
from scrubjay.modeling.wrapped import ZooWrapperForCausalLM, ZooWrapperModel, ZooWrapperPreTrainedModel


class RecycledPreTrainedModel(ZooWrapperPreTrainedModel):
    """What all models below share."""

    config_class = RecycledConfig
    cache_class = RecycledCache
    _is_stateful = False  # the cache gives tokens back, so another model may propose some


class RecycledModel(RecycledPreTrainedModel, ZooWrapperModel):
    """The decoder without a head."""

    @takes_cache
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, **kwargs):
        """As `ZooWrapperModel.forward`; in train mode with `train_tail` as the paper continues to pre-train.

        Raises:
            ValueError: with `train_tail`, rows that are padded, packed or no longer than it.
        """
        if self.training and self.config.train_tail and (cache is None or torch.is_grad_enabled()):
            said = {"attention_mask": attention_mask, "position_ids": position_ids} | kwargs
            x = given(input_ids, kwargs.get("inputs_embeds"), self.config.hidden_size)
            if kwargs.get("columns") is None:
                kwargs["columns"] = self.read(x.shape[:2], x.device, Marks.of(said), cache)
            kwargs["recycled_tail"] = self._tail(kwargs["columns"], cache)
        return super().forward(input_ids, attention_mask, position_ids, cache, **kwargs)

    def _tail(self, columns, cache):
        config = self.config
        plain = columns.real is None and not columns.packed and cache is None
        if not plain or columns.shape[1] <= config.train_tail:
            raise ValueError(
                f"train_tail = {config.train_tail} needs rows of more tokens than that, without padding, packing or a "
                f"cache; got {columns.shape[1]} columns. Cut the text into rows of one length, or set "
                "config.train_tail = 0."
            )
        stand_in(self.decoder)  # for good: a layer that is run again in the backward pass must find it, too
        settings = {"recent": config.keep_recent, "kernel": config.pool_kernel, "reduce": config.group_reduce}
        settings |= {"tail": config.train_tail, "budget": config.budget, "sinks": config.sinks}
        return settings, config.full_layers


class RecycledForCausalLM(RecycledPreTrainedModel, ZooWrapperForCausalLM, GenerationMixin):
    """The decoder and its head."""

    model_class = RecycledModel


class RecycledForSequenceClassification(RecycledPreTrainedModel, ZooForSequenceClassification):
    """The decoder with scores of a text."""

    model_class = RecycledModel


class RecycledForTokenClassification(RecycledPreTrainedModel, ZooForTokenClassification):
    """The decoder with scores of each token."""

    model_class = RecycledModel


__all__ = [
    "RecycledForCausalLM",
    "RecycledForSequenceClassification",
    "RecycledForTokenClassification",
    "RecycledModel",
    "RecycledPreTrainedModel",
]
