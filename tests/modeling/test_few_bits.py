"""Models in 8 and 4 bits: what is quantized, that they compute what their numbers say, saving, and refusals."""

import copy
import importlib.util
import json
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import logging
from zoo import VOCAB, relative, tokens

from scrubjay import FewBitsConfig, SSDConfig, SSDForCausalLM, quantize
from scrubjay.modeling import bits_layers, bits_quantizer
from scrubjay.modeling.bits_layers import FewBits, FewBitsEmbedding, FewBitsLinear, TiedHead
from scrubjay.modeling.bits_quantizer import METHOD
from scrubjay.modeling.inputs.cache_argument import CACHE, named

WIDTHS = {
    "8": {"bits": 8},
    "4": {"bits": 4},
    "4, embedding in 8": {"bits": 4, "group_size": 128, "embedding_bits": 8},
}
# Of logits: every product rounds its input by up to 1 / 15876 of the row's largest, and layers add these up.
EXACT = 3e-3


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable_progress_bar()


@pytest.fixture(params=WIDTHS)
def settings(request):
    return WIDTHS[request.param]


@pytest.fixture
def tied(settings):
    """Embedding and head of one matrix, or of two, in one width each."""
    return settings["bits"] == 4 and "group_size" not in settings


def build(entry, **changes):
    """A model that has matrices with sides of 32 and more, and of 16."""
    more = {"ssd": {"n_groups": 2}}.get(entry.name, {})
    return entry.build(hidden_size=64, **more | changes)


def plain(model, quantized):
    """The same function in plain layers: a float32 model with the numbers that the codes stand for."""
    for name, layer in quantized.named_modules():
        if isinstance(layer, FewBits):
            model.get_submodule(name).weight.data = layer.dequantized()
    return model


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def test_every_large_matrix_and_nothing_else_has_few_bits(entry, settings, tied):
    model = build(entry, tie_word_embeddings=tied)
    floats = copy.deepcopy(model)
    assert quantize(model, **settings) is model
    for name, module in floats.named_modules():
        got = model.get_submodule(name)
        vocabulary = name in ("model.embed_tokens", "lm_head")
        if tied and name == "lm_head":
            assert isinstance(got, TiedHead)
            assert got.embedding is model.model.embed_tokens
        elif vocabulary or (type(module) is nn.Linear and min(module.weight.shape) >= 32):
            assert isinstance(got, (FewBitsLinear, FewBitsEmbedding)), name
            wanted = settings.get("embedding_bits") if vocabulary else None
            assert got.bits == (wanted or settings["bits"]), name
            most = module.weight.detach().abs().amax(1)  # of a row: a code of 8 bits is off by half of 1 / 127
            bound = most / 254 if got.bits == 8 else most * (1 / 8 + 1 / 120)
            error = got.dequantized() - module.weight.detach()
            assert (error.square().mean(1).sqrt() <= bound * (1 + 1e-5)).all(), name
        else:
            assert type(got) is type(module), name
    kept = {name for name, parameter in model.named_parameters() if parameter.ndim > 1 and min(parameter.shape) >= 32}
    assert not {name for name in kept if "controller" not in name}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, floats.get_parameter(name)), name
        assert not parameter.requires_grad


def test_a_model_computes_what_its_numbers_say(entry, settings, tied):
    """In one pass, in parts with a cache, padded, and token by token."""
    model = build(entry, tie_word_embeddings=tied)
    quantized = quantize(copy.deepcopy(model), **settings)
    model, ids = plain(model, quantized), tokens(2, 12)
    want = logits(model, ids)
    assert relative(logits(quantized, ids), want) < EXACT
    with torch.no_grad():
        cache = quantized(ids[:, :7], use_cache=True)[CACHE]
        steps = [quantized(ids[:, t : t + 1], **named(cache), use_cache=True).logits for t in range(7, 12)]
    assert relative(torch.cat(steps, 1), want[:, 7:]) < EXACT
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    padded = logits(quantized, ids, attention_mask=mask)
    assert relative(padded[0, 5:], logits(model, ids[:1, 5:])[0]) < EXACT
    quantized.generation_config.eos_token_id = None
    ids = quantized.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    best = logits(model, ids[:, :-1])[:, 11:].topk(2).values
    chosen = logits(model, ids[:, :-1])[:, 11:].gather(2, ids[:, 12:, None])[..., 0]
    assert (best[..., 0] - chosen <= 2 * EXACT * best[..., 0].abs().max()).all()  # or one as good


