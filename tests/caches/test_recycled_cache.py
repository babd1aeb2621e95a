"""A recycled cache as an object: copies, files, bytes, and what it refuses."""

import copy
import importlib.util

import pytest
import torch
from recycled_cases import Oracle, assert_close, compare, decoder, drive, gap, padded, tokens
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from zoo import ZOO

from scrubjay import RecycledCache, RecycledConfig, RecycledForCausalLM, SSDCache
from scrubjay.modeling.decoder import attention_recycled
from scrubjay.modeling.inputs.cache_argument import CACHE, named

POLICIES = ("recycled", "lowrank", "snapkv", "h2o", "tova", "streaming", "full")
DYNAMIC = {"schedule": "dynamic", "qc": 2, "threshold": 0.4}


@pytest.fixture(scope="module")
def llama():
    return decoder()


def real_of(columns):
    return torch.cat([padded((12, 5), 12), torch.ones(2, columns - 12, dtype=torch.bool)], 1)


@torch.no_grad()
def steps_on(model, ids, cache):
    """Logits of single tokens on a cache whose rows have 7 columns of padding in the second."""
    found = []
    for column in ids.T:
        n = cache.get_seq_length()
        positions = torch.tensor([[n], [n - 7]])
        found.append(model(column[:, None], **named(cache), position_ids=positions).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("settings", [*({"policy": policy} for policy in POLICIES), DYNAMIC], ids=str)
def test_recycled_copies_and_files_go_on_bit_for_bit(llama, tmp_path, settings, steps):
    ids, more = tokens(2, 12 + steps), tokens(2, 9, seed=2)
    with RecycledCache(llama, budget=8, stride=4, **settings) as cache:
        drive(llama, ids, [12] + [1] * steps, cache, real_of(12 + steps))
        fork = copy.deepcopy(cache)
        cache.save(tmp_path / "cache.safetensors")
        want = steps_on(llama, more, cache)
        again = copy.deepcopy(fork)
        for other in (fork, again, *(RecycledCache.load(tmp_path / "cache.safetensors", llama) for _ in "12")):
            with other:
                assert other.get_seq_length() == 12 + steps
                assert torch.equal(steps_on(llama, more, other), want)
                assert other.full_steps == cache.full_steps
                assert other.nbytes == cache.nbytes
        assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]


def test_recycled_files_of_another_kind_or_model_are_refused(llama, tmp_path):
    path = tmp_path / "cache.safetensors"
    with RecycledCache(llama, budget=8) as cache:
        with pytest.raises(ValueError, match="empty"):
            cache.save(path)
        assert not path.exists()
        drive(llama, tokens(1, 12), [12], cache)
        cache.save(path)
    with pytest.raises(ValueError, match=r"holds RecycledCache; SSDCache.load needs its own kind"):
        SSDCache.load(path)
    others = [decoder(layers=3), decoder(groups=4), decoder(heads=2), decoder(hidden_size=64), decoder("mistral")]
    for other in (*others, decoder(head_dim=16)):
        with pytest.raises(ValueError, match=r"was written for .*; the model has"):
            RecycledCache.load(path, other)
        assert not other.model._forward_hooks
    model = ZOO[0].build()
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.long), use_cache=True)[CACHE].save(path)
    with pytest.raises(ValueError, match=r"holds SSDCache; RecycledCache.load needs its own kind"):
        RecycledCache.load(path, llama)


def test_recycled_bytes_are_those_of_every_tensor(llama):
    """256 columns ahead of the prompt; the last 64 queries; K slots of keys, values, index and rank."""
    with RecycledCache(llama, budget=8, stride=50) as cache:
        assert cache.nbytes == 0
        drive(llama, tokens(3, 12), [12], cache)
        full, tail = 2 * 2 * (12 + 256) * 8 * 8, 4 * 64 * 8 * 8
        assert cache.nbytes == 2 * 3 * (full + tail)
        drive(llama, tokens(3, 1), [1], cache)
        kept = 2 * 8 * (2 * 8 * 8 + 8 + 8)
        assert cache.nbytes == 2 * 3 * (full + tail + kept)
    with RecycledCache(llama, budget=8, stride=50) as cache:
        drive(llama, tokens(2, 13), [12, 1], cache, real_of(13))
        assert cache.nbytes == 2 * 2 * (full + tail + kept + 2 * 8) + 2 * 13  # which slots are real, and which columns


