"""Conversion of Mamba-2 checkpoints with attention layers and MLPs: logits against a float64 recurrence, bits there and
back, what other layouts refuse."""

import json

import pytest
import torch
from conversion_cases import BOUND, assert_same, load_whole, prompt, stored
from hybrid_cases import ATTENTION, HYBRIDS, hybrid, judge
from test_conversion import LAYOUTS, configuration, far, logits

from scrubjay import SSDConfig, SSDForCausalLM
from scrubjay.conversion import convert as conversion
from scrubjay.conversion.convert import convert, own_shapes
from scrubjay.conversion.keymap import plan_in, plan_out
from scrubjay.examples.benchmarks.published_layouts import MAMBA2ATTN_2B7, mamba2_shapes, mamba_ssm_config

SSD = LAYOUTS["mamba_ssm"]


@pytest.fixture(params=HYBRIDS)
def case(request, tmp_path):
    """Its name, the authors' folder, its tensors."""
    return request.param, tmp_path / "source", hybrid(request.param, tmp_path / "source")


def test_from_pretrained_reads_the_authors_folder_as_it_is(case):
    name, source, tensors = case
    model, ids = load_whole(source), prompt(tensors)
    want = judge(source, ids)
    assert float(want.abs().max()) > 1
    assert far(logits(model, ids), want) < BOUND
    assert model.config.attn_layer_idx == HYBRIDS[name].get("A", [])


def test_a_converted_hybrid_gives_the_logits_of_the_recurrence(case, tmp_path):
    _, source, tensors = case
    report = convert(source, tmp_path / "new", check=True)
    ids = prompt(tensors)
    assert far(logits(load_whole(tmp_path / "new"), ids), judge(source, ids)) < BOUND
    (measured,) = report.check["max_logit_difference"].values()
    assert 0 < measured < report.check["bound"]
    assert report.check["config_differences"] == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HYBRIDS)
def test_there_and_back_changes_no_bit(name, dtype, tmp_path):
    tensors = hybrid(name, tmp_path / "source", dtype)
    convert(tmp_path / "source", tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "back", to="mamba_ssm", check=True)
    assert_same(stored(tmp_path / "back"), tensors)
    assert configuration(tmp_path / "source", SSD) == configuration(tmp_path / "back", SSD)
    assert list(report.check["max_logit_difference"]) == [
        "this library's model on the result",
        "another implementation of mamba_ssm on the result",
    ]
    ids = prompt(tensors)
    assert far(judge(tmp_path / "back", ids), judge(tmp_path / "source", ids)) == 0


def test_a_cast_is_checked_and_spares_what_the_model_keeps_in_float32(tmp_path):
    hybrid("attention and MLP", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "new", dtype=torch.bfloat16, check=True)
    for name, tensor in stored(tmp_path / "new").items():
        kept = name.endswith(("A_log", ".D", "dt_bias"))
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name


def test_what_is_written_for_the_authors_code_leaves_nothing_to_its_defaults(tmp_path):
    """Which are others than ours: without a word there are biases, no convolution, no positions and no causality."""
    hybrid("attention and MLP", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="mamba_ssm")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["attn_layer_idx"] == [1, 3]
    assert written["d_intermediate"] == 100
    more = dict(num_heads_kv=3, mlp_dim=0, softmax_scale=None, rotary_emb_base=10000.0, rotary_emb_interleaved=False)
    assert written["attn_cfg"] == ATTENTION | more


def test_published_sizes_map_whole_in_both_directions():
    """mamba2attn-2.7b: names and shapes of the published file, without its values."""
    shapes = mamba2_shapes("embedding", MAMBA2ATTN_2B7, head=True)
    theirs = mamba_ssm_config(MAMBA2ATTN_2B7, unpadded=50277)
    assert SSD.recognises(theirs, shapes)
    config, notes = SSD.read_config(theirs, shapes, {})
    assert "agrees" in notes[0]
    with torch.device("meta"):
        model = SSDForCausalLM(config)
    assert model.model.layers[9].mixer.in_proj.out_features == 11520
    assert model.num_parameters() == 2_697_590_880
    ours = own_shapes(model)
    plan = plan_in(SSD.rows(config), shapes, ours)
    assert plan.shapes == ours
    assert plan.used | {copy for copy, _ in plan.copies} == shapes.keys()
    assert plan_out(SSD.rows(config), ours).shapes == shapes
    again, _ = SSD.read_config(SSD.write_config(config), shapes, {})
    assert again.to_diff_dict() == config.to_diff_dict() == SSDConfig.published("2.7b-hybrid").to_diff_dict()


