"""Documents and padding in one batch, in every notation of collators: each document gives what it gives alone."""

import pytest
import torch
from document_cases import (
    AFTER,
    AROUND,
    BEFORE,
    FULL,
    LOW,
    NOTATIONS,
    ROWS,
    SAME,
    numbers,
    offsets,
    places,
    positions,
    real,
)
from zoo import VOCAB, ZOO, relative, tokens, trainable

from scrubjay.modeling.inputs.columns import Marks, read_columns

WAYS = {
    "positions beside a mask of ones": (FULL, lambda p: dict(position_ids=positions(p), attention_mask=real(p))),
    "positions beside True": (FULL, lambda p: dict(position_ids=positions(p), attention_mask=real(p).bool())),
    "positions, padding after": (AFTER, lambda p: dict(position_ids=positions(p), attention_mask=real(p))),
    "positions, padding before": (BEFORE, lambda p: dict(position_ids=positions(p, 1), attention_mask=real(p))),
    "positions, padding around": (AROUND, lambda p: dict(position_ids=positions(p, 7), attention_mask=real(p))),
    "positions, added -inf": (
        AROUND,
        lambda p: dict(position_ids=positions(p), attention_mask=torch.where(real(p) > 0, 0.0, -torch.inf)),
    ),
    "positions, floats": (AROUND, lambda p: dict(position_ids=positions(p), attention_mask=real(p).float())),
    "offsets over padding": (AROUND, lambda p: dict(cu_seq_lens_q=offsets(p), attention_mask=real(p))),
    "offsets of one row": (AFTER[:1], lambda p: dict(cu_seq_lens_q=offsets(p), attention_mask=real(p))),
    "document numbers over padding": (AROUND, lambda p: dict(seq_idx=numbers(p, 1), attention_mask=real(p))),
    "document numbers of -1": (AROUND, lambda p: dict(seq_idx=numbers(p).int())),
    "document numbers of -1 beside a mask": (AFTER, lambda p: dict(seq_idx=numbers(p), attention_mask=real(p))),
    "document numbers for all rows": (SAME, lambda p: dict(seq_idx=numbers(p)[:1])),
    "positions for all rows": (SAME, lambda p: dict(position_ids=positions(p)[:1])),
    "positions for all rows, ones": (SAME, lambda p: dict(position_ids=positions(p)[:1], attention_mask=real(p))),
    "a numbering mask": (AROUND, lambda p: dict(attention_mask=numbers(p, 0))),
    "a numbering mask of bytes": (FULL, lambda p: dict(attention_mask=numbers(p, 0).byte())),
    "a numbering mask of floats": (AFTER, lambda p: dict(attention_mask=numbers(p, 0).float())),
    "everything": (
        AROUND,
        lambda p: dict(
            attention_mask=numbers(p, 0),
            seq_idx=numbers(p),
            cu_seq_lens_q=offsets(p),
            cu_seq_lens_k=offsets(p),
            position_ids=positions(p),
        ),
    ),
    "positions that count the row": (
        AROUND,
        lambda p: dict(seq_idx=numbers(p), position_ids=torch.arange(24).expand(3, -1)),
    ),
    "one a row, added -inf": (ROWS, lambda p: dict(attention_mask=torch.where(real(p) > 0, 0.0, -torch.inf))),
    "one a row, added lowest": (
        ROWS,
        lambda p: dict(attention_mask=torch.where(real(p) > 0, 0.0, LOW).to(torch.bfloat16)),
    ),
    "one a row, floats": (ROWS, lambda p: dict(attention_mask=real(p).float())),
    "one a row, True": (ROWS, lambda p: dict(attention_mask=real(p).bool())),
    "one a row, numbers of -1": (ROWS, lambda p: dict(seq_idx=numbers(p))),
    "one a row, positions that jump": (
        ROWS,
        lambda p: dict(attention_mask=real(p), position_ids=torch.arange(5, 29).expand(3, -1)),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_documents_and_padding_in_any_notation_equal_each_document_alone(entry, way):
    rows, arguments = WAYS[way]
    model, ids = entry.build(torch.float64), tokens(len(rows), 24)
    labels = ids.clone()
    for row, columns in places(rows).values():  # as collators: what would be predicted of another document, or padding
        labels[row, [i for i in columns if i == 0 or i - 1 not in columns]] = -100
    labels[real(rows) == 0] = -100
    with torch.no_grad():
        out = model(ids, labels=labels, **arguments(rows))
        nats = []
        for row, columns in places(rows).values():
            alone = model(ids[row, columns][None]).logits[0]
            assert relative(out.logits[row, columns], alone) < 1e-10
            asked = [i for i, column in enumerate(columns) if labels[row, column] != -100]
            before = alone[[i - 1 for i in asked]]
            nats.append(torch.nn.functional.cross_entropy(before, ids[row, columns][asked], reduction="sum"))
    assert relative(out.loss, sum(nats) / (labels != -100).sum()) < 1e-10


def test_gradients_of_padded_documents_equal_those_of_each_alone(entry):
    model, ids = entry.build(torch.float64), tokens(len(AROUND), 24)
    model.train(not entry.samples)
    out = model(ids, attention_mask=real(AROUND), position_ids=positions(AROUND))
    weights = torch.randn_like(out.logits) * real(AROUND)[..., None]
    got = torch.autograd.grad((out.logits * weights).sum(), trainable(model))
    alone = sum(
        (model(ids[row, columns][None]).logits[0] * weights[row, columns]).sum()
        for row, columns in places(AROUND).values()
    )
    want = torch.autograd.grad(alone, trainable(model))
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-9


@pytest.mark.parametrize("changed", ["b", "d", "."])
def test_another_document_and_padding_change_no_bit(entry, changed):
    model, ids = entry.build(), tokens(len(AROUND), 24)
    if entry.name == "taipan":  # products of more or fewer selected tokens round differently: all are selected
        model.config.eval_threshold = 1e-6
    arguments = dict(attention_mask=real(AROUND), position_ids=positions(AROUND))
    others = torch.tensor([[letter not in (changed, ".") for letter in row] for row in AROUND])
    at = torch.tensor([[letter == changed for letter in row] for row in AROUND])
    with torch.no_grad():
        before = model(ids, **arguments).logits
        after = model(torch.where(at, (ids + 1) % VOCAB, ids), **arguments).logits
    assert torch.equal(before[others], after[others])
    assert changed == "." or not torch.equal(before[at], after[at])


def test_padding_among_documents_comes_back_as_zeros_of_a_state(recurrent):
    model = recurrent.build()
    out = model(tokens(3, 24), attention_mask=real(AROUND), seq_idx=numbers(AROUND), output_hidden_states=True)
    padding = real(AROUND) == 0
    assert all(not states[padding].any() for states in out.hidden_states)
    assert not out.logits[padding].any()
    assert out.cache is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_decoder_isolates_documents_under_either_attention_and_checkpointing(wrapped, attention, checkpointing):
    model, ids = wrapped.build(torch.float64, attn_implementation=attention).train(), tokens(3, 24)
    assert model.get_decoder().config._attn_implementation == attention
    arguments = dict(attention_mask=real(AROUND), position_ids=positions(AROUND))
    weights = torch.randn(3, 24, VOCAB, dtype=torch.float64) * real(AROUND)[..., None]
    alone = {x: (row, c, model(ids[row, c][None]).logits[0]) for x, (row, c) in places(AROUND).items()}
    want = torch.autograd.grad(sum((y * weights[r, c]).sum() for r, c, y in alone.values()), trainable(model))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    logits = model(ids, **arguments).logits
    got = torch.autograd.grad((logits * weights).sum(), trainable(model))
    bound = 1.3e-6 if attention == "eager" else 1e-10  # transformers' has a softmax in float32: measured 2.5e-7
    assert max(relative(logits[row, c], y) for row, c, y in alone.values()) < bound
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < bound


@pytest.fixture(params=[entry for entry in ZOO if not entry.recurrent], ids=lambda entry: entry.name)
def wrapped(request):
    """Each model that is a decoder of transformers, in turn."""
    return request.param


def test_a_budget_counts_the_tokens_of_documents_alone():
    """In training the gate draws for each token: the same draws where padding is gone from the start."""
    taipan = next(entry for entry in ZOO if entry.samples)
    model, ids = taipan.build(torch.float64).train(), tokens(len(AROUND), 24)
    columns = [(row, i) for row, i in real(AROUND).nonzero().tolist()]
    bare = ids[tuple(zip(*columns, strict=True))][None]
    flat = "".join(AROUND[row][i] for row, i in columns)
    outs = []
    for given, rows in ((ids, AROUND), (bare, (flat,))):
        torch.manual_seed(5)
        outs.append(model(given, attention_mask=real(rows), position_ids=positions(rows)))
    padded, plain = outs
    assert relative(padded.logits[real(AROUND).bool()], plain.logits[0]) < 1e-10
    assert torch.equal(padded.budget_loss, plain.budget_loss)
    assert torch.equal(padded.sequence_selection, plain.sequence_selection)
    assert len(padded.sequence_selection) == 7
    model.eval()
    rates = [model(ids[row, columns][None]).selection for row, columns in places(AROUND).values()]
    got = model(ids, attention_mask=real(AROUND), position_ids=positions(AROUND))
    assert relative(got.sequence_selection, torch.stack(rates)) < 1e-10


def test_thresholds_are_calibrated_on_the_tokens_of_documents_alone():
    taipan = next(entry for entry in ZOO if entry.samples)
    model, ids = taipan.build(torch.float64), tokens(len(ROWS), 24)
    want = model.calibrate(ids, 0.3, attention_mask=real(ROWS))
    for mask in (torch.where(real(ROWS) > 0, 0.0, -torch.inf), real(ROWS).bool(), real(ROWS).float()):
        assert model.calibrate(ids, 0.3, attention_mask=mask) == want
    packed = torch.cat([ids[row, columns] for row, columns in places(ROWS).values()])[None]
    letters = "".join(x * len(columns) for x, (_, columns) in places(ROWS).items())
    assert model.calibrate(packed, 0.3, attention_mask=numbers((letters,), 0)) == want


@pytest.mark.parametrize("filled", [0, 1])
def test_positions_that_generate_makes_of_a_padded_mask_are_no_documents(entry, filled):
    model, ids, mask = entry.build(), tokens(2, 24), torch.ones(2, 24).long()
    mask[0, :10] = 0
    made = (mask.cumsum(1) - 1).masked_fill(mask == 0, filled)
    with torch.no_grad():
        got, want = (model(ids, attention_mask=mask, use_cache=True, **more) for more in (dict(position_ids=made), {}))
    assert torch.equal(got.logits[mask.bool()], want.logits[mask.bool()])
    assert got.cache.get_seq_length() == 24


@pytest.mark.parametrize("notation", ["added", "True", "floats", "documents"])
def test_generation_reads_a_mask_in_any_notation(entry, notation):
    model, ids, mask = entry.build(), tokens(2, 24), torch.ones(2, 24).long()
    mask[0, :10] = 0
    other = mask * torch.tensor([[1], [2]]) if notation == "documents" else NOTATIONS[notation](mask)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(ids, attention_mask=other, max_new_tokens=5, do_sample=False), want)


class _Read(torch.nn.Module):
    """Reading alone, as torch.export wants it."""

    def forward(self, mask):
        return read_columns((2, 12), mask.device, Marks.of({"attention_mask": mask})).real


class _Call(torch.nn.Module):
    """A model's call, as torch.export wants it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("notation", NOTATIONS)
def test_an_exported_program_reads_a_mask_in_any_notation(notation):
    mask, write = real(("....aaaaaaaa", "aaaaaaaaaa..")), NOTATIONS[notation]
    program = torch.export.export(_Read(), (write(mask),), strict=False).module()
    for other in (mask, mask.flip(0), mask.flip(1)):
        assert torch.equal(program(write(other)), other.bool())
    for wrong in () if notation == "True" else (2 * mask, mask + 2):
        with pytest.raises(RuntimeError, match="attention_mask must be of 1 and 0, or of what is added to scores"):
            program(wrong.to(write(mask).dtype))


@pytest.mark.slow
def test_an_exported_model_reads_an_added_mask_and_refuses_documents(entry):
    model, ids, mask = entry.build(), tokens(2, 12), real(("....aaaaaaaa", "aaaaaaaaaa.."))
    added = NOTATIONS["added"](mask)
    program = torch.export.export(_Call(model), (ids, added), strict=False).module()
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits
        assert relative(program(ids, added)[mask.bool()], want[mask.bool()]) < 2e-5
        with pytest.raises(RuntimeError, match="attention_mask must be of 1 and 0, or of what is added to scores"):
            program(ids, 2.0 * mask)
