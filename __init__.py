"""Efficient-attention language models for Hugging Face Transformers.

Importing the package registers its models with the Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from scrubjay.configuration.configuration_adore import AdoreConfig
from scrubjay.configuration.configuration_recycled import RecycledConfig
from scrubjay.configuration.configuration_rodimus import RodimusConfig
from scrubjay.configuration.configuration_ssd import SSDConfig
from scrubjay.configuration.configuration_taipan import TaipanConfig
from scrubjay.modeling.bits_quantizer import FewBitsConfig, quantize
from scrubjay.modeling.caches.cache_adore import AdoreCache
from scrubjay.modeling.caches.cache_recycled import RecycledCache
from scrubjay.modeling.caches.cache_rodimus import RodimusCache
from scrubjay.modeling.caches.cache_ssd import SSDCache
from scrubjay.modeling.caches.cache_taipan import TaipanCache
from scrubjay.modeling.modeling_adore import (
    AdoreForCausalLM,
    AdoreForSequenceClassification,
    AdoreForTokenClassification,
    AdoreModel,
)
from scrubjay.modeling.modeling_recycled import (
    RecycledForCausalLM,
    RecycledForSequenceClassification,
    RecycledForTokenClassification,
    RecycledModel,
)
from scrubjay.modeling.modeling_rodimus import (
    RodimusForCausalLM,
    RodimusForSequenceClassification,
    RodimusForTokenClassification,
    RodimusModel,
)
from scrubjay.modeling.modeling_ssd import (
    SSDForCausalLM,
    SSDForSequenceClassification,
    SSDForTokenClassification,
    SSDModel,
)
from scrubjay.modeling.modeling_taipan import (
    TaipanForCausalLM,
    TaipanForSequenceClassification,
    TaipanForTokenClassification,
    TaipanModel,
)
from scrubjay.modeling.torch_export import DecodeStep, Prefill, export_decoding
from scrubjay.modeling.training.adapter_report import adapter_report
from scrubjay.modeling.training.context_parallel import average_gradients, shard_sequence
from scrubjay.modeling.training.sharding import save_adapter, shard_model, whole_state

__version__ = "0.1.0"

for _config, _model, _causal_lm, _of_texts, _of_tokens in (
    (SSDConfig, SSDModel, SSDForCausalLM, SSDForSequenceClassification, SSDForTokenClassification),
    (RodimusConfig, RodimusModel, RodimusForCausalLM, RodimusForSequenceClassification, RodimusForTokenClassification),
    (TaipanConfig, TaipanModel, TaipanForCausalLM, TaipanForSequenceClassification, TaipanForTokenClassification),
    (
        RecycledConfig,
        RecycledModel,
        RecycledForCausalLM,
        RecycledForSequenceClassification,
        RecycledForTokenClassification,
    ),
    (AdoreConfig, AdoreModel, AdoreForCausalLM, AdoreForSequenceClassification, AdoreForTokenClassification),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForCausalLM.register(_config, _causal_lm)
    AutoModelForSequenceClassification.register(_config, _of_texts)
    AutoModelForTokenClassification.register(_config, _of_tokens)

__all__ = [
    "AdoreCache",
    "AdoreConfig",
    "AdoreForCausalLM",
    "AdoreForSequenceClassification",
    "AdoreForTokenClassification",
    "AdoreModel",
    "DecodeStep",
    "FewBitsConfig",
    "Prefill",
    "RecycledCache",
    "RecycledConfig",
    "RecycledForCausalLM",
    "RecycledForSequenceClassification",
    "RecycledForTokenClassification",
    "RecycledModel",
    "RodimusCache",
    "RodimusConfig",
    "RodimusForCausalLM",
    "RodimusForSequenceClassification",
    "RodimusForTokenClassification",
    "RodimusModel",
    "SSDCache",
    "SSDConfig",
    "SSDForCausalLM",
    "SSDForSequenceClassification",
    "SSDForTokenClassification",
    "SSDModel",
    "TaipanCache",
    "TaipanConfig",
    "TaipanForCausalLM",
    "TaipanForSequenceClassification",
    "TaipanForTokenClassification",
    "TaipanModel",
    "adapter_report",
    "average_gradients",
    "export_decoding",
    "quantize",
    "save_adapter",
    "shard_model",
    "shard_sequence",
    "whole_state",
]
