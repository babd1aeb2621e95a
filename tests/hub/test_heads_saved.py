"""Classifiers in files and in other hands: loading, folders, adapters, 4 bits, Trainer, heads of other people's."""

import json
import re

import numpy
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conversion_cases import CASES as PUBLISHED
from conversion_rodimus_cases import OFFICIAL, write
from heads_cases import KINDS, each_token, same_weights, texts, with_head
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from processes import without_scrubjay
from recycled_cases import decoder
from tiny_tokenizer import tiny_tokenizer
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.utils import logging
from zoo import ZOO, relative, tokens

import scrubjay
from scrubjay import adapter_report
from scrubjay.conversion.export_hub import export
from scrubjay.examples.benchmarks.published_layouts import values
from scrubjay.examples.benchmarks.published_rodimus import official_shapes
from scrubjay.modeling.hub.verify_hub import verify

AUTO = {KINDS[0]: AutoModelForSequenceClassification, KINDS[1]: AutoModelForTokenClassification}
MADE = {KINDS[0]: texts, KINDS[1]: each_token}
TASKS = {KINDS[0]: TaskType.SEQ_CLS, KINDS[1]: TaskType.TOKEN_CLS}


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable_progress_bar()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def new_head(folder, kind, cls=None, **options):
    """A classifier of the folder of a language model, whose `score` alone is new."""
    options = dict(num_labels=3, dtype=torch.float32) | options
    model, info = (cls or AUTO[kind]).from_pretrained(folder, output_loading_info=True, **options)
    assert info.pop("missing_keys") == {"score.weight"} | ({"score.bias"} if kind == KINDS[1] else set())
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_language_models_checkpoint_makes_a_classifier(entry, kind, tied, tmp_path, transformers_log):
    base = entry.build(tie_word_embeddings=tied)
    base.save_pretrained(tmp_path)
    model = new_head(tmp_path, kind)
    assert type(model) is with_head(entry, kind).model
    assert same_weights(model.model, base.model)
    assert model.num_labels == model.score.out_features == 3
    # of 144 normal numbers
    assert 0 < model.score.weight.abs().max() < 5 * model.config.initializer_range
    assert "score.weight" in transformers_log.text
    assert "lm_head" not in transformers_log.text
    assert not any(p.requires_grad for name, p in model.named_parameters() if "controller" in name)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "codestral"])  # which is to be converted
def test_published_layouts_of_mamba2_make_classifiers(name, kind, tmp_path):
    PUBLISHED[name][0](tmp_path)
    base = scrubjay.SSDForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert same_weights(new_head(tmp_path, kind, with_head(ZOO[0], kind).model).model, base.model)


def test_the_authors_rodimus_makes_classifiers(kind, tmp_path):
    config = OFFICIAL["plus, odd window"]
    write(tmp_path, config, values(official_shapes(config), torch.float32))
    base = scrubjay.RodimusForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert same_weights(new_head(tmp_path, kind, with_head(ZOO[1], kind).model).model, base.model)


@pytest.mark.parametrize("name", ["adore", "recycled"])
def test_a_decoders_checkpoint_makes_a_classifier(name, kind, tmp_path):
    entry = next(entry for entry in ZOO if entry.name == name)
    theirs = decoder("qwen3", torch.float32, tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path)
    model, info = with_head(entry, kind).model.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    new = {key for key in info["missing_keys"] if not key.startswith("model.controller.")}
    assert new == {"score.weight"} | ({"score.bias"} if kind == KINDS[1] else set())
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    own = dict(model.model.named_parameters())
    assert all(torch.equal(p, own[key]) for key, p in theirs.model.named_parameters())


