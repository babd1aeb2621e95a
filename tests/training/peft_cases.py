"""What the tests of adapters share: every projection of every model, and every way of running a model."""

import copy
from dataclasses import replace
from functools import cache

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from zoo import ZOO, tokens

from scrubjay import AdoreCache, RecycledCache
from scrubjay.modeling import base

# Narrower and shorter than what any model needs to run all of its parts; small caches release, and rebuild.
UNTIED = {"tie_word_embeddings": False}
SMALL = {"adore": {"cache_size": 6, "rebuild": 2, "sinks": 1, "recent": 2}, "recycled": {"budget": 6, "stride": 3}}


@cache
def projections(entry) -> tuple[str, ...]:
    """Last two parts of the name of each linear layer, the head among them, each once."""
    names = [name for name, module in entry.build(**UNTIED).named_modules() if isinstance(module, nn.Linear)]
    return tuple(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))


CASES = [(entry, target) for entry in ZOO for target in projections(entry)]
TAIPAN = next(entry for entry in ZOO if entry.name == "taipan")
# the other way to keep keys, whose steps and whose training run through code of their own
SELECTED = replace(
    TAIPAN,
    name="taipan_selected",
    config=lambda **c: TAIPAN.config(**{"kv_scope": "selected", "train_attention": "dense"} | c),
)
CASES += [(SELECTED, target) for target in projections(SELECTED) if target.startswith("attn.")]
IDS = [f"{entry.name}-{target}" for entry, target in CASES]


def adapted(model, target, **changes):
    """The model with an adapter that does something, in eval mode."""
    torch.manual_seed(1)
    target = target if target == "all-linear" else [target]
    config = LoraConfig(target_modules=target, r=4, lora_alpha=64, **{"init_lora_weights": False} | changes)
    return get_peft_model(model, config).eval()


def merged(model):
    """A copy with its adapters merged in."""
    return copy.deepcopy(model).merge_and_unload()


def _stepwise(model, cache=None):
    ids = tokens(2, 15)
    parts = []
    for start, stop in ((0, 9), (9, 12), (12, 13), (13, 14), (14, 15)):  # a prompt, a piece, single steps
        out = model(ids[:, start:stop], cache=cache, use_cache=True)
        cache = out.cache
        parts.append(out.logits)
    return torch.cat(parts, 1)


def whole(model):
    """One pass over all tokens."""
    return model(tokens(2, 15), use_cache=False).logits


def _small_cache(entry, model):
    cache = {"adore": AdoreCache, "recycled": RecycledCache}[entry.name]
    with cache(model, **SMALL[entry.name]) as held:
        return _stepwise(model, held)


def _in_segments(model):
    kept, base.SEGMENT = base.SEGMENT, 4
    try:
        return whole(model)
    finally:
        base.SEGMENT = kept


def _training(model):
    torch.manual_seed(2)
    logits = model.train()(tokens(2, 15)).logits
    model.eval()
    return logits


def _packed(model):
    return model(tokens(1, 15), seq_idx=torch.tensor([[0] * 6 + [1] * 2 + [2] * 7])).logits


def _padded(model):
    mask = torch.ones(2, 15, dtype=torch.int64)
    mask[0, :4] = mask[1, 11:] = 0
    return model(tokens(2, 15), attention_mask=mask).logits[mask.bool()]


def paths(entry):
    """{name: model -> logits} of each way in which a model reads its weights."""
    ways = {"whole": whole, "cached": _stepwise, "packed": _packed, "padded": _padded, "training": _training}
    if entry.recurrent:
        return ways | {"segments": _in_segments}
    return ways | {"small cache": lambda model: _small_cache(entry, model)}
