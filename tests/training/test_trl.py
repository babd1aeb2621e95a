"""trl's DPOTrainer, GRPOTrainer and RewardTrainer on every model: a few steps on tiny data."""

import math

import pytest
import torch
from datasets import Dataset
from heads_cases import KINDS, with_head
from tiny_tokenizer import tiny_tokenizer
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer
from zoo import relative, trainable

PROMPTS = [f"w{5 + i} w{20 + i}" + f" w{40 + i}" * (i % 3) for i in range(8)]
GOOD, BAD = "w11 w12", "w13"


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable_progress_bar()


def settings(config, folder, **changes):
    """A few steps on a CPU, from a batch of four, in float32."""
    common = dict(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    return config(**common | changes)


def logged(trainer, name):
    """What was logged under a name, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def moved(model, before):
    """How many of the parameters that are trained are not as they were."""
    return sum(not torch.equal(p, q) for p, q in zip(trainable(model), before, strict=True))


def copies(model):
    return [p.detach().clone() for p in trainable(model)]


def preferences():
    return Dataset.from_list([{"prompt": p, "chosen": f" {GOOD}", "rejected": f" {BAD}"} for p in PROMPTS])


def test_dpo_learns_what_is_preferred(entry, tmp_path):
    """Policy and reference are the same before the first step, as long as the gates of training draw nothing."""
    entry.build(**{"train_gate": "argmax"} if entry.samples else {}).save_pretrained(tmp_path / "model")
    model = entry.model.from_pretrained(tmp_path / "model", dtype=torch.float32)
    before = copies(model)
    trainer = DPOTrainer(
        model=model,
        args=settings(DPOConfig, tmp_path, max_length=16),
        train_dataset=preferences(),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    losses, margins = logged(trainer, "loss"), logged(trainer, "rewards/margins")
    assert all(math.isfinite(loss) for loss in losses)
    assert abs(losses[0] - math.log(2)) < 1e-4  # the log has four digits
    assert margins[0] == 0
    assert losses[-1] < 0.9 * losses[0]
    assert margins[-1] > margins[0]
    assert logged(trainer, "rewards/accuracies")[-1] == 1
    assert moved(model, before) == len(before)


@pytest.mark.parametrize("source", ["model", "folder"])
def test_a_reward_model_learns_what_is_preferred(entry, source, tmp_path):
    entry.build().save_pretrained(tmp_path / "model")
    one = with_head(entry, KINDS[0]).model
    path = str(tmp_path / "model")
    model = one.from_pretrained(path, num_labels=1, dtype=torch.float32) if source == "model" else path
    trainer = RewardTrainer(
        model=model,
        args=settings(RewardConfig, tmp_path, max_length=16),
        train_dataset=preferences(),
        processing_class=tiny_tokenizer(),
    )
    assert type(trainer.model) is one
    before = copies(trainer.model)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < 0.5 * losses[0]
    assert logged(trainer, "margin")[-1] > logged(trainer, "margin")[0]
    assert logged(trainer, "accuracy")[-1] == 1
    assert moved(trainer.model, before) == len(before)
    ids, model = trainer.processing_class, trainer.model.eval()
    rewards = []
    for side in ("left", "right"):  # texts of two lengths; the longer one first
        ids.padding_side = side
        batch = ids([f"{PROMPTS[2]} {GOOD}<eos>", f"{PROMPTS[0]} {BAD}<eos>"], padding=True, return_tensors="pt")
        with torch.no_grad():
            rewards.append(model(**batch).logits)
    assert relative(*rewards) < 2e-6  # 2.3e-7 was the most of three seeds
    assert rewards[0][0] > rewards[0][1]


def favour_even(completion_ids, **kwargs):
    """The share of even tokens."""
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


class Watched(GRPOTrainer):
    """Keeps what the loss is computed of."""

    def _compute_loss(self, model, inputs):
        self.seen.append({name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()})
        return super()._compute_loss(model, inputs)


PRECISION = {  # of the weights, and whether trl computes in bfloat16, as it does where nobody says otherwise
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, True),
    "mixed": (torch.float32, True),
}
# Caches that release, or recycle, within what is generated here.
SMALL = {"adore": {"cache_size": 4, "rebuild": 2, "label_k": 2}, "recycled": {"budget": 2, "stride": 2}}
# nats; 9.6e-7, 0.0082 and 0.0131 were the most of four seeds over the zoo
NEAR = {"float32": 5e-6, "bfloat16": 0.05, "mixed": 0.07}


@torch.no_grad()
def by_hand(model, inputs):
    """(rows, completion) log-probabilities of what was generated, each text alone and unpadded; 0 after its end."""
    found = torch.zeros(inputs["completion_ids"].shape)
    for row, (prompt, completion) in enumerate(zip(inputs["prompt_ids"], inputs["completion_ids"], strict=True)):
        prompt = prompt[inputs["prompt_mask"][row].bool()]
        completion = completion[inputs["completion_mask"][row].bool()]
        ids = torch.cat([prompt, completion])[None]
        nats = model.eval()(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found[row, : len(completion)] = nats.gather(1, completion[:, None])[:, 0]
    return found


@pytest.mark.parametrize("precision", PRECISION)
def test_grpo_scores_what_it_generates(entry, precision, tmp_path):
    """Prompts of two lengths, so that padding stands on the left of some and, after an end, on the right as well."""
    dtype, autocast = PRECISION[precision]
    entry.build(dtype, **SMALL.get(entry.name, {})).save_pretrained(tmp_path / "model")
    model, start = (entry.model.from_pretrained(tmp_path / "model", dtype=dtype) for _ in range(2))
    before = copies(model)
    trainer = Watched(
        model=model,
        args=settings(
            GRPOConfig,
            tmp_path,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=5,
            shuffle_dataset=False,
            max_steps=2,
            beta=0.1,
            bf16=autocast,
        ),
        reward_funcs=favour_even,
        train_dataset=Dataset.from_list([{"prompt": p} for p in PROMPTS]),
        processing_class=tiny_tokenizer(),
    )
    trainer.seen = []
    trainer.train()
    assert len(trainer.seen) == 2
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
    assert moved(model, before) > 0.9 * len(before)
    for inputs in trainer.seen:
        prompts, completions, kept = inputs["prompt_ids"], inputs["completion_ids"], inputs["completion_mask"]
        assert len(prompts) == len(completions) == 8
        assert 0 < completions.shape[1] <= 5
        assert len(inputs["prompt_mask"].sum(1).unique()) == 2
        assert bool(inputs["prompt_mask"][:, -1].all())  # padding stands on the left
        ends = torch.isin(completions, torch.tensor(trainer.eos_token_ids)).int()
        ended = ends.cumsum(1) - ends > 0
        assert torch.equal(kept.bool(), ~ended)
        want = by_hand(start, inputs)
        assert ((inputs["ref_per_token_logps"] - want) * kept).abs().max() < NEAR[precision]
    whole = torch.cat([prompts, completions], 1), torch.cat([inputs["prompt_mask"], kept], 1)
    with torch.no_grad():
        got = trainer._get_per_token_logps_and_entropies(model.eval(), *whole, completions.shape[1])[0]
    assert ((got - by_hand(model, inputs)) * kept).abs().max() < NEAR[precision]
