"""What tests of Taipan share: small models whose every part matters, and how far their gates are from a tie."""

from contextlib import contextmanager

import torch
from parity_cases import shake, tokens

from scrubjay import TaipanConfig, TaipanForCausalLM
from scrubjay.modeling.selective_layer import Gate

SMALL = dict(
    hidden_size=24,
    head_dim=12,
    state_size=6,
    num_hidden_layers=5,
    attention_every=1,
    vocab_size=29,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_head_dim=6,
    intermediate_size=32,
    sliding_window=8,
)
# name: fields that differ from SMALL; each flag has its alternative in one of them at least
CASES = {
    "defaults": {},
    "window 1": dict(sliding_window=1),
    "window 2, one head": dict(sliding_window=2, num_attention_heads=1, num_key_value_heads=1),
    "window longer than the text": dict(sliding_window=100, num_key_value_heads=4),
    "three blocks to a unit": dict(attention_every=3, num_hidden_layers=9),
    "fewer layers than a unit": dict(attention_every=6, num_hidden_layers=3),
    "selected keys": dict(kv_scope="selected"),
    "selected keys by rank": dict(kv_scope="selected", window_axis="rank"),
    "rank of all keys": dict(window_axis="rank"),
    "cap of 3": dict(kv_cap=3),
    "selected keys, cap of 3": dict(kv_scope="selected", kv_cap=3, sliding_window=12),
    "selected keys by rank, cap of 3": dict(kv_scope="selected", window_axis="rank", kv_cap=3),
    "gate network": dict(gate_hidden=10),
    "gate of the stream": dict(gate_norm=False, gate_hidden=10),
    "threshold 0.7": dict(eval_threshold=0.7),
    "a threshold for each layer": dict(eval_threshold=[0.3, 0.7]),
    "residual": dict(refine="residual", tie_word_embeddings=False),
    "refined first": dict(refine_first=True),
    "norm after attention": dict(sal_post_norm=True),
    "rope": dict(sal_pos="rope", rope_theta=100.0),
    "rope, odd heads, selected keys": dict(sal_pos="rope", attention_head_dim=5, kv_scope="selected"),
    "network in every block": dict(mamba_mlp=True),
    "narrow residual": dict(residual_in_fp32=False, n_groups=2, use_bias=True, conv_kernel=3),
}


def build(name="defaults", seed=0, dtype=torch.float64, **changes):
    """A model in eval mode with random weights, of which each gate selects about 40 % of random tokens."""
    model = shake(TaipanForCausalLM(TaipanConfig(**SMALL | CASES[name] | changes)).double(), seed)
    ids = tokens(model.config.vocab_size, 2, 61)
    for i, module in enumerate(module for module in model.modules() if isinstance(module, Gate)):
        _, found = recorded(model, ids)  # again for each: what one selects changes the next one's input
        delta = torch.cat([delta.flatten() for j, delta in found if j == i])
        with torch.no_grad():
            module.bias[1] -= delta.quantile(0.6) - logit(of_layer(model.config.eval_threshold, i))
    return model.to(dtype)


@contextmanager
def gates(model, detach=True):
    """Every delta that the model's gates give, in order: (layer's number, (B, T) tensor)."""
    found, modules = [], [module for module in model.modules() if isinstance(module, Gate)]
    hooks = [
        module.register_forward_hook(lambda module, args, out, i=i: found.append((i, out.detach() if detach else out)))
        for i, module in enumerate(modules)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def logit(share):
    return float(torch.tensor(share, dtype=torch.float64).logit())


def of_layer(threshold, i):
    """The threshold of the i-th selective layer, of one number or a list."""
    return threshold[i] if isinstance(threshold, list) else threshold


def masks(found, layer, threshold=0.5):
    """Selection of one layer over the calls recorded by `gates`, joined in time: (B, T) bool."""
    return torch.cat([delta > logit(of_layer(threshold, i)) for i, delta in found if i == layer], 1)


def margin(found, threshold=0.5):
    """Smallest distance of any delta from its threshold: a comparison near a tie means nothing."""
    return min(float((delta - logit(of_layer(threshold, i))).abs().min()) for i, delta in found)


@torch.no_grad()
def recorded(model, ids, pieces=None, **kwargs):
    """(logits, what the gates gave) of ids, in one pass or piece by piece through a cache."""
    with gates(model) as found:
        if pieces is None:
            return model(ids, use_cache=False, **kwargs).logits, found
        cache, logits = None, []
        for piece in ids.split(pieces, 1):
            out = model(piece, cache=cache, use_cache=True)
            cache = out.cache
            logits.append(out.logits)
    return torch.cat(logits, 1), found
