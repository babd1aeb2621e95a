"""What adapters of peft touch in a model, and what they leave alone and why."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from scrubjay.modeling.training.adapters import adapts

NOT_NAMED = "not in target_modules"
EXCLUDED = "in exclude_modules"
HEAD = "output head: adapted only where target_modules names it"
TIED = "output head, the embedding's weight: named in target_modules, it gets one of its own"
EMBEDDING = "embedding: adapted only where target_modules names it"
NOT_LINEAR = "not a torch.nn.Linear: modules_to_save trains it whole"
VECTORS = "vectors: modules_to_save trains them whole"
BIAS = "bias"  # the last part of a name that peft looks for


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer of the base model that has parameters of its own.

    Attributes:
        name: of the layer in the base model.
        kind: its class.
        shape: of its weight or largest parameter, (outputs, inputs) where it is linear.
        stored: dtype of the weight, or the type of its quantization.
        parameters: their names in the base model.
        size, nbytes: numbers in them, and bytes with all that a quantized weight needs; 0 where an earlier layer
            shares the weight.
        trained, trained_nbytes: numbers and bytes that adapters add here; a copy in modules_to_save counts in full, and
            biases that an adapter's `bias` trains where they are count too.
        state: "adapted", "saved" (by modules_to_save or trainable tokens), "biases" (those alone) or "left".
        reason: why it was left; "" otherwise.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    stored: str
    parameters: tuple[str, ...]
    size: int
    nbytes: int
    trained: int
    trained_nbytes: int
    state: str
    reason: str


@dataclass(frozen=True)
class AdapterReport:
    """What `adapter_report` found; `print` it, or read `layers`. `adapters`: what each is, by name."""

    adapters: dict[str, str]
    layers: tuple[AdaptedLayer, ...]

    @property
    def touched(self) -> tuple[str, ...]:
        """Parameters of the base model that a product goes through together with an adapter, or that have a copy.

        Beside an adapted linear layer's weight, its bias is named too: the adapter adds to the same sum.
        """
        wholly = tuple(
            name for layer in self.layers if layer.state in ("adapted", "saved") for name in layer.parameters
        )
        alone = [name for layer in self.layers if layer.state == "biases" for name in layer.parameters]
        return (*wholly, *(name for name in alone if name.endswith(f".{BIAS}")))

    def total(self, field: str) -> int:
        """Sum of "size", "nbytes", "trained" or "trained_nbytes" over all layers."""
        return sum(getattr(layer, field) for layer in self.layers)

    def __str__(self) -> str:
        lines = [f"{name}: {about}" for name, about in self.adapters.items()]
        trained, size = self.total("trained"), self.total("size")
        lines.append(
            f"{trained:,} numbers ({self.total('trained_nbytes'):,} bytes) beside {size:,} ({self.total('nbytes'):,} "
            f"bytes) of the base model: {100 * trained / size:.2f}%"
        )
        titles = {
            "adapted": "adapted",
            "saved": "trained whole",
            "biases": "biases trained",
            "left": "left as they are",
        }
        for state, title in titles.items():
            rows = _rows([layer for layer in self.layers if layer.state == state])
            lines += [f"{title}:", *rows] if rows else []
        return "\n".join(lines)


def adapter_report(model: nn.Module) -> AdapterReport:
    """Every layer of a model with adapters: which of them an adapter touches, and why not the others.

    Args:
        model: what `peft.get_peft_model` or `PeftModel.from_pretrained` gave, or a model after `add_adapter`.

    Raises:
        ValueError: a model without adapters.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise ValueError(
            f"adapter_report needs a model with an adapter; this {type(model).__name__} has none. Give it one: "
            'get_peft_model(model, LoraConfig(target_modules="all-linear")).'
        )
    whole: Any = model
    base = whole.get_base_model() if hasattr(model, "get_base_model") else whole
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    seen: set[int] = set()
    layers = tuple(_layer(name, module, head, configs, seen) for name, module in _layers("", base, set()))
    return AdapterReport({name: _about(config) for name, config in configs.items()}, layers)


