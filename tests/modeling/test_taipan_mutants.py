"""T8: deliberate errors in Taipan's code. Each has to be found by a comparison that tests make."""

from dataclasses import replace

import pytest
import torch
from parity_cases import BOUND, error, through, tokens
from recurrences_taipan import taipan_logits
from taipan_cases import build

from scrubjay import TaipanConfig
from scrubjay.modeling import selective_layer as selective
from scrubjay.modeling.caches.cache_taipan import RingLayer
from scrubjay.modeling.modeling_ssd import SSDMixer
from scrubjay.modeling.selective_layer import SelectiveAttention

LENGTH = 40
NAMES = ("defaults", "selected keys")


def expect(got, want):
    assert error(got.detach(), want.detach()) < BOUND


def check_whole(name):
    model, ids = build(name), tokens(29, 2, LENGTH)
    with torch.no_grad():
        expect(model(ids).logits, taipan_logits(model.state_dict(), model.config, ids))


def check_steps(name):
    model, ids = build(name), tokens(29, 2, LENGTH)
    expect(through(model, ids, [1] * LENGTH), taipan_logits(model.state_dict(), model.config, ids))


def check_prefill(name):
    model, ids = build(name), tokens(29, 2, LENGTH)
    expect(through(model, ids, [12] + [1] * 28), taipan_logits(model.state_dict(), model.config, ids))


def check_padding(name):
    """A padded prefill and steps after it, against the rows alone."""
    model, lengths = build(name), (20, 13, 2)
    ids = tokens(29, 3, LENGTH)
    mask = torch.stack([torch.arange(LENGTH) >= 20 - n for n in lengths]).long()
    with torch.no_grad():
        past = model(ids[:, :20], attention_mask=mask[:, :20], use_cache=True).cache
        steps = [
            model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], cache=past).logits for t in range(20, LENGTH)
        ]
        for row, n in enumerate(lengths):
            expect(torch.cat(steps, 1)[row], model(ids[row : row + 1, 20 - n :]).logits[0, n:])


def check_beams(name):
    """Rows of different lengths exchange their caches."""
    model, ids, order = build(name), tokens(29, 3, LENGTH), torch.tensor([2, 0, 0])
    mask = torch.stack([torch.arange(20) >= 20 - n for n in (20, 13, 2)]).long()
    with torch.no_grad():
        past = model(ids[:, :20], attention_mask=mask, use_cache=True).cache
        past.reorder_cache(order)
        history, mask = ids[:, :20][order], mask[order]
        for t in range(20, 30):
            history = torch.cat([history, ids[:, t : t + 1]], 1)
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
            got = model(ids[:, t : t + 1], attention_mask=mask, cache=past).logits[:, -1]
            expect(got, model(history, attention_mask=mask).logits[:, -1])


def check_budget(name):
    """Of a padded batch: the mean over rows of what they have alone, summed over layers."""
    model, ids, lengths = build(name), tokens(29, 3, 20), (20, 13, 2)
    mask = torch.stack([torch.arange(20) >= 20 - n for n in lengths]).long()
    with torch.no_grad():
        alone = [model(ids[row : row + 1, 20 - n :]).budget_loss for row, n in enumerate(lengths)]
        expect(model(ids, attention_mask=mask).budget_loss[None], sum(alone)[None] / 3)


def check_gate_bits(name):
    attn = SelectiveAttention(TaipanConfig(hidden_size=2048, num_attention_heads=1))
    for parameter in attn.gate.parameters():
        torch.nn.init.normal_(parameter)
    h = torch.randn(300, 2048)
    with torch.no_grad():
        whole, rows = attn.gate(attn.norm(h)), torch.cat([attn.gate(attn.norm(row[None])) for row in h])
    assert torch.equal(whole, rows)


def with_argument(at, change):
    def changed(original):
        return lambda *args, **kwargs: original(*args[:at], change(args[at]), *args[at + 1 :], **kwargs)

    return changed


def keys_of_selected_alone(original):
    return lambda self, x, a, m, *rest: original(self, x * m[..., None], a, m, *rest)