@torch.no_grad()
def test_recycled_full_buffer_grows_by_a_quarter_and_keeps_its_columns(llama):
    ids = tokens(1, 700)
    with RecycledCache(llama, budget=8) as cache:
        drive(llama, ids, [100, 200, 300] + [1] * 100, cache)
        assert cache.layers[0].full_keys.shape[2] == 750
        other = DynamicCache()
        llama(ids[:, :100], **named(other))
        assert torch.equal(cache.layers[0].full_keys[:, :, :100], other.layers[0].keys)
        place = cache.layers[0].full_keys.data_ptr()
        drive(llama, ids[:, :50], [1] * 50, cache)
        assert cache.layers[0].full_keys.data_ptr() == place  # a step writes one column


@torch.no_grad()
def test_recycled_cache_refuses_inputs_that_do_not_fit(llama):
    ids = tokens(2, 12)
    with RecycledCache(llama, budget=8) as cache:
        with pytest.raises(ValueError, match=r"attention_mask must have shape \(2, 12\).*got \(2, 11\)"):
            llama(ids, **named(cache), attention_mask=torch.ones(2, 11))
        drive(llama, ids, [12], cache)
        with pytest.raises(ValueError, match=r"holds 2 rows, the input has 3.*batch_repeat_interleave"):
            llama(tokens(3, 1), **named(cache))
        with pytest.raises(ValueError, match=r"\(2, 1\) or \(2, 13\), with the 12 columns in the cache; got \(2, 2\)"):
            llama(ids[:, :1], **named(cache), attention_mask=torch.ones(2, 2))
        with pytest.raises(ValueError, match=r"attention_mask must be a .* got \(2, 1, 1, 13\)"):
            llama(ids[:, :1], **named(cache), attention_mask=torch.ones(2, 1, 1, 13))
        for given, said in (
            ({}, "exactly one of input_ids"),
            ({"input_ids": ids, "inputs_embeds": llama.model.embed_tokens(ids)}, "exactly one of input_ids"),
            ({"input_ids": ids[:, 0]}, r"input_ids must have shape \(batch, length\)"),
            ({"input_ids": ids[:, :0]}, r"holds 12 columns, and this call brings none .*reset\(\)"),
            ({"input_ids": ids[:, :1], "attention_mask": {"full_attention": None}}, "attention_mask must be .* dict"),
        ):
            with pytest.raises(ValueError, match=said):
                llama.model(**named(cache), **given)
        assert cache.get_seq_length() == 12
        assert llama.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="only until it is closed"):
        llama(ids[:, :1], **named(cache))
    with pytest.raises(ValueError, match="closed cache cannot be copied"):
        copy.deepcopy(cache)
    with RecycledCache(llama, budget=8) as cache, pytest.raises(ValueError, match="model that it was made for"):
        decoder(seed=1)(ids, **named(cache))


def test_recycled_cache_refuses_attention_it_cannot_stand_in_for():
    model = decoder()
    with RecycledCache(model, budget=8) as cache:
        model.config._attn_implementation_internal = "flash_attention_2"
        with pytest.raises(ValueError, match=r"'sdpa' or 'eager'.*'flash_attention_2'.*set_attn_implementation"):
            model(tokens(1, 4), **named(cache))
        assert model.config._attn_implementation == "flash_attention_2"