def _about(config):
    rank = f", r = {config.r}, alpha = {config.lora_alpha}" if hasattr(config, "lora_alpha") else ""
    return f"{getattr(config.peft_type, 'value', config.peft_type)}{rank}"


def _layers(name: str, module: nn.Module, met: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Modules with parameters of their own, and adapters in place of what they wrap, each once."""
    if id(module) in met:
        return
    met.add(id(module))
    wraps = adapts(module) or "original_module" in module._modules
    if wraps or next(module.parameters(recurse=False), None) is not None:
        yield name, module
    if not wraps:
        for child_name, child in module.named_children():
            yield from _layers(f"{name}.{child_name}".lstrip("."), child, met)


def _layer(name, module, head, configs, seen):
    inside, layer = "", module
    while adapts(layer) or "original_module" in layer._modules:
        step = "base_layer" if adapts(layer) else "original_module"
        inside, layer = f"{inside}{step}.", layer.get_submodule(step)
    own = dict(layer.named_parameters(recurse=bool(inside)))
    held = {id(p) for p in own.values()}  # an adapter of tokens has the embedding inside itself
    added = [p for p in module.parameters() if inside and id(p) not in held]
    added = _new(added, seen)
    largest = max(own.values(), key=lambda p: p.numel())
    fresh = _new(own.values(), seen)
    biases = _biases(own, adapts(module), configs)
    added += [p for p in fresh if any(p is bias for bias in biases)]
    linear = isinstance(layer, nn.Linear)
    tensors = layer.state_dict() if linear and fresh else {}  # a quantized weight's scales are among them
    quantized = getattr(largest, "quant_state", None)
    return AdaptedLayer(
        name=name,
        kind=type(layer).__name__,
        shape=(layer.out_features, layer.in_features) if linear else tuple(largest.shape),
        stored=str(largest.dtype).removeprefix("torch.") if quantized is None else quantized.quant_type,
        parameters=tuple(f"{name}.{part}" for part in own),
        size=sum(layer.in_features * layer.out_features if linear and p is layer.weight else p.numel() for p in fresh),
        nbytes=sum(tensor.nbytes for tensor in (tensors.values() if linear else fresh)),
        trained=sum(p.numel() for p in added),
        trained_nbytes=sum(p.nbytes for p in added),
        state=("adapted" if adapts(module) else "saved") if inside else "biases" if biases else "left",
        reason="" if inside or biases else _reason(name, module, largest, head, configs, not fresh),
    )


def _biases(own, adapted, configs):
    """Parameters that peft trains in place because a configuration's `bias` says so: "all", or those it adapts."""
    said = {getattr(config, "bias", "none") for config in configs.values()} - {"none"}
    return [p for part, p in own.items() if part == BIAS and ("all" in said or (said and adapted))]


def _new(parameters, seen):
    """Those that no earlier layer has."""
    new = [parameter for parameter in parameters if id(parameter) not in seen]
    seen.update(id(parameter) for parameter in new)
    return new


def _reason(name, module, largest, head, configs, tied):
    if isinstance(module, nn.Linear):
        if any(_matches(name, getattr(config, "exclude_modules", None)) for config in configs.values()):
            return EXCLUDED
        return (TIED if tied else HEAD) if module is head else NOT_NAMED
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    return NOT_LINEAR if largest.ndim > 1 else VECTORS


def _matches(name, patterns):
    """As peft matches names: a regular expression for all of it, or a list of last parts."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == part or name.endswith(f".{part}") for part in patterns or ())


def _rows(layers):
    """Lines for layers that differ by their numbers alone, one for all of them."""
    alike: dict[tuple, list[AdaptedLayer]] = {}
    for layer in layers:
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", layer.name)
        alike.setdefault((pattern, layer.shape, layer.stored, layer.reason), []).append(layer)
    width = max((len(pattern) for pattern, *_ in alike), default=0)
    rows = []
    for (pattern, shape, stored, reason), group in alike.items():
        size = " x ".join(str(n) for n in shape)
        tail = reason or f"+ {sum(layer.trained for layer in group):,}"
        rows.append(f"  {len(group):3} x {pattern:{width}}  {size:>14} {stored:9} {tail}")
    return rows
