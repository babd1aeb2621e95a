"""Taipan where nothing is selected, in all rows or in some: what is computed, what is called, what has a gradient."""

import pytest
import torch
from parity_cases import BOUND, error, tokens
from taipan_cases import build
from torch import nn

from scrubjay.modeling import selective_layer as selective

NAMES = (
    "defaults",
    "selected keys",
    "selected keys by rank, cap of 3",
    "gate of the stream",
    "rope, odd heads, selected keys",
    "refined first",
    "norm after attention",
)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class NeedsRows(nn.Linear):
    """As linear layers with dynamic quantization, which look for the largest number of their input."""

    def forward(self, x):
        if not x.numel():
            raise IndexError("max(): Expected reduction dim to be specified for input.numel() == 0.")
        return super().forward(x)


def strict(model):
    """The model with linear layers that refuse an input of no rows."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = NeedsRows
    return model


def select_in(rows, monkeypatch):
    """From here on these rows of a batch alone have tokens selected."""
    chosen = selective.select

    def select(delta, *rest):
        kept = torch.zeros(len(delta), 1, dtype=torch.bool)
        kept[list(rows)] = True
        return chosen(delta, *rest) & kept

    monkeypatch.setattr(selective, "select", select)


def stepwise(model, ids, mask):
    """Logits of a prefill of 20 columns, a piece of 3, and single steps."""
    cache, logits = None, []
    for a, b in [(0, 20), (20, 23)] + [(t, t + 1) for t in range(23, ids.shape[1])]:
        out = model(ids[:, a:b], attention_mask=mask[:, :b], cache=cache, use_cache=True)
        cache = out.cache
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("rows", [(), (1,), (0, 2)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_no_linear_layer_is_given_no_rows_and_every_row_is_as_alone(name, rows, monkeypatch):
    model, ids, lengths = strict(build(name)), tokens(29, 3, 30), (20, 13, 2)
    mask = torch.stack([torch.arange(30) >= 20 - n for n in lengths]).long()
    want = {}
    for row, n in enumerate(lengths):
        with monkeypatch.context() as only, torch.no_grad():
            select_in((0,) if row in rows else (), only)
            want[row] = model(ids[row : row + 1, 20 - n :])
    select_in(rows, monkeypatch)
    with torch.no_grad():
        whole, pieces = model(ids, attention_mask=mask), stepwise(model, ids, mask)
    for row, n in enumerate(lengths):
        assert bool(want[row].selection[:, 0].all()) == (row in rows)
        assert error(whole.logits[row, 20 - n :], want[row].logits[0]) < BOUND
        assert error(pieces[row, 20 - n :], want[row].logits[0]) < BOUND
        assert error(whole.sequence_selection[row], want[row].selection) < BOUND


@pytest.mark.parametrize("attention", ["dense", "compact"])
@pytest.mark.parametrize("rows", [(), (1,)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_in_training_every_parameter_has_the_gradient_of_the_rows_alone(name, rows, attention, monkeypatch):
    """As distributed training asks: zeros, where nothing is selected, in place of none."""
    model, ids = strict(build(name, train_attention=attention, train_gate="argmax")).train(), tokens(29, 2, 20)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for row in range(2):
        with monkeypatch.context() as only:
            select_in((0,) if row in rows else (), only)
            alone = model(ids[row : row + 1], labels=ids[row : row + 1]).loss
        for sum_, grad in zip(total, torch.autograd.grad(alone / 2, list(model.parameters())), strict=True):
            sum_ += grad
    select_in(rows, monkeypatch)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.sequence_selection[:, 0, 0].bool().tolist() == [False, bool(rows)]
    for (parameter_name, p), want in zip(model.named_parameters(), total, strict=True):
        assert p.grad is not None, parameter_name
        assert (p.grad - want).abs().max() < BOUND * max(1.0, float(want.abs().max())), parameter_name
        if any(part in PROJECTIONS for part in parameter_name.split(".")) and not rows and attention == "compact":
            assert not p.grad.any(), parameter_name


@pytest.mark.parametrize("name", ["defaults", "selected keys"])
def test_packed_documents_without_a_selected_token_are_as_alone(name, monkeypatch):
    model, ids = strict(build(name)), tokens(29, 1, 60)
    bounds = torch.tensor([0, 30, 31, 60])
    chosen = selective.select

    def second(delta, *rest):  # the last document alone has some, of which packed columns come after the others
        kept = torch.arange(delta.shape[1]) >= delta.shape[1] - 29
        return chosen(delta, *rest) & kept

    with torch.no_grad():
        with monkeypatch.context() as some:
            some.setattr(selective, "select", second)
            packed = model(ids, cu_seq_lens_q=bounds)
            last = model(ids[:, 31:]).logits
        with monkeypatch.context() as none:
            select_in((), none)
            first = [model(part).logits for part in (ids[:, :30], ids[:, 30:31])]
    assert packed.sequence_selection[:, :, 0].bool().tolist() == [[False, False]] * 2 + [[True, True]]
    assert error(packed.logits, torch.cat([*first, last], 1)) < BOUND


@pytest.mark.parametrize(
    ("name", "who", "counts"),
    [
        ("defaults", "nobody", [0, 1, 1, 0]),
        ("selected keys", "nobody", [0, 0, 0, 0]),
        *((name, who, [1, 1, 1, 1]) for name in ("defaults", "selected keys") for who in ("a gradient", "a hook")),
    ],
)
@pytest.mark.parametrize("length", [1, 20])
def test_projections_are_called_once_where_somebody_waits_for_it_and_else_as_the_keys_need(
    name, who, counts, length, monkeypatch
):
    """A process of FSDP has to make the calls that the others make, in inference too."""
    model, calls = strict(build(name)), []
    select_in((), monkeypatch)
    attn = model.model.layers[model.config.selective_layers[0]].attn
    forward = NeedsRows.forward
    monkeypatch.setattr(NeedsRows, "forward", lambda self, x: (calls.append(self), forward(self, x))[1])
    if who == "a hook":
        for part in PROJECTIONS:
            getattr(attn, part).register_forward_hook(lambda *args: None)
    with torch.set_grad_enabled(who == "a gradient"):
        model(tokens(29, 2, length), use_cache=True)
    assert [calls.count(getattr(attn, part)) for part in PROJECTIONS] == counts
