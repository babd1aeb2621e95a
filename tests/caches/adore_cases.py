"""Tiny decoders, scores given as a table, and the law that ADORE's cache is held to.

The law is a plain simulation of slots and releases on Python sets, and one dense masked forward pass of the unmodified
decoder over the graph of token instances: every time a token runs through the model it is an instance of its own.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from scrubjay import AdoreCache
from scrubjay.modeling.decoder.controller import Scorer
from scrubjay.modeling.inputs.cache_argument import CACHE, named

VOCAB = 97
# float64, sdpa, norms that keep float64: the worst over all cases was 1e-12, on logits up to 40
EXACT = 5e-12
PIECES = [18] + [1] * 20
SMALL = dict(cache_size=7, rebuild=3)
HOST = SMALL | {"rebuild_from": "host"}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}


def decoder(family="llama", dtype=torch.float64, **changes):
    """A random model whose attention is peaked, so that a token that is dropped shows.

    Its norms keep float64; transformers' own round to float32.
    """
    config_class, model_class = FAMILIES[family]
    sizes = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=VOCAB)
    sizes |= dict(num_key_value_heads=2, head_dim=12, initializer_range=0.3, attn_implementation="sdpa")
    sizes |= dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    if family == "mistral":
        sizes["sliding_window"] = None
    torch.manual_seed(0)
    model = model_class(config_class(**sizes | changes)).to(dtype).eval()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm") and not isinstance(child, nn.RMSNorm):
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=dtype)
                setattr(parent, name, norm.requires_grad_(False))
    return model


def text(batch=1, length=40, seed=3):
    """(batch, length) random ids."""
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def mask_of(lengths, length):
    """(rows, length): 1 for the last so many columns of each row."""
    return torch.stack([torch.arange(length) >= length - n for n in lengths]).long()


class TableScorer(Scorer):
    """Scores from a table (N, N): row, the current position; column, the token's."""

    def __init__(self, table):
        super().__init__()
        self.scores = table

    def score(self, features, positions, now, state, table):
        return self.scores[now, positions]


def drawn_scores(length=64, seed=5):
    """A table whose every row is another order of the tokens, yet like the others: what is cached often scores well."""
    draw = torch.Generator().manual_seed(seed)
    return TableScorer(torch.rand(length, generator=draw) + 0.3 * torch.rand(length, length, generator=draw))


def made(model, **settings):
    """A cache with these scores, small enough to release."""
    return AdoreCache(model, controller=drawn_scores(), **SMALL | settings)


def on_host(model, **settings):
    """The same, its released tokens on the host."""
    return made(model, **HOST | settings)


@dataclass
class Instance:
    """One run of a token through the model: its column, the call, and the instances that it attends."""

    column: int
    call: int
    sees: list = field(default_factory=list, repr=False)  # a graph: its text would be endless


@dataclass
class Law:
    """What a text's calls must do: instances in order, the slots after each call, the columns rebuilt in each."""

    instances: list
    slots: list
    rebuilt: list


def simulate(scores, pieces, cache_size, rebuild, recent=1, sinks=0, **flags):
    """Slots and instances for calls of so many new tokens each; flags as in `AdoreSettings`."""
    instances, slots, law_slots, law_rebuilt, start = [], {}, [], [], 0
    first, host = {}, flags.get("rebuild_from") == "host"  # each column's instance of the call that it came with
    for call, new in enumerate(pieces):
        now, row = start + new - 1, scores[start + new - 1].tolist()

        def rank(column, row=row):
            return row[column], column

        chosen = sorted((c for c in range(start) if c not in slots), key=rank)[::-1][:rebuild]
        if call % flags.get("rebuild_every", 1):
            chosen = []
        gate = flags.get("rebuild_gate")
        if gate and chosen and row[chosen[0]] <= min(row[c] for c in slots):
            chosen = []
        fresh = {c: Instance(c, call) for c in range(start, start + new)}
        again = {c: first[c] if host else Instance(c, call) for c in chosen}
        entering, running = again | fresh, fresh if host else again | fresh
        first |= fresh
        rivals = {*slots, *range(start, start + new), *(chosen if flags.get("rebuild_commit") == "swap" else ())}
        spared = {c for c in rivals if c < sinks or c > now - recent}
        order = sorted(rivals, key=lambda c: (c in spared, *rank(c)))
        kept = set(order[-cache_size:])
        attended = {c: i for c, i in slots.items() if c in kept or not flags.get("release_before")} | entering
        for column, instance in running.items():
            everything = flags.get("rebuild_mask") == "full" and column < start
            instance.sees = [i for c, i in attended.items() if c <= column or everything]
        instances += running.values()
        slots = {c: i for c, i in {**slots, **entering}.items() if c in kept}
        law_slots.append(set(slots))
        law_rebuilt.append(set(chosen))
        start += new
    return Law(instances, law_slots, law_rebuilt)


