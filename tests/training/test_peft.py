"""LoRA on each projection of each model, alone: it acts wherever the model runs, learns, and merges."""

import copy
import json

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft_cases import CASES, IDS, SELECTED, TAIPAN, UNTIED, adapted, merged, paths, whole
from zoo import ZOO, relative, tokens

from scrubjay.modeling import selective_layer as selective

pytestmark = [
    # said of every model whose head is adapted: its weights travel with the adapter
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    # said of every tied model whose head or embedding is adapted; that it is merged correctly is tested here
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and:UserWarning"),
]
EXACT = 5e-5  # relative difference of logits between an adapter and its merged weights; 9.2e-6 was the most seen
WITHIN = {"taipan": "gate", "adore": "controller"}  # what all-linear leaves alone
MOVED = 1e-3  # what an adapter has to change at least; 3.1e-3 was the least seen


@pytest.mark.parametrize(("entry", "target"), CASES, ids=IDS)
def test_an_adapter_acts_on_every_path(entry, target):
    """Merged weights are plain weights: a path that reads a weight past its adapter gives the base model's logits."""
    base = entry.build(**UNTIED).requires_grad_(False)  # torch folds a product differently where a gradient is wanted
    model = adapted(copy.deepcopy(base), target)
    plain = merged(model)
    with torch.no_grad():
        for name, run in paths(entry).items():
            got, want, without = run(model), run(plain), run(base)
            assert relative(got, want) < EXACT, name
            assert relative(got, without) > MOVED, name
            with model.disable_adapter():
                assert torch.equal(run(model), without), name
        assert relative(paths(entry)["cached"](model), whole(model)) < EXACT


@pytest.mark.parametrize(("entry", "target"), CASES, ids=IDS)
def test_an_adapter_learns_and_nothing_else_does(entry, target):
    model = adapted(entry.build(**UNTIED), target).train()
    ids = tokens(2, 15)

    def loss():
        torch.manual_seed(2)
        return model(ids, labels=ids).loss

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = loss()
    first.backward()
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name and target in name for name in trained)
    assert all(float(p.grad.abs().max()) > 0 for p in trained.values())
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained.values()])
    with torch.no_grad():
        for parameter in trained.values():
            parameter -= 1e-2 * parameter.grad / norm
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trained)
    assert loss().item() < first.item()


