"""Published models: their configurations, the shapes of their parameters and how many numbers those are."""

import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, Mamba2Config
from zoo import own_fields

from scrubjay import RodimusConfig, RodimusForCausalLM, SSDConfig, SSDForCausalLM, TaipanConfig
from scrubjay.examples.benchmarks.published_layouts import (
    CODESTRAL,
    MAMBA2_2B7,
    MAMBA2ATTN_2B7,
    mamba_ssm_config,
    params_json,
)
from scrubjay.examples.benchmarks.published_rodimus import PUBLISHED as RODIMUS_FILES

# sizes, (channels of the convolution, rows of in_proj), number of parameters; what is not given is the default
MAMBA2 = {
    "mamba2-130m": (dict(hidden_size=768, num_hidden_layers=24), (1792, 3352), 128_989_632),
    "mamba2-370m": (dict(hidden_size=1024, num_hidden_layers=48), (2304, 4384), 368_346_624),
    "mamba2-780m": (dict(hidden_size=1536, num_hidden_layers=48), (3328, 6448), 780_161_280),
    "mamba2-1.3b": (dict(hidden_size=2048, num_hidden_layers=48), (4352, 8512), 1_343_757_312),
    "mamba2-2.7b": (dict(hidden_size=2560, num_hidden_layers=64), (5376, 10576), 2_702_599_680),
    "codestral-7b": (
        dict(hidden_size=4096, num_hidden_layers=64, n_groups=8, vocab_size=32768, tie_word_embeddings=False),
        (10240, 18560),
        7_285_403_648,
    ),
}
AUTHORS = {
    "130m": dict(d=768, L=24),
    "370m": dict(d=1024, L=48),
    "780m": dict(d=1536, L=48),
    "1.3b": dict(d=2048, L=48),
    "2.7b": dict(d=2560, L=64),
    "2.7b-hybrid": MAMBA2ATTN_2B7,
}
UNTIED = {"tie_word_embeddings": False}
WIDE = {"hidden_size": 3072, "num_hidden_layers": 32}
# sizes, (inner_size, input_gate_rank, intermediate_size, num_attention_heads), number of parameters
RODIMUS = {
    "1.4B": ({"block_type": "rodimus", "num_hidden_layers": 48}, (4096, 32, 2736, 16), 1_531_551_744),
    "1.6B": ({}, (4096, 32, 2736, 16), 1_607_095_296),
    "1.6B-untied": (UNTIED, (4096, 32, 2736, 16), 1_866_093_568),
    "4B": (WIDE | UNTIED, (6144, 48, 4096, 24), 4_786_527_232),
    "4B-tied": (WIDE, (6144, 48, 4096, 24), 4_398_029_824),
}
RODIMUS_NAMES = {
    "rodimus-1.4b": "1.4B",
    "rodimus-plus-1.6b": "1.6B",
    "rodimus-plus-1.6b, with a head": "1.6B-untied",
    "rodimus-plus-4b": "4B",
}