@torch.no_grad()
def dense(model, ids, law):
    """Logits (I, V) and per layer (keys, values) of (H, I, P): one forward pass over all instances of the law."""
    number = {id(instance): i for i, instance in enumerate(law.instances)}
    columns = torch.tensor([instance.column for instance in law.instances])
    mask = torch.zeros(len(columns), len(columns), dtype=torch.bool)
    for i, instance in enumerate(law.instances):
        mask[i, [number[id(other)] for other in instance.sees]] = True
    out = model(
        input_ids=ids[columns][None], position_ids=columns[None], attention_mask=mask[None, None], use_cache=True
    )
    return out.logits[0], [(layer.keys[0], layer.values[0]) for layer in out[CACHE].layers]


class Recorder(AdoreCache):
    """Keeps what each call attended in each layer beside the slots: (keys, values), in the order of the call."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        attended = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        keys, values = (x[0, :, self._step.width :].clone() for x in attended)
        self.__dict__.setdefault("entries", []).append((layer_idx, keys, values))
        return attended


@torch.no_grad()
def run(model, ids, pieces, cache, mask=None):
    """Logits (B, T, V) of ids (B, T) fed in pieces, and the tables after each: [(slots, rebuilt)]."""
    logits, tables, start = [], [], 0
    for new in pieces:
        seen = None if mask is None else mask[:, : start + new]
        part = ids[:, start : start + new]
        logits.append(model(part, attention_mask=seen, **named(cache)).logits)
        tables.append((cache.slots.clone(), cache.last_rebuilt.clone()))
        start += new
    return torch.cat(logits, 1), tables


def follows(model, ids, pieces, scorer, **settings):
    """Largest differences from the law, as (logits, keys and values of rebuilt tokens), for ids (T,), and the law.

    Asserts that slots and rebuilt columns are the law's after every call.
    """
    law = simulate(scorer.scores, pieces, **settings)
    cache = Recorder(model, controller=scorer, **settings)
    logits, tables = run(model, ids[None], pieces, cache)
    for (slots, rebuilt), want_slots, want_rebuilt in zip(tables, law.slots, law.rebuilt, strict=True):
        assert {c for c in slots[0].tolist() if c >= 0} == want_slots
        assert {c for c in rebuilt[0].tolist() if c >= 0} == want_rebuilt
    want, layers = dense(model, ids, law)
    rows = {}
    for row, instance in enumerate(law.instances):
        rows[instance.call, instance.column] = row
    call_of = [call for call, new in enumerate(pieces) for _ in range(new)]
    originals = [rows[call, column] for column, call in enumerate(call_of)]
    host = settings.get("rebuild_from") == "host"
    gap = float((logits[0] - want[originals]).abs().max())
    rebuilt_gap, per_call = 0.0, len(layers)
    for call, (_, rebuilt) in enumerate(tables):
        for layer, keys, values in cache.entries[call * per_call : (call + 1) * per_call]:
            for at, column in enumerate(rebuilt[0].tolist()):
                if column >= 0:
                    row = originals[column] if host else rows[call, column]
                    for got, held in zip((keys, values), layers[layer], strict=True):
                        rebuilt_gap = max(rebuilt_gap, float((got[:, at] - held[:, row]).abs().max()))
    return gap, rebuilt_gap, law


@torch.no_grad()
def gap_after_reordering(model, **flags):
    """Largest difference of rows of a left-padded batch, reordered half way, from the same rows alone (check E).

    Asserts that the rows hold different tokens when they change places.
    """
    lengths, ids, later = (18, 11, 2), text(3), [1, 1, 4, 1, 1]
    mask = torch.cat([mask_of(lengths, 18), torch.ones(3, 22, dtype=torch.long)], 1)
    order, settings = torch.tensor([2, 0, 0]), dict(cache_size=5, rebuild=3, rebuild_commit="swap") | flags
    cache = AdoreCache(model, controller=drawn_scores(), **settings)
    first, tables = run(model, ids[:, :28], [18] + [1] * 10, cache, mask[:, :28])
    assert len({tuple(row.sort().values.tolist()) for row in tables[-1][0]}) == 3
    cache.reorder_cache(order)
    second, start = [], 28
    for new in later:
        seen = mask[order][:, : start + new]
        second.append(model(ids[order][:, start : start + new], attention_mask=seen, **named(cache)).logits)
        start += new
    second, gap = torch.cat(second, 1), 0.0
    for row, n in enumerate(lengths):
        lone = AdoreCache(model, controller=drawn_scores(), **settings)
        want = run(model, ids[row : row + 1, 18 - n : start], [n] + [1] * 10 + later, lone)[0][0]
        gap = max(gap, float((first[row, 18 - n :] - want[: n + 10]).abs().max()))
        for at in (order == row).nonzero()[:, 0]:
            gap = max(gap, float((second[at] - want[n + 10 :]).abs().max()))
    return gap
