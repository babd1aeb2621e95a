"""trl's SFTTrainer with packing and LoRA or QLoRA, and its DPOTrainer, on every model."""

import itertools
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from peft_cases import whole
from tiny_tokenizer import tiny_tokenizer
from transformers import BitsAndBytesConfig, Trainer
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from zoo import VOCAB, ZOO, relative

LENGTHS = (5, 9, 7, 12, 6, 8, 10, 4) * 3


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def train(tokenizer, tmp_path):
    """model -> trainer over packed documents, each of them counting upwards."""
    logging.disable_progress_bar()
    documents = [[2 + (3 * i + j) % (VOCAB - 2) for j in range(length)] for i, length in enumerate(LENGTHS)]

    def make(model, trainer=SFTTrainer, lora=None, **options):
        args = SFTConfig(
            output_dir=str(tmp_path / "out"),
            packing=True,
            max_length=32,
            per_device_train_batch_size=2,
            max_steps=8,
            learning_rate=2e-2,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        data = Dataset.from_list([{"input_ids": document} for document in documents])
        lora = LoraConfig(target_modules="all-linear", r=4, **(lora or {}))
        return trainer(
            model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora, **options
        )

    return make


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_packed_documents_do_not_leak(entry, train):
    """The batches of the trainer's own collator: each document has the logits and the loss that it has alone."""
    trainer = train(entry.build())
    batch = next(iter(trainer.get_train_dataloader()))
    bounds = batch["cu_seq_lens_q"].tolist()
    assert len(bounds) > 4
    model = trainer.model.eval()
    with torch.no_grad():
        packed = model(**batch)
        alone = [model(batch["input_ids"][:, a:b], use_cache=False).logits for a, b in itertools.pairwise(bounds)]
        assert relative(packed.logits, torch.cat(alone, 1)) < 2e-6  # 3.6e-7 was the most seen
        shared = model(batch["input_ids"], use_cache=False).logits
        assert relative(shared, packed.logits) > 0.05  # it is the borders that keep them apart
        nats = [
            torch.nn.functional.cross_entropy(logits[0, :-1], batch["input_ids"][0, a + 1 : b], reduction="sum")
            for logits, a, b in zip(alone, bounds, bounds[1:], strict=False)
        ]
        want = sum(nats) / (bounds[-1] - len(nats))
        assert relative(trainer.compute_loss(model, dict(batch)), want) < 1e-6  # 2.1e-7 was the most seen
        assert relative(packed.loss, want) < 1e-6


def test_lora_learns_in_sft(entry, train, tmp_path):
    base = entry.build()
    trainer = train(base)
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert trainer.state.global_step == 8
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, now[name]) for name, p in frozen.items())
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(entry.build(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(whole(again), whole(trainer.model.eval()))


def test_qlora_learns_in_sft_from_a_folder(entry, train, tmp_path):
    more = {"ssd": {"n_groups": 2}}.get(entry.name, {})
    entry.build(hidden_size=64, **more).save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    trainer = train(str(tmp_path / "base"), quantization_config=settings)
    kinds = {type(module).__name__ for module in trainer.model.modules()}
    assert "Linear4bit" in kinds
    trainer.train()
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]


class WholeLoss(SFTTrainer):
    """With the loss that the model itself computes."""

    def compute_loss(self, model, inputs, **options):
        return Trainer.compute_loss(self, model, inputs, **options)


def test_taipans_budget_is_in_the_models_own_loss_alone(train):
    """trl takes the loss from hidden states and labels; who trains the gate asks the model for it."""
    entry = next(entry for entry in ZOO if entry.name == "taipan")
    gates = {}
    for trainer_class in (SFTTrainer, WholeLoss):
        base = entry.build(budget_lambda=50.0)
        trainer = train(base, trainer_class, lora={"modules_to_save": ["gate"]})
        batch, model = next(iter(trainer.get_train_dataloader())), trainer.model.train()
        torch.manual_seed(0)
        loss = trainer.compute_loss(model, dict(batch))
        torch.manual_seed(0)
        out = model(**batch)
        budget = 50.0 * out.budget_loss if trainer_class is WholeLoss else 0.0
        plain = out.loss - 50.0 * out.budget_loss
        assert relative(loss, plain + budget) < 1e-5
        loss.backward()
        gates[trainer_class] = [p.grad for name, p in model.named_parameters() if "modules_to_save" in name]
    assert all(relative(a, b) > 0.1 for a, b in zip(*gates.values(), strict=True))


@pytest.fixture
def against_itself(tokenizer, tmp_path):
    """(entry, changes) -> losses of trl's DPO of a model, in training, against one of the same weights."""
    logging.disable_progress_bar()

    def words(start, count):
        return " ".join(f"w{2 + (start + i) % (VOCAB - 2)}" for i in range(count))

    rows = [
        {
            "prompt": words(3 * i, 4 + i % 3),
            "chosen": " " + words(i, 3 + i % 4),
            "rejected": " " + words(7 * i, 6 - i % 3),
        }
        for i in range(8)
    ]

    def losses_of(entry, **changes):
        args = DPOConfig(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=2, learning_rate=1e-2,
            logging_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        policy, reference = (entry.build(**changes) for _ in range(2))
        data = Dataset.from_list(rows)
        trainer = DPOTrainer(
            model=policy, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer
        )
        trainer.train()
        return losses(trainer)

    return losses_of


def test_dpo_of_a_model_against_itself_starts_at_ln_2(entry, against_itself):
    """In training and in evaluation a model is the same, but for Taipan's noise."""
    changes = {"train_gate": "argmax"} if entry.samples else {}
    first, second = against_itself(entry, **changes)
    assert abs(first - math.log(2)) < 1e-4
    assert abs(second - math.log(2)) > 1e-2  # the optimizer has moved one of the two


def test_dpo_of_a_taipan_that_draws_does_not_start_at_ln_2(against_itself):
    entry = next(entry for entry in ZOO if entry.name == "taipan")
    assert abs(against_itself(entry)[0] - math.log(2)) > 1e-4
