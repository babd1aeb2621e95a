"""Training with what users train with: Trainer, collators, autocast, checkpointing, resuming."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from zoo import relative, tokens, trainable


class Rows(Dataset):
    """Rows of the same short pattern with noise: something that a model learns within a few steps."""

    def __init__(self, count=64, length=24):
        start = torch.randint(0, 20, (count, 1), generator=torch.Generator().manual_seed(0))
        self.ids = (start + torch.arange(length)) % 23

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def arguments(folder, **more):
    options = dict(
        output_dir=str(folder), per_device_train_batch_size=8, learning_rate=3e-3, max_steps=20, use_cpu=True, seed=0,
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return TrainingArguments(**options | more)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_labels_are_shifted_and_summed_as_asked(entry):
    model, ids = entry.build(torch.float64), tokens(2, 10)
    logits = model(ids).logits
    want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert relative(model(ids, labels=ids).loss, want) < 1e-6  # transformers' loss takes float32 logits
    assert relative(model(ids, labels=ids, num_items_in_batch=torch.tensor(7)).loss, want * 18 / 7) < 1e-6
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    assert relative(model(ids, shift_labels=shifted).loss, want) < 1e-6
    assert relative(model(ids, labels=torch.zeros_like(ids), shift_labels=shifted).loss, want) < 1e-6


@pytest.mark.parametrize("call", [dict(logits_to_keep=2), dict(labels=tokens(2, 9))], ids=lambda call: next(iter(call)))
def test_labels_of_another_length_than_the_logits_are_refused(entry, call):
    with pytest.raises(ValueError, match=r"labels must have shape \(2, (2|10)\), .*; got \(2, (10|9)\)"):
        entry.build()(**dict(input_ids=tokens(2, 10), labels=tokens(2, 10)) | call)


@pytest.mark.parametrize("extended", [False, True])
def test_trainer_smooths_the_labels_of_the_next_token(entry, extended, tmp_path):
    """Not of the token itself: Trainer computes this loss, and shifts labels only for classes whose names it knows. It
    is all of the loss, without Taipan's budget."""
    ids = tokens(2, 10)
    model = entry.build()
    if extended:  # as by a user, or by FSDP2
        model.__class__ = type("Extended", (entry.model,), {})
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=Rows())
    with torch.no_grad():
        torch.manual_seed(0)  # of Taipan's noise
        got = trainer.compute_loss(trainer.model.train(), {"input_ids": ids, "labels": ids})
        torch.manual_seed(0)
        logits = trainer.model(ids).logits
    want = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)
    assert relative(got, want) < 1.5e-6  # 3.1e-7 was the most seen


def test_gradient_checkpointing_gives_the_same_gradients(entry):
    model, ids = entry.build(torch.float64).train(), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    grads = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if options is not None:
            model.gradient_checkpointing_enable(options)
        model.zero_grad()
        torch.manual_seed(3)
        out = model(ids, attention_mask=mask, labels=ids)
        assert out.cache is None
        out.loss.backward()
        grads.append([p.grad.clone() for p in trainable(model)])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))
    with pytest.raises(ValueError, match="cannot advance a cache"):
        model(ids, cache=entry.model.cache_class(model))


def test_trainer_learns(entry, tmp_path):
    trainer = Trainer(entry.build(), arguments(tmp_path), train_dataset=Rows())
    trainer.train()
    assert losses(trainer)[-1] < 0.6 * losses(trainer)[0]


def test_trainer_in_bfloat16_with_checkpointing_learns(entry, tmp_path):
    more = dict(bf16=True, gradient_checkpointing=True)
    trainer = Trainer(entry.build(), arguments(tmp_path, **more), train_dataset=Rows())
    trainer.train()
    assert losses(trainer)[-1] < 0.6 * losses(trainer)[0]
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_autocast_stays_near_float32_and_keeps_states_exact(entry):
    model, ids = entry.build(), tokens(2, 40)
    want = model(ids, labels=ids)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(ids, labels=ids, use_cache=True)
        got.loss.backward()
    assert abs(got.loss.item() - want.loss.item()) < 2e-2 * want.loss.item()
    if entry.recurrent:
        held = [layer.tensors() for layer in got.cache.layers]
        assert {tensors["state"].dtype for tensors in held if "state" in tensors} == {torch.float32}
    autocast = [p.grad.clone() for p in trainable(model)]
    model.zero_grad()
    want.loss.backward()
    cosine = [
        torch.cosine_similarity(a.flatten(), p.grad.flatten(), 0)
        for a, p in zip(autocast, trainable(model), strict=True)
    ]
    assert min(cosine) > 0.95


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("bounds", [False, True])
def test_flattening_collator_equals_separate_documents(entry, numbers, bounds):
    model, more = entry.build(torch.float64), dict(return_seq_idx=numbers, return_flash_attn_kwargs=bounds)
    documents = [{"input_ids": tokens(1, n, seed=n)[0].tolist()} for n in (9, 1, 30)]
    batch = DataCollatorWithFlattening(return_tensors="pt", **more)(documents)
    assert ("seq_idx" in batch, "cu_seq_lens_k" in batch) == (numbers, bounds)
    got = model(**batch, num_items_in_batch=torch.tensor(37))
    parts = [model(torch.tensor([d["input_ids"]])).logits for d in documents]
    assert relative(got.logits, torch.cat(parts, 1)) < 1e-10
    want = sum(
        torch.nn.functional.cross_entropy(x[0, :-1], torch.tensor(d["input_ids"][1:]), reduction="sum")
        for x, d in zip(parts, documents, strict=True)
        if len(d["input_ids"]) > 1
    )
    assert relative(got.loss, want / 37) < 1e-6


def test_trainer_with_packing_learns(entry, tmp_path):
    rows = [{"input_ids": row["input_ids"].tolist()} for row in Rows()]
    trainer = Trainer(
        entry.build(),
        arguments(tmp_path, remove_unused_columns=False),
        train_dataset=rows,
        data_collator=DataCollatorWithFlattening(),
    )
    trainer.train()
    assert losses(trainer)[-1] < 0.6 * losses(trainer)[0]


def test_resuming_from_a_checkpoint_goes_on_bit_for_bit(entry, tmp_path):
    more = dict(max_steps=6, save_strategy="steps", save_steps=3)
    straight = Trainer(entry.build(), arguments(tmp_path, **more), train_dataset=Rows())
    straight.train()
    resumed = Trainer(entry.build(seed=9), arguments(tmp_path, **more), train_dataset=Rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(straight)
    pairs = zip(straight.model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_weight_decay_groups_hold_every_parameter_once(entry):
    model = entry.build()
    decayed, kept = model.weight_decay_groups(0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    ids = [id(p) for group in (decayed, kept) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in trainable(model))
    assert all(p.ndim >= 2 for p in decayed["params"])
    optimizer = torch.optim.AdamW([decayed, kept], lr=1e-3)
    model(tokens(2, 8), labels=tokens(2, 8)).loss.backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_model_from_config_alone_starts_near_uniform(entry):
    """Initialisation through transformers' own path, on the meta device first: the loss starts at ln(vocabulary)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(entry.config())
    assert abs(model(tokens(2, 30), labels=tokens(2, 30)).loss.item() - math.log(97)) < 0.5
