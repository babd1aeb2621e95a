"""QLoRA: 4-bit bases (nf4, double quantization) under LoRA, on a CPU; and caches on a decoder that stays as it is."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft_cases import adapted, whole
from processes import without_scrubjay
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging
from zoo import VOCAB, ZOO, relative, tokens

from scrubjay import AdoreCache, RecycledCache, adapter_report
from scrubjay.modeling.inputs.cache_argument import CACHE, named
from scrubjay.modeling.training.adapters import WholeLinear, keep_unpacked

# Said of every merge into 4 bits, whose rounding is bounded here.
pytestmark = pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear:UserWarning")

# Half of the widest gap between two of nf4's sixteen values, as a share of the largest weight of a block of 64: the
# most by which rounding can move a weight. The share itself is kept in 8 bits, which adds less than a hundredth.
NF4 = 0.152 + 0.01
# What stays in float32 whatever the model's dtype is.
KEPT = {"ssd": {"A_log", "D", "dt_bias"}, "adore": {"controller"}}
KEPT |= {"ssd_hybrid": KEPT["ssd"], "taipan": KEPT["ssd"] | {"gate"}} | {
    key: {"mem_gate_bias"} for key in ("rodimus", "rodimus_plus")
}
# Outputs that are no multiple of 32, on which bitsandbytes stops, and ones that it would rearrange, on some CPUs.
SIZES = {"odd": 64, "even": 128}


def four_bits(compute=torch.float32, **changes):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        **changes,
    )


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable_progress_bar()


def build(entry, hidden_size, **changes):
    """A model in which most inputs are multiples of 64."""
    more = {"ssd": {"n_groups": 2}, "rodimus": {}}.get(entry.name, {"intermediate_size": 192})
    return entry.build(hidden_size=hidden_size, **more | changes)


def split(model):
    """Names of the linear layers, the head aside, that 4 bits can and cannot hold."""
    linear = {
        name: m.in_features for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"
    }
    can = {name for name, inputs in linear.items() if inputs % 64 == 0}
    return can, set(linear) - can


@pytest.fixture(params=SIZES)
def folder(request, entry, tmp_path):
    """Of a saved model."""
    build(entry, SIZES[request.param]).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bits(), **options)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def unquantized(folder, model):
    """The same function in plain layers: a float32 model with the numbers that the 4 bits stand for."""
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for name, layer in layers(model).items():
        plain.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return plain


def test_every_projection_and_nothing_else_is_loaded_in_4_bits(entry, folder):
    model = load(folder, dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    quantized = layers(model)
    can, cannot = split(plain)
    assert set(quantized) == can
    assert {name.rpartition(".")[2] for name in cannot} == (
        {"ch_gate_up"} if entry.name.startswith("rodimus") else set()
    )
    odd = {name for name, layer in quantized.items() if layer.out_features % 32}
    assert odd or not entry.recurrent or model.config.hidden_size != 64
    for name, layer in quantized.items():
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        got = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        want = plain.get_submodule(name).weight.detach().bfloat16().float()
        error, largest = _blocks(got - want), _blocks(want)
        assert (error <= NF4 * largest + 1e-3).all(), name
        assert float(error.max()) > 0
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") in quantized:
            continue
        is_kept = bool(set(name.split(".")) & KEPT.get(entry.name, set()))
        assert parameter.dtype == (torch.float32 if is_kept else torch.bfloat16), name
        assert parameter.shape == plain.get_parameter(name).shape
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == plain.config.tie_word_embeddings


@pytest.mark.parametrize("tied", [False, True])
def test_a_list_of_what_to_skip_adds_to_what_is_skipped(entry, tied, tmp_path):
    """transformers takes such a list in place of its own, in which the head stands."""
    build(entry, 64, tie_word_embeddings=tied).save_pretrained(tmp_path)
    skipped = {"rodimus": "out_proj", "rodimus_plus": "out_proj"}.get(
        entry.name, "in_proj" if entry.recurrent else "q_proj"
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=four_bits(llm_int8_skip_modules=[skipped])
    )
    assert layers(model)
    assert not [name for name in layers(model) if "lm_head" in name or skipped in name]
    assert model.lm_head.weight.dtype == torch.float32
    ids = tokens(2, 12)
    with torch.no_grad():
        assert relative(model(ids).logits, unquantized(tmp_path, model)(ids).logits) < 5e-6


def _blocks(x):
    """Largest magnitude of each block of 64 numbers."""
    flat = x.flatten().abs()
    return nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64).amax(1)


def test_4_bit_layers_of_any_size_give_what_their_numbers_say(entry, folder):
    """In eval mode, where bitsandbytes would rearrange weights, with gradients, prefilled and token by token."""
    model = load(folder)
    plain = unquantized(folder, model)
    ids = tokens(2, 12)
    with torch.no_grad():
        want = plain(ids).logits
        assert relative(model(ids).logits, want) < 5e-6  # 7.0e-7 was the most seen
        cached = model(ids[:, :11], use_cache=True)[CACHE]
        step = model(ids[:, 11:], **named(cached), use_cache=True).logits
        assert relative(step, want[:, 11:]) < 5e-6
    assert relative(model(ids).logits, want) < 5e-6


def test_gradients_after_generating_are_those_before(folder):
    model = adapted(load(folder), "all-linear")
    ids = tokens(2, 12)

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        model.train()(ids, labels=ids).loss.backward()
        model.eval()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    assert len(before) >= 8
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))


def test_gradients_of_an_adapter_and_of_biases_are_those_on_plain_layers(entry, folder):
    """bias="all" trains vectors of the base model in place, beside 4 bits that are not trained."""
    ids, found = tokens(2, 12), []
    quantized = load(folder)
    for base in (quantized, unquantized(folder, quantized)):
        model = adapted(base, "all-linear", bias="all").train()
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    got, want = found
    assert got.keys() == want.keys()
    assert any("lora_" not in name for name in got) == entry.recurrent  # the others have none but the controller's
    largest = max(gradient.abs().max() for gradient in want.values())
    for name in got:
        assert (got[name] - want[name]).abs().max() < 1.5e-5 * largest, name  # 2.7e-6 was the most seen
        assert want[name].abs().max() > 0, name


def test_qlora_trains_generates_saves_loads_and_merges(entry, folder, tmp_path):
    model = prepare_model_for_kbit_training(load(folder), gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, lora_alpha=16))
    report = adapter_report(model)
    nf4 = {layer.name for layer in report.layers if layer.state == "adapted" and layer.stored == "nf4"}
    assert nf4 == split(AutoModelForCausalLM.from_pretrained(folder))[0]
    ids, losses = tokens(2, 12), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(6):
        torch.manual_seed(0)
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    greedy = dict(max_new_tokens=5, do_sample=False, attention_mask=torch.ones(2, 5))
    with torch.no_grad():
        logits, text = whole(model.eval()), model.generate(ids[:, :5], **greedy)
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
        assert torch.equal(whole(again), logits)
        assert torch.equal(again.generate(ids[:, :5], **greedy), text)

        plain = PeftModel.from_pretrained(unquantized(folder, load(folder)), tmp_path / "adapter").eval()
        want = plain.merge_and_unload()
        assert relative(whole(want), logits) < 5e-6  # 6.6e-7 was the most seen
        before = {name: layer.weight.data.clone() for name, layer in layers(again).items()}
        merged = again.merge_and_unload()
        assert len(before) == len(layers(merged)) > 0
        for name, layer in layers(merged).items():
            got = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            exact = want.get_submodule(name).weight
            assert (_blocks(got - exact) <= NF4 * _blocks(exact) + 1e-3).all(), name
            assert not torch.equal(layer.weight.data, before[f"base_model.model.{name}.base_layer"]), name
        assert whole(merged).isfinite().all()


def test_gradient_checkpointing_gives_the_same_gradients_on_4_bits(entry, folder):
    ids, found = tokens(2, 12), []
    for checkpointing in (False, True):
        model = prepare_model_for_kbit_training(
            load(folder), checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == checkpointing
        model = adapted(model, "all-linear").train()
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_inputs_that_are_no_multiple_of_a_block_stay_as_they_are(entry, tmp_path):
    """Of which bitsandbytes reads some numbers with the scale of another block on a CPU."""
    model = entry.build()  # 48
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    can, cannot = split(model)
    assert set(layers(loaded)) == can
    assert cannot
    for name in cannot:
        assert type(loaded.get_submodule(name)) is WholeLinear
        assert torch.equal(loaded.get_submodule(name).weight, model.get_submodule(name).weight)


def test_a_4_bit_model_is_the_same_after_saving(entry, folder, tmp_path):
    model = load(folder).eval()
    with torch.no_grad():
        logits = whole(model)
        model.save_pretrained(tmp_path / "quantized")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized").eval()
        assert layers(again).keys() == layers(model).keys()
        assert torch.equal(whole(again), logits)


def test_bfloat16_computes_close_to_float32(entry, tmp_path):
    build(entry, 128).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=four_bits(torch.bfloat16)
    )
    plain = unquantized(tmp_path, model)
    if entry.name == "taipan":  # a rounded gate would choose other tokens
        for one in (model, plain):
            one.config.eval_threshold = 1e-9
    with torch.no_grad():
        assert relative(whole(model), whole(plain)) < 0.1  # 0.016 was the most seen


CHILD = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, quantization_config=settings)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    kinds = [type(module).__name__ for module in model.modules()]
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)).eval()
    ids = torch.arange(12).view(2, 6)
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    assert text.shape == (2, 9)
    model.train()(ids, labels=ids).loss.backward()
    finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    print(type(model.get_base_model()).__name__, kinds.count("Linear4bit"), finite)
"""


