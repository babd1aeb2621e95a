"""What lets adapters (peft) and quantizers (bitsandbytes and others) take hold of a model of the zoo.

Fused projections ask `hooked` whether something acts on a layer (`project` in modeling/layers.py), and then call it.
"""

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import PreTrainedModel
from transformers.utils import logging

from scrubjay.configuration.cache_names import CACHE_NAMES

logger = logging.get_logger(__name__)
BLOCK = 64  # numbers that share a scale in bitsandbytes' 4 bits


class WholeLinear(nn.Linear):
    """A linear layer that no quantizer replaces."""


def heads_of(model: PreTrainedModel) -> list[nn.Module]:
    """What stands on the model without head: `lm_head`, `score`, or what somebody's own class has there."""
    if model.base_model is model:
        return []
    return [child for name, child in model.named_children() if name != model.base_model_prefix]


def make_replaceable(model: PreTrainedModel, quantization_config) -> None:
    """Make subclasses of the `torch.nn.Linear` layers, which quantizers replace, that they are to leave alone.

    Not in 4 bits are layers whose inputs are no multiple of 64: on a CPU bitsandbytes takes the scale of another block
    for some of their numbers (0.50.2), and a checkpoint is to be the same on all devices.
    """
    settings = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
    in_blocks = settings.get("load_in_4bit", False)
    head, whole = {part for top in heads_of(model) for part in top.modules()}, []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        if module in head:  # quantizers leave one out as long as nobody gives them a list of their own
            module.__class__ = WholeLinear
        elif in_blocks and module.in_features % BLOCK:
            module.__class__ = WholeLinear
            whole.append(f"{name} ({module.in_features})")
    if whole:
        logger.warning_once(f"Not in 4 bits, because their inputs are no multiple of {BLOCK}: {', '.join(whole)}.")


def keep_unpacked(model: nn.Module) -> None:
    """Have bitsandbytes leave 4-bit layers as they were loaded; to be called after each loading.

    On a CPU with AVX512-BF16 its layers rearrange their weights in the first pass of eval mode. Those whose outputs are
    no multiple of 32, or whose inputs are none of a block, fail there. All others stay rearranged: from then on their
    inputs get no gradient, and an adapter merges into numbers in the wrong order (seen in 0.50.2). Models of the zoo
    call it themselves; a decoder of transformers that is trained after it has generated needs it too.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def adapts(value: object) -> bool:
    """Whether this is an adapter around a layer."""
    return isinstance(value, nn.Module) and "base_layer" in value._modules


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward method: FSDP gathers weights and accelerate
    fetches them (by a forward method of the module's own), peft chooses adapters, profilers watch every module."""
    own = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return bool(own) or "forward" in module.__dict__ or _has_any_global_hook()


def in_use(module):
    """A module, or where `modules_to_save` wraps it the one that acts: the copy that is trained, or the original."""
    if "original_module" not in getattr(module, "_modules", ()):
        return module
    names = module.active_adapters
    if module.disable_adapters or not names or names[0] not in module.modules_to_save:
        return module.original_module
    return module.modules_to_save[names[0]]


# peft's, by which it gives a model a cache of keys that were trained; the model itself is told nothing of it
PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")
NO_PREFIX = "A recurrent state cannot read keys from before the text (prefix tuning): tune a prompt, or use LoRA."


def prefix_tuned(model) -> bool:
    """Whether peft generates with keys that were trained in front of the text: it then prepares the model's inputs."""
    owner = getattr(getattr(model, "prepare_inputs_for_generation", None), "__self__", None)
    return getattr(getattr(owner, "active_peft_config", None), "peft_type", None) in PREFIXES


def refuse_prefix(model) -> None:
    """Refuse generation with keys in front of the text.

    Raises:
        ValueError: what to do instead.
    """
    if prefix_tuned(model):
        raise ValueError(f"{type(model).__name__}: {NO_PREFIX}")


def for_peft(model, prepared: dict, cache) -> dict:
    """Inputs of a step of generation, so that peft (0.21.2) finds the cache: it knows the older name alone.

    It looks whether a prompt was read already, and where not puts its own keys in the place of that name.
    """
    if cache is None:
        return prepared
    if prefix_tuned(model) and not cache.get_seq_length():
        return {name: value for name, value in prepared.items() if name not in CACHE_NAMES}
    return prepared | dict.fromkeys(CACHE_NAMES, cache)


def give_own_weight(model, adapter: nn.Module) -> None:
    """Untie the embedding or the head that `adapter` wraps: merged, it would change the other one as well."""
    if not model.config.tie_word_embeddings:
        return
    layer = adapter.get_submodule("base_layer")
    while adapts(layer):  # an adapter of another kind around it
        layer = layer.get_submodule("base_layer")
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    model.config.tie_word_embeddings = False
