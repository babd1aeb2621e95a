"""Deliberate errors in ADORE's cache, each of which its checks have to find (check G)."""

import pytest
import torch
from adore_cases import EXACT, PIECES, decoder, drawn_scores, follows, gap_after_reordering, text

from scrubjay.kernels import release
from scrubjay.modeling.caches import adore_schedule
from scrubjay.modeling.caches.adore_history import TokenHistory
from scrubjay.modeling.caches.adore_layer import AdoreLayer
from scrubjay.modeling.caches.cache_adore import AdoreCache


def rebuilt_at_the_current_position(original):
    def enter(self, decoder, kwargs):
        kwargs = original(self, decoder, kwargs)
        kwargs["position_ids"] = kwargs["position_ids"].clone()
        kwargs["position_ids"][:, : self._step.rebuilt] = kwargs["position_ids"][:, -1:]
        return kwargs

    return enter


def rebuilt_sees_later_tokens(original):
    def visibility(query_pos, key_pos, key_real):
        seen = original(query_pos, key_pos, key_real)
        seen[:, :-1] |= key_real[:, None]  # the last query is the current token
        return seen

    return visibility


def not_written(original):
    return staticmethod(lambda held, at, entries: held if at.shape[2] == 1 else original(held, at, entries))


def written_one_slot_late(original):
    return lambda taken, enters: (original(taken, enters) + 1).clamp(max=taken.shape[1])


def released_too_early(original):
    return lambda rank, budget: original(rank, budget - 1)


def forgotten(original):
    return lambda self, change: None


def slots_forgotten(original):
    def reorder(self, change):
        slots = self.slots
        original(self, change)
        self.slots = slots

    return reorder


def padding_counted(original):
    return lambda self, real: original(self, torch.ones_like(real))


def in_one_run(model):
    gap, rebuilt_gap, _ = follows(model, text()[0], PIECES, drawn_scores(), cache_size=7, rebuild=3)
    assert max(gap, rebuilt_gap) < EXACT


def in_rows(model):
    assert gap_after_reordering(model) < EXACT


MUTANTS = {
    "wrong RoPE position": (AdoreCache, "enter", rebuilt_at_the_current_position, in_one_run),
    "non-causal rebuild": (adore_schedule, "visibility", rebuilt_sees_later_tokens, in_one_run),
    "stale slot": (AdoreLayer, "_stored", not_written, in_one_run),
    "another slot than the table says": (release, "placement", written_one_slot_late, in_one_run),
    "one token too few kept": (release, "survivors", released_too_early, in_one_run),
    "history forgotten in reorder": (TokenHistory, "map", forgotten, in_rows),
    "slots forgotten in reorder": (AdoreCache, "_map", slots_forgotten, in_rows),
    "keys forgotten in reorder": (AdoreLayer, "map", forgotten, in_rows),
    "padding counted as tokens": (TokenHistory, "locate", padding_counted, in_rows),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_adore_G_mutants_are_caught(name, monkeypatch):
    owner, attribute, mutate, check = MUTANTS[name]
    model = decoder()
    check(model)
    monkeypatch.setattr(owner, attribute, mutate(getattr(owner, attribute)))
    with pytest.raises(AssertionError):
        check(model)