def test_all_linear_takes_every_projection_and_no_gate_or_controller(entry):
    """Every matrix of the model but the embedding and the head; what a gate or controller has is in neither."""
    base = entry.build(**UNTIED)
    matrices = {name.removesuffix(".weight") for name, p in base.named_parameters() if p.ndim == 2}
    spared = ("embed_tokens", "lm_head", "gate", "controller")
    wanted = {name for name in matrices if not set(spared) & set(name.split("."))}
    model = adapted(base, "all-linear")
    assert set(model.base_model.targeted_module_names) == wanted
    assert (len(wanted) < len(matrices) - 2) == (entry.name in WITHIN)


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_is_the_same_after_saving(entry, tied, tmp_path):
    base = entry.build(tie_word_embeddings=tied)
    config = LoraConfig(target_modules=".*(proj|fc|lm_head|ch_gate_up|ch_gate_down)", r=4, init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    again = PeftModel.from_pretrained(entry.build(tie_word_embeddings=tied), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(whole(again), whole(model))
        assert relative(whole(again), whole(entry.build(tie_word_embeddings=tied))) > MOVED
        greedy = dict(max_new_tokens=4, do_sample=False, attention_mask=torch.ones(2, 5))
        assert torch.equal(again.generate(tokens(2, 5), **greedy), model.generate(tokens(2, 5), **greedy))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("together", [False, True])
def test_a_tied_weight_is_adapted_and_merged_alone(entry, target, together, tmp_path):
    """As saved too. `together`: ensure_weight_tying, by which peft gives both the same adapter."""
    base = entry.build(tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    before = base.lm_head.weight.detach().clone()
    with torch.no_grad():
        logits = whole(base)
        model = adapted(base, target, ensure_weight_tying=together)
        with model.disable_adapter():
            assert torch.equal(whole(model), logits)
        want = whole(model)
        assert relative(want, logits) > MOVED
        plain = model.merge_and_unload()
        assert relative(whole(plain), want) < EXACT
    weights = {"lm_head": plain.lm_head.weight, "embed_tokens": plain.model.embed_tokens.weight}
    for name, weight in weights.items():
        assert torch.equal(weight, before) == (name != target and not together)
    plain.save_pretrained(tmp_path)
    loaded = entry.model.from_pretrained(tmp_path)
    assert not loaded.config.tie_word_embeddings
    with torch.no_grad():
        assert torch.equal(whole(loaded), whole(plain))


def test_a_layer_that_is_no_linear_one_is_refused_by_name():
    adore = next(entry for entry in ZOO if entry.name == "adore")
    for entry, target, kind in ((TAIPAN, "gate", "Gate"), (adore, "first", "ControllerLinear")):
        with pytest.raises(ValueError, match=rf"Target module {kind}\(.*is not supported.*torch.nn.Linear"):
            adapted(entry.build(), target)


SAVED = [(entry, name) for entry in ZOO for name in ("norm", "lm_head")]
SAVED += [(entry, name) for entry in ZOO for name in ("gate", "controller") if name == WITHIN.get(entry.name)]


@pytest.mark.parametrize(("entry", "name"), SAVED, ids=[f"{entry.name}-{name}" for entry, name in SAVED])
def test_modules_to_save_train_and_act_as_copies(entry, name, tmp_path):
    """A norm in every model, Taipan's gate, ADORE's controller, the head. The language-model loss trains no controller,
    but its copy is the one that the cache asks."""
    base = entry.build(**UNTIED)
    model = adapted(copy.deepcopy(base), "all-linear", modules_to_save=[name], init_lora_weights=True)
    run = paths(entry)["cached" if entry.recurrent else "small cache"]
    with torch.no_grad():
        unchanged = run(model)
        assert relative(unchanged, run(base)) < EXACT
        copies = [p.requires_grad_(False) for full, p in model.named_parameters() if "modules_to_save" in full]
        torch.manual_seed(3)
        for p in copies:
            p.add_(torch.randn_like(p) * (1.0 if name in ("gate", "controller") else 0.1))
        got = run(model)
        assert relative(got, unchanged) > MOVED
        with model.disable_adapter():
            assert relative(run(model), unchanged) < EXACT
        assert relative(run(merged(model)), got) < EXACT
    if name != "controller":
        for p in copies:
            p.requires_grad_(True)
        ids = tokens(2, 15)
        model.train()(ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in copies)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = run(PeftModel.from_pretrained(base, tmp_path).eval())
    assert torch.equal(again, got)


def test_the_copy_of_a_gate_is_read_where_norm_and_gate_are_one_pass(monkeypatch):
    """As on a GPU: the layer then hands the gate's weights to a function instead of calling the gate."""
    model = adapted(TAIPAN.build(), "all-linear", modules_to_save=["gate"])
    with torch.no_grad():
        unchanged = whole(model)
        for name, p in model.named_parameters():
            if "modules_to_save" in name and p.ndim == 2:
                p.mul_(-3.0)
        got = whole(model)
        assert relative(got, unchanged) > MOVED
        monkeypatch.setattr(selective, "in_one_pass", lambda *operands: True)
        assert torch.equal(whole(model), got)
        with model.disable_adapter():
            assert torch.equal(whole(model), whole(TAIPAN.build().requires_grad_(False)))


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # said of every norm that is not torch's own
@pytest.mark.parametrize("one_pass", [False, True])
def test_a_norm_that_is_tuned_is_read_through_its_adapter(one_pass, monkeypatch):
    model = get_peft_model(TAIPAN.build(), LNTuningConfig(target_modules=["attn.norm"])).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.mul_(-3.0)
        want = whole(merged(model))
        assert relative(want, whole(TAIPAN.build())) > MOVED
        if one_pass:
            monkeypatch.setattr(selective, "in_one_pass", lambda *operands: True)
        assert relative(whole(model), want) < EXACT


def two_adapters(entry):
    """A model with the adapters "default" and "other"."""
    model = adapted(entry.build(**UNTIED).requires_grad_(False), "all-linear")
    model.add_adapter("other", LoraConfig(target_modules="all-linear", r=2, lora_alpha=16, init_lora_weights=False))
    return model


@pytest.mark.parametrize("entry", [*ZOO, SELECTED], ids=lambda entry: entry.name)
def test_rows_with_adapters_of_their_own_are_as_alone(entry):
    """peft tells rows by the first axis of what a projection is given: a layer that gathers tokens mixes them up."""
    model, names = two_adapters(entry), ["default", "other", "__base__"]

    def each(ids):
        for name in names:
            if name == "__base__":
                with model.disable_adapter():
                    yield model(ids).logits
            else:
                model.set_adapter(name)
                yield model(ids).logits

    with torch.no_grad():
        for length, seed in [(length, seed) for length in (1, 2, 3, 12) for seed in range(8)]:
            ids = tokens(3, length, seed=seed)
            alone = torch.stack([logits[row] for row, logits in enumerate(each(ids))])
            model.set_adapter("default")
            got = model(input_ids=ids, adapter_names=names)
            assert relative(got.logits, alone) < 3e-4  # 6.2e-5 was the most seen; another row's adapter is off by 1e-2
            assert relative(got.logits, model(ids).logits) > 1e-2
        settings = dict(attention_mask=torch.ones(3, 12), max_new_tokens=6, do_sample=False, eos_token_id=None)
        text = model.generate(input_ids=ids, adapter_names=names, **settings)
        settings["attention_mask"] = torch.ones(1, 12)
        assert torch.equal(text[:1], model.generate(input_ids=ids[:1], **settings))
        model.set_adapter("other")
        assert torch.equal(text[1:2], model.generate(input_ids=ids[1:2], **settings))


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied after merging:UserWarning")
@pytest.mark.parametrize("how", [{"trainable_token_indices": [1, 2, 3]}, {"modules_to_save": ["lm_head"]}])
def test_what_trains_of_a_tied_weight_is_merged_and_stays(entry, how, tmp_path):
    """The embedding's rows are the head's, too; a head that is trained has its own weight from then on."""
    config = LoraConfig(target_modules="all-linear", r=4, lora_alpha=8, init_lora_weights=False, **how)
    model = get_peft_model(entry.build(tie_word_embeddings=True), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name or "modules_to_save" in name:
                parameter += 0.1 * torch.randn_like(parameter)
        got = whole(model)
        base = model.merge_and_unload()
        assert relative(whole(base), got) < EXACT
        assert base.config.tie_word_embeddings == ("modules_to_save" not in how)
        base.tie_weights()
        assert relative(whole(base), got) < EXACT
        base.save_pretrained(tmp_path)
        assert relative(whole(entry.model.from_pretrained(tmp_path).eval()), got) < EXACT


@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning")
def test_a_prompt_is_tuned_with_the_sizes_of_the_configuration(entry):
    model = get_peft_model(entry.build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    ids = tokens(2, 10)
    with torch.no_grad():
        text = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits
    assert torch.equal(logits[:, -7:-1].argmax(-1), text[:, 10:])
    loss = model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    loss.backward()
    (prompt,) = [p for p in model.parameters() if p.requires_grad]
    assert float(prompt.grad.abs().max()) > 0


def test_a_controller_is_set_through_an_adapter():
    entry = next(entry for entry in ZOO if entry.name == "adore")
    model = adapted(entry.build(), "all-linear", modules_to_save=["controller"])
    other = entry.build(seed=5).controller
    model.get_base_model().set_controller(other)
    assert all(torch.equal(a, b) for a, b in zip(model.controller.parameters(), other.parameters(), strict=True))
    assert type(model.controller) is type(other)
    with model.disable_adapter():  # the original is as it was
        original = list(model.controller.parameters())
        assert not any(torch.equal(a, b) for a, b in zip(original, other.parameters(), strict=True))