@pytest.mark.parametrize("name", ["adore", "recycled"])
@torch.no_grad()
def test_a_decoders_classifier_is_one_here_with_its_labels(name, tmp_path):
    entry = next(entry for entry in ZOO if entry.name == name)
    sizes = decoder("llama", torch.float32).config.to_dict() | {"id2label": {0: "bad", 1: "fair", 2: "good"}}
    theirs = LlamaForSequenceClassification(type(decoder("llama").config)(**sizes)).eval()
    theirs.config.problem_type = "multi_label_classification"
    theirs.save_pretrained(tmp_path / "theirs")
    ours = with_head(entry, KINDS[0]).model.from_pretrained(tmp_path / "theirs").eval()
    ours.save_pretrained(tmp_path / "ours")
    for model in (ours, AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()):
        assert model.config.id2label == {0: "bad", 1: "fair", 2: "good"}
        assert model.config.problem_type == "multi_label_classification"
        ids = tokens(2, 12).clamp(3, 60)
        assert relative(model(ids).logits, theirs(ids).logits) < 1e-6  # 1.0e-7 was the most of three seeds
    fewer = with_head(entry, KINDS[0]).model.from_pretrained(
        tmp_path / "theirs", num_labels=2, ignore_mismatched_sizes=True
    )
    fewer.save_pretrained(tmp_path / "fewer")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "fewer").score.out_features == 2


def test_a_saved_classifier_is_the_same_again(entry, kind, tmp_path):
    model = MADE[kind](entry, torch.float32)
    model.config.id2label = {0: "jay", 1: "crow", 2: "rook"}
    model.save_pretrained(tmp_path / "one", card={"license": "mit"})
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    module = type(model).__module__.rsplit(".", 1)[-1]
    stem = type(model).__name__.removesuffix(kind)
    assert config["auto_map"] == {
        "AutoConfig": f"configuration_{module.removeprefix('modeling_')}.{stem}Config",
        "AutoModel": f"{module}.{stem}Model",
        **{f"AutoModel{end}": f"{module}.{stem}{end}" for end in ("ForCausalLM", *KINDS)},
    }
    export(str(tmp_path / "one"), tmp_path / "two")
    assert verify(str(tmp_path / "two")).agrees
    card = (tmp_path / "two" / "README.md").read_text()
    assert f"pipeline_tag: {'text' if kind == KINDS[0] else 'token'}-classification" in card
    shown: list = []
    block = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0].replace('"."', repr(str(tmp_path / "two")))
    exec(block.replace("print(", "shown.append("), {"shown": shown})
    with torch.no_grad():
        assert torch.equal(shown[0], model(torch.tensor([[1, 2, 3]])).logits)
    again, info = AUTO[kind].from_pretrained(tmp_path / "two", output_loading_info=True)
    assert not any(info.values())
    assert same_weights(again, model)
    assert again.config.id2label == model.config.id2label


