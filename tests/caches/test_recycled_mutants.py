"""Deliberate errors: each is put into Recycled Attention, and a comparison that tests make has to find it."""

import functools

import pytest
import torch
from recycled_cases import Oracle, OutOfBoundError, assert_close, compare, decoder, drive, padded, tokens

from scrubjay import RecycledCache, RecycledConfig
from scrubjay.modeling.caches import choosing_layer, kept_keys, recycled_layer
from scrubjay.modeling.caches import evicting_layer as evicting
from scrubjay.modeling.caches.choosing_layer import LowRankLayer, QuestLayer
from scrubjay.modeling.caches.evicting_layer import EvictingLayer
from scrubjay.modeling.caches.kept_keys import Call, KeepingLayer, Kept
from scrubjay.modeling.caches.recycled_layer import TAIL, RecycledLayer
from scrubjay.modeling.inputs.cache_argument import named

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

STEPS = [12] + [1] * 20


@functools.cache
def model():
    return decoder()


def check(pieces=STEPS, side=None, counts=(12, 5, 2), **settings):
    """The library does what the oracle does."""
    settings = {"budget": 8, "stride": 6} | settings
    ids, real = tokens(3, sum(pieces)), None
    if side is not None:
        rest = torch.ones(3, sum(pieces) - 12, dtype=torch.bool)
        real = torch.cat([padded(counts, 12, side), rest], 1)
    with RecycledCache(model(), **settings) as cache:
        compare(model(), ids, pieces, cache, Oracle(model(), **settings), real)


def check_dynamic(**settings):
    """With a threshold in the middle of what the oracle finds."""
    settings = dict(budget=8, schedule="dynamic", qc=2) | settings
    found = Oracle(model(), threshold=-2.0, **settings)
    found.drive(tokens(3, sum(STEPS)), STEPS)
    check(threshold=torch.tensor([row[1:] for row in found.cosines]).median().item() + 1e-4, **settings)


def check_crop(**settings):
    """Five steps, five back, and the same five again."""
    ids = tokens(2, 17)
    with RecycledCache(model(), **{"budget": 6, "stride": 50} | settings) as cache:
        want = drive(model(), ids, [12] + [1] * 5, cache)
        cache.crop(-5)
        assert_close(drive(model(), ids[:, 12:], [1] * 5, cache), want[:, 12:])


def check_reorder(policy="recycled", n_sink=0):
    """Rows in another order, and steps: as if they had been in that order from the start."""
    ids, order, settings = tokens(3, 30), torch.tensor([2, 0, 0]), dict(budget=8, policy=policy, n_sink=n_sink)
    real = torch.cat([padded((12, 2, 4), 12), torch.ones(3, 18, dtype=torch.bool)], 1)
    with RecycledCache(model(), **settings) as cache, RecycledCache(model(), **settings) as other:
        drive(model(), ids[:, :13], [12, 1], cache, real[:, :13])
        cache.reorder_cache(order)
        want = drive(model(), ids[order], [12] + [1] * 18, other, real[order])[:, 13:]
        positions = real[order].long().cumsum(1)[:, 13:] - 1
        with torch.no_grad():
            steps = [
                model()(column[:, None], **named(cache), position_ids=at[:, None]).logits
                for column, at in zip(ids[order, 13:].T, positions.T, strict=True)
            ]
        assert_close(torch.cat(steps, 1), want)


def with_arguments(change):
    """The original, called with what `change` makes of its arguments."""

    def changed(original):
        def call(*args, **kwargs):
            args, kwargs = change(*args, **kwargs)
            return original(*args, **kwargs)

        return call

    return changed


def narrower(logp, groups, reduce, kernel, real):
    return (logp, groups, reduce, kernel - 2, real), {}


def of_the_mean(logp, groups, reduce, kernel, real):
    return (logp, groups, "mean", kernel, real), {}


def padding_unmasked(logp, groups, reduce, kernel, real):
    return (logp, groups, reduce, kernel), {}


def padding_chosen(scores, budget, recent, sinks, real):
    return (scores, budget, recent, sinks), {}


def newest_free(scores, budget, recent, sinks, real):
    return (scores, budget, 0, sinks, real), {}


def old_key_again(kept, k, v, column, rank, real):
    return (kept, kept.keys[:, :, :1].clone(), kept.values[:, :, :1].clone(), column, rank, real), {}


def ties_the_other_way(original):
    """The oldest of equal scores."""

    def top(scores, *args):
        return scores.shape[2] - 1 - original(scores.flip(-1), *args)

    return top


