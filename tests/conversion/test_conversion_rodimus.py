"""Rodimus checkpoints of the authors and of fla: loaded as they are, converted, converted back.

Folders are written by hand in `conversion_rodimus_cases.py`; the judge of logits is the recurrence of `recurrences.py`.
"""

import dataclasses
import json
import logging

import pytest
import torch
from conversion_rodimus_cases import (
    FLA,
    OFFICIAL,
    fla_shapes,
    meaning_of_fla,
    meaning_of_official,
    write,
)
from recurrences import rodimus_logits
from safetensors.torch import load_file, save_file

from scrubjay import RodimusConfig, RodimusForCausalLM
from scrubjay.conversion import convert as conversion
from scrubjay.conversion.checkpoint import Checkpoint
from scrubjay.conversion.convert_rodimus import RODIMUS
from scrubjay.conversion.keymap import plan_in, plan_out
from scrubjay.examples.benchmarks.published_layouts import values
from scrubjay.examples.benchmarks.published_rodimus import PUBLISHED, official_shapes, repeat_head
from scrubjay.modeling.key_names import Merge

BOUND = 1e-4  # float32 against float64, of logits up to 5; measured 8.7e-6 at most
EXACT = 1e-12  # float64 against float64; measured 2.0e-14 at most
FORMATS = {layout.name: layout for layout in RODIMUS}
FLA_CASES = {
    "plus": FLA,
    "plus, tied": FLA | {"tie_word_embeddings": True},
    "plus, no convolution": FLA | {"use_short_conv": False},
    "rodimus": FLA | {"block_type": "rodimus", "ska_attn": None},
    "rodimus, tied": FLA | {"block_type": "rodimus", "ska_attn": None, "tie_word_embeddings": True},
}
WRITABLE_AS_FLA = ("rodimus", "plus", "plus, odd window")


def convert(source, destination, **options):
    return conversion.convert(source, destination, progress=False, **options)


def official(name, folder, dtype=torch.float32, **options):
    """(folder, tensors, configuration) of one of the authors' checkpoints."""
    config = OFFICIAL[name]
    tensors = values(official_shapes(config), dtype)
    tensors = repeat_head(tensors) if config["tie_word_embeddings"] else tensors
    return write(folder, config, tensors, **options), tensors, config


def fla(name, folder):
    config = FLA_CASES[name]
    tensors = values(fla_shapes(config))
    return write(folder, config, tensors), tensors, config


def tokens(batch=2, length=40):
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def loaded(folder, **options):
    """The model, of which nothing is missing and nothing left over."""
    model, info = RodimusForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


@torch.no_grad()
def far(model, meaning):
    """Largest difference from the recurrence's logits."""
    ids = tokens()
    want = rodimus_logits(*meaning, ids)
    assert 1 < want.abs().max() < 10
    return float((model(ids).logits - want).abs().max())


def fields(config):
    """Of ours, from theirs; without what says nothing of the model."""
    ours = RodimusConfig.from_dict(config).to_dict()
    return {name: ours[name] for name in ours if name not in ("dtype", "transformers_version")}


