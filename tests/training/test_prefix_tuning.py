"""Keys that peft trains in front of a text: transformers' cache holds them, and a recurrent state cannot read them."""

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from recycled_cases import decoder
from zoo import ZOO, tokens

from scrubjay import AdoreCache, RecycledCache
from scrubjay.modeling.inputs.cache_argument import named

DECODERS = [entry for entry in ZOO if not entry.recurrent]
# peft turns a tensor that has a gradient into a number, and drops the positions that generate() makes
pytestmark = [
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning"),
]


def tuned(model, kind=PrefixTuningConfig):
    return get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=4))


def generated(model, ids):
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


@pytest.mark.parametrize("kind", DECODERS, ids=lambda entry: entry.name)
def test_prefixes_are_trained_and_heeded_in_generation(kind):
    """The caches of the zoo, small enough here to lose some keys, stand back: every key is attended, as in training."""
    small = {"cache_size": 8, "label_k": 4} if kind.name == "adore" else {"budget": 8}
    model, ids = tuned(kind.build(**small)).eval(), tokens(2, 10)
    with torch.no_grad():
        for prefix in (parameter for parameter in model.parameters() if parameter.requires_grad):
            prefix.mul_(20)
        text = generated(model, ids)
        logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits
        assert torch.equal(logits[:, -7:-1].argmax(-1), text[:, 10:])
        assert not torch.equal(generated(model.get_base_model(), ids), text)
    model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    (prefix,) = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert prefix.grad.abs().max() > 0


def test_prefixes_are_refused_by_a_recurrent_state_and_the_way_out_works(recurrent):
    model, ids = tuned(recurrent.build()), tokens(2, 10)
    for call in (
        lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids),
        lambda: generated(model, ids),
    ):
        with pytest.raises(ValueError, match="tune a prompt, or use LoRA"):
            call()
    model = tuned(recurrent.build(), PromptTuningConfig)
    assert generated(model, ids).shape == (2, 16)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()


@pytest.mark.parametrize("kind", DECODERS, ids=lambda entry: entry.name)
def test_a_cache_beside_the_one_that_prefixes_bring_is_refused(kind):
    model = kind.build()
    peft, ids = tuned(model).eval(), tokens(2, 10)
    with pytest.raises(ValueError, match=r"Prefix tuning brings a cache of its own"):
        peft.generate(input_ids=ids, max_new_tokens=2, **named(model.cache_class(model)))
    with pytest.raises(ValueError, match="Prefix tuning brings one of its own"):
        peft(input_ids=ids, attention_mask=torch.ones_like(ids), cache=model.cache_class(model))


# transformers', of two caches, of which peft brings one by the old name
@pytest.mark.filterwarnings("ignore:Both `past_key_values` and `cache` are set:FutureWarning")
@pytest.mark.parametrize("make", [lambda m: RecycledCache(m, budget=8), lambda m: AdoreCache(m, cache_size=8)])
def test_a_cache_attached_to_a_decoder_refuses_prefixes(make):
    model, ids = decoder(), tokens(2, 10) % 60
    peft = tuned(model).double().eval()
    with pytest.raises(ValueError, match=r"Prefix tuning brings a cache of its own"):
        make(peft)
    with make(model) as cache:
        with pytest.raises(ValueError, match=r"Prefix tuning brings a cache of its own"):
            peft.generate(input_ids=ids, max_new_tokens=2, **named(cache))
        assert cache.get_seq_length() == 0
        assert model.generate(ids, max_new_tokens=2, eos_token_id=None, **named(cache)).shape == (2, 12)
