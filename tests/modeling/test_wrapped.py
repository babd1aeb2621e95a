"""Decoders of transformers with a cache of the zoo: what the model around the cache owes its user.

What both wrappers do is tested here once; what each method computes, in the tests of its own.
"""

import copy
import json
import re

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from recycled_cases import decoder
from recycled_cases import tokens as small
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from zoo import relative, tokens

from scrubjay import (
    AdoreCache,
    AdoreConfig,
    AdoreForCausalLM,
    RecycledCache,
    RecycledConfig,
    RecycledForCausalLM,
    RodimusCache,
    RodimusConfig,
    RodimusForCausalLM,
    TaipanCache,
    TaipanConfig,
    TaipanForCausalLM,
)
from scrubjay.modeling.inputs.cache_argument import CACHE, named

WRAPPERS = {
    "recycled": (RecycledConfig, RecycledForCausalLM, dict(budget=8, stride=3)),
    "adore": (AdoreConfig, AdoreForCausalLM, dict(cache_size=12, rebuild=3, label_k=4)),
}
EXACT = 1e-10


@pytest.fixture(params=WRAPPERS)
def kind(request):
    return WRAPPERS[request.param]


def build(kind, **changes):
    """In float64 and evaluation mode."""
    config_class, model_class, settings = kind
    sizes = dict(hidden_size=48, num_hidden_layers=2, vocab_size=97, num_attention_heads=4, initializer_range=0.3)
    torch.manual_seed(0)
    return model_class(config_class(**sizes, **settings | changes)).double().eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_configuration_made_from_a_models_own_leaves_the_model_alone(kind, implementation):
    llama = decoder()
    llama.set_attn_implementation(implementation)
    ids = small(2, 20)
    with torch.no_grad():
        before = llama(ids).logits
        wrapper = kind[1](kind[0](base_config=llama.config, **kind[2]))
        assert torch.equal(llama(ids).logits, before)
    assert llama.config._attn_implementation == implementation
    assert wrapper.get_decoder().config._attn_implementation == implementation
    wrapper.resize_token_embeddings(120)
    wrapper.set_attn_implementation("eager")
    assert llama.config.vocab_size != 120
    assert llama.config._attn_implementation == implementation


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_attention_that_is_asked_for_runs(kind, implementation, tmp_path):
    build(kind).save_pretrained(tmp_path / "m")
    for cls, options in ((kind[1], {}), (AutoModelForCausalLM, {"trust_remote_code": True})):
        model = cls.from_pretrained(tmp_path / "m", attn_implementation=implementation, **options)
        assert model.config._attn_implementation == model.get_decoder().config._attn_implementation == implementation
    assert kind[1].from_pretrained(tmp_path / "m").config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "adapted",
    [
        dict(target_modules=["q_proj", "embed_tokens"]),
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"]),
        dict(target_modules=["q_proj"], trainable_token_indices=[5, 6]),
    ],
    ids=["LoRA", "whole", "tokens"],
)
def test_what_an_adapter_replaces_takes_part(kind, adapted):
    """The decoder runs the modules that the wrapper has, not those that it was made with."""
    tuned = get_peft_model(build(kind), LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **adapted))
    ids = torch.arange(20)[None]
    tuned.train()(input_ids=ids, labels=ids).loss.backward()
    trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert len(trained) > 4
    assert all(p.grad is not None and p.grad.abs().max() > 0 for name, p in trained.items() if "lora_embed" not in name)
    assert any("embed_tokens" in name or "token_adapter" in name for name in trained)
    embedded = [name for name in trained if "lora_embedding" in name]
    assert all(trained[name].grad is not None for name in embedded)


def test_a_layer_that_is_taken_away_is_gone(kind):
    model, ids = build(kind), tokens(1, 12)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        assert relative(model(ids, use_cache=False).logits, before) > 1e-2


def test_what_others_look_for_in_a_configuration_is_the_decoders(kind, tmp_path):
    """peft reads sizes off the dictionary, and unties embeddings by the configuration; the file says each once."""
    kind, *_ = kind
    config = kind(hidden_size=48, vocab_size=97, tie_word_embeddings=True)
    said = config.to_dict()
    base = said["base_config"]
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings", "vocab_size"):
        assert said[name] == base[name]
    again = kind.from_dict(said)
    assert again.to_dict() == said == copy.deepcopy(config).to_dict()
    config.tie_word_embeddings = False
    assert config.base_config.tie_word_embeddings is False
    config.update({"num_hidden_layers": 1})
    assert (config.num_hidden_layers, config.base_config.num_hidden_layers) == (1, 1)
    assert kind(**{name: x for name, x in (said | {"vocab_size": 50}).items() if name != "model_type"}).to_dict() == (
        said | {"vocab_size": 50, "base_config": base | {"vocab_size": 50}}
    )
    again.save_pretrained(tmp_path)
    assert not {"hidden_size", "tie_word_embeddings"} & set(json.loads((tmp_path / "config.json").read_text()))
    assert kind.from_pretrained(tmp_path).to_dict() == said | {"transformers_version": transformers.__version__}
    assert kind.from_pretrained(tmp_path, tie_word_embeddings=False).base_config.tie_word_embeddings is False