def one_slot_less(original):
    return lambda self, keys, selected: original(self, [keys[0], keys[1] - 1, keys[2]], selected)


def counts_of_selected(original):
    """The layer counts what it selected instead of what it saw."""

    def attend(self, x, a, m, layout, ring, dense):
        found = original(self, x, a, m, layout, ring, dense)
        if ring is not None:
            ring.counts = (
                ring.counts - (layout.real[..., 0] if layout.lengths is not None else m | True).sum(1) + m.sum(1)
            )
        return found

    return attend


def only_keys_reordered(original):
    def select(self, indices):
        counters = {n: getattr(self, n) for n in ("counts", "written", "places") if n in self.names}
        original(self, indices)
        vars(self).update(counters)

    return select


def compact_index(original):
    def attend(*args):
        index, o = original(*args)
        return torch.arange(len(index)), o

    return attend


def perturbed_share(original):
    def forward(self, h, layout, *rest):
        new, sums = original(self, h, layout, *rest)
        return (new + 1e-4 * (new - h) if h.shape[1] == 1 else new), sums

    return forward


def padding_unknown(original):
    return lambda self, x, layout, state=None: original(self, x, replace(layout, lengths=None), state)


def padding_counted(original):
    return lambda self, columns, lengths: original(self, columns, None)


def padding_in_the_sums(original):
    def sums(x, layout):
        return original(x, replace(layout, lengths=None))

    return sums


def product(original):
    return lambda x, weight, bias, hidden=None: (x @ weight.t() + bias).diff(dim=-1)[..., 0]


def thresholds_of_others(original):
    return property(lambda self: original.fget(self)[::-1])


def unnormalised_values(original):
    def keys(self, x, *where):
        k, v = original(self, x, *where)
        return k, v * (1 + x.square().mean(-1)).sqrt()[..., None, None]

    return keys


# name: (owner, attribute, the new one from the old one, the comparison that finds it, the cases that have the part)
MUTANTS = {
    "window one key short": (selective, "select_attention", with_argument(5, lambda w: w - 1), check_whole, NAMES[:1]),
    "window one key long": (selective, "select_attention", with_argument(5, lambda w: w + 1), check_whole, NAMES[:1]),
    "ring of w - 1 slots": (RingLayer, "__init__", one_slot_less, check_steps, NAMES[:1]),
    "no keys of unselected tokens": (SelectiveAttention, "attend", keys_of_selected_alone, check_whole, NAMES[:1]),
    "counted by selection": (SelectiveAttention, "attend", counts_of_selected, check_steps, NAMES[:1]),
    "beams without counters": (RingLayer, "batch_select_indices", only_keys_reordered, check_beams, NAMES),
    "a exchanged": (selective, "mix", with_argument(2, lambda a: 1 - a), check_whole, NAMES),
    "scattered to the compact index": (SelectiveAttention, "attend", compact_index, check_whole, NAMES),
    "no padding in Mamba-2": (SSDMixer, "forward", padding_unknown, check_padding, NAMES),
    "padding has positions": (RingLayer, "count", padding_counted, check_padding, NAMES[:1]),
    "a perturbed in steps": (SelectiveAttention, "forward", perturbed_share, check_prefill, NAMES),
    "values before the norm": (SelectiveAttention, "_keys", unnormalised_values, check_whole, NAMES),
    "padding in the budget": (selective, "_sums", padding_in_the_sums, check_budget, NAMES),
    "thresholds of other layers": (
        TaipanConfig,
        "thresholds",
        thresholds_of_others,
        check_whole,
        ["a threshold for each layer"],
    ),
    "gate by a product": (selective, "gate_logit", product, check_gate_bits, NAMES[:1]),
}


@pytest.mark.parametrize(("mutant", "name"), [(mutant, name) for mutant in MUTANTS for name in MUTANTS[mutant][4]])
def test_T8_a_deliberate_error_is_found(mutant, name, monkeypatch):
    owner, attribute, change, comparison, _ = MUTANTS[mutant]
    comparison(name)
    monkeypatch.setattr(owner, attribute, change(getattr(owner, attribute)))
    with pytest.raises(AssertionError):
        comparison(name)