def exchanged(tensors, one, other):
    """The tensors, two of which, or two parts of one, have changed places."""
    if other in tensors:
        return tensors | {one: tensors[other], other: tensors[one]}
    size, first = other
    parts = list(tensors[one].split(size))
    parts[first], parts[first + 1] = parts[first + 1], parts[first]
    return tensors | {one: torch.cat(parts)}


LAYER = "backbone.layers.1."
EXCHANGES = {
    "norms": ("attention and MLP", f"{LAYER}norm.weight", f"{LAYER}norm2.weight"),
    "layers": ("attention and MLP", f"{LAYER}mixer.conv1d.bias", "backbone.layers.3.mixer.conv1d.bias"),
    "q and k": ("attention", f"{LAYER}mixer.in_proj.weight", (48, 0)),
    "k and v": ("attention", f"{LAYER}mixer.in_proj.weight", (48, 1)),
    "halves of fc1": ("MLP", f"{LAYER}mlp.fc1.weight", (128, 0)),
}


@pytest.mark.parametrize("what", EXCHANGES)
def test_two_tensors_that_change_places_would_be_found(what, tmp_path):
    """Where shapes are equal, the recurrence alone tells an exchange."""
    name, one, other = EXCHANGES[what]
    tensors = hybrid(name, tmp_path / "source")
    hybrid(name, tmp_path / "other")
    torch.save(exchanged(tensors, one, other), tmp_path / "other" / "pytorch_model.bin")
    ids = prompt(tensors)
    assert far(logits(load_whole(tmp_path / "source"), ids), judge(tmp_path / "other", ids)) > 100 * BOUND


def test_the_check_sees_an_exchange(tmp_path, monkeypatch):
    hybrid("attention and MLP", tmp_path / "source")

    def planned(rows, theirs, ours):
        plan = plan_in(rows, theirs, ours)
        a, b = "model.layers.1.norm.weight", "model.layers.1.norm2.weight"
        plan.recipes[a], plan.recipes[b] = plan.recipes[b], plan.recipes[a]
        return plan

    monkeypatch.setattr(conversion, "plan_in", planned)
    with pytest.raises(ValueError, match="The check failed: logits differ"):
        convert(tmp_path / "source", tmp_path / "new", check=True)


