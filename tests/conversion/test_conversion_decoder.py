"""Llama, Qwen2, Qwen3 and Mistral to ADORE and Recycled Attention and back: the judge is transformers' own model."""

import json

import pytest
import torch
from recycled_cases import CONFIGS, decoder
from recycled_cases import tokens as drawn_tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from scrubjay import AdoreForCausalLM, RecycledForCausalLM
from scrubjay.conversion.convert import convert as full_convert

MODELS = {"adore": AdoreForCausalLM, "recycled": RecycledForCausalLM}
WEIGHTS = "model.safetensors"
WITHIN = {"adore": {"cache_size": 100}, "recycled": {"budget": 40}}  # a budget that holds the prompt of the tests


def convert(source, destination, **options):
    return full_convert(source, destination, progress=False, **options)


@pytest.fixture(params=MODELS)
def to(request):
    return request.param


def saved(folder, kind="llama", dtype=torch.float32, **changes):
    """transformers' own folder."""
    decoder(kind, dtype, **changes).save_pretrained(folder)
    return folder


def whole(model_class, folder, **options):
    """The model, of which nothing is missing and nothing left over."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


@torch.no_grad()
def logits(model, ids=None):
    return model(drawn_tokens(2, 30) if ids is None else ids).logits


def without_controller(folder):
    tensors = load_file(folder / WEIGHTS)
    return {name: x for name, x in tensors.items() if not name.startswith("model.controller.")}


def same_tensors(first, second):
    assert first.keys() == second.keys()
    assert all(first[name].dtype == second[name].dtype for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_stay_and_a_prompt_within_the_budget_has_the_decoders_logits(kind, tied, to, tmp_path):
    source = saved(tmp_path / "theirs", kind, tie_word_embeddings=tied)
    report = convert(source, tmp_path / "ours", to=to, settings=WITHIN[to], check=True)
    same_tensors(without_controller(tmp_path / "ours"), load_file(source / WEIGHTS))
    theirs, ours = AutoModelForCausalLM.from_pretrained(source), whole(MODELS[to], tmp_path / "ours")
    assert ours.config.base_config.model_type == kind
    assert torch.equal(logits(ours), logits(theirs))
    ids = drawn_tokens(1, 12)
    options = dict(max_new_tokens=16, do_sample=False)
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    assert set(report.check["max_logit_difference"].values()) == {0.0}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_back_again_it_is_the_folder_that_it_was(kind, tied, to, tmp_path):
    source = saved(tmp_path / "theirs", kind, tie_word_embeddings=tied)
    convert(source, tmp_path / "ours", to=to)
    report = convert(tmp_path / "ours", tmp_path / "back", to="transformers", check=True)
    same_tensors(load_file(tmp_path / "back" / WEIGHTS), load_file(source / WEIGHTS))
    assert sorted(file.name for file in (tmp_path / "back").glob("*.py")) == []
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back")]
    assert configs[0] == configs[1]
    again = whole(AutoModelForCausalLM, tmp_path / "back")
    assert type(again) is type(AutoModelForCausalLM.from_pretrained(source))
    left = {"ADORE's controller, which the decoder does not have"} if to == "adore" else set()
    assert set(report.left_out.values()) == left
    assert set(report.check["max_logit_difference"].values()) == {0.0}


def test_the_controller_is_new_and_the_same_every_time(tmp_path):
    source = saved(tmp_path / "theirs", dtype=torch.bfloat16)
    report = convert(source, tmp_path / "one", to="adore", settings={"controller_hidden": 16})
    torch.manual_seed(5)
    convert(source, tmp_path / "two", to="adore", settings={"controller_hidden": 16})
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    same_tensors(one, two)
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(5)).item()
    new = {name: x for name, x in one.items() if name.startswith("model.controller.")}
    assert set(report.new) == set(new)
    assert new["model.controller.gru.weight_ih_l0"].shape == (48, 32)
    assert all(x.dtype == torch.float32 and 0 < x.std() < 1 for x in new.values() if x.numel() > 1)
    assert all(x.dtype == torch.bfloat16 for name, x in one.items() if name not in new)
    assert any("train one and give it to set_controller" in note for note in report.notes)
    model = whole(AdoreForCausalLM, tmp_path / "one")
    assert torch.equal(model.controller.first.weight, new["model.controller.first.weight"])
    assert not any(parameter.requires_grad for parameter in model.controller.parameters())


def test_a_trained_controller_stays_and_is_left_out_on_the_way_back(tmp_path):
    source = saved(tmp_path / "theirs")
    convert(source, tmp_path / "ours", to="adore")
    model = AdoreForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        model.controller.first.weight.add_(1)
    model.save_pretrained(tmp_path / "trained")
    report = convert(tmp_path / "trained", tmp_path / "back", to="transformers")
    assert "model.controller.first.weight" in report.left_out
    same_tensors(load_file(tmp_path / "back" / WEIGHTS), load_file(source / WEIGHTS))


@pytest.mark.parametrize("options", [{"trust_remote_code": True}, {}], ids=["code of the folder", "installed"])
def test_what_is_written_loads_by_the_auto_class(to, options, tmp_path):
    source = saved(tmp_path / "theirs")
    convert(source, tmp_path / "ours", to=to, settings=WITHIN[to])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", **options)
    assert type(model).__name__ == MODELS[to].__name__
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(source)))
    names = {file.name for file in (tmp_path / "ours").iterdir()}
    assert {f"modeling_{to}.py", "config.json", "generation_config.json", "README.md"} <= names


def test_settings_are_the_new_models(to, tmp_path):
    source = saved(tmp_path / "theirs")
    report = convert(source, tmp_path / "ours", to=to, settings=WITHIN[to])
    config = MODELS[to].from_pretrained(tmp_path / "ours").config
    assert {name: getattr(config, name) for name in WITHIN[to]} == WITHIN[to]
    defaults = next(note for note in report.notes if note.startswith("the defaults: "))
    assert next(iter(WITHIN[to])) not in defaults
    with pytest.raises(ValueError, match=rf"{next(iter(WITHIN[to]))} .* got 0"):
        convert(source, tmp_path / "other", to=to, settings={next(iter(WITHIN[to])): 0})
    with pytest.raises(ValueError, match=r"budgets: no such field"):
        convert(source, tmp_path / "other", to=to, settings={"budgets": 3})


@pytest.mark.parametrize("settings", [{"cache_size": 24, "prefill": "chunked"}, {"cache_size": 24}])
def test_the_check_is_of_the_weights_whatever_the_cache_releases(settings, tmp_path):
    source = saved(tmp_path / "theirs")
    report = convert(source, tmp_path / "ours", to="adore", settings=settings | {"label_k": 4}, check=True)
    assert set(report.check["max_logit_difference"].values()) == {0.0}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_check_knows_of_a_cast(kind, to, tmp_path):
    """The source's tensors are rounded before they are compared: what rounding changes is not the conversion's."""
    source = saved(tmp_path / "theirs", kind)
    report = convert(source, tmp_path / "ours", to=to, settings=WITHIN[to], dtype=torch.bfloat16, check=True)
    assert set(report.check["max_logit_difference"].values()) == {0.0}
    unrounded = logits(AutoModelForCausalLM.from_pretrained(source))
    rounded = logits(MODELS[to].from_pretrained(tmp_path / "ours", dtype=torch.float32))
    assert (rounded - unrounded).abs().max() > 1e-3
    report = convert(tmp_path / "ours", tmp_path / "back", to="transformers", dtype=torch.float16, check=True)
    assert set(report.check["max_logit_difference"].values()) == {0.0}


def test_the_check_reads_the_file_that_was_named(to, tmp_path):
    source = saved(tmp_path / "theirs")
    other = {name: tensor * 1.3 for name, tensor in load_file(source / WEIGHTS).items()}
    torch.save(other, source / "pytorch_model.bin")
    convert(source / "pytorch_model.bin", tmp_path / "ours", to=to, check=True)
    same_tensors(without_controller(tmp_path / "ours"), other)
    torch.save(load_file(tmp_path / "ours" / WEIGHTS), tmp_path / "ours" / "pytorch_model.bin")
    first = load_file(source / WEIGHTS)
    save_file(load_file(tmp_path / "ours" / WEIGHTS) | first, tmp_path / "ours" / WEIGHTS, metadata={"format": "pt"})
    convert(tmp_path / "ours" / "pytorch_model.bin", tmp_path / "back", to="transformers", check=True)
    same_tensors(load_file(tmp_path / "back" / WEIGHTS), other)


def test_a_head_that_differs_in_a_tied_decoder_is_kept_where_that_is_said(to, tmp_path):
    source = saved(tmp_path / "theirs", tie_word_embeddings=True)
    tensors = load_file(source / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="--set tie_word_embeddings=false keeps both"):
        convert(source, tmp_path / "ours", to=to)
    settings = WITHIN[to] | {"tie_word_embeddings": False}
    report = convert(source, tmp_path / "ours", to=to, settings=settings, check=True)
    assert set(report.check["max_logit_difference"].values()) == {0.0}
    same_tensors(without_controller(tmp_path / "ours"), tensors)
    model = whole(MODELS[to], tmp_path / "ours")
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert not model.config.base_config.tie_word_embeddings
    assert report.notes[0].endswith("llama, stays as it is but for tie_word_embeddings False")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_a_window_is_nothing_that_can_be_given(kind, to, tmp_path):
    source = saved(tmp_path / "theirs", kind)
    match = "sliding_window: no such field in LlamaConfig" if kind == "llama" else "set to None alone.*; got 16"
    with pytest.raises(ValueError, match=match):
        convert(source, tmp_path / "ours", to=to, settings={"sliding_window": 16})
    with pytest.raises(ValueError, match="base_config is no setting: it is the decoder's configuration"):
        convert(source, tmp_path / "ours", to=to, settings={"base_config": {"model_type": "llama"}})


def test_a_configuration_that_says_quantized_is_refused(to, tmp_path):
    source = edited(saved(tmp_path / "theirs"), quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(
        ValueError, match=r"says that the weights are quantized .*gptq.* --set quantization_config=null"
    ):
        convert(source, tmp_path / "ours", to=to)
    convert(source, tmp_path / "ours", to=to, settings={"quantization_config": None})
    assert "quantization_config" not in (tmp_path / "ours" / "config.json").read_text()


def test_a_decoder_with_a_window_of_its_own_is_refused_until_it_is_taken_off(to, tmp_path):
    source = saved(tmp_path / "theirs", "mistral", sliding_window=16)
    with pytest.raises(ValueError, match=r"layers that see a window only.*sliding_window 16"):
        convert(source, tmp_path / "ours", to=to)
    assert not (tmp_path / "ours").exists()
    convert(source, tmp_path / "ours", to=to, settings={"sliding_window": None}, check=True)  # on more tokens than 16
    assert MODELS[to].from_pretrained(tmp_path / "ours").config.base_config.sliding_window is None


def test_which_model_to_make_has_to_be_said(tmp_path):
    source = saved(tmp_path / "theirs")
    for wrong in (None, "transformers", "fla"):
        with pytest.raises(ValueError, match="Say which model to make: --to adore or --to recycled"):
            convert(source, tmp_path / "ours", to=wrong)


def edited(source, **changes):
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps({name: x for name, x in config.items() if x is not None}))
    return source


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 64}, "hidden_size 64, the tensors say 32"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 3, the tensors say 2"),
        ({"vocab_size": 64}, "vocab_size 64, the tensors say 61"),
        ({"intermediate_size": 96}, "intermediate_size 96, the tensors say 48"),
        ({"num_attention_heads": 8}, "num_attention_heads times the size of a head 64, the tensors say 32"),
        ({"num_key_value_heads": 4}, "num_key_value_heads times it 32, the tensors say 16"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_contradiction_is_said_with_both_values(changes, said, to, tmp_path):
    source = edited(saved(tmp_path / "theirs"), **changes)
    with pytest.raises(ValueError, match=f"The configuration contradicts the tensors: .*{said}"):
        convert(source, tmp_path / "ours", to=to)
    assert not (tmp_path / "ours").exists()


def test_another_decoder_and_none_at_all_are_refused(to, tmp_path):
    source = edited(saved(tmp_path / "theirs"), model_type="gemma")
    with pytest.raises(
        ValueError, match=r"layout of .* is unknown.*\n(.*\n)*.*model_type llama, qwen2, qwen3, mistral"
    ):
        convert(source, tmp_path / "ours", to=to)
    (source / "config.json").unlink()
    with pytest.raises(ValueError, match=r"There is no config.json, .* one of model_type llama, qwen2, qwen3, mistral"):
        convert(source, tmp_path / "ours", to=to)


def test_all_that_does_not_fit_is_listed_at_once(to, tmp_path):
    source = saved(tmp_path / "theirs")
    tensors = load_file(source / WEIGHTS)
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(32)
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(32, 40)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # older versions of transformers wrote it
    del tensors["model.norm.weight"]
    save_file(tensors, source / WEIGHTS)
    with pytest.raises(ValueError, match="3 tensors of the checkpoint do not fit") as error:
        convert(source, tmp_path / "ours", to=to)
    assert "unknown: model.layers.0.self_attn.o_proj.bias [32]" in str(error.value)
    assert "wrong shape: model.layers.1.mlp.down_proj.weight is [32, 40], needed [32, 48]" in str(error.value)
    assert "missing: model.norm.weight [32]" in str(error.value)


def test_an_old_buffer_and_a_repeated_head_are_left_out(to, tmp_path):
    source = saved(tmp_path / "theirs", tie_word_embeddings=True)
    tensors = load_file(source / WEIGHTS)
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(2)}
    extra["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | extra, source / WEIGHTS)
    report = convert(source, tmp_path / "ours", to=to)
    assert set(report.left_out) == set(extra)
    same_tensors(without_controller(tmp_path / "ours"), tensors)
    extra["lm_head.weight"][0, 0] += 1
    save_file(tensors | extra, source / WEIGHTS)
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        convert(source, tmp_path / "other", to=to)