def test_saved_and_loaded_it_is_the_same(entry, settings, tied, tmp_path):
    dtype = torch.bfloat16 if settings["bits"] == 8 else torch.float32
    model = build(entry, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "float")
    config = FewBitsConfig(**settings)
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=dtype, quantization_config=config)
    one.save_pretrained(tmp_path / "few")
    other, info = AutoModelForCausalLM.from_pretrained(tmp_path / "few", output_loading_info=True)
    assert not any(info.values())
    other.save_pretrained(tmp_path / "again")
    few, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("few", "again"))
    assert few == again
    held = json.loads((tmp_path / "few" / "config.json").read_text())["quantization_config"]
    assert held["quant_method"] == "scrubjay_few_bits"
    assert {name: held[name] for name in settings} == settings
    floats = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=dtype)
    want = logits(quantize(floats, **settings), tokens(2, 9))
    assert want.dtype == torch.float32
    for loaded in (one, other):
        assert torch.equal(logits(loaded, tokens(2, 9)), want)
        assert loaded.dtype == dtype
        assert all(m.scales.dtype == torch.float32 for m in loaded.modules() if isinstance(m, FewBits))
        assert loaded.model.embed_tokens(tokens(1, 3)).dtype == dtype


def test_bytes_are_those_of_the_bits(entry, tmp_path):
    model = build(entry)
    for bits, wanted in ((8, 8), (4, 4.25)):
        quantized = quantize(copy.deepcopy(model), bits)
        layers = [module for module in quantized.modules() if isinstance(module, FewBits)]
        for layer in layers:
            inputs = layer.in_features if bits == 8 else -(-layer.in_features // 32) * 32
            assert layer.nbytes == layer.out_features * (inputs * wanted / 8 + 4)
        quantized.save_pretrained(tmp_path / str(bits))
        file = (tmp_path / str(bits) / "model.safetensors").stat().st_size
        rest = sum(parameter.nbytes for parameter in quantized.parameters())
        assert file - rest - sum(layer.nbytes for layer in layers) < 25_000  # its header: names and shapes


def test_copies_pickles_and_casts_compute_the_same(entry):
    model = quantize(build(entry), 4)
    ids, want = tokens(2, 9), logits(model, tokens(2, 9))
    assert torch.equal(logits(copy.deepcopy(model), ids), want)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), ids), want)
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.equal(narrow.model.embed_tokens.scales, model.model.embed_tokens.scales)
    assert narrow.model.embed_tokens(ids).dtype == torch.bfloat16
    assert relative(logits(narrow, ids), want) < 0.2  # layers round by 2^-9 each; a wrong scale is off by 1 and more


def test_a_gradient_reaches_the_input(entry):
    """By the dequantized weights, and no parameter."""
    model = build(entry)
    quantized = quantize(copy.deepcopy(model), 8)
    model = plain(model, quantized).requires_grad_(False)
    ids = tokens(2, 9)
    grads = []
    for network in (model, quantized):
        x = model.get_input_embeddings()(ids).requires_grad_()
        network(inputs_embeds=x, labels=ids).loss.backward()
        grads.append(x.grad)
    assert relative(grads[1], grads[0]) < 1e-5
    assert all(parameter.grad is None for parameter in quantized.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_training_and_adapters_are_refused(entry, tmp_path):
    model = quantize(build(entry), 4)
    with pytest.raises(ValueError, match="quantized"):
        Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    name = next(name for name, m in model.named_modules() if isinstance(m, FewBitsLinear) and name != "lm_head")
    with pytest.raises(ValueError, match="FewBitsLinear"):
        get_peft_model(model, LoraConfig(target_modules=[name]))
    with pytest.raises(ValueError, match="quantized already, by scrubjay_few_bits"):
        quantize(model, 8)


def test_a_model_with_adapters_is_refused(entry):
    model = get_peft_model(build(entry), LoraConfig(target_modules="all-linear")).base_model.model
    with pytest.raises(ValueError, match="merge them first"):
        quantize(model, 4)


def test_what_is_named_stays_as_it_is(entry):
    model = build(entry, tie_word_embeddings=False)
    name = next(name for name, m in model.named_modules() if type(m) is nn.Linear and min(m.weight.shape) >= 32)
    quantize(model, 4, modules_to_not_convert=[name.rpartition(".")[2], "lm_head", "embed_tokens"])
    assert type(model.get_submodule(name)) is nn.Linear
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.embed_tokens) is nn.Embedding
    small = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, FewBits))]
    with pytest.raises(ValueError, match="no matrix to quantize"):
        quantize(build(entry), 4, modules_to_not_convert=[*small, "embed_tokens", "lm_head"])


@pytest.mark.parametrize("settings", [{"bits": 2}, {"group_size": 16}, {"embedding_bits": 6}, {"width": 4}], ids=str)
def test_settings_that_there_are_none_of_are_refused(settings):
    with pytest.raises(ValueError, match=str(next(iter(settings.values()))) + "|width"):
        FewBitsConfig(**settings)


def test_a_state_dict_replaces_what_products_take(entry):
    one, other, ids = quantize(build(entry), 8), build(entry), tokens(2, 9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    other = quantize(other, 8)
    assert relative(logits(one, ids), logits(other, ids)) > 1e-3
    one.load_state_dict(other.state_dict())
    assert torch.equal(logits(one, ids), logits(other, ids))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_one_matrix_is_kept_by_either_name(name):
    model = SSDForCausalLM(SSDConfig(hidden_size=64, num_hidden_layers=1, vocab_size=96, tie_word_embeddings=True))
    quantize(model, modules_to_not_convert=[name])
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.embed_tokens) is nn.Embedding
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.layers[0].mixer.in_proj, FewBitsLinear)