def test_a_classifiers_folder_gives_a_language_model_a_new_head_alone(entry, tmp_path):
    model = texts(entry, torch.float32, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert info["unexpected_keys"] == {"score.weight"}
    assert same_weights(again.model, model.model)


def test_the_card_of_a_language_model_says_how_to_make_a_classifier(tmp_path):
    ZOO[0].build().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    (call,) = re.findall(r"`(AutoModelForSequenceClassification\.from_pretrained\(.*?\))`", card)
    model = eval(call.replace('"."', repr(str(tmp_path))), globals())
    assert model.score.out_features == 2
    assert "`AutoModelForTokenClassification`" in card


CHILD = """
import json, torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers.utils import logging
logging.disable_progress_bar()
logging.set_verbosity_error()
torch.set_num_threads(1)
ids = torch.arange(12).view(2, 6)
for folder in sys.argv[1:]:
    for auto, end in ((AutoModelForSequenceClassification, "texts"), (AutoModelForTokenClassification, "tokens")):
        model = auto.from_pretrained(f"{folder}/{end}", trust_remote_code=True).eval()
        with torch.no_grad():
            same = torch.equal(model(ids).logits, torch.load(f"{folder}/{end}.pt"))
        print(type(model).__module__.split(".")[0], type(model).__name__, same)
    base = type(AutoModel.from_pretrained(f"{folder}/lm", trust_remote_code=True))
    exec(open(f"{folder}/reward.py").read())
    torch.save(scores(reward_model(base, f"{folder}/lm"), ids), f"{folder}/rewards.pt")
"""


# As OpenRLHF makes one: on the first base of the class that AutoModel finds.
REWARD = """
def reward_model(base, folder):
    class RewardModel(base.__base__):
        supports_gradient_checkpointing = True

        def __init__(self, config):
            super().__init__(config)
            setattr(self, self.base_model_prefix, base(config))
            self.value_head = nn.Linear(config.hidden_size, 1, bias=False)
            self.post_init()

        def forward(self, input_ids, attention_mask):
            positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
            out = getattr(self, self.base_model_prefix)(
                input_ids, attention_mask=attention_mask, position_ids=positions
            )
            return self.value_head(out["last_hidden_state"]).squeeze(-1)

    torch.manual_seed(0)
    return RewardModel.from_pretrained(folder, dtype=torch.float32).eval()

def scores(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with torch.no_grad():
        model.value_head.weight.copy_(torch.arange(model.value_head.in_features) / 10)
        return model(ids, mask)[mask.bool()]
"""
exec(REWARD)


def test_a_reward_model_on_the_first_base_of_a_model_has_its_weights(entry, tmp_path):
    """Each of its parameters is the checkpoint's, so its scores are those of the model without head."""
    lm = entry.build()
    lm.save_pretrained(tmp_path / "lm")
    base = type(AutoModel.from_pretrained(tmp_path / "lm"))
    assert base.__base__.config_class is type(lm.config)
    model = reward_model(base, tmp_path / "lm")  # noqa: F821
    assert same_weights(model.model, lm.model)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"model", "value_head"}
    assert not any(p.requires_grad for name, p in model.named_parameters() if "controller" in name)
    ids = torch.arange(12).view(2, 6)
    got = scores(model, ids)  # noqa: F821
    with torch.no_grad():
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        hidden = lm.model(ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]
        assert relative(got, hidden @ (torch.arange(48) / 10)) < 1e-6  # 1.0e-7 was the most of three seeds
    model.save_pretrained(tmp_path / "reward")
    again = type(model).from_pretrained(tmp_path / "reward")
    assert same_weights(again, model)
    assert same_weights(AutoModel.from_pretrained(tmp_path / "reward"), lm.model)


@pytest.mark.slow
def test_folders_load_without_the_library_and_carry_other_heads(tmp_path):
    """By trust_remote_code, in a process that cannot import scrubjay."""
    ids, wanted = torch.arange(12).view(2, 6), []
    for entry in ZOO:
        folder = tmp_path / entry.name
        for make, end in ((texts, "texts"), (each_token, "tokens")):
            model = make(entry, torch.float32)
            model.save_pretrained(folder / end)
            with torch.no_grad():
                torch.save(model(ids).logits, folder / f"{end}.pt")
            wanted.append(f"transformers_modules {type(model).__name__} True")
        entry.build().save_pretrained(folder / "lm")
        (folder / "reward.py").write_text(REWARD)
    printed = without_scrubjay(CHILD, tmp_path, *(str(tmp_path / entry.name) for entry in ZOO))
    assert printed == wanted
    for entry in ZOO:
        lm = entry.build()
        here = reward_model(type(lm.model), tmp_path / entry.name / "lm")  # noqa: F821
        assert torch.equal(torch.load(tmp_path / entry.name / "rewards.pt"), scores(here, ids))  # noqa: F821


