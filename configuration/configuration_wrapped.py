"""What configurations share whose model is another library's decoder with a cache of its own."""

import copy
import dataclasses
import functools

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING
from transformers.configuration_utils import PreTrainedConfig

from scrubjay.configuration.cache_names import CACHE_NAMES
from scrubjay.configuration.tested_versions import tell_of_untested

tell_of_untested()

BASES = ("llama", "qwen2", "qwen3", "mistral")
# What peft looks for in the dictionary of any configuration.
SHOWN = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "tie_word_embeddings",
    "vocab_size",
)


class WrappedConfig(PreTrainedConfig):
    """The sizes of a decoder (`base_config`) beside the settings of a cache, which subclasses add as fields.

    Fields that are not the subclass's own are the base's: `config.hidden_size` is `config.base_config.hidden_size`.
    A dictionary of the base itself makes one too, so a Llama checkpoint loads as it is.

    Args:
        base_config: configuration of the decoder, or its dictionary with "model_type": one of "llama", "qwen2",
            "qwen3", "mistral". None makes a `LlamaConfig` from the other arguments (hidden_size, vocab_size, ...).
    """

    keys_to_ignore_at_inference = list(CACHE_NAMES)
    sub_configs = {"base_config": PreTrainedConfig}

    base_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        own = {field.name for field in dataclasses.fields(PreTrainedConfig)}
        own |= {"attn_implementation", "name_or_path", "num_labels"}
        given = self.base_config
        if given is None:
            # generic names of the decoder, which this class leaves to it
            sizes = {name: kwargs.pop(name) for name in list(kwargs) if name not in own and not name.startswith("_")}
            sizes.pop("model_type", None)
            self.base_config = _base("llama", _derived(sizes))
        elif isinstance(given, dict):
            self.base_config = _base(given.get("model_type"), {k: v for k, v in given.items() if k != "model_type"})
        elif given.model_type not in BASES:
            raise ValueError(_unknown(given.model_type))
        else:
            self.base_config = copy.deepcopy(given)  # a model may hold it
            kwargs.setdefault("attn_implementation", given._attn_implementation)
        kwargs.pop("model_type", None)
        if self.id2label is None and kwargs.get("num_labels") is None:  # a classifier that was a decoder's
            self.id2label, self.label2id = copy.copy(self.base_config.id2label), copy.copy(self.base_config.label2id)
        if self.problem_type is None:
            self.problem_type = self.base_config.problem_type
        # no property: transformers 5.17 assigns to it where embeddings are tied
        self.base_model_tp_plan = self.base_config.base_model_tp_plan
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; the dictionary of a bare decoder becomes `base_config`.

        Raises:
            ValueError: a setting of a wrong type.
        """
        if "base_config" not in config_dict and config_dict.get("model_type", cls.model_type) != cls.model_type:
            config_dict = {"base_config": config_dict, "dtype": config_dict.get("dtype")}
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:  # is no ValueError, which a caller expects
            raise ValueError(str(error.__cause__ or error)) from error

    def to_dict(self):
        """As in transformers; the dtype stands in one place, and the sizes that others read in sight."""
        output = super().to_dict()
        output["base_config"].pop("dtype", None)
        return output | {name: output["base_config"][name] for name in SHOWN}

    def to_diff_dict(self):
        """As in transformers, for the file: what the base says is not said twice."""
        output = {name: value for name, value in super().to_diff_dict().items() if name not in SHOWN}
        if self.id2label != self.base_config.id2label:  # left out, these would be the base's
            output |= {"id2label": self.id2label, "label2id": self.label2id}
        return output

    def get_text_config(self, decoder=None, encoder=None):
        """The decoder's configuration: sizes, token ids."""
        return self.base_config

    def __getattr__(self, name):
        base = self.__dict__.get("base_config")
        if name.startswith(("_", "rope_")) or not isinstance(base, PreTrainedConfig):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(base, name)

    def __setattr__(self, name, value):
        """As in Python; fields of the decoder alone are set where they are read."""
        base = self.__dict__.get("base_config")
        if isinstance(base, PreTrainedConfig) and name in _fields(type(base)) - _fields(type(self)):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def base_model_pp_plan(self):
        """The decoder's."""
        return self.base_config.base_model_pp_plan


@functools.cache
def _fields(config_class):
    return {field.name for field in dataclasses.fields(config_class)}


def _derived(sizes):
    """With heads and a feed-forward width that fit `hidden_size`, where they are not given."""
    hidden = sizes.get("hidden_size", 0)
    if hidden and "num_attention_heads" not in sizes and "head_dim" not in sizes:
        sizes["num_attention_heads"] = hidden // next(p for p in (128, 64, 32, 16, 8, 4, 2, 1) if hidden % p == 0)
    if hidden and "intermediate_size" not in sizes:
        sizes["intermediate_size"] = -(-8 * hidden // 24) * 8  # 8/3 hidden_size, as Llama's own, in eights
    return sizes


def _base(kind, sizes):
    if kind not in BASES:
        raise ValueError(_unknown(kind))
    return CONFIG_MAPPING[kind](**sizes)


def _unknown(kind):
    return f"base_config must be of model_type {', '.join(BASES)}; got {kind!r}. Other decoders are untested."