@pytest.mark.parametrize("to", ["transformers", "fla", "codestral"])
@pytest.mark.parametrize("straight", [True, False], ids=["straight", "by way of ours"])
@pytest.mark.parametrize("name", ["attention", "attention and MLP", "MLP"])
def test_layouts_of_mamba2_alone_refuse_a_hybrid(name, straight, to, tmp_path):
    hybrid(name, tmp_path / "source")
    if not straight:
        convert(tmp_path / "source", tmp_path / "ours")
    why = {"A": r"attn_layer_idx is \[1.*\], its Mamba-2 has no attention layers"}
    why |= {"F": "intermediate_size is 1.., its Mamba-2 has no MLPs"}
    match = f"{to} cannot express this model: .*" + ".*".join(w for key, w in why.items() if HYBRIDS[name].get(key))
    with pytest.raises(ValueError, match=match):
        convert(tmp_path / ("source" if straight else "ours"), tmp_path / "new", to=to)
    assert not (tmp_path / "new").exists()


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["attn_cfg"] |= changes.pop("attn_cfg", {})
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"attn_layer_idx": []}, r"attn_layer_idx \[\], the tensors say \[1, 3\]"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx \[1\], the tensors say \[1, 3\]"),
        ({"attn_layer_idx": [1, 3, 9]}, r"attn_layer_idx \[1, 3, 9\], the tensors say \[1, 3\]"),
        ({"d_intermediate": 0}, "d_intermediate 0, which makes MLPs of 0, the tensors say 128"),
        ({"d_intermediate": 200}, "d_intermediate 200, which makes MLPs of 256, the tensors say 128"),
        ({"attn_cfg": {"num_heads": 4}}, "num_heads 4, num_heads_kv 4, .* rows of in_proj 192, the tensors say 144"),
        ({"attn_cfg": {"head_dim": 8}}, "head_dim 8 .* columns of out_proj 24, the tensors say 48"),
        ({"attn_cfg": {"mlp_dim": 8}}, "mlp_dim 8, which make rows of in_proj 400, the tensors say 144"),
        ({"attn_cfg": {"d_conv": 3}}, "attn_cfg d_conv 3, the tensors say 4"),
    ],
    ids=str,
)
def test_a_configuration_that_contradicts_the_tensors_is_said_with_both_values(tmp_path, changes, match):
    hybrid("attention and MLP", tmp_path / "source")
    configure(tmp_path / "source", **changes)
    with pytest.raises(ValueError, match=f"contradicts the tensors: .*{match}"):
        convert(tmp_path / "source", tmp_path / "new")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"attn_cfg": {"causal": False}}, "causal is False"),
        ({"attn_cfg": {"sparse": 3}}, "unknown meaning: sparse"),
        ({"attn_cfg": {"rotary_emb_dim": 18}}, "rotary_emb_dim must be even and at most head_dim = 16; got 18"),
        ({"ssm_cfg": {}}, "ssm_cfg.layer is 'Mamba1'"),
    ],
    ids=str,
)
def test_attention_that_this_model_does_not_compute_is_refused(tmp_path, changes, match):
    hybrid("attention", tmp_path / "source")
    configure(tmp_path / "source", **changes)
    with pytest.raises(ValueError, match=match):
        convert(tmp_path / "source", tmp_path / "new")
    with pytest.raises(Exception, match=match):
        SSDForCausalLM.from_pretrained(tmp_path / "source")


@pytest.mark.parametrize(("name", "match"), [("causal", "causal is False"), ("num_heads", "attn_cfg has no num_heads")])
def test_what_a_configuration_leaves_out_is_the_authors_default(tmp_path, name, match):
    hybrid("attention", tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    del config["attn_cfg"][name]
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        convert(tmp_path / "source", tmp_path / "new")


def test_an_mlp_whose_width_the_configuration_leaves_open_has_the_authors(tmp_path):
    """8/3 of the model's, which their code rounds up to 128."""
    tensors = hybrid("MLP", tmp_path / "source")
    configure(tmp_path / "source", d_intermediate=None)
    convert(tmp_path / "source", tmp_path / "new", check=True)
    config = SSDConfig.from_pretrained(tmp_path / "new")
    assert (config.intermediate_size, config.mlp_size) == (85, 128)
    assert tensors["backbone.layers.0.mlp.fc2.weight"].shape[1] == 128


def test_a_tensor_of_mamba2_that_is_missing_makes_no_attention_layer(tmp_path):
    tensors = hybrid("attention", tmp_path / "source")
    del tensors["backbone.layers.2.mixer.A_log"]
    torch.save(tensors, tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"missing: backbone.layers.2.mixer.A_log \[4\]"):
        convert(tmp_path / "source", tmp_path / "new")


def test_without_a_configuration_the_heads_have_to_be_said(tmp_path):
    tensors = hybrid("attention and MLP", tmp_path / "source")
    (tmp_path / "source" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"layers \[1, 3\] are attention layers, of whose heads .* --set 'attn_cfg="):
        convert(tmp_path / "source", tmp_path / "new")
    cfg = {"num_heads": 3, "head_dim": 16, "rotary_emb_dim": 8}
    convert(tmp_path / "source", tmp_path / "new", settings={"attn_cfg": cfg}, check=True)
    config = SSDConfig.from_pretrained(tmp_path / "new")
    assert (config.attn_layer_idx, config.intermediate_size, config.attn_cfg["d_conv"]) == ([1, 3], 128, 4)
    assert_same(
        {name: tensor for name, tensor in stored(tmp_path / "new").items() if name == "lm_head.weight"},
        {"lm_head.weight": tensors["lm_head.weight"]},
    )
