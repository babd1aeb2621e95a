"""Taipan's losses: what is in them, over which tokens, and how they add up over the calls of one step."""

import pytest
import torch
import torch.nn.functional as F
from parity_cases import BOUND, error, through, tokens
from taipan_cases import CASES, build, gates
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from zoo import relative

LENGTHS = (20, 13, 2)


def padded():
    mask = torch.stack([torch.arange(20) >= 20 - n for n in LENGTHS]).long()
    return tokens(29, 3, 20), mask


def shares(model, ids):
    """The outputs, and each layer's choices as 0 and 1, by what the gates said."""
    with gates(model) as found, torch.no_grad():
        out = model(ids)
    return out, [(delta > 0).double() for _, delta in found]


def test_selection_reports_rates_of_real_tokens():
    model, (ids, mask) = build(), padded()
    with gates(model) as found, torch.no_grad():
        out = model(ids, attention_mask=mask)
    assert out.selection.shape == (2, 3)
    real = torch.arange(20) < torch.tensor(LENGTHS)[:, None]  # the blocks' order: real tokens first
    for (_, delta), (sampled, mean, argmax) in zip(found, out.selection.tolist(), strict=True):
        assert sampled == argmax == pytest.approx(float((delta[real] > 0).double().mean()), abs=1e-12)
        assert mean == pytest.approx(float(torch.sigmoid(delta[real]).mean()), abs=1e-12)
    model.train()
    out = model(ids, attention_mask=mask)
    assert (out.selection[:, 0] != out.selection[:, 2]).all()
    assert not out.selection.requires_grad


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_selection_of_a_sequence_is_that_of_its_row_alone(training):
    """By argmax in training too, where choices do not depend on the batch."""
    model, (ids, mask) = build(train_gate="argmax").train(training), padded()
    mask = torch.cat([mask, torch.zeros_like(mask[:1])])  # a row without a token
    found = model(torch.cat([ids, ids[:1]]), attention_mask=mask).sequence_selection
    assert found.shape == (4, 2, 3)
    assert not found.requires_grad
    for row, n in enumerate(LENGTHS):
        alone = model(ids[row : row + 1, 20 - n :])
        assert relative(found[row], alone.selection) < BOUND
        assert torch.equal(alone.sequence_selection[0], alone.selection)
    assert not found[3].any()
    assert len({str(row) for row in found.tolist()}) == 4  # no two are alike


@pytest.mark.parametrize("name", ["defaults", "selected keys"])
def test_the_budget_is_of_real_tokens_per_sequence_summed_over_layers(name):
    model, (ids, mask) = build(name), padded()
    with torch.no_grad():
        got = model(ids, attention_mask=mask)
        alone, rates = [], []
        for row, n in enumerate(LENGTHS):
            out, masks = shares(model, ids[row : row + 1, 20 - n :])
            rates.append(torch.stack([m.mean() for m in masks]))
            alone.append(out.budget_loss)
    want = (0.15 - torch.stack(rates)).square().sum(1)
    assert relative(torch.stack(alone), want) < BOUND
    assert relative(got.budget_loss, want.mean()) < BOUND
    model.config.budget_reduction = "batch"
    whole = sum(rate * n for rate, n in zip(rates, LENGTHS, strict=True)) / sum(LENGTHS)
    assert relative(model(ids, attention_mask=mask).budget_loss, (0.15 - whole).square().sum()) < BOUND


@pytest.mark.parametrize("name", ["defaults", "selected keys"])
def test_packed_documents_have_a_budget_each(name):
    model, ids = build(name), tokens(29, 1, 60)
    with torch.no_grad():
        packed = model(ids, cu_seq_lens_q=torch.tensor([0, 30, 31, 60]))
        parts = [model(part) for part in ids.split([30, 1, 29], 1)]
    assert relative(packed.budget_loss, sum(part.budget_loss for part in parts) / 3) < BOUND
    want = sum(part.selection * n for part, n in zip(parts, (30, 1, 29), strict=True)) / 60
    assert relative(packed.selection, want) < BOUND
    assert relative(packed.sequence_selection, torch.stack([part.selection for part in parts])) < BOUND


def test_a_row_of_padding_has_no_budget():
    model, ids = build(), tokens(29, 2, 20)
    mask = torch.ones_like(ids)
    mask[1] = 0
    with torch.no_grad():
        got, want = model(ids, attention_mask=mask), model(ids[:1])
    assert relative(got.budget_loss, want.budget_loss) < BOUND
    assert relative(got.selection, want.selection) < BOUND


def test_a_long_prompt_taken_in_segments_reports_the_same():
    model, ids = build(), tokens(29, 2, 700)
    whole = model(ids)  # gradients wanted: one pass
    with torch.no_grad():
        cut = model(ids)
    assert relative(cut.budget_loss, whole.budget_loss) < BOUND
    assert relative(cut.selection, whole.selection) < BOUND
    assert relative(cut.sequence_selection, whole.sequence_selection) < BOUND


def test_the_loss_holds_the_budget_in_training_alone():
    model, (ids, mask) = build(budget_lambda=3.0), padded()
    labels = ids.masked_fill(mask == 0, -100)
    for training in (False, True):
        model.train(training)
        out = model(ids, attention_mask=mask, labels=labels)
        targets = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
        nats = F.cross_entropy(out.logits.flatten(0, 1), targets, ignore_index=-100)
        assert relative(out.loss, nats + (3 * out.budget_loss if training else 0)) < 1e-6
    assert model(ids).loss is None