def test_recycled_cache_refuses_models_it_was_not_built_for():
    for kind, more in (("mistral", {}), ("qwen2", {"use_sliding_window": True, "max_window_layers": 1})):
        with pytest.raises(ValueError, match=rf"{kind} has layers that see a window.*sliding_window 5.*Load it with"):
            RecycledCache(decoder(kind, sliding_window=5, **more))
    with pytest.raises(ValueError, match=r"llama, qwen2, qwen3, mistral; got 'gpt2'"):
        RecycledCache(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)))
    with pytest.raises(ValueError, match="got 'Linear'"):
        RecycledCache(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"windows": 3}, r"no setting \['windows'\]; it has"),
        ({"base_config": None}, "no setting"),
        ({"policy": "keyformer"}, "policy must be one of .*'keyformer'"),
        ({"schedule": "never"}, "schedule must be one of .*'never'"),
        ({"group_reduce": "sum"}, "group_reduce must be one of .*'sum'"),
        ({"qsim_space": "mid"}, "qsim_space must be one of .*'mid'"),
        ({"qsim_batch": "most"}, "qsim_batch must be one of .*'most'"),
        ({"budget": 0}, "budget must be at least 1; got 0"),
        ({"stride": 0}, "stride must be at least 1; got 0"),
        ({"qc": 0}, "qc must be at least 1; got 0"),
        ({"pool_kernel": 4}, "pool_kernel must be odd .*; got 4"),
        ({"pool_kernel": -1}, "pool_kernel must be odd .*; got -1"),
        ({"budget": 3, "keep_recent": 4}, "fit the budget together; got 4 .* 0 and a budget of 3"),
        ({"budget": 4, "n_sink": 4, "keep_recent": 0}, "fit the budget together; got 0 .* 4 and a budget of 4"),
        ({"budget": 4, "policy": "streaming"}, "fit the budget together; got 1 .* 4 and a budget of 4"),
        ({"budget": 8, "n_sink": 5, "policy": "h2o"}, "fit the budget together; got 4 .* 5 and a budget of 8"),
        ({"keep_recent": -1}, "0 or more"),
        ({"n_sink": -1}, "0 or more"),
        ({"full_layers": (2,)}, r"layer indices from 0 to 1; got \[2\]"),
        ({"full_layers": ("a",)}, "full_layers must be layer indices"),
        ({"budget": "many"}, "budget"),
    ],
    ids=str,
)
def test_recycled_settings_that_mean_nothing_are_refused(llama, settings, message):
    with pytest.raises(Exception, match=message) as caught:
        RecycledCache(llama, **settings)
    assert "Strict" in type(caught.value).__name__ or type(caught.value) is ValueError
    assert not llama.model._forward_hooks


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("style", ["none", "new", "whole", "forgotten"])
@pytest.mark.parametrize("budget", [8, 64])
@pytest.mark.parametrize("policy", POLICIES)
def test_recycled_padding_stays_padding_whatever_later_calls_say(policy, budget, style, implementation):
    """Pieces, full steps, partial ones, and short ones where the budget holds all."""
    dtype = torch.float32 if implementation == "eager" else torch.float64  # eager gives padding NaN in float64
    llama = decoder(attn_implementation=implementation, dtype=dtype)
    ids, real, pieces = tokens(2, 31), real_of(31), [12, 3, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 1, 1, 1]
    got, start = [], 0
    with RecycledCache(llama, budget=budget, stride=3, policy=policy) as cache:
        want = drive(llama, ids, pieces, cache, real)
    with RecycledCache(llama, budget=budget, stride=3, policy=policy) as cache:
        for piece in pieces:
            stop = start + piece
            seen = real[:, :stop].long()
            masks = {"none": None, "new": seen[:, start:], "whole": seen, "forgotten": torch.ones_like(seen)}
            mask = masks[style] if start else seen
            positions = ((mask if style == "forgotten" else seen).cumsum(1) - 1).clamp(min=0)[:, start:]
            got.append(llama(ids[:, start:stop], **named(cache), attention_mask=mask, position_ids=positions).logits)
            start = stop
    assert torch.equal(torch.cat(got, 1)[real], want[real])


def test_recycled_cache_of_a_decoder_called_by_position(llama):
    ids = tokens(2, 14)
    with RecycledCache(llama, budget=8) as one, RecycledCache(llama, budget=8) as two, torch.no_grad():
        for piece in (ids[:, :12], ids[:, 12:13], ids[:, 13:]):
            mask = torch.ones(2, one.get_seq_length() + piece.shape[1])
            mask[1, :4] = 0
            want = llama.model(input_ids=piece, attention_mask=mask, **named(one)).last_hidden_state
            assert torch.equal(llama.model(piece, mask, None, two).last_hidden_state, want)
        embeds = llama.model.embed_tokens(ids[:, :1])
        want = llama(ids[:, :1], **named(one)).logits
        assert torch.equal(llama(inputs_embeds=embeds, **named(two)).logits, want)
        assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("policy", POLICIES)