def highest_evicted(original):
    return torch.Tensor.argmax


def crop_with_stale_query(original):
    def crop(self, count):
        stale = self.query_of(self.seen).clone()
        original(self, count)
        self.tail[:, :, (self.seen - 1) % TAIL] = stale

    return crop


def crop_with_stale_slots(original):
    def crop(self, count):
        kept = self.kept
        original(self, count)
        self.kept = kept

    return crop


def crop_with_stale_schedule(original):
    def crop(self, count):
        since = self.since
        original(self, count)
        self.since = since

    return crop


def reorder_without(*left):
    """Rows move, but for the tensors of these names."""

    def changed(original):
        def select(self, change):
            stay = {name: tensor for name, tensor in self.tensors().items() if name in left}
            original(self, change)
            for name, tensor in stay.items():
                self.set(name, tensor)

        return select

    return changed


def refresh_of_old_tokens(original):
    def full_step(self, *args):
        out = original(self, *args)
        self.waiting[..., self.seen - self.settings.stride : -1] = -torch.inf
        return out

    return full_step


def turned_the_other_way(original):
    def mean_of(self, queries):
        cos, sin = self.call.rotary
        self.call.rotary = cos, -sin
        mean = original(self, queries)
        self.call.rotary = cos, sin
        return mean

    return mean_of


def not_turned(original):
    return lambda self, queries: queries.mean(1)


def reference_of_the_prompt(original):
    return lambda self: original(self) if self.reference is None else None


def restarted_while_short(original):
    def short_step(self, *args):
        self.renew()

    return short_step


def left_in_slot_order(original):
    return lambda self: torch.arange(self.filled).expand(*self.index.shape[:2], -1)


def replaced_by(value):
    return lambda original: value


