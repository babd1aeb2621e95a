"""What every model of the zoo is, with or without a head: saving, caches, blocks that fit their configuration, decay.

B batch, T time.
"""

import os

import torch
from torch import nn

from scrubjay.configuration.cache_names import CACHE_NAMES
from scrubjay.modeling.bits_layers import FewBits, FewBitsEmbedding
from scrubjay.modeling.bits_quantizer import FEW_BITS, METHOD
from scrubjay.modeling.hub.publishing import Published
from scrubjay.modeling.inputs.columns import Columns, Marks, read_columns
from scrubjay.modeling.training.adapters import NO_PREFIX, adapts, give_own_weight, keep_unpacked, make_replaceable


class ZooPreTrainedModel(Published):
    """Saving with code, caches of the zoo, weight decay groups. Subclasses set `config_class`, `cache_class`."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = (*CACHE_NAMES, "state")
    _supports_attention_backend = False
    _is_stateful = True  # assisted decoding would have to take tokens back from a sum
    cache_class: type
    few_bits = FEW_BITS
    no_weight_decay: tuple[str, ...] = ()
    no_weight_decay_on_embedding = False  # where it is not a language model's head as well

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers. A `quantization_config` is for every projection; embedding and head stay as they are, but
        of a `FewBitsConfig`."""
        loaded = super().from_pretrained(*args, **kwargs)
        keep_unpacked(loaded[0] if isinstance(loaded, tuple) else loaded)  # a tuple: with output_loading_info
        return loaded

    def post_init(self):
        """As in transformers, which has put the quantizer's settings into the configuration by now."""
        settings = getattr(self.config, "quantization_config", None)
        if settings is not None and dict(settings).get("quant_method") != METHOD:  # which chooses by itself
            make_replaceable(self, settings)
        super().post_init()

    def resize_token_embeddings(self, *args, **kwargs):
        """As in transformers.

        Raises:
            ValueError: a model whose vocabulary is in few bits.
        """
        if isinstance(self.get_input_embeddings(), FewBits):
            raise ValueError("A vocabulary in few bits cannot be resized: resize the float model, then quantize it.")
        return super().resize_token_embeddings(*args, **kwargs)

    def __setattr__(self, name, value):
        """As in torch; an adapter on the embedding or the head gets a weight that the other one does not share, and
        what replaces an embedding in few bits goes into as many."""
        held = self.__dict__.get("_modules", {}).get(name) if name == "embed_tokens" else None
        if isinstance(held, FewBitsEmbedding) and value is not held:
            value = held.successor(value)
        if name in ("embed_tokens", "lm_head") and adapts(value):
            give_own_weight(self, value)
        super().__setattr__(name, value)

    def checkpoints(self, cache) -> bool:
        """Whether the model's `layers` run under gradient checkpointing, which a cache that was given forbids.

        Without gradients (generate() in train mode) nothing runs twice, and a cache advances as always.
        """
        asked = self.training and any(getattr(block, "gradient_checkpointing", False) for block in self.layers)
        checkpointing = asked and torch.is_grad_enabled()
        if checkpointing and cache is not None:
            raise ValueError(
                "Gradient checkpointing runs blocks twice and cannot advance a cache: pass none, or call model.eval()."
            )
        return checkpointing

    def check_cache(self, cache) -> None:
        """Refuse what is no cache of this model.

        Raises:
            ValueError: what came, and what is needed.
        """
        if cache is not None and not isinstance(cache, self.cache_class):
            name = self.cache_class.__name__
            peft = f" {NO_PREFIX}" if type(cache).__module__.startswith("transformers.") else ""
            raise ValueError(
                f"{type(self).__name__} needs a {name}; got {type(cache).__name__}. Pass {name}(model), or none.{peft}"
            )

    def read(self, shape, device, marks: Marks, cache) -> Columns:
        """What the arguments of a call of `shape` (B, T) say of its columns.

        Raises:
            ValueError: a cache of another kind; see `read_columns`.
        """
        self.check_cache(cache)
        seen = 0 if cache is None else cache.get_seq_length()
        held = self.holds(cache, marks, shape[1]) if seen and shape[1] > 1 else None
        return read_columns(shape, device, marks, seen=seen, cache=cache, held=held)

    def holds(self, cache, marks: Marks, columns: int) -> torch.Tensor | None:
        """(B,) bool, the rows of which a cache that is not empty holds tokens. None: all, or as the mask says."""
        return None

    def check_places(self) -> None:
        """Refuse blocks of another number than the configuration has.

        Raises:
            ValueError: both numbers.
        """
        if len(self.layers) != self.config.num_hidden_layers:
            raise ValueError(
                f"The model has {len(self.layers)} blocks, and num_hidden_layers = {self.config.num_hidden_layers} in "
                "its configuration, by which caches and checkpoints are made. Set config.num_hidden_layers to the "
                "number of blocks. A block that stands twice must be a copy (copy.deepcopy)."
            )

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As `Published.save_pretrained`.

        Raises:
            ValueError: blocks that a folder would not give back: of another number than the configuration's, or one
                that stands twice.
        """
        base = self.base_model
        base.check_places()
        if len(set(map(id, base.layers))) != len(base.layers):
            raise ValueError(
                "A block stands twice in the model's layers, and of one block a folder has one: loading it would leave "
                "the second place without weights. Put a copy there: copy.deepcopy(block)."
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    def weight_decay_groups(self, weight_decay: float) -> list[dict]:
        """Parameter groups for an optimizer: matrices decay; biases, norms, and gates' own parameters do not."""
        spared = self.no_weight_decay
        tied = self.config.tie_word_embeddings and self.get_output_embeddings() is not None
        if self.no_weight_decay_on_embedding and not tied:
            spared += ("embed_tokens",)
        decayed: list[nn.Parameter] = []
        kept: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                exempt = parameter.ndim < 2 or any(part in spared for part in name.split("."))
                (kept if exempt else decayed).append(parameter)
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
