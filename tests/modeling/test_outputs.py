"""What a call returns: as a tuple or by name, as the call or the configuration asks; and what hangs on the graph."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from zoo import ZOO, tokens

OWN = {False: "configuration", True: "argument"}
DECODERS = [entry for entry in ZOO if not entry.recurrent]


def asked(model, name, value, by_argument):
    """Arguments of a call that asks for `name`, or none, where the configuration asks."""
    if by_argument:
        return {name: value}
    setattr(model.config, name, value)
    return {}


@pytest.mark.parametrize("by_argument", OWN, ids=OWN.get)
def test_a_tuple_holds_what_the_output_holds_by_name(entry, by_argument):
    model, ids = entry.build(), tokens(2, 12)
    with torch.no_grad():
        want = model(ids, labels=ids, output_hidden_states=True)
        base = model.model(ids)
        arguments = asked(model, "return_dict", False, by_argument)
        got = model(ids, labels=ids, output_hidden_states=True, **arguments)
        assert type(got) is tuple
        assert torch.equal(got[0], want.loss)
        assert torch.equal(got[1], want.logits)
        assert got[2].get_seq_length() == 12
        assert all(torch.equal(a, b) for a, b in zip(got[3], want.hidden_states, strict=True))
        got = model.model(ids, **arguments)
        assert type(got) is tuple
        assert torch.equal(got[0], base.last_hidden_state)
        assert len(got) == len(base.to_tuple())


def test_generation_does_not_heed_that_calls_return_tuples(entry):
    model, ids, mask = entry.build(), tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **options)
    model.config.return_dict = False
    assert torch.equal(model.generate(ids, **options), want)


def test_a_training_step_returns_a_tuple(entry):
    model, ids = entry.build().train(), tokens(2, 12)
    torch.manual_seed(0)
    want = model(ids, labels=ids).loss
    model.config.return_dict = False
    torch.manual_seed(0)
    got = model(ids, labels=ids)[0]
    assert torch.equal(got, want)
    got.backward()
    assert model.model.embed_tokens.weight.grad.abs().max() > 0


def stock(model, **options):
    """transformers' own model with the same weights."""
    other = AutoModelForCausalLM.from_config(model.config.base_config, **options).eval()
    own = {name: weight for name, weight in model.state_dict().items() if "controller" not in name}
    other.load_state_dict(own)
    return other


@pytest.mark.parametrize("by_argument", OWN, ids=OWN.get)
@pytest.mark.parametrize("kind", DECODERS, ids=lambda entry: entry.name)
def test_states_and_probabilities_are_the_decoders_own(kind, by_argument):
    model, ids = kind.build(), tokens(2, 12)
    model.set_attn_implementation("eager")
    other = stock(model, attn_implementation="eager")
    with torch.no_grad():
        want = other(ids, output_hidden_states=True, output_attentions=True)
        arguments = asked(model, "output_hidden_states", True, by_argument)
        arguments |= asked(model, "output_attentions", True, by_argument)
        got = model(ids, **arguments)
    for name in ("hidden_states", "attentions"):
        assert len(got[name]) == len(want[name]) == 2 + (name == "hidden_states")
        assert all(torch.equal(a, b) for a, b in zip(got[name], want[name], strict=True))


@pytest.mark.parametrize("kind", DECODERS, ids=lambda entry: entry.name)
def test_probabilities_that_sdpa_does_not_give_are_refused_as_in_transformers(kind):
    model, ids = kind.build(), tokens(1, 5)
    with pytest.raises(ValueError, match="not supported when using the `attn_implementation` set to sdpa"):
        model.config.output_attentions = True
    with torch.no_grad():
        assert not model(ids, output_attentions=True).attentions  # of which transformers warns once


def test_a_configuration_cannot_ask_for_probabilities_where_there_are_none(recurrent):
    model, ids = recurrent.build(), tokens(1, 5)
    model.config.output_attentions = True
    with pytest.raises(ValueError, match=r"output_attentions=True.*and in the configuration"):
        model(ids)
    with torch.no_grad():
        assert model(ids, output_attentions=False).attentions is None


def test_an_argument_goes_before_the_configuration(entry):
    model, ids = entry.build(), tokens(1, 5)
    model.config.output_hidden_states = True
    with torch.no_grad():
        assert len(model(ids).hidden_states) == model.config.num_hidden_layers + 1
        assert model(ids, output_hidden_states=False).hidden_states is None


def plain():
    ids = tokens(2, 12)
    return {"input_ids": ids, "labels": ids}


def padded():
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, 9:] = mask[1, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 4] = -100  # the column before it is padding, of which nothing is asked
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed():
    ids, starts = tokens(1, 24), torch.cat([torch.arange(9), torch.arange(4), torch.arange(11)])[None]
    return {"input_ids": ids, "position_ids": starts, "labels": ids.masked_fill(starts == 0, -100)}


@pytest.mark.parametrize("batch", [plain, padded, packed], ids=lambda batch: batch.__name__)
def test_gradients_reach_the_states_that_are_returned(recurrent, batch):
    """Against central differences of the loss when a layer's input is scaled, whose error is 1e-9 here."""
    model, inputs = recurrent.build(torch.float64), batch()
    out = model(**inputs, output_hidden_states=True)
    for states in out.hidden_states:
        states.retain_grad()
    out.loss.backward()
    for layer, states in zip(model.model.layers, out.hidden_states, strict=False):
        ends, step = [], 1e-5
        for factor in (1 + step, 1 - step):
            hook = layer.register_forward_pre_hook(lambda _, args, factor=factor: (args[0] * factor, *args[1:]))
            with torch.no_grad():
                ends.append(model(**inputs).loss)
            hook.remove()
        want = (ends[0] - ends[1]) / (2 * step)
        assert abs(want) > 1e-5
        assert abs((states.grad * states).sum() - want) < 1e-7
        if "attention_mask" in inputs:
            assert not states.grad[inputs["attention_mask"] == 0].any()
    last = out.hidden_states[-1].detach().requires_grad_()
    model.loss_function(model.lm_head(last), inputs["labels"], 97).backward()
    assert torch.allclose(out.hidden_states[-1].grad, last.grad, rtol=1e-12, atol=1e-14)