def test_calls_of_one_step_sum_to_a_mean_weighted_by_labels():
    """Trainer sums the losses of the calls between two steps, each divided by all labels of the step."""
    model, ids = build().train(), tokens(29, 4, 20)
    labels = ids.clone()
    labels[0, :11] = -100
    counts = (labels[:, 1:] != -100).sum(1)
    total, parts = counts.sum(), []
    for row in range(4):
        torch.manual_seed(row)
        loss = model(ids[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=total).loss
        torch.manual_seed(row)
        alone = model(ids[row : row + 1], labels=labels[row : row + 1])
        assert relative(loss, alone.loss * counts[row] / total) < 1e-6
        parts.append(loss)
        torch.manual_seed(row)
        shifted = F.pad(labels[row : row + 1], (0, 1), value=-100)[:, 1:]
        again = model(ids[row : row + 1], shift_labels=shifted, num_items_in_batch=total).loss
        assert relative(again, loss) < 1e-12
    assert torch.isfinite(sum(parts))


class Rows(Dataset):
    def __init__(self):
        self.ids = (torch.arange(48)[:, None] + torch.arange(24)) % 23

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def train(folder, steps=40, **changes):
    model = build(dtype=torch.float32, **changes)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2,
        max_steps=steps, use_cpu=True, seed=0, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = Trainer(model, arguments, train_dataset=Rows())
    trainer.train()
    with torch.no_grad():
        return trainer, model.eval()(Rows().ids).selection


def test_training_with_accumulation_learns_and_spends_the_budget(tmp_path):
    """mean(a), which is the expected share in training, comes near C; without a budget loss it does not."""
    trainer, rates = train(tmp_path, budget_lambda=5.0, capacity=0.15)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert (rates[:, 1] - 0.15).abs().max() < 0.1
    _, free = train(tmp_path, budget_lambda=0.0)
    assert (free[:, 1] - 0.15).abs().max() > 0.15


def test_trainer_predicts_logits_and_evaluates_the_cross_entropy_alone(tmp_path):
    model = build(dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=16, use_cpu=True, report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, compute_metrics=lambda prediction: {"shape": prediction.predictions.shape})
    found = trainer.predict(Rows())
    assert found.metrics["test_shape"] == (48, 24, 29)
    ids = Rows().ids
    with torch.no_grad():
        logits = model(ids).logits
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found.metrics["test_loss"] == pytest.approx(float(want), rel=1e-5)


def test_gradient_checkpointing_gives_the_budget_the_same_gradients():
    """The noise is drawn again in the backward pass: it has to be the same."""
    model, ids, grads = build().train(), tokens(29, 2, 40), []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if options:
            model.gradient_checkpointing_enable(options)
        model.zero_grad()
        torch.manual_seed(1)
        out = model(ids, labels=ids)
        (out.loss + 10 * out.budget_loss).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize("surrogate", ["p1", "chosen"])
@pytest.mark.parametrize("name", CASES)
def test_training_by_argmax_has_the_logits_of_evaluation(name, surrogate):
    """In bits where the same tokens attend; where all of them do, so that each learns, sums are taken in another order.
    Those were 9.3e-14 apart at most."""
    model, ids = build(name, train_gate="argmax", st_surrogate=surrogate), tokens(29, 2, 61)
    want = model(ids, use_cache=False).logits.detach()
    model.train()
    model.config.train_attention = "compact"
    assert torch.equal(model(ids).logits, want)
    model.config.train_attention = "dense"
    dense = model(ids).logits.detach()
    assert torch.equal(dense, want) if surrogate == "chosen" else error(dense, want) < BOUND
    model.config.train_gate = "sample"
    assert error(model(ids).logits.detach(), want) > 0.1


@pytest.mark.parametrize("attention", ["dense", "compact"])
@pytest.mark.parametrize("name", ["defaults", "selected keys", "selected keys by rank, cap of 3", "rope"])
def test_training_by_argmax_through_a_cache_has_the_logits_of_evaluation(name, attention):
    model, ids = build(name, train_gate="argmax", train_attention=attention), tokens(29, 2, 61)
    want = through(model, ids, [20, 1, 5, 35])
    got = through(model.train(), ids, [20, 1, 5, 35])
    assert torch.equal(got, want) if attention == "compact" else error(got, want) < BOUND


def test_training_by_argmax_in_float32_with_gradients_is_near_evaluation_without():
    """As DPO compares a policy with a reference: 3.7e-6 of the largest logit was the most of eight seeds."""
    model, ids = build(dtype=torch.float32, train_gate="argmax"), tokens(29, 2, 61)
    with torch.no_grad():
        want = model(ids).logits
    assert relative(model.train()(ids).logits, want) < 1.9e-5


@pytest.mark.parametrize(("attention", "reached"), [("dense", 122), ("compact", 49)])
def test_training_by_argmax_teaches_the_gate(attention, reached):
    """The gradient of the cross-entropy alone by delta: of every token, or of those that were selected."""
    model, ids = build(num_hidden_layers=2, train_gate="argmax", train_attention=attention).train(), tokens(29, 2, 61)
    with gates(model, detach=False) as found:
        logits = model(ids).logits
    ((_, delta),) = found
    (grad,) = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), ids.flatten()), delta)
    assert int((grad != 0).sum()) == reached
    assert attention == "dense" or torch.equal(grad != 0, delta > 0)