# by name, and the file that its authors publish
PUBLISHED = {
    **{name: (SSDConfig, mamba_ssm_config(MAMBA2_2B7 | sizes, unpadded=50277)) for name, sizes in AUTHORS.items()},
    "codestral-7b": (SSDConfig, params_json(CODESTRAL)),
    "1.4b": (RodimusConfig, RODIMUS_FILES["rodimus_1B4_base"][0]),
    "plus-coder-1.6b": (RodimusConfig, RODIMUS_FILES["Rodimus-Plus-Coder-1.6B-Base"][0]),
    "plus-coder-4b": (RodimusConfig, RODIMUS_FILES["Rodimus-Plus-Coder-4B-Base"][0]),
}
COUNTS = {
    "130m": 128_989_632,
    "370m": 368_346_624,
    "780m": 780_161_280,
    "1.3b": 1_343_757_312,
    "2.7b": 2_702_599_680,
    "2.7b-hybrid": 2_697_590_880,
    "codestral-7b": 7_285_403_648,
    "1.4b": 1_531_551_744,
    "plus-coder-1.6b": 1_607_095_296,
    "plus-coder-4b": 4_786_527_232,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_name_gives_what_the_published_file_says(name):
    config_class, theirs = PUBLISHED[name]
    config, want = config_class.published(name), config_class.from_dict(theirs)
    fields = {*own_fields(config_class), "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
    assert {field: getattr(config, field) for field in fields} == {field: getattr(want, field) for field in fields}
    assert getattr(config, "max_position_embeddings", 2048) == theirs.get("max_position_embeddings", 2048)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == COUNTS[name]


def test_a_name_may_be_changed_and_an_unknown_one_lists_those_that_there_are():
    config = SSDConfig.published("2.7b-hybrid", num_hidden_layers=3, attn_layer_idx=[1])
    assert (config.hidden_size, config.num_hidden_layers, config.attn_layer_idx) == (2560, 3, [1])
    config.attn_cfg["num_heads"] = 1
    assert SSDConfig.published("2.7b-hybrid").attn_cfg["num_heads"] == 30
    for config_class in (SSDConfig, RodimusConfig):
        names = [name for name, (owner, _) in PUBLISHED.items() if owner is config_class]
        with pytest.raises(ValueError, match=re.escape(f"name must be one of {tuple(names)}; got '7b'")):
            config_class.published("7b")
    assert not hasattr(TaipanConfig, "published")  # it has `reconstructed`


@pytest.mark.parametrize("name", [*MAMBA2, *RODIMUS_NAMES])
def test_published_sizes_have_their_number_of_parameters(name):
    if name in MAMBA2:
        sizes, _, count = MAMBA2[name]
        config = SSDConfig(**sizes)
    else:
        sizes, (*_, heads), count = RODIMUS[RODIMUS_NAMES[name]]
        config = RodimusConfig(**sizes, num_attention_heads=heads)
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) == count


@pytest.mark.parametrize(
    ("sizes", "derived", "parameters"),
    MAMBA2.values(),
    ids=[name.replace("codestral-7b", "Mamba-Codestral-7B") for name in MAMBA2],
)
def test_published_mamba2_configurations_load(sizes, derived, parameters, tmp_path, transformers_log):
    """From what transformers' own class writes, and with the number of parameters that the authors' code has."""
    defaults = {"n_groups": 1, "vocab_size": 50288, "tie_word_embeddings": True, "eos_token_id": 0, "pad_token_id": 0}
    theirs = Mamba2Config(num_heads=sizes["hidden_size"] // 32, **defaults | sizes)
    theirs.save_pretrained(tmp_path)
    config = SSDConfig.from_pretrained(tmp_path)
    assert "`mamba2`" in transformers_log.text
    assert "`scrubjay_ssd`" in transformers_log.text
    shared = set(own_fields(SSDConfig)) & set(theirs.to_dict()) - {"chunk_size", "time_step_limit"}
    assert len(shared) > 20
    assert {name: getattr(config, name) for name in shared} == {name: getattr(theirs, name) for name in shared}
    assert config.time_step_limit == [0.0, math.inf]
    with torch.device("meta"):
        model = SSDForCausalLM(config)
    assert (config.conv_size, model.model.layers[0].mixer.in_proj.out_features) == derived
    assert model.num_parameters() == parameters


@pytest.mark.parametrize(("sizes", "derived", "parameters"), RODIMUS.values(), ids=RODIMUS)
def test_published_rodimus_sizes_give_their_number_of_parameters(sizes, derived, parameters):
    config = RodimusConfig(**sizes)
    found = (config.inner_size, config.input_gate_rank, config.intermediate_size, config.num_attention_heads)
    assert found == derived
    with torch.device("meta"):
        assert RodimusForCausalLM(config).num_parameters() == parameters


def shapes(model):
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_ssd_parameters_have_the_authors_shapes():
    d, inner, H, G, N, K, V = 24, 48, 6, 3, 5, 4, 31
    config = SSDConfig(hidden_size=d, head_dim=8, n_groups=G, state_size=N, num_hidden_layers=1, vocab_size=V)
    mixer = {
        "in_proj.weight": (2 * inner + 2 * G * N + H, d),
        "conv1d.weight": (inner + 2 * G * N, 1, K),
        "conv1d.bias": (inner + 2 * G * N,),
        "dt_bias": (H,),
        "A_log": (H,),
        "D": (H,),
        "norm.weight": (inner,),
        "out_proj.weight": (d, inner),
    }
    want = {f"model.layers.0.mixer.{name}": shape for name, shape in mixer.items()}
    want |= {"model.embed_tokens.weight": (V, d), "model.layers.0.norm.weight": (d,), "model.norm.weight": (d,)}
    assert shapes(SSDForCausalLM(config)) == want


@pytest.mark.parametrize(("expand", "m"), [(2, 80), (1.5, 64), (1.6, 64), (1.61, 64), (1.65, 72)])
def test_rodimus_parameters_have_the_authors_shapes(expand, m):
    d, n, K, V, H = 40, 6, 4, 31, 5
    r, f, p = 16, 56, 8  # max(40 // 64, 16); int(40 * 4 / 3) = 53, up to a multiple of 8; 40 / 5
    config = RodimusConfig(
        hidden_size=d,
        expand=expand,
        state_size=n,
        num_hidden_layers=1,
        vocab_size=V,
        num_attention_heads=H,
        norm_embedding=True,
    )
    block = {
        "mixer_norm.weight": (d,),
        "mixer.fc.weight": (2 * m, d),
        "mixer.conv1d.weight": (m, 1, K),
        "mixer.conv1d.bias": (m,),
        "mixer.in_proj.weight": (2 * n, m),
        "mixer.mem_gate_proj.weight": (2 * n, m),
        "mixer.mem_gate_bias": (2 * n,),
        "mixer.ch_gate_down.weight": (r, m),
        "mixer.ch_gate_up.weight": (m, r),
        "mixer.ch_gate_up.bias": (m,),
        "mixer.residual_weight": (m,),
        "mixer.act_norm.weight": (m,),
        "mixer.out_proj.weight": (d, m),
        "attn_norm.weight": (d,),
        "attn.q_proj.weight": (d, d),
        "attn.k_proj.weight": (p, d),
        "attn.v_proj.weight": (d, d),
        "attn.o_proj.weight": (d, d),
        "ffn_norm.weight": (d,),
        "ffn.fc.weight": (2 * f, d),
        "ffn.out_proj.weight": (d, f),
    }
    want = {f"model.layers.0.{name}": shape for name, shape in block.items()}
    want |= {"model.embed_tokens.weight": (V, d), "model.embed_norm.weight": (d,), "model.norm.weight": (d,)}
    assert shapes(RodimusForCausalLM(config)) == want
