"""Deliberate errors in how Recycled Attention holds its keys: a comparison that tests make has to find each."""

import functools

import pytest
import test_recycled_held as held
import torch
from recycled_cases import assert_close, decoder, drive, tokens

from scrubjay import RecycledCache
from scrubjay.kernels import pages
from scrubjay.modeling.caches import held_keys, held_layer
from scrubjay.modeling.caches.held_keys import FewBitKeys, HeldKeys, HostKeys
from scrubjay.modeling.caches.held_layer import HeldLowRankLayer

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


@functools.cache
def model():
    return decoder()


def on_the_host(policy="recycled", side=None):
    held.test_keys_on_the_host_give_the_oracles_answers(model(), policy, side, held.TURNS)


def step(hold="device"):
    held.test_a_step_attends_what_the_bits_stand_for(hold, 4)


def chosen(hold="device"):
    held.test_what_was_chosen_is_exact_where_the_host_has_it(hold, 4)


def crop():
    held.test_crop_takes_back_columns_over_the_border_of_a_group(model(), "full", "device", 4)


def turned():
    """Two rows change places between a prompt and its steps."""
    ids, settings = tokens(2, 40), dict(budget=8, stride=4, hold="host")
    with RecycledCache(model(), **settings) as cache, RecycledCache(model(), **settings) as other:
        want = drive(model(), ids.flip(0), [30] + [1] * 10, other)[:, 30:]
        drive(model(), ids[:, :30], [30], cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert_close(drive(model(), ids.flip(0)[:, 30:], [1] * 10, cache), want)


def first_page_twice(original):
    def generate(self, start, columns, device):
        first = None
        for page in original(self, start, columns, device):
            first = page if first is None or first[0].shape != page[0].shape else first
            yield first

    return generate


def hidden_wrong(change):
    """`_hidden` of a page with other arguments."""
    return lambda original: lambda start, m, queries, real, device: original(*change(start, m, queries, real), device)


def steps_by_half_up(original):
    def quantize(x, bits, dim):
        codes, low, step = original(x, bits, dim)
        return (codes + 1).clamp(max=2**bits - 1), low, step

    return quantize


def no_rescaling(original):
    """The softmax of each page by itself, added up."""

    def attend(q, parts, n, scale, real=None, scores=False):
        found = [original(q, [part], n, scale, real, scores) for part in parts]
        out = torch.stack([out for out, _ in found]).mean(0)
        return out, torch.cat([logp for _, logp in found], -1) if scores else None

    return attend


def rows_off_by_one(original):
    return lambda self, index: original(self, (index - 1).clamp(min=0))


def everything_coded(original):
    return 0


def few_alone(self, name, tensor):
    if name.startswith("few."):
        setattr(self.parts["few"], name[4:], tensor)


MUTATIONS = {
    "a page again": ([(HostKeys, "pages", first_page_twice)], on_the_host),
    "few bits: a page again": ([(FewBitKeys, "pages", first_page_twice)], functools.partial(step, "host")),
    "each page a softmax of its own": ([(held_layer, "attend_pages", no_rescaling)], on_the_host),
    "later tokens are seen": (
        [(pages, "_hidden", hidden_wrong(lambda start, m, queries, real: (start, m, range(10**6, 10**6 + 1), real)))],
        on_the_host,
    ),
    "padding is seen": (
        [(pages, "_hidden", hidden_wrong(lambda start, m, queries, real: (start, m, queries, None)))],
        functools.partial(on_the_host, side="left"),
    ),
    "host: neighbours are fetched": ([(HostKeys, "rows", rows_off_by_one)], on_the_host),
    "few bits: neighbours are fetched": ([(FewBitKeys, "rows", rows_off_by_one)], chosen),
    "low rank: other keys are lowered": (
        [(HeldLowRankLayer, "blocks", lambda original: lambda *args: [x.flip(-1) for x in original(*args)])],
        functools.partial(on_the_host, "lowrank"),
    ),
    "codes rounded up": ([(pages, "_quantize", steps_by_half_up)], step),
    "the newest are rounded": ([(held_keys, "TAIL", everything_coded)], crop),
    "what the bits stand for is chosen, though the host has it": (
        [(HeldKeys, "rows", lambda original: lambda self, index: self.parts["few"].rows(index))],
        functools.partial(chosen, "host"),
    ),
    "crop: the newest stay": ([(HeldKeys, "crop", lambda original: lambda self, columns: None)], crop),
    "beams: the host's rows stay": ([(HeldKeys, "set", lambda original: few_alone)], turned),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_held_mutants_are_found(name, monkeypatch):
    monkeypatch.setattr(held_keys, "PAGE", 5)
    mutations, check = MUTATIONS[name]
    check()
    for owner, attribute, change in mutations:
        monkeypatch.setattr(owner, attribute, change(getattr(owner, attribute)))
    with pytest.raises(AssertionError):
        check()
