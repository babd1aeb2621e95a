"""How long a token takes ADORE beside full attention, at the level of generate(), on an idle machine: at batch 1 and 8,
and in the memory that the cache of transformers takes for eight texts, where what is smaller holds more rows.

Tokens are random and the controller untrained, which times do not feel.
"""

from collections.abc import Callable
from statistics import median

import torch
from transformers import DynamicCache

from scrubjay import AdoreCache, RecycledCache
from scrubjay.examples.measuring.measure import cache_nbytes
from scrubjay.examples.studies.cells import Cell
from scrubjay.examples.studies.real_speed import STOCK, rate
from scrubjay.examples.studies.releasing_caches import filled
from scrubjay.modeling.decoder.controller import Controller
from scrubjay.modeling.inputs.cache_argument import named

EQUAL = "equal memory"
ROWS = (1, 8, EQUAL)
TEXTS = 8  # whose keys and values are the memory


def speed_cells(model: str, dtype: str, lengths, cache_size: int, rebuild: int, smoke: bool) -> list[Cell]:
    """Of all times."""
    about = {"part": "speed", "dtype": dtype, "cache_size": cache_size, "rebuild": rebuild}
    about |= {"tokens": 4, "turns": 1} if smoke else {"tokens": 16, "turns": 3}
    return [
        Cell("releasing", model, 0, 0.0, about | {"length": length, "rows": rows})
        for length in lengths
        for rows in ROWS
    ]


def makers(model, read: RecycledCache, ids: torch.Tensor, cache_size: int, rebuild: int) -> dict[str, Callable]:
    """{name: what makes a cache that has read ids}, from one that holds all keys. All attend as many tokens, or all."""
    keys_values = [tuple(x[:, :, : layer.seen] for x in (layer.full_keys, layer.full_values)) for layer in read.layers]
    controller = Controller(model.config.hidden_size, score_mode="bilinear").eval()

    def stock():
        cache = DynamicCache(config=model.config)
        for i, (keys, values) in enumerate(keys_values):
            cache.update(keys.clone(), values.clone(), i)
        return cache

    def adore(size, r):
        cache = AdoreCache(model, cache_size=size, rebuild=r, controller=controller)
        return filled(cache, model, ids, keys_values)

    budget = cache_size + rebuild
    found: dict[str, Callable] = {STOCK: stock, "full": lambda: read.fork(policy="full")}
    found["StreamingLLM"] = lambda: read.fork(policy="streaming", budget=budget + 1)
    found["Recycled, S = 10"] = lambda: read.fork(policy="recycled", stride=10, budget=budget + 1)
    found["ADORE, R = 0"] = lambda: adore(budget, 0)
    return found | {f"ADORE, R = {rebuild}": lambda: adore(cache_size, rebuild)}


@torch.no_grad()
def speed(shop, settings) -> dict:
    """{cache: {"ms": of a step, the median over turns, "rows", "nbytes"}}; in a step every row has a token."""
    model, rows = shop.decoder("none"), settings["rows"]
    torch.manual_seed(0)
    count = TEXTS if rows == EQUAL else rows
    ids = torch.randint(100, min(40_000, model.config.vocab_size), (count, settings["length"]))
    found: dict[str, dict] = {}
    with RecycledCache(model, policy="full", budget=settings["cache_size"]) as read:
        model(ids[:, :-1], **named(read), logits_to_keep=1)
        for _ in range(settings["turns"]):
            for name, make in makers(model, read, ids[:, :-1], settings["cache_size"], settings["rebuild"]).items():
                cache = make()
                size, more = cache_nbytes(cache), 1
                if rows == EQUAL:
                    more = max(1, found.get(STOCK, {"nbytes": size})["nbytes"] // size)
                    cache.batch_repeat_interleave(more)
                mine = found.setdefault(name, {"seconds": [], "rows": count * more, "nbytes": cache_nbytes(cache)})
                mine["seconds"].append(rate(model, ids.repeat_interleave(more, 0), cache, settings["tokens"]))
                if isinstance(cache, AdoreCache | RecycledCache):
                    cache.close()
    for mine in found.values():
        mine["ms"] = round(1e3 * median(mine.pop("seconds")), 2)
    return found