@pytest.mark.slow
def test_4_bits_and_an_adapter_without_the_library(tmp_path):
    """By trust_remote_code, in a process that cannot import scrubjay."""
    wanted = []
    for entry in ZOO:
        model = build(entry, 64)
        model.save_pretrained(tmp_path / entry.name)
        wanted.append(f"{entry.model.__name__} {len(split(model)[0])} True")
    printed = without_scrubjay(CHILD, tmp_path, *(str(tmp_path / entry.name) for entry in ZOO))
    assert [line for line in printed if "ForCausalLM" in line] == wanted


@pytest.fixture
def llama(tmp_path):
    """Transformers' own model in 4 bits, with an adapter that does something."""
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2)).save_pretrained(tmp_path / "llama")
    model = load(tmp_path / "llama")
    keep_unpacked(model)
    return adapted(model, "all-linear")


@pytest.mark.parametrize("cache", [AdoreCache, RecycledCache])
def test_caches_take_part_in_a_4_bit_llama_with_an_adapter(llama, cache):
    ids = tokens(2, 20)
    room = {AdoreCache: {"cache_size": 64}, RecycledCache: {"budget": 64}}[cache]
    tight = {AdoreCache: {"cache_size": 6, "rebuild": 0, "recent": 2}, RecycledCache: {"budget": 6, "stride": 3}}[cache]

    def logits(past):
        parts = [llama(ids[:, :12], **named(past)).logits]
        parts += [llama(ids[:, i : i + 1], **named(past)).logits for i in range(12, 20)]
        return torch.cat(parts, 1)

    with torch.no_grad():
        full = llama(ids, use_cache=False).logits
        with cache(llama, **room) as past:
            assert relative(logits(past), full) < 2e-5  # 3.7e-6 was the most seen
        with cache(llama, **tight) as past:
            got = logits(past)
            assert relative(got, full) > 1e-3
        with llama.disable_adapter(), cache(llama, **tight) as past:
            assert relative(logits(past), got) > 1e-2
        with cache(llama, **tight) as past:
            text = llama.generate(ids[:, :12], **named(past), max_new_tokens=6, attention_mask=torch.ones(2, 12))
        assert text.shape == (2, 18)


def test_a_decoder_that_is_kept_unpacked_trains_as_before_after_a_pass_in_eval_mode(llama):
    ids = tokens(2, 12)

    def gradients():
        llama.zero_grad()
        llama.train()(ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in llama.eval().parameters() if p.grad is not None])

    before = gradients()
    with torch.no_grad():
        llama(ids)
    assert torch.equal(gradients(), before)