def test_a_head_that_was_untied_is_saved(tmp_path):
    model = SSDForCausalLM(SSDConfig(hidden_size=64, num_hidden_layers=1, vocab_size=96, tie_word_embeddings=True))
    model.lm_head.weight = nn.Parameter(torch.randn(96, 64))
    quantize(model).save_pretrained(tmp_path)
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.arange(9)[None]
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("where", ["", "model"])
def test_other_embeddings_go_into_as_many_bits_and_the_tied_head_follows(entry, where, tied, tmp_path):
    torch.manual_seed(0)
    model, other = build(entry, tie_word_embeddings=tied), build(entry, tie_word_embeddings=tied)
    ids, new = tokens(2, 9), nn.Embedding.from_pretrained(torch.randn(VOCAB, 64))
    other.load_state_dict(model.state_dict())
    other.set_input_embeddings(new)
    other.tie_weights()
    want = logits(quantize(other, 4), ids)
    quantize(model, 4)
    before, head = logits(model, ids), model.lm_head
    model.get_submodule(where).set_input_embeddings(copy.deepcopy(new))
    assert torch.equal(logits(model, ids), want)
    assert not torch.equal(before, want)
    assert model.lm_head is head
    assert torch.equal(logits(copy.deepcopy(model), ids), want)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), want)
    model.model.embed_tokens = other.model.embed_tokens  # in few bits already
    assert model.get_input_embeddings() is other.get_input_embeddings()
    assert not tied or model.lm_head.embedding is other.get_input_embeddings()


def test_embeddings_that_do_not_fit_are_refused(entry):
    model = quantize(build(entry), 4)
    for wrong in (nn.Embedding(VOCAB, 32), nn.Embedding(VOCAB + 1, 64), nn.Linear(64, VOCAB)):
        with pytest.raises(ValueError, match=rf"an Embedding\({VOCAB}, 64\); got {type(wrong).__name__}"):
            model.set_input_embeddings(wrong)
    assert isinstance(model.get_input_embeddings(), FewBitsEmbedding)


def test_one_kept_matrix_comes_back_from_its_folder(entry, tmp_path):
    for name in ("lm_head", "embed_tokens"):
        model, ids = quantize(build(entry, tie_word_embeddings=True), modules_to_not_convert=[name]), tokens(2, 9)
        model.save_pretrained(tmp_path / name)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(logits(again, ids), logits(model, ids))
        assert again.lm_head.weight is again.get_input_embeddings().weight


def test_a_vocabulary_in_few_bits_is_not_resized(entry):
    with pytest.raises(ValueError, match="resize the float model"):
        quantize(build(entry)).resize_token_embeddings(VOCAB + 3)


def test_the_code_of_another_folder_leaves_these_classes(entry, tmp_path, monkeypatch):
    """transformers keeps one quantizer of a name: the last that was imported, with whatever model came before it."""
    for table in (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.setitem(table, METHOD, table[METHOD])
    spec = importlib.util.spec_from_file_location("copy_of_a_folder", bits_quantizer.__file__)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    copied.FEW_BITS.replace = copied.FEW_BITS.settle = None  # not asked
    assert AUTO_QUANTIZER_MAPPING[METHOD] is copied.FewBitsQuantizer
    quantize(build(entry), 4).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(model.model.embed_tokens, FewBitsEmbedding)


def test_a_head_with_scores_stays_as_it_is(entry, tmp_path):
    quantize(build(entry), 4).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=40)
    assert type(model.score) is nn.Linear
    assert isinstance(model.model.embed_tokens, FewBitsEmbedding)
    causal = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(model.model(ids).last_hidden_state, causal.model(ids).last_hidden_state)


def test_where_fbgemm_is_not_it_is_slow_and_right_and_says_so(entry, monkeypatch, transformers_log):
    model = build(entry)
    quantized = quantize(copy.deepcopy(model), 4)
    want = logits(plain(model, quantized), tokens(2, 9))
    monkeypatch.setattr(bits_layers, "pack", lambda *args: None)
    logger_once = bits_layers.logger.warning_once
    logger_once.cache_clear()
    again = copy.deepcopy(quantized)
    assert relative(logits(again, tokens(2, 9)), want) < 1e-5
    assert "no FBGEMM for this processor" in transformers_log.text


def test_a_prompt_that_is_remembered_and_beams(recurrent):
    """Greedy search is beam search with one beam, and the cache keeps its dtype and bytes."""
    model = build(recurrent)
    quantized = quantize(copy.deepcopy(model), 4)
    with torch.no_grad():
        caches = [m(tokens(1, 9), use_cache=True)[CACHE] for m in (model, quantized)]
    assert caches[0].nbytes == caches[1].nbytes
    out = quantized.generate(tokens(1, 9), max_new_tokens=4, num_beams=3, do_sample=False)
    assert out.shape == (1, 13)
    assert out.max() < VOCAB
