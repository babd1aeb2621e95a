"""Rodimus checkpoints that are not what they seem: heads, left-over buffers, contradictions, what has no words."""

import json
import re

import pytest
import torch
from conversion_rodimus_cases import (
    FLA,
    OFFICIAL,
    fla_shapes,
    meaning_of_official,
    write,
)
from recurrences import rodimus_logits
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer

from scrubjay import RodimusConfig, RodimusForCausalLM
from scrubjay.configuration.rodimus_configs import config_for
from scrubjay.conversion.convert import convert as full_convert
from scrubjay.examples.benchmarks.published_layouts import values
from scrubjay.examples.benchmarks.published_rodimus import official_shapes, repeat_head

PLUS, UNTIED, ALL = OFFICIAL["plus"], OFFICIAL["plus, odd window"], OFFICIAL["plus, all else"]
HEAD, EMBEDDING = "lm_head.weight", "model.embeddings.weight"


def convert(source, destination, **options):
    return full_convert(source, destination, progress=False, **options)


def folder_of(path, config=PLUS, changes=None, **options):
    """A folder of the authors'; changes: tensors by name, None takes one away."""
    tensors = values(official_shapes(config))
    tensors = repeat_head(tensors) if config["tie_word_embeddings"] else tensors
    tensors = {name: x for name, x in (tensors | (changes or {})).items() if x is not None}
    return write(path, config, tensors, **options), tensors