def test_sizes_given_to_from_pretrained_are_those_of_the_model(kind, tmp_path):
    build(kind).float().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path, vocab_size=50, num_hidden_layers=1))
    assert (model.lm_head.out_features, model.model.embed_tokens.num_embeddings, len(model.model.layers)) == (50, 50, 1)


def test_settings_given_to_from_pretrained_are_checked(kind, tmp_path):
    build(kind).save_pretrained(tmp_path / "m")
    name = next(name for name in kind[2] if name in ("budget", "cache_size"))
    with pytest.raises(Exception, match=rf"{name} (must be|>=).* got 0"):
        kind[1].from_pretrained(tmp_path / "m", **{name: 0})
    assert getattr(kind[1].from_pretrained(tmp_path / "m", **{name: 9}).config, name) == 9


@pytest.mark.parametrize("mask", ["none", "of the new columns", "of all columns"])
def test_padding_is_remembered_when_the_next_call_does_not_repeat_it(kind, mask):
    model, ids = build(kind), tokens(2, 24)
    seen = torch.stack([torch.arange(20) >= 20 - n for n in (7, 20)]).long()
    masks = {"none": None, "of the new columns": seen.new_ones(2, 1)}
    with torch.no_grad():
        cache = model(ids[:, :20], attention_mask=seen)[CACHE]
        alone = model(ids[:1, 13:20])[CACHE]
        for t in range(20, 24):
            masks["of all columns"] = torch.cat([seen, seen.new_ones(2, t - 19)], 1)
            got = model(ids[:, t : t + 1], attention_mask=masks[mask], **named(cache)).logits
            want = model(ids[:1, t : t + 1], **named(alone)).logits
            assert relative(got[:1], want) < EXACT


@pytest.mark.parametrize("plain", [False, True], ids=["wrapped", "attached"])
def test_a_mask_that_is_forgotten_in_a_later_turn_changes_nothing(kind, plain):
    """generate() makes one of ones then, and positions of it: what was padding stays padding."""
    model, ids = build(kind), tokens(2, 12) % 60 + 1
    if plain:
        model = decoder()
    mask = torch.stack([torch.arange(12) >= n for n in (5, 0)]).long()
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)

    def turns(second):
        make = RecycledCache if kind[0] is RecycledConfig else AdoreCache
        cache = make(model, **{"budget": 64} if make is RecycledCache else {"cache_size": 64})
        first = model.generate(ids, attention_mask=mask, **named(cache), **options)
        prompt = torch.cat([first, ids[:, :3]], 1)
        whole = torch.cat([mask, mask.new_ones(2, prompt.shape[1] - 12)], 1)
        given = {"attention_mask": whole} if second == "given" else {}
        if second == "stock":
            return model.generate(prompt, attention_mask=whole, **named(DynamicCache(config=model.config)), **options)
        return model.generate(prompt, **given, **named(cache), **options)

    assert torch.equal(turns("forgotten"), turns("given"))
    assert torch.equal(turns("forgotten"), turns("stock"))


def test_caches_that_are_not_for_the_model_are_named(kind):
    model, ids = build(kind), tokens(1, 6)
    other = RodimusForCausalLM(RodimusConfig(hidden_size=48, num_hidden_layers=2, vocab_size=97))
    for decoding in (model, decoder()):
        with pytest.raises(ValueError, match=r"A RodimusCache holds recurrent states.*Pass the model's own"):
            decoding(ids % 60, **named(RodimusCache(other)))
    with pytest.raises(ValueError, match=r"needs a RodimusCache; got \w+Cache. Pass RodimusCache\(model\), or none.$"):
        other(ids, **named(model.cache_class(model)))


def test_full_attention_is_a_dynamic_cache_and_others_are_refused_by_name(kind):
    model, ids = build(kind), tokens(1, 6)
    options = dict(max_new_tokens=3, do_sample=False)
    with pytest.raises(ValueError, match=r"StaticCache. For full attention, pass DynamicCache\(config=model.config\)"):
        model.generate(ids, **named(StaticCache(config=model.config, max_cache_len=32)), **options)
    with pytest.raises(ValueError, match=r"no 'static' one.* pass DynamicCache\(config=model.config\)"):
        model.generate(ids, cache_implementation="static", **options)
    assert model.generate(ids, **named(DynamicCache(config=model.config)), **options).shape == (1, 9)