def same_tensors(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("pickled", [True, False], ids=["bin", "safetensors"])
@pytest.mark.parametrize("name", OFFICIAL)
def test_the_authors_folders_load_as_they_are(name, pickled, tmp_path):
    folder, tensors, config = official(name, tmp_path / "theirs", pickled=pickled)
    assert far(loaded(folder), meaning_of_official(tensors, config)) < BOUND


@pytest.mark.parametrize("name", FLA_CASES)
def test_flas_folders_load_as_they_are(name, tmp_path):
    folder, tensors, config = fla(name, tmp_path / "theirs")
    assert far(loaded(folder), meaning_of_fla(tensors, config)) < BOUND


def test_loading_theirs_warns_of_nothing(tmp_path, transformers_log):
    """transformers says of another model_type that it is not supported: this one is."""
    for folder, *_ in (official("plus, odd window", tmp_path / "theirs"), fla("plus", tmp_path / "fla")):
        loaded(folder)
    logging.getLogger("transformers").warning("heard")
    assert [record.message for record in transformers_log.records] == ["heard"]


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_authors_folders_convert(name, tmp_path):
    folder, tensors, config = official(name, tmp_path / "theirs", pickled=True)
    convert(folder, tmp_path / "ours")
    assert far(loaded(tmp_path / "ours"), meaning_of_official(tensors, config)) < BOUND


@pytest.mark.parametrize("name", FLA_CASES)
def test_flas_folders_convert(name, tmp_path):
    folder, tensors, config = fla(name, tmp_path / "theirs")
    convert(folder, tmp_path / "ours")
    assert far(loaded(tmp_path / "ours"), meaning_of_fla(tensors, config)) < BOUND


DEFAULTS = {
    "codefuse": (
        {"model_type": "rodimus", "d_model": 256, "n_layer": 2, "mixer_cfg": {}, "attn_cfg": {}},
        {
            "block_type": "rodimus",
            "vocab_size": 50277,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        | {"state_size": 64, "inner_size": 512, "conv_kernel": 4, "input_gate_rank": 16, "k_norm_eps": 1e-12}
        | {"rms_norm_eps": 1e-5, "scale_embedding": False, "norm_embedding": False},
    ),
    "codefuse, plus": (
        {"d_model": 256, "n_layer": 2, "block_type": "rodimus_plus", "attn_cfg": {"window_size": 8, "num_heads_v": 2}},
        {"num_attention_heads": 2, "sliding_window": 5, "rotary_dim": 128, "rope_theta": 1e4, "rope_interleaved": False}
        | {"num_value_heads": 2, "intermediate_size": 344},
    ),
    "fla": (
        {"model_type": "rodimus", "hidden_size": 256, "expand_ratio": 64, "ska_attn": {"num_heads": 4}},
        {"block_type": "rodimus_plus", "vocab_size": 126464, "tie_word_embeddings": True, "num_hidden_layers": 24}
        | {"bos_token_id": 126080, "eos_token_id": 126081, "sliding_window": 1024, "k_norm_eps": 1e-12}
        | {"state_size": 64, "inner_size": 512, "conv_kernel": 4, "input_gate_rank": 16, "intermediate_size": 344}
        | {"num_value_heads": 4, "rotary_dim": 64, "rope_theta": 1e4, "rms_norm_eps": 1e-5},
    ),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_a_configuration_leaves_out_is_its_librarys_default(name):
    """transformers of version 4 writes no field that has its default."""
    theirs, want = DEFAULTS[name]
    config = RodimusConfig.from_dict(theirs)
    assert {field: getattr(config, field) for field in want} == want


EXCHANGES = [
    ("mixer.up_proj.weight", "mixer.gate_proj.weight"),
    ("mixer.q_proj.weight", "mixer.k_proj.weight"),
    ("mixer.g_gate_proj.weight", "mixer.tau_gate_proj.weight"),
    ("mixer.g_gate_proj.bias", "mixer.tau_gate_proj.bias"),
    ("mlp.up_proj.weight", "mlp.gate_proj.weight"),
    ("ska_attn.q_proj.weight", "ska_attn.o_proj.weight"),
    ("ska_attn.v_proj.weight", "ska_attn.q_proj.weight"),
    ("ska_attn_norm.weight", "mlp_norm.weight"),
    ("mixer_norm.weight", "mlp_norm.weight"),
    ("mixer.residual_weight", "mixer.activation_norm.weight"),
    ("mixer.short_conv.bias", "mixer.i_gate_proj.1.bias"),
]


@pytest.mark.parametrize(("one", "other"), EXCHANGES)
def test_two_tensors_that_change_places_would_be_found(one, other, tmp_path):
    """Where shapes are equal, the recurrence alone tells an exchange."""
    folder, tensors, config = fla("plus", tmp_path / "theirs")
    a, b = f"model.layers.1.{one}", f"model.layers.1.{other}"
    exchanged = tensors | {a: tensors[b], b: tensors[a]}
    assert far(loaded(folder), meaning_of_fla(exchanged, config)) > 100 * BOUND


def test_the_parts_of_the_authors_tensors_are_flas(tmp_path):
    """Which half goes where, and every name and shape of the folder that is written."""
    folder, theirs, _ = official("plus, odd window", tmp_path / "theirs")
    convert(folder, tmp_path / "fla", to="fla")
    got = load_file(tmp_path / "fla" / "model.safetensors")
    n, m, f = 64, 96, 64
    halves = {
        "mixer.fc.weight": (m, "mixer.up_proj.weight", "mixer.gate_proj.weight"),
        "mixer.inner_mixer.in_proj.weight": (n, "mixer.q_proj.weight", "mixer.k_proj.weight"),
        "mixer.inner_mixer.mem_gate_proj.weight": (n, "mixer.g_gate_proj.weight", "mixer.tau_gate_proj.weight"),
        "mixer.inner_mixer.mem_gate_proj.bias": (n, "mixer.g_gate_proj.bias", "mixer.tau_gate_proj.bias"),
        "ffn.fc.weight": (f, "mlp.up_proj.weight", "mlp.gate_proj.weight"),
    }
    whole = {
        "mixer_norm.weight": "mixer_norm.weight",
        "mixer.act_norm.weight": "mixer.activation_norm.weight",
        "mixer.out_proj.weight": "mixer.down_proj.weight",
        "mixer.inner_mixer.short_conv.conv1d.weight": "mixer.short_conv.weight",
        "mixer.inner_mixer.short_conv.conv1d.bias": "mixer.short_conv.bias",
        "mixer.inner_mixer.residual_weight": "mixer.residual_weight",
        "mixer.inner_mixer.ch_gate_proj.0.weight": "mixer.i_gate_proj.0.weight",
        "mixer.inner_mixer.ch_gate_proj.1.weight": "mixer.i_gate_proj.1.weight",
        "mixer.inner_mixer.ch_gate_proj.1.bias": "mixer.i_gate_proj.1.bias",
        "attn_norm.weight": "ska_attn_norm.weight",
        "attn.q_proj.weight": "ska_attn.q_proj.weight",
        "attn.k_proj.weight": "ska_attn.k_proj.weight",
        "attn.v_proj.weight": "ska_attn.v_proj.weight",
        "attn.out_proj.weight": "ska_attn.o_proj.weight",
        "ffn_norm.weight": "mlp_norm.weight",
        "ffn.out_proj.weight": "mlp.down_proj.weight",
    }
    want = {name: theirs[name] for name in ("model.embeddings.weight", "lm_head.weight")}
    want["model.norm.weight"] = theirs["model.norm_f.weight"]
    for layer in ("model.layers.0.", "model.layers.1."):
        want |= {layer + name: theirs[layer + old] for old, name in whole.items()}
        for old, (length, first, second) in halves.items():
            assert theirs[layer + old].shape[0] == 2 * length
            want |= {layer + first: theirs[layer + old][:length], layer + second: theirs[layer + old][length:]}
    same_tensors(got, want)
    written = json.loads((tmp_path / "fla" / "config.json").read_text())
    assert {name: tuple(x.shape) for name, x in got.items()} == fla_shapes(written | {"hidden_ratio": 4 / 3})
    assert written["ska_attn"] == {
        "num_heads": 4,
        "window_size": 6,
        "rope_theta": 10000.0,
        "qkv_bias": False,
        "qk_norm": False,
    }
    assert (written["expand_ratio"], written["block_residual_in_fp32"], written["attn_mode"]) == (64, True, "chunk")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", OFFICIAL)
def test_the_authors_tensors_come_back_bit_by_bit(name, dtype, tmp_path):
    folder, tensors, config = official(name, tmp_path / "theirs", dtype)
    convert(folder, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="codefuse")
    same_tensors(load_file(tmp_path / "back" / "model.safetensors"), tensors)
    again = json.loads((tmp_path / "back" / "config.json").read_text())
    assert fields(again) == fields(config)
    if name in WRITABLE_AS_FLA:
        convert(folder, tmp_path / "fla", to="fla")
        convert(tmp_path / "fla", tmp_path / "and back", to="codefuse")
        same_tensors(load_file(tmp_path / "and back" / "model.safetensors"), tensors)


@pytest.mark.parametrize("name", FLA_CASES)
def test_flas_tensors_come_back_bit_by_bit(name, tmp_path):
    folder, tensors, config = fla(name, tmp_path / "theirs")
    middles = (("ours", None), ("authors", "codefuse")) if config["use_short_conv"] else (("ours", None),)
    for middle, to in middles:
        convert(folder, tmp_path / middle, to=to)
        convert(tmp_path / middle, tmp_path / f"back from {middle}", to="fla")
        same_tensors(load_file(tmp_path / f"back from {middle}" / "model.safetensors"), tensors)
        again = json.loads((tmp_path / f"back from {middle}" / "config.json").read_text())
        unset = {"fuse_cross_entropy", "fuse_norm", "hidden_act", "hidden_ratio", "torch_dtype"}
        want = {key: config[key] for key in config if key not in unset} | {"intermediate_size": 64}
        assert {key: again.get(key, "absent") for key in want} == want


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_fit(name):
    """Every name and shape, and the numbers of parameters, on the meta device."""
    config, has_head, parameters, in_file = PUBLISHED[name]
    shapes = official_shapes(config, head=has_head)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == in_file
    layout = FORMATS["codefuse"]
    assert layout.recognises(config, shapes)
    ours, _ = layout.read_config(config, shapes, {})
    with torch.device("meta"):
        model = RodimusForCausalLM(ours)
    own = conversion.own_shapes(model)
    assert sum(torch.Size(shape).numel() for shape in own.values()) == parameters
    plan = plan_in(layout.rows(ours), shapes, own)
    assert (plan.used | set(plan.left_out), set(plan.recipes)) == (set(shapes), set(own))
    window = config["attn_cfg"]["window_size"]
    assert ours.sliding_window == (2049 if window == 4096 or not ours.has_attention else window // 2 + 1)
    back = plan_out(layout.rows(ours), own)
    assert back.shapes == official_shapes(config, head=True)
    written = layout.write_config(ours)
    assert {key: written["mixer_cfg"][key] for key in config["mixer_cfg"]} == config["mixer_cfg"]
    if ours.has_attention:
        turned = {"rotary_emb_dim": 128}  # all of a head, which the authors write as -1
        kept = {key: value for key, value in config["attn_cfg"].items() if key != "softmax_scale"}
        assert written["attn_cfg"] == kept | turned
    parts = plan_out(FORMATS["fla"].rows(ours), own).shapes
    assert parts == fla_shapes(FORMATS["fla"].write_config(ours) | {"hidden_ratio": 4 / 3})


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_reference_of_the_check_is_the_recurrence_of_the_authors_names(name, tmp_path):
    folder, tensors, config = official(name, tmp_path / "theirs")
    ids = tokens()
    want = rodimus_logits(*meaning_of_official(tensors, config), ids)
    got = FORMATS["codefuse"].reference(Checkpoint(folder), ids, {})
    assert (got - want).abs().max() < EXACT


@pytest.mark.parametrize("name", FLA_CASES)
def test_the_reference_of_the_check_is_the_recurrence_of_flas_names(name, tmp_path):
    folder, tensors, config = fla(name, tmp_path / "theirs")
    ids = tokens()
    want = rodimus_logits(*meaning_of_fla(tensors, config), ids)
    assert (FORMATS["fla"].reference(Checkpoint(folder), ids, {}) - want).abs().max() < EXACT


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("to", [None, "fla"])
def test_the_check_measures_both_ways(to, dtype, tmp_path):
    """Also where tensors are rounded on the way; the gates' bias is not."""
    folder, tensors, _ = official("plus", tmp_path / "theirs", pickled=True)
    report = convert(folder, tmp_path / "new", to=to, check=True, dtype=dtype)
    differences = report.check["max_logit_difference"]
    assert len(differences) == (1 if to is None else 2)
    assert all(0 < x < BOUND for name, x in differences.items() if "this library's" in name)
    bias = "model.layers.0.mixer." + ("mem_gate_bias" if to is None else "g_gate_proj.bias")
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert written[bias].dtype == torch.float32
    kept = tensors["model.layers.0.mixer.inner_mixer.mem_gate_proj.bias"]
    assert torch.equal(written[bias], kept if to is None else kept[:64])
    assert written["model.embed_tokens.weight" if to is None else "model.embeddings.weight"].dtype == (
        dtype or torch.float32
    )


SETTINGS = {
    "sliding_window": 3,
    "k_norm_eps": 5.0,
    "rms_norm_eps": 0.1,
    "rope_theta": 50.0,
    "rotary_dim": 4,
    "rope_interleaved": True,
    "scale_embedding": True,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("theirs", ["codefuse", "fla"])
def test_the_check_knows_of_settings(theirs, name, tmp_path):
    """Each of which changes the logits."""
    write_one, config = (official, "plus") if theirs == "codefuse" else (fla, "plus, tied")
    folder, _, _ = write_one(config, tmp_path / "theirs")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embeddings.weight"].flip(0).contiguous()
    if name == "tie_word_embeddings":
        save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    report = convert(folder, tmp_path / "ours", settings={name: SETTINGS[name]}, check=True)
    assert 0 < max(report.check["max_logit_difference"].values()) < BOUND
    config = RodimusConfig.from_pretrained(folder)
    assert getattr(config, name) != SETTINGS[name]
    unset = FORMATS[theirs].reference(Checkpoint(folder), tokens(), {})
    with torch.no_grad():
        assert (loaded(tmp_path / "ours")(tokens()).logits - unset).abs().max() > 100 * BOUND


@pytest.mark.parametrize("ours", ["mixer.fc", "mixer.in_proj", "mixer.mem_gate_proj", "mixer.mem_gate_bias", "ffn.fc"])
def test_the_check_finds_a_table_whose_halves_are_exchanged(ours, tmp_path, monkeypatch):
    """There and back such a table is its own inverse, and every shape fits."""

    def exchanged(config):
        return tuple(
            dataclasses.replace(row, theirs=row.theirs[::-1]) if isinstance(row, Merge) and ours in row.ours else row
            for row in FORMATS["fla"].rows(config)
        )

    assert exchanged(None) != FORMATS["fla"].rows(None)
    wrong = dataclasses.replace(FORMATS["fla"], rows=exchanged)
    monkeypatch.setattr(conversion, "FORMATS", (FORMATS["codefuse"], wrong))
    folder, tensors, _ = fla("plus", tmp_path / "theirs")
    convert(folder, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="fla")
    same_tensors(load_file(tmp_path / "back" / "model.safetensors"), tensors)
    with pytest.raises(ValueError, match="check failed: logits differ"):
        convert(folder, tmp_path / "checked", check=True)
    assert not (tmp_path / "checked").exists()