def refused(match, tmp_path, source, **options):
    """The conversion's error matches, and nothing is left beside the source."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=match) as error:
        convert(source, tmp_path / "ours", **options)
    assert sorted(tmp_path.iterdir()) == before
    return str(error.value)


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pickled", [True, False], ids=["one memory", "two copies"])
def test_a_head_that_repeats_the_embedding_is_left_out_and_written_again(pickled, tmp_path):
    folder, tensors = folder_of(tmp_path / "theirs", pickled=pickled)
    report = convert(folder, tmp_path / "ours")
    assert report.left_out == {HEAD: f"repeats {EMBEDDING}"}
    assert "lm_head.weight" not in load_file(tmp_path / "ours" / "model.safetensors")
    convert(tmp_path / "ours", tmp_path / "back", to="codefuse")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert torch.equal(back[HEAD], tensors[HEAD])
    convert(folder, tmp_path / "fla", to="fla")
    assert HEAD not in load_file(tmp_path / "fla" / "model.safetensors")


def test_a_tied_checkpoint_may_leave_its_head_out(tmp_path):
    folder, _ = folder_of(tmp_path / "theirs", changes={HEAD: None})
    assert convert(folder, tmp_path / "ours").left_out == {}
    assert RodimusForCausalLM.from_pretrained(tmp_path / "ours").config.tie_word_embeddings


def test_a_head_that_differs_in_a_tied_checkpoint_is_an_error_until_it_is_said_to_be_one(tmp_path):
    """Neither tensor is dropped without being asked: one number apart is enough."""
    own = values(official_shapes(PLUS))[EMBEDDING].clone()
    own[3, 5] += 1e-3
    folder, tensors = folder_of(tmp_path / "theirs", changes={HEAD: own})
    text = refused(f"{HEAD} differs from {EMBEDDING}", tmp_path, folder)
    assert "tie" in text
    convert(folder, tmp_path / "ours", settings={"tie_word_embeddings": False})
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], own)
    assert torch.equal(written["model.embed_tokens.weight"], tensors[EMBEDDING])
    assert not RodimusForCausalLM.from_pretrained(tmp_path / "ours").config.tie_word_embeddings


def test_a_head_that_differs_in_a_tied_checkpoint_is_used_where_it_is_loaded_directly(tmp_path, transformers_log):
    folder, tensors = folder_of(tmp_path / "theirs", changes={HEAD: values({HEAD: (61, 48)}, seed=7)[HEAD]})
    model = RodimusForCausalLM.from_pretrained(folder)
    assert "we will NOT tie them" in transformers_log.text
    ids = torch.arange(30)[None]
    weights, sizes = meaning_of_official(tensors, PLUS | {"tie_word_embeddings": False})
    with torch.no_grad():
        assert (model(ids).logits - rodimus_logits(weights, sizes, ids)).abs().max() < 1e-4  # measured 4.7e-6


def test_an_untied_checkpoint_whose_head_equals_the_embedding_stays_untied(tmp_path):
    same = values(official_shapes(UNTIED))[EMBEDDING]
    folder, _ = folder_of(tmp_path / "theirs", UNTIED, {HEAD: same})
    convert(folder, tmp_path / "ours")
    assert "lm_head.weight" in load_file(tmp_path / "ours" / "model.safetensors")
    folder, _ = folder_of(tmp_path / "headless", UNTIED, {HEAD: None})
    with pytest.raises(ValueError, match=r"missing: lm_head.weight \[61, 48\]"):
        convert(folder, tmp_path / "other")


# --- the tokenizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_code", [True, False])
def test_the_authors_tokenizer_loads_without_their_code(with_code, tmp_path):
    """Most of their repositories name a class in `auto_map` and lack its file."""
    folder, _ = folder_of(tmp_path / "theirs", UNTIED)
    words = ["[CLS]", "<|startoftext|>", "<|endoftext|>", "a", "b", "<|fim_end|>"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[CLS]"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "RodimusTokenizer", "gmask_token": "[gMASK]", "model_max_length": 4096}
    config["auto_map"] = {"AutoTokenizer": [None, "tokenization_rodimus_fast.RodimusTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if with_code:
        (folder / "tokenization_rodimus_fast.py").write_text("raise SystemError('this code ran')")
    report = convert(folder, tmp_path / "ours")
    assert any("transformers' own class reads what was RodimusTokenizer's" in note for note in report.notes)
    assert any("own code was not copied" in note for note in report.notes) == with_code
    for options in ({}, {"trust_remote_code": True}):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours", **options)
        batch = tokenizer(["a b", "b"], padding=True)
        assert batch["input_ids"] == [[3, 4], [2, 4]]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (1, 2, 4096)
    assert json.loads((folder / "tokenizer_config.json").read_text()) == config


# --- tensors that do not belong --------------------------------------------------------------------------------------

BUFFERS = {
    "model.layers.0.mixer.inner_mixer.conv_state_0": (1, 96, 4),
    "model.layers.1.mixer.inner_mixer.ssm_state_1": (1, 1, 64, 96),
    "model.layers.0.attn.key_cache_0": (1, 4, 1, 12),
    "model.layers.1.attn.value_cache_1": (1, 4, 4, 12),
}


def test_buffers_that_generation_left_behind_are_named_and_ignored(tmp_path):
    folder, _ = folder_of(tmp_path / "theirs", changes=values(BUFFERS))
    report = convert(folder, tmp_path / "ours")
    assert {name for name in report.left_out if name != HEAD} == set(BUFFERS)
    assert len(set(report.left_out.values())) == 2
    clean, _ = folder_of(tmp_path / "clean")
    convert(clean, tmp_path / "from clean")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "from clean"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    _, info = RodimusForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info


def test_all_that_does_not_fit_is_listed_at_once(tmp_path):
    changes = {
        "model.layers.0.mixer.inner_mixer.conv_state": torch.zeros(1),
        "model.layers.2.mixer.fc.bias": torch.zeros(3),
        "model.layers.1.attn.q_proj.weight": None,
        "model.layers.0.ffn.fc.weight": torch.zeros(128, 47),
    }
    folder, _ = folder_of(tmp_path / "theirs", changes=changes)
    text = refused("4 tensors of the checkpoint do not fit", tmp_path, folder)
    assert "unknown: model.layers.0.mixer.inner_mixer.conv_state [1]" in text
    assert "unknown: model.layers.2.mixer.fc.bias [3]" in text
    assert "missing: model.layers.1.attn.q_proj.weight [48, 48]" in text
    assert "wrong shape: model.layers.0.ffn.fc.weight is [128, 47], needed [128, 48]" in text


# --- configurations that contradict the tensors ----------------------------------------------------------------------


def changed(config, name, value):
    part, _, field = name.rpartition(".")
    return config | ({part: config[part] | {field: value}} if part else {field: value})


CONTRADICTIONS = [
    ("d_model", 96, "d_model 96, the tensors say 48"),
    ("n_layer", 3, "n_layer 3, the tensors say 2"),
    ("vocab_size", 64, "vocab_size 64, the tensors say 61"),
    ("block_type", "rodimus", "block_type 'rodimus', the tensors say 'rodimus_plus'"),
    ("use_norm_embedding", True, "use_norm_embedding True, the tensors say False"),
    ("mixer_cfg.mem_size", 32, "mixer_cfg.mem_size 32, the tensors say 64"),
    ("mixer_cfg.d_conv", 3, "mixer_cfg.d_conv 3, the tensors say 4"),
    ("mixer_cfg.expand_ratio", 1, "mixer_cfg.expand_ratio 1, which makes inner_size 48, the tensors say 96"),
    ("mixer_cfg.input_gate_low_rank", 17, "mixer_cfg.input_gate_low_rank 17, the tensors say 16"),
    ("attn_cfg.num_heads_k", 2, "attn_cfg.num_heads_k 2, which makes key_width 24, the tensors say 12"),
    ("attn_cfg.num_heads_v", 2, "attn_cfg.num_heads_v 2, which makes value_width 24, the tensors say 48"),
    ("attn_cfg.num_heads", 8, "attn_cfg.num_heads_k 1, which makes key_width 6, the tensors say 12"),
    ("attn_cfg.ffn_expand_ratio", 2, "attn_cfg.ffn_expand_ratio"),
]


@pytest.mark.parametrize(("name", "value", "said"), CONTRADICTIONS, ids=[case[0] for case in CONTRADICTIONS])
def test_a_contradiction_is_said_with_both_values(name, value, said, tmp_path):
    tensors = repeat_head(values(official_shapes(PLUS)))
    folder = write(tmp_path / "theirs", changed(PLUS, name, value), tensors)
    assert said in refused("The configuration contradicts the tensors", tmp_path, folder)


def test_a_setting_that_contradicts_the_tensors_is_called_one(tmp_path):
    folder, _ = folder_of(tmp_path / "theirs")
    text = refused("contradicts", tmp_path, folder, settings={"state_size": 32})
    assert "the setting says mixer_cfg.mem_size 32, the tensors say 64" in text


def test_flas_contradictions_go_by_its_own_names(tmp_path):
    folder = write(tmp_path / "theirs", FLA | {"expand_ratio": 7, "hidden_size": 64}, values(fla_shapes(FLA)))
    text = refused("contradicts", tmp_path, folder)
    assert "expand_ratio 7, the tensors say 6" in text
    assert "hidden_size 64, the tensors say 48" in text


def test_a_configuration_of_another_layout_is_refused(tmp_path):
    folder = write(tmp_path / "theirs", FLA, values(official_shapes(PLUS)))
    refused("The configuration is fla, and the tensors are named as codefuse names them", tmp_path, folder)
    folder = write(tmp_path / "llama", {"model_type": "llama", "hidden_size": 48}, values(official_shapes(PLUS)))
    refused("The configuration is no Rodimus one", tmp_path, folder)


# --- without a configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rodimus", "rodimus, other sizes", "plus", "plus, odd window"])
def test_sizes_are_read_off_the_tensors_where_there_is_no_configuration(name, tmp_path):
    config = OFFICIAL[name]
    tensors = values(official_shapes(config, head=False))
    folder = write(tmp_path / "theirs", config, tensors)
    (folder / "config.json").unlink()
    kept = {"k_norm_eps": config["mixer_cfg"].get("normalize_epsilon", 1e-12)}
    if config["block_type"] == "rodimus_plus":
        kept["sliding_window"] = config["attn_cfg"]["window_size"] // 2 + 1
    report = convert(folder, tmp_path / "ours", settings=kept)
    assert any("there is no configuration file" in note for note in report.notes)
    assert any("which shapes do not tell" in note for note in report.notes)
    ids = torch.arange(30)[None]
    want = rodimus_logits(*meaning_of_official(tensors, config), ids)
    with torch.no_grad():
        got = RodimusForCausalLM.from_pretrained(tmp_path / "ours")(ids).logits
    assert (got - want).abs().max() < 1e-4  # measured 5.8e-6


def test_the_report_says_where_values_come_from_that_shapes_do_not_tell(tmp_path):
    folder, _ = folder_of(tmp_path / "theirs", UNTIED)
    notes = "\n".join(convert(folder, tmp_path / "ours", settings={"rms_norm_eps": 1e-3}).notes)
    assert "k_norm_eps 1e-12: the default" in notes
    assert "rms_norm_eps 0.001: given" in notes
    assert "sliding_window 6, rope_theta 10000.0" in notes
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["rms_norm_eps"] == 1e-3


def test_the_check_wants_a_configuration(tmp_path):
    folder, _ = folder_of(tmp_path / "theirs")
    (folder / "config.json").unlink()
    refused("check needs the configuration", tmp_path, folder, check=True)


# --- what one side cannot express ------------------------------------------------------------------------------------

UNREADABLE = [
    (PLUS, "attn_cfg.softmax_scale", "norm", "softmax_scale is 'norm'"),
    (PLUS, "attn_cfg.rotary_emb_scale_base", 512, "rotary_emb_scale_base is 512"),
    (PLUS, "attn_cfg.window_size", None, "window_size is None .* Give sliding_window"),
    (PLUS, "attn_cfg.window_size", -1, "window_size is -1 .* Give sliding_window"),
    (PLUS, "attn_cfg.alibi", True, "attn_cfg has fields of unknown meaning: alibi"),
    (PLUS, "mixer_cfg.heads", 2, "mixer_cfg has fields of unknown meaning: heads"),
    (PLUS, "mixer_cfg.input_gate_low_rank", "0.25", "must be a whole number of at least 1, or \"auto\"; got '0.25'"),
    (FLA, "attn", {"layers": [0], "num_heads": 4}, "attn is .*layers"),
    (FLA, "hidden_act", "gelu", "hidden_act is 'gelu'"),
    (FLA, "ska_attn.qkv_bias", True, "qkv_bias is True"),
    (FLA, "ska_attn.qk_norm", True, "qk_norm is True"),
    (FLA, "ska_attn.window_size", None, "window_size is None .* Give sliding_window"),
]


@pytest.mark.parametrize(("config", "name", "value", "said"), UNREADABLE, ids=[case[1] for case in UNREADABLE])
def test_what_the_model_does_not_compute_is_refused_on_the_way_in(config, name, value, said, tmp_path):
    shapes = fla_shapes(FLA) if config is FLA else official_shapes(PLUS)
    folder = write(tmp_path / "theirs", changed(config, name, value), values(shapes))
    refused(said, tmp_path, folder)
    with pytest.raises(ValueError, match=said):
        RodimusForCausalLM.from_pretrained(folder)


def test_a_window_without_end_may_be_given_one(tmp_path):
    config = changed(PLUS, "attn_cfg.window_size", None)
    folder = write(tmp_path / "theirs", config, repeat_head(values(official_shapes(PLUS))))
    convert(folder, tmp_path / "ours", settings={"sliding_window": 30})
    ours = RodimusForCausalLM.from_pretrained(tmp_path / "ours")
    direct = RodimusForCausalLM.from_pretrained(folder, sliding_window=30)
    assert ours.config.sliding_window == direct.config.sliding_window == 30


NOT_IN_FLA = {
    "scale_embedding": True,
    "norm_embedding": True,
    "expand": 1.5,
    "num_key_heads": 2,
    "num_value_heads": 1,
    "rotary_dim": 6,
    "rope_interleaved": True,
    "hidden_dropout": 0.1,
    "activation_dropout": 0.1,
    "attention_dropout": 0.1,
}
SIZES = dict(hidden_size=48, num_hidden_layers=2, vocab_size=61, num_attention_heads=4, state_size=6)


@pytest.mark.parametrize("name", NOT_IN_FLA)
def test_what_fla_cannot_express_is_refused_on_the_way_out(name, tmp_path):
    config = RodimusConfig(**SIZES | {name: NOT_IN_FLA[name]})
    RodimusForCausalLM(config).save_pretrained(tmp_path / "theirs")
    said = "inner_size is 72, it has 96" if name == "expand" else f"{name} is {NOT_IN_FLA[name]}, it has "
    refused(f"fla cannot express this model: {said}", tmp_path, tmp_path / "theirs", to="fla")


SWITCHES = {"temperature_gate": False, "input_gate": "full", "short_conv": False, "two_hop": False}


@pytest.mark.parametrize("layout", ["codefuse", "fla"])
@pytest.mark.parametrize("name", [*SWITCHES, "no input gate"])
def test_a_part_that_is_switched_off_is_refused_where_a_library_has_no_switch(name, layout):
    changes = {"input_gate": "none"} if name == "no input gate" else {name: SWITCHES[name]}
    config, ((field, value),) = RodimusConfig(**SIZES | changes), changes.items()
    if (layout, name) == ("fla", "short_conv"):
        theirs = config_for(layout, config)
        assert theirs["use_short_conv"] is False
        assert not RodimusConfig.from_dict(theirs).short_conv
        return
    said = f"{layout} cannot express this model: {field} is {value!r} ({config.ablations[field]}), for which its code"
    with pytest.raises(ValueError, match=re.escape(said)):
        config_for(layout, config)


@pytest.mark.parametrize("told", [True, False])
def test_a_convolution_that_is_only_in_the_tensors_or_only_in_the_configuration_is_refused(told, tmp_path):
    shapes = fla_shapes(FLA | {"use_short_conv": not told})
    folder = write(tmp_path / "theirs", FLA | {"use_short_conv": told}, values(shapes))
    said = f"the configuration says use_short_conv {told}, the tensors say {not told}"
    refused(said, tmp_path, folder)


def test_every_reason_is_said_at_once():
    with pytest.raises(ValueError, match=r"scale_embedding is True.*num_key_heads is 3.*rotary_dim is 4"):
        config_for("fla", RodimusConfig.from_dict(ALL))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sliding_window": 1}, "sliding_window is 1, and its windows hold at least 2 keys"),
        ({"intermediate_size": 60}, "intermediate_size is 60, and its widths are multiples of 8"),
    ],
)
def test_what_the_authors_code_cannot_express_is_refused(changes, said):
    with pytest.raises(ValueError, match=re.escape(f"codefuse cannot express this model: {said}")):
        config_for("codefuse", RodimusConfig(**SIZES | changes))


@pytest.mark.parametrize("layout", ["codefuse", "fla"])
def test_a_feed_forward_width_of_any_eights_survives(layout):
    for hidden in (48, 56, 120, 2048, 3072):
        for width in range(8, 5 * hidden, 8 * (hidden // 40)):
            sizes = dict(hidden_size=hidden, intermediate_size=width, num_attention_heads=4)
            theirs = config_for(layout, RodimusConfig(**sizes))
            assert RodimusConfig.from_dict(theirs).intermediate_size == width