WINDOWS = {
    "mistral": dict(sliding_window=5),
    "qwen2": dict(sliding_window=5, use_sliding_window=True, max_window_layers=1),
    "qwen3": dict(sliding_window=5, use_sliding_window=True, max_window_layers=1),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_the_way_out_of_layers_with_a_window_works_as_it_is_written(kind, name, tmp_path):
    stock = decoder(name, dtype=torch.float32, **WINDOWS[name])
    stock.save_pretrained(tmp_path)
    ids, make = small(1, 12), RecycledCache if kind[0] is RecycledConfig else AdoreCache
    with pytest.raises(ValueError, match=r"Load it with .*, or use") as refused:
        make(stock)
    wrapped = kind[1].from_pretrained(tmp_path, **kind[2])
    with pytest.raises(ValueError, match=r"Load it with .*, or use") as again:
        wrapped.generate(ids, max_new_tokens=2)
    assert str(again.value) == str(refused.value)
    given = eval("dict(" + re.search(r"Load it with (.*), or use", str(refused.value))[1] + ")")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **given)
    with make(loaded) as cache:
        assert loaded.generate(ids, max_new_tokens=2, eos_token_id=None, **named(cache)).shape == (1, 14)
    loaded = kind[1].from_pretrained(tmp_path, **kind[2], **given)
    assert loaded.generate(ids, max_new_tokens=2, eos_token_id=None).shape == (1, 14)


def test_attentions_are_returned(kind):
    model = build(kind)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(tokens(2, 9), use_cache=False, output_attentions=True).attentions
    assert [x.shape for x in found] == [(2, 4, 9, 9)] * 2


def caches(model):
    """Every cache that takes part in a decoder's calls."""
    for policy in ("recycled", "snapkv", "h2o", "streaming", "full"):
        yield lambda policy=policy: RecycledCache(model, budget=8, stride=3, policy=policy)
    yield lambda: RecycledCache(model, budget=8, schedule="dynamic", qc=2)
    yield lambda: AdoreCache(model, cache_size=8, rebuild=3, controller="random")


def turns(model, cache, ids, first):
    """Logits of steps after a prompt that was read under `first`."""
    with first:
        model(ids[:, :20], **named(cache))
    with torch.no_grad():
        later = model(ids[:, 20:24], **named(cache)).logits
        return torch.cat([later, *(model(x, **named(cache)).logits for x in ids[:, 24:].split(1, 1))], 1)


@pytest.mark.parametrize("which", range(7))
def test_a_prompt_read_in_inference_mode_can_be_gone_on_with_outside_of_it(which):
    model, ids = decoder(), small(2, 34)
    make = list(caches(model))[which]
    assert torch.equal(turns(model, make(), ids, torch.inference_mode()), turns(model, make(), ids, torch.no_grad()))


def test_taipan_goes_on_outside_of_inference_mode():
    config = TaipanConfig(hidden_size=48, num_hidden_layers=3, attention_every=1, vocab_size=97, sliding_window=8)
    model, ids = TaipanForCausalLM(config).eval(), small(2, 34)
    one, other = (turns(model, TaipanCache(model), ids, mode()) for mode in (torch.inference_mode, torch.no_grad))
    assert torch.equal(one, other)


def interrupted(model, cache):
    """A step that Ctrl-C ends between two layers, where torch runs no hooks."""

    def stop(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(small(1, 1), **named(cache))
    hook.remove()


@pytest.mark.parametrize("which", range(7))
@pytest.mark.parametrize("ending", ["close", "del", "next call"])
def test_an_interrupted_call_leaves_no_trace(which, ending):
    model = decoder()
    inner, ids = model.get_decoder(), small(1, 20)
    with torch.no_grad():
        want = model(ids, **named(DynamicCache(config=model.config))).logits
        cache = list(caches(model))[which]()
        model(ids, **named(cache))
    interrupted(model, cache)
    if ending == "next call":
        with torch.no_grad():
            assert torch.equal(model(ids, **named(DynamicCache(config=model.config))).logits, want)
    elif ending == "close":
        cache.close()
    else:
        del cache
    assert inner.config._attn_implementation == "sdpa"
    if ending != "next call":
        assert not inner._forward_hooks
        assert not inner._forward_pre_hooks
        with torch.no_grad():
            assert torch.equal(model(ids).logits, want)


@torch.no_grad()
def test_a_compiled_decoder_goes_on_while_caches_come_and_go():
    """dynamo guards on hooks by their numbers, which change with each cache that attaches and leaves."""
    model, ids = decoder(dtype=torch.float32), small(1, 12)
    options = dict(max_new_tokens=3, do_sample=False)
    makers = (lambda: AdoreCache(model, cache_size=64), lambda: RecycledCache(model, budget=64))
    want = model.generate(ids, **options)
    model.forward = torch.compile(model.forward, backend="eager")
    for make in (*makers, *makers):
        with make() as cache:
            assert torch.equal(model.generate(ids, **named(cache), **options), want)
        assert torch.equal(model.generate(ids, **options), want)