# name: (what to replace: (owner, attribute, the new one from the old one), ...; the comparison that finds it)
MUTATIONS = {
    "pool narrower by one on each side": ([(kept_keys, "pooled", with_arguments(narrower))], check),
    "mean of a group for max": ([(kept_keys, "pooled", with_arguments(of_the_mean))], check),
    "oldest of equal scores kept": ([(recycled_layer, "top", ties_the_other_way)], check),
    "newest token not forced": ([(recycled_layer, "top", with_arguments(newest_free))], check),
    "newest token not written": ([(Kept, "put", with_arguments(old_key_again))], check),
    "highest evicted": ([(torch.Tensor, "argmin", highest_evicted)], check),
    "one key too many": ([(KeepingLayer, "capacity", replaced_by(property(lambda self: 9)))], check),
    "padding masked before pooling alone": (
        [
            (kept_keys, "pooled", with_arguments(padding_unmasked)),
            (recycled_layer, "top", with_arguments(padding_chosen)),
        ],
        functools.partial(check, side="left"),
    ),
    "neighbours across a hole apart": (
        [(kept_keys, "pooled", with_arguments(padding_unmasked))],
        functools.partial(check, side="inner"),
    ),
    "a padded query chooses": (
        [(Call, "last", replaced_by(lambda self, query, count: query[:, :, -count:]))],
        functools.partial(check, side="right", counts=(12, 11, 10)),
    ),
    "refresh forgets the tokens since the last full step": (
        [(RecycledLayer, "full_step", refresh_of_old_tokens)],
        functools.partial(check, stride=5),
    ),
    "schedule restarts while all keys fit": (
        [(RecycledLayer, "short_step", restarted_while_short)],
        functools.partial(check, [3] + [1] * 20),
    ),
    "sinks evicted": ([(KeepingLayer, "pinned", replaced_by(
        lambda self, columns, like: torch.zeros(len(like), columns, dtype=torch.bool)))],
        functools.partial(check, n_sink=3, stride=50),
    ),
    "crop: stale query": ([(RecycledLayer, "crop", crop_with_stale_query)], check_crop),
    "crop: stale slots": ([(RecycledLayer, "crop", crop_with_stale_slots)], check_crop),
    "crop: stale schedule": (
        [(RecycledLayer, "crop", crop_with_stale_schedule)],
        functools.partial(check_crop, stride=4),
    ),
    "beams: keys not reordered": (
        [(KeepingLayer, "map", reorder_without("kept.keys", "kept.values"))],
        check_reorder,
    ),
    "beams: ranks not reordered": (
        [(KeepingLayer, "map", reorder_without("kept.rank"))],
        functools.partial(check_reorder, n_sink=3),
    ),
    "beams: mass not reordered": (
        [(KeepingLayer, "map", reorder_without("mass"))],
        functools.partial(check_reorder, "h2o"),
    ),
    "dynamic: turned the other way": ([(RecycledLayer, "mean_of", turned_the_other_way)], check_dynamic),
    "dynamic: not turned back": ([(RecycledLayer, "mean_of", not_turned)], check_dynamic),
    "dynamic: compared with the prompt": ([(RecycledLayer, "refer", reference_of_the_prompt)], check_dynamic),
    "h2o: without the prompt's columns": (
        [(evicting, "attend_received", lambda original: lambda *args: (
            original(*args)[0], torch.zeros_like(original(*args)[1])))],
        functools.partial(check, policy="h2o"),
    ),
    "h2o: mass of the last query alone": (
        [(evicting, "attend_received", lambda original: lambda q, k, v, scale: (
            original(q, k, v, scale)[0], evicting.received(q[:, :, -1:], k, scale, torch.ones(1, 1).bool())))],
        functools.partial(check, policy="h2o"),
    ),
    "h2o: no mass from steps": (
        [(evicting, "decode_with_scores", lambda original: lambda *args: (
            original(*args)[0], torch.full_like(original(*args)[1], -torch.inf)))],
        functools.partial(check, [3] + [1] * 40, policy="h2o"),
    ),
    "h2o: newest half not spared": (
        [(RecycledConfig, "recent", replaced_by(property(lambda self: 1)))],
        functools.partial(check, policy="h2o"),
    ),
    "streaming: without sinks": (
        [(RecycledConfig, "sinks", replaced_by(property(lambda self: 0)))],
        functools.partial(check, policy="streaming"),
    ),
    "streaming: a second turn in the order of the slots": (
        [(Kept, "sort", left_in_slot_order)],
        functools.partial(check, [12, 1, 1, 1, 2] + [1] * 10, policy="streaming"),
    ),
    "snapkv: a window of one": (
        [(RecycledConfig, "recent", replaced_by(property(lambda self: 1)))],
        functools.partial(check, policy="snapkv"),
    ),
    "snapkv: no pooling": (
        [(evicting, "pooled", lambda original: lambda mass, *args: mass)],
        functools.partial(check, [30] + [1] * 9, policy="snapkv"),
    ),
    "tova: the largest of the heads": (
        [(EvictingLayer, "over_heads", replaced_by(lambda self, logp: logp.exp().amax(1, keepdim=True)))],
        functools.partial(check, policy="tova"),
    ),
    "lowrank: queries lowered as keys are": (
        [(LowRankLayer, "find", lambda original: lambda self, *args: (
            original(self, *args), self.to_low[:, :, 1].copy_(self.to_low[:, :, 0])))],
        functools.partial(check, policy="lowrank"),
    ),
    "lowrank: new keys never lowered": (
        [(LowRankLayer, "lower", lambda original: lambda self, keys: (
            original(self, keys), self.low[..., 12 : self.seen].zero_()))],
        functools.partial(check, policy="lowrank"),
    ),
    "lowrank: the newest key not read": (
        [(choosing_layer, "best", lambda original: lambda scores, budget, recent, *args: original(
            scores.index_fill(2, torch.tensor(scores.shape[2] - 1), -torch.inf), budget, 0, *args))],
        functools.partial(check, policy="lowrank"),
    ),
    "quest: one bound of two": (
        [(QuestLayer, "bound", lambda original: lambda self, *args: (
            original(self, *args), setattr(self, "high", self.low)))],
        functools.partial(check, policy="quest", page=3),
    ),
    "quest: the page that is not whole not read": (
        [(choosing_layer.torch, "cat", lambda original: lambda tensors, *args, **kwargs: (
            tensors[0] if tensors[0].dtype == torch.int64 and args == (2,) else original(tensors, *args, **kwargs)))],
        functools.partial(check, policy="quest", page=3),
    ),
    "a piece sees what follows": (
        [(EvictingLayer, "visible", lambda original: lambda *args: original(*args) | True)],
        functools.partial(check, [12, 1, 4, 1, 1, 1], policy="snapkv"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_deliberate_error_in_recycled_attention_is_found(name, monkeypatch):
    """That the comparisons can fail."""
    changes, comparison = MUTATIONS[name]
    comparison()
    for owner, attribute, change in changes:
        monkeypatch.setattr(owner, attribute, change(getattr(owner, attribute)))
    with pytest.raises(OutOfBoundError):
        comparison()