def test_recycled_cache_stands_in_for_eager_attention(policy):
    model, settings = decoder(attn_implementation="eager"), dict(budget=8, stride=4, policy=policy)
    ids, real, pieces = tokens(2, 24), real_of(24), [12] + [1] * 12
    with RecycledCache(model, **settings) as cache:
        # eager's softmax is one of float32: measured 2e-7
        compare(model, ids, pieces, cache, Oracle(model, **settings), bound=1e-6)
        assert model.config._attn_implementation == "eager"
    model = decoder(attn_implementation="eager", dtype=torch.float32)
    with RecycledCache(model, budget=24, policy=policy) as cache:
        got = drive(model, ids, pieces, cache, real)
    assert_close(got, drive(model, ids, pieces, DynamicCache(), real), real, bound=1e-5)  # measured 1e-6


def test_recycled_cache_sees_through_adapters():
    peft = pytest.importorskip("peft", reason="peft, of the train extra, is not installed")
    model, ids, settings = decoder(), tokens(2, 24), dict(budget=8, stride=4)
    with RecycledCache(model, **settings) as cache:
        plain = drive(model, ids, [12] + [1] * 12, cache)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)).double().eval()
    with RecycledCache(adapted, **settings) as cache:
        assert_close(drive(adapted, ids, [12] + [1] * 12, cache), plain)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        cache.reset()
        changed = drive(adapted, ids, [12] + [1] * 12, cache)
        assert gap(changed, plain) > 0.1
    merged = adapted.merge_and_unload()
    with RecycledCache(merged, **settings) as cache:
        assert_close(drive(merged, ids, [12] + [1] * 12, cache), changed)


def test_recycled_model_makes_the_cache_of_its_configuration(llama):
    config = RecycledConfig(base_config=llama.config.to_dict(), budget=8, stride=4, n_sink=2)
    model, ids = RecycledForCausalLM(config).double().eval(), tokens(2, 12)
    out = model.generate(ids, max_new_tokens=8, eos_token_id=None, do_sample=False, return_dict_in_generate=True)
    cache = out[CACHE]
    assert (cache.settings.budget, cache.settings.stride, cache.settings.n_sink) == (8, 4, 2)
    assert cache.full_steps == [7 // 4] * 2
    with RecycledCache(model, stride=2) as other:
        assert (other.settings.budget, other.settings.stride) == (8, 2)


def test_recycled_attention_of_another_copy_of_the_code_is_another():
    """Code that travelled with a checkpoint must not take over the attention of what is installed, nor the reverse."""
    name = attention_recycled.NAMES["sdpa"]
    ours = ALL_ATTENTION_FUNCTIONS[name]
    spec = importlib.util.spec_from_file_location("elsewhere.attention_recycled", attention_recycled.__file__)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    assert ALL_ATTENTION_FUNCTIONS[name] is ours
    assert ALL_ATTENTION_FUNCTIONS[copied.NAMES["sdpa"]].func is copied.recycled_attention


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("full_layers", [(), (1,)])
def test_recycled_attentions_have_a_place_for_each_layer(full_layers, return_dict):
    """None where a layer attended a few keys by itself."""
    model, ids = decoder(attn_implementation="eager"), tokens(1, 12)
    with RecycledCache(model, budget=4, stride=100, full_layers=full_layers) as cache, torch.no_grad():
        out = model.generate(
            ids,
            max_new_tokens=4,
            eos_token_id=None,
            output_attentions=True,
            return_dict_in_generate=True,
            **named(cache),
        )
        prompt, *steps = out.attentions
        assert [x.shape for x in prompt] == [(1, 4, 12, 12)] * 2
        assert len(steps) == 3
        assert [[x is None for x in step] for step in steps] == [[True, True]] * 3
        out = model.model(ids[:, :1], **named(cache), output_attentions=True, return_dict=return_dict)
        assert (out.attentions if return_dict else out[-1]) == (None, None)


def test_recycled_settings_of_attention_layers_are_the_models(llama):
    """What is written to the configuration of a layer's attention reaches the model's, while a cache lives too."""
    with RecycledCache(llama, budget=8):
        seen, config = llama.model.layers[0].self_attn.config, llama.config
        before = config.attention_dropout
        seen.attention_dropout = 0.25
        assert config.attention_dropout == 0.25
        config.attention_dropout = before
        assert seen.attention_dropout == before
