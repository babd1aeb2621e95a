"""Deliberate errors in what lies on the host, each of which its checks have to find."""

import pytest
import torch
from adore_cases import EXACT, HOST, PIECES, decoder, drawn_scores, follows, gap_after_reordering, on_host, run, text

from scrubjay.modeling.caches import adore_schedule
from scrubjay.modeling.caches.adore_history import TokenHistory
from scrubjay.modeling.caches.host_rows import HostRows


def numbers_of_other_rows(original):
    return lambda self, numbers, device: original(self, numbers.flip(0), device)


def one_row_late(original):
    return lambda self, numbers, device: original(self, (numbers - 1).clamp(min=0), device)


def columns_first(original):
    def append(self, keys, values):
        original(self, *(x.transpose(0, 2).reshape(x.shape) for x in (keys, values)))

    return append


def not_renumbered(original):
    return lambda self: self["host"].flatten().cpu().long()


def values_as_keys(original):
    return lambda self: original(self).flip(-1)


def what_comes_back_hidden(original):
    def visibility(query_pos, key_pos, key_real):
        key_real = key_real.clone()
        key_real[:, HOST["cache_size"] : -query_pos.shape[1]] = False
        return original(query_pos, key_pos, key_real)

    return visibility


def at_the_current_position(original):
    def compacted(pos, real):
        pos = original(pos, real)
        pos[:, HOST["cache_size"] : -1] = pos[:, -1:]
        return pos

    return compacted


def in_one_run(model):
    gap, back_gap, _ = follows(model, text()[0], PIECES, drawn_scores(), **HOST)
    assert max(gap, back_gap) < EXACT


def in_rows(model):
    assert gap_after_reordering(model, rebuild_from="host") < EXACT


def in_fewer_rows(model):
    cache, ids = on_host(model), text(3, 30)
    run(model, ids, [18] + [1] * 4, cache)
    cache.batch_select_indices(torch.tensor([2, 1]))
    want = run(model, ids, [18] + [1] * 10, on_host(model))[0][[2, 1], 22:]
    assert (run(model, ids[[2, 1], 22:], [1] * 6, cache)[0] - want).abs().max() < EXACT


def compact(model):
    law = decoder(num_hidden_layers=1)
    logits, tables = run(law, text(), PIECES, on_host(law, position_mode="compact"))
    held, again = tables[-2][0][0].tolist(), tables[-1][1][0].tolist()
    with torch.no_grad():
        want = law(text()[:, [*sorted({*held, *again} - {-1}), 37]]).logits[0, -1]
    assert (logits[0, -1] - want).abs().max() < 1e-10


def turned_once_more(original):
    def append(self, keys, values):
        original(self, keys.roll(1, -1), values)

    return append


MUTANTS = {
    "another token's row": (HostRows, "fetch", one_row_late, in_one_run),
    "values for keys": (HostRows, "fetched", values_as_keys, in_one_run),
    "another batch row's": (HostRows, "fetch", numbers_of_other_rows, in_rows),
    "columns before rows": (HostRows, "append", columns_first, in_rows),
    "numbers forgotten in reorder": (TokenHistory, "map", lambda original: lambda self, change: None, in_rows),
    "old numbers after rows left": (TokenHistory, "renumber", not_renumbered, in_fewer_rows),
    "what comes back hidden": (adore_schedule, "visibility", what_comes_back_hidden, in_one_run),
    "turned to the current position": (adore_schedule, "compacted", at_the_current_position, compact),
    "keys stored otherwise than held": (HostRows, "append", turned_once_more, compact),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, monkeypatch):
    owner, attribute, mutate, check = MUTANTS[name]
    model = decoder()
    check(model)
    monkeypatch.setattr(owner, attribute, mutate(getattr(owner, attribute)))
    with pytest.raises((AssertionError, IndexError)):
        check(model)