@pytest.mark.parametrize("target", ["all-linear", "named"])
def test_lora_trains_the_score_and_comes_back(entry, kind, target, tmp_path):
    entry.build().save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    base = new_head(tmp_path / "base", kind)
    named = [".".join(n.split(".")[-2:]) for n, m in base.model.named_modules() if isinstance(m, nn.Linear)]
    config = LoraConfig(task_type=TASKS[kind], target_modules=target if target == "all-linear" else named, r=4)
    if kind == KINDS[1] and target == "all-linear":
        config.exclude_modules = ["score"]  # without it peft stops, as for a Llama
    model = get_peft_model(base, config)
    states = {layer.name: layer.state for layer in adapter_report(model).layers}
    assert states["score"] == "saved"
    assert "adapted" in states.values()
    ids = tokens(4, 12)
    labels = torch.tensor([0, 1, 2, 1]) if kind == KINDS[0] else torch.randint(0, 3, (4, 12))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("score.modules_to_save" in name for name in moved)
    assert all("lora_" in name or "score.modules_to_save" in name for name in moved)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(new_head(tmp_path / "base", kind), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_4_bits_leave_the_score_alone(entry, kind, tmp_path):
    """Also where a list of what is left out is given, which stands in place of the quantizer's own."""
    more = {"ssd": {"n_groups": 2}}.get(entry.name, {})
    entry.build(hidden_size=64, **more).save_pretrained(tmp_path)
    for skipped in (None, ["o_proj"]):
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
        model = AUTO[kind].from_pretrained(tmp_path, num_labels=3, quantization_config=settings)
        assert any(isinstance(module, Linear4bit) for module in model.modules())
        assert model.score.weight.dtype.is_floating_point
        assert model.score.weight.shape == (3, 64)
        assert model(tokens(2, 12)).logits.isfinite().all()


def test_blocks_on_devices_as_the_map_says(entry, kind, tmp_path):
    model = MADE[kind](entry, torch.float32)
    model.save_pretrained(tmp_path)
    places = {name: "cpu" for name, _ in model.model.named_children()}
    places = {f"model.{name}": place for name, place in places.items()} | {"model.layers": "disk", "score": "disk"}
    spread = AUTO[kind].from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    assert spread.score.weight.device.type == "meta"
    with torch.no_grad():
        assert torch.equal(spread(tokens(2, 12)).logits, model(tokens(2, 12)).logits)
    assert set(with_head(entry, kind).model(model.config)._no_split_modules) >= set(model.model._no_split_modules)


class Rows(torch.utils.data.Dataset):
    """Texts whose label is their first token, and each token's label whether it is even."""

    def __init__(self, kind):
        self.ids = torch.cat([torch.randint(0, 3, (12, 1)), tokens(12, 9)], 1)
        self.labels = self.ids[:, 0] if kind == KINDS[0] else self.ids % 2

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def test_trainer_trains_and_evaluates(entry, kind, tmp_path):
    model = with_head(entry, kind).build(num_labels=3, classifier_dropout=0.0)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=4,
        max_steps=1,
        learning_rate=0.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    shapes = []

    def accuracy(predicted):
        assert isinstance(predicted.predictions, numpy.ndarray)  # logits alone
        shapes.append(predicted.predictions.shape)
        return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}

    data = Rows(kind)
    trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data, compute_metrics=accuracy)
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    assert shapes == [(12, 3) if kind == KINDS[0] else (12, 10, 3)]
    loss = next(log["loss"] for log in trainer.state.log_history if "loss" in log)
    whole = model.eval()(data.ids, labels=data.labels).loss  # of all rows, which were the four batches of the one step
    assert abs(loss - float(whole.detach())) < (0.2 if entry.samples else 1e-4)  # Trainer rounds it


def test_a_pipeline_classifies(entry, tmp_path):
    model = texts(entry, torch.float32, pad_token_id=0)
    model.config.id2label = {0: "jay", 1: "crow", 2: "rook"}
    classify = pipeline("text-classification", model=model, tokenizer=tiny_tokenizer(), top_k=None, device="cpu")
    with torch.no_grad():
        want = model(torch.tensor([[5, 6, 7]])).logits.softmax(-1)[0]
    found = {row["label"]: row["score"] for row in classify(["w5 w6 w7"])[0]}
    assert found == pytest.approx(dict(zip(("jay", "crow", "rook"), want.tolist(), strict=True)), rel=1e-5)
