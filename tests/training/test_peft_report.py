"""`adapter_report`: every number of the base model once, everything that trains, and a reason for what is left."""

import pytest
from peft import LoraConfig, get_peft_model
from peft_cases import UNTIED, adapted
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging
from zoo import ZOO

from scrubjay import adapter_report
from scrubjay.modeling.training.adapter_report import EMBEDDING, EXCLUDED, HEAD, NOT_LINEAR, NOT_NAMED, TIED, VECTORS

# said of every tied model whose head or embedding is adapted
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and:UserWarning")


def counted(parameters):
    """Numbers and bytes of those that differ."""
    alone = {id(p): p for p in parameters}.values()
    return sum(p.numel() for p in alone), sum(p.nbytes for p in alone)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("target", ["all-linear", "lm_head", "out_proj|o_proj"])
def test_every_number_is_counted_once(entry, target, tied):
    base = entry.build(tie_word_embeddings=tied)
    names = {name for name, _ in base.named_parameters(remove_duplicate=False)}
    before = counted(base.parameters())
    config = LoraConfig(target_modules=target if "|" not in target else f".*({target})", r=3)
    model = get_peft_model(base, config)
    report = adapter_report(model)
    assert {name for layer in report.layers for name in layer.parameters} == names
    copied = base.lm_head.weight if tied and target == "lm_head" else None  # it has its own weight now
    more = (0, 0) if copied is None else (copied.numel(), copied.nbytes)
    assert (report.total("size"), report.total("nbytes")) == (before[0] + more[0], before[1] + more[1])
    trained = counted(p for p in model.parameters() if p.requires_grad)
    assert (report.total("trained"), report.total("trained_nbytes")) == trained
    around = {name for name, module in model.get_base_model().named_modules() if "base_layer" in module._modules}
    assert around
    assert {layer.name for layer in report.layers if layer.state == "adapted"} == around
    assert {name.rpartition(".")[0] for name in report.touched} == around
    assert str(report).splitlines()[0] == "default: LORA, r = 3, alpha = 8"
    assert f"{trained[0]:,} numbers ({trained[1]:,} bytes) beside" in str(report)


@pytest.mark.parametrize("biases", ["all", "lora_only"])
def test_biases_that_are_trained_in_place_are_counted_and_named(entry, biases):
    base = entry.build()
    names = {id(p): name for name, p in base.named_parameters()}
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", r=4, bias=biases))
    report = adapter_report(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert (report.total("trained"), report.total("trained_nbytes")) == counted(trained)
    assert {names[id(p)] for p in trained if id(p) in names} <= set(report.touched)
    assert ("biases trained:" in str(report)) == any(layer.state == "biases" for layer in report.layers)
    around = {name for name, module in model.get_base_model().named_modules() if "base_layer" in module._modules}
    assert all(name.rpartition(".")[0] in around or "bias" in name for name in report.touched)


def test_tokens_that_are_trained_count_alone(entry):
    model = get_peft_model(entry.build(), LoraConfig(target_modules="all-linear", r=4, trainable_token_indices=[1, 2]))
    trained = counted(p for p in model.parameters() if p.requires_grad)
    report = adapter_report(model)
    assert (report.total("trained"), report.total("trained_nbytes")) == trained
    (saved,) = [layer for layer in report.layers if layer.state == "saved" and layer.trained]
    assert (saved.name, saved.trained) == ("model.embed_tokens", 2 * model.config.hidden_size)


def test_what_is_left_has_its_reason(entry):
    base = entry.build(tie_word_embeddings=True)
    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", exclude_modules=[linear[0]]))
    reasons = {layer.name: layer.reason for layer in adapter_report(model).layers}
    assert reasons.pop("model.embed_tokens") == EMBEDDING
    assert reasons.pop("lm_head") == TIED
    assert reasons.pop(linear[0]) == EXCLUDED
    for name in linear[1:]:
        assert reasons.pop(name) == ""
    inside = {
        name: NOT_LINEAR if {"gate", "controller", "conv1d"} & set(name.split(".")) else VECTORS for name in reasons
    }
    assert reasons == inside

    untied = adapter_report(adapted(entry.build(**UNTIED), linear[0]))
    assert {layer.reason for layer in untied.layers if layer.name == "lm_head"} == {HEAD}
    assert {layer.reason for layer in untied.layers if layer.name in linear[1:]} == {NOT_NAMED}


def test_copies_and_adapters_of_two_names():
    entry = next(entry for entry in ZOO if entry.name == "taipan")
    model = adapted(entry.build(), "all-linear", modules_to_save=["gate"])
    saved = [layer for layer in adapter_report(model).layers if layer.state == "saved"]
    assert [(layer.name, layer.kind, layer.trained) for layer in saved] == [("model.layers.1.attn.gate", "Gate", 98)]
    assert set(saved[0].parameters) <= set(adapter_report(model).touched)
    one = adapter_report(model).total("trained")
    model.add_adapter("second", LoraConfig(target_modules="all-linear", r=4, modules_to_save=["gate"]))
    two = adapter_report(model)
    assert list(two.adapters) == ["default", "second"]
    assert two.total("trained") == 2 * one


def test_bytes_of_a_quantized_weight_are_those_that_are_stored(entry, tmp_path):
    logging.disable_progress_bar()
    entry.build(hidden_size=64, **({"n_groups": 2} if entry.name == "ssd" else {})).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    stored = sum(tensor.nbytes for tensor in {x.data_ptr(): x for x in base.state_dict().values()}.values())
    report = adapter_report(adapted(base, "all-linear"))
    assert report.total("nbytes") == stored
    assert report.total("size") == AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters()
    for layer in report.layers:
        if (
            layer.stored == "nf4"
        ):  # half a byte a number, a byte a block of 64, two tables of float32, and a description
            numbers = layer.shape[0] * layer.shape[1]
            known = numbers // 2 + numbers // 64 + 4 * (16 + 256) + 4 * -(-numbers // 64 // 256)
            assert 0 < layer.nbytes - known - 4 * (layer.size - numbers) < 200
    assert " nf4 " in str(report)


def test_a_model_without_an_adapter_is_refused(entry):
    with pytest.raises(ValueError, match=f"this {entry.model.__name__} has none.*get_peft_model"):
        adapter_report(entry.build())
