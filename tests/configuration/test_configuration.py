"""The configurations: what is derived, what is refused, what survives a file, and that nothing in them is idle."""

import copy
import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import (
    StrictDataclassClassValidationError,
    StrictDataclassError,
    StrictDataclassFieldValidationError,
)
from transformers import AutoConfig, Mamba2Config
from zoo import own_fields

from scrubjay import RodimusConfig, RodimusForCausalLM, SSDConfig, SSDForCausalLM

HIDDEN_SIZES = (*range(1, 34), 47, 48, 64, 97, 100, 127, 129, 255, 768, 2048)
BUILD = {
    "ssd": SSDConfig,
    "rodimus": lambda **c: RodimusConfig(block_type="rodimus", **c),
    "rodimus_plus": RodimusConfig,
}
MODELS = {"ssd": SSDForCausalLM, "rodimus": RodimusForCausalLM, "rodimus_plus": RodimusForCausalLM}
READ_BY_TRANSFORMERS = {"tie_word_embeddings", "bos_token_id", "eos_token_id"}

# A value for each field that is not its default.
OTHER_VALUES = {
    SSDConfig: {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "attn_layer_idx": [0, 2],
        "attn_cfg": {
            "num_heads": 6,
            "num_heads_kv": 2,
            "head_dim": 12,
            "d_conv": 3,
            "rotary_emb_dim": 6,
            "rotary_emb_base": 500.0,
            "rotary_emb_interleaved": True,
            "qkv_proj_bias": True,
            "out_proj_bias": True,
            "softmax_scale": 0.2,
            "causal": True,
            "mlp_dim": 100,
        },
        "intermediate_size": 100,
        "state_size": 16,
        "expand": 1.5,
        "num_heads": 9,
        "head_dim": 8,
        "n_groups": 3,
        "conv_kernel": 3,
        "use_conv_bias": False,
        "use_bias": True,
        "chunk_size": 17,
        "hidden_act": "swish",
        "layer_norm_epsilon": 1e-6,
        "residual_in_fp32": False,
        "time_step_limit": [0.01, 0.5],
        "time_step_min": 0.002,
        "time_step_max": 0.2,
        "time_step_floor": 1e-3,
        "A_initializer_range": [2.0, 3.0],
        "initializer_range": 0.1,
        "rescale_prenorm_residual": False,
        "use_cache": False,
        "tie_word_embeddings": False,
        "pad_token_id": 3,
        "bos_token_id": 1,
        "eos_token_id": [2, 4],
    },
    RodimusConfig: {
        "block_type": "rodimus",
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "expand": 1.5,
        "state_size": 16,
        "conv_kernel": 3,
        "temperature_gate": False,
        "input_gate": "full",
        "input_gate_rank": 5,
        "short_conv": False,
        "k_norm_eps": 1e-5,
        "num_attention_heads": 6,
        "num_key_heads": 2,
        "num_value_heads": 3,
        "sliding_window": 9,
        "rope_theta": 500.0,
        "rotary_dim": 4,
        "rope_interleaved": True,
        "intermediate_size": 40,
        "two_hop": False,
        "scale_embedding": True,
        "norm_embedding": True,
        "hidden_dropout": 0.1,
        "activation_dropout": 0.2,
        "attention_dropout": 0.3,
        "rms_norm_eps": 1e-6,
        "residual_in_fp32": False,
        "chunk_size": 8,
        "initializer_range": 0.1,
        "rescale_prenorm_residual": False,
        "use_cache": False,
        "tie_word_embeddings": False,
        "pad_token_id": 3,
        "bos_token_id": 1,
        "eos_token_id": [2, 4],
    },
}


def content(config):
    """Everything but where it was read and which version of transformers wrote it."""
    return {n: value for n, value in config.to_dict().items() if n not in ("transformers_version", "_name_or_path")}


@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
@pytest.mark.parametrize("name", BUILD)
def test_three_sizes_are_enough(name, hidden_size):
    config = BUILD[name](hidden_size=hidden_size, num_hidden_layers=2, vocab_size=11)
    if name == "ssd":
        assert config.num_heads * config.head_dim == config.inner_size == 2 * hidden_size
        assert config.head_dim <= 64
    else:
        assert config.inner_size % 8 == config.intermediate_size % 8 == 0
        assert config.num_attention_heads * config.head_dim == hidden_size
        assert config.rotary_dim in (config.head_dim, config.head_dim - 1)
    with torch.device("meta"):
        MODELS[name](config)


@pytest.mark.parametrize("hidden_size", [1, 3, 48, 100])
@pytest.mark.parametrize("name", BUILD)
def test_a_model_of_three_sizes_computes(name, hidden_size):
    model = MODELS[name](BUILD[name](hidden_size=hidden_size, num_hidden_layers=1, vocab_size=1))
    assert model(torch.zeros(2, 5, dtype=torch.int64)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("given", "heads", "head_dim"),
    [
        ({}, 24, 64),
        ({"num_heads": 12}, 12, 128),
        ({"head_dim": 16}, 96, 16),
        ({"expand": 1}, 12, 64),
        ({"expand": 0.5, "hidden_size": 100}, 25, 2),
        ({"hidden_size": 9, "expand": 1}, 9, 1),
    ],
    ids=str,
)
def test_ssd_heads_follow_from_what_is_given(given, heads, head_dim):
    config = SSDConfig(**given)
    assert (config.num_heads, config.head_dim) == (heads, head_dim)
    assert config.conv_size == heads * head_dim + 2 * config.n_groups * config.state_size


@pytest.mark.parametrize(
    ("hidden_size", "derived"),
    [
        (48, {"num_attention_heads": 1, "rotary_dim": 48, "intermediate_size": 64, "input_gate_rank": 16}),
        (100, {"num_attention_heads": 1, "rotary_dim": 100, "intermediate_size": 136, "input_gate_rank": 16}),
        (768, {"num_attention_heads": 6, "rotary_dim": 128, "intermediate_size": 1024, "input_gate_rank": 16}),
        (2048, {"num_attention_heads": 16, "rotary_dim": 128, "intermediate_size": 2736, "input_gate_rank": 32}),
    ],
    ids=str,
)
def test_rodimus_sizes_follow_from_the_width(hidden_size, derived):
    config = RodimusConfig(hidden_size=hidden_size)
    assert {name: getattr(config, name) for name in derived} == derived
    assert config.num_value_heads == config.num_attention_heads
    assert config.num_key_heads == 1
    assert RodimusConfig(hidden_size=hidden_size, expand=1.01).inner_size == -(-int(1.01 * hidden_size) // 8) * 8


@pytest.mark.parametrize(("hidden_size", "std"), [(32, 0.16), (512, 0.04), (2048, 0.02), (4096, 0.02)])
def test_rodimus_starts_with_projections_of_one_size_up_to_the_authors_width(hidden_size, std):
    assert RodimusConfig(hidden_size=hidden_size).initializer_range == pytest.approx(std, rel=1e-15)
    assert RodimusConfig(hidden_size=hidden_size, initializer_range=0.02).initializer_range == 0.02
    theirs = {"d_model": hidden_size, "n_layer": 2, "mixer_cfg": {}, "block_type": "rodimus"}
    assert RodimusConfig.from_dict(theirs).initializer_range == 0.02, "their libraries' default, whatever the width is"


@pytest.mark.parametrize("value", [True, False])
def test_the_gates_temperature_is_not_taken_for_that_of_generation(value):
    """transformers drops a `temperature` that is no field in silence, and generates with one that is."""
    with pytest.raises(ValueError, match=f"got {value}. The switch of the gate is temperature_gate"):
        RodimusConfig(temperature=value)
    RodimusConfig(temperature=0.7)  # as older files of any model have it


def test_rodimus_needs_no_fitting_heads_without_attention():
    assert not RodimusConfig(block_type="rodimus", num_attention_heads=7, num_key_heads=3).has_attention


def test_chunk_of_another_librarys_file_is_not_taken_over_unless_asked_for(tmp_path):
    """It suits that library's kernels; it changes no result."""
    Mamba2Config(chunk_size=256).save_pretrained(tmp_path)
    assert SSDConfig.from_pretrained(tmp_path).chunk_size == SSDConfig().chunk_size
    assert SSDConfig.from_pretrained(tmp_path, chunk_size=32).chunk_size == 32
    SSDConfig(chunk_size=256).save_pretrained(tmp_path)
    assert SSDConfig.from_pretrained(tmp_path).chunk_size == 256


@pytest.mark.parametrize("config_class", OTHER_VALUES, ids=lambda c: c.__name__)
def test_every_field_survives_a_file(config_class, tmp_path):
    values = OTHER_VALUES[config_class]
    assert values.keys() == own_fields(config_class).keys(), "give each field a value in OTHER_VALUES"
    assert [name for name, value in values.items() if value == getattr(config_class(), name)] == []
    config = config_class(**values)
    config.save_pretrained(tmp_path)
    for loaded in (config_class.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path), copy.deepcopy(config)):
        assert type(loaded) is config_class
        assert content(loaded) == content(config)
        assert {name: getattr(loaded, name) for name in values} == values
    first = (tmp_path / "config.json").read_text()
    config_class.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == first


@pytest.mark.parametrize("name", BUILD)
def test_derived_values_survive_a_file(name, tmp_path):
    config = BUILD[name](hidden_size=48, num_hidden_layers=2, vocab_size=11)
    config.save_pretrained(tmp_path)
    assert content(AutoConfig.from_pretrained(tmp_path)) == content(config)


@pytest.mark.parametrize(
    ("written", "limit"),
    [
        ('{"time_step_limit": [0.0, Infinity]}', [0.0, math.inf]),
        ('{"time_step_limit": [0.0, {"__float__": "Infinity"}]}', [0.0, math.inf]),
        ('{"time_step_limit": null}', [0.0, math.inf]),
        ("{}", [0.0, math.inf]),
        ('{"time_step_limit": [0.001, 0.5]}', [0.001, 0.5]),
        ('{"time_step_limit": [0, 1]}', [0.0, 1.0]),
    ],
)
def test_time_step_limit_is_read_as_published_files_write_it(written, limit, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(written)
    loaded = [SSDConfig.from_pretrained(tmp_path), SSDConfig.from_json_file(file), SSDConfig(**json.loads(written))]
    loaded[0].save_pretrained(tmp_path)
    for config in (*loaded, SSDConfig.from_pretrained(tmp_path)):
        assert config.time_step_limit == limit
        assert all(type(x) is float for x in config.time_step_limit)


@pytest.mark.parametrize(
    ("config_class", "given", "said"),
    [
        *(
            (SSDConfig, {name: value}, rf"{name} must be at least 1; got {value}")
            for name in ("vocab_size", "hidden_size", "num_hidden_layers", "state_size", "num_heads", "head_dim")
            for value in (0, -3)
        ),
        *((SSDConfig, {name: 0}, f"{name} must be at least 1; got 0") for name in ("n_groups", "conv_kernel")),
        (SSDConfig, {"chunk_size": 0}, "chunk_size must be at least 1; got 0"),
        (
            *(SSDConfig, {"num_heads": 5, "head_dim": 64}),
            r"num_heads \* head_dim must equal expand \* hidden_size; got 5 \* 64 = 320 and 2 \* 768 = 1536",
        ),
        (SSDConfig, {"num_heads": 7}, r"got 7 \* 219 = 1533 and 2 \* 768 = 1536"),
        (SSDConfig, {"head_dim": 100}, r"got 15 \* 100 = 1500 and 2 \* 768 = 1536"),
        (SSDConfig, {"n_groups": 5}, "n_groups must divide num_heads = 24; got 5"),
        (SSDConfig, {"hidden_act": "gelu"}, "hidden_act must be \"silu\".*; got 'gelu'"),
        *(
            (SSDConfig, {"layer_norm_epsilon": value}, f"layer_norm_epsilon must be positive; got {value}")
            for value in (0.0, -1e-5, math.nan)
        ),
        (
            SSDConfig,
            {"time_step_limit": [0.5, 0.1]},
            r"time_step_limit must be a pair \(low, high\) with 0 <= low <= high; got \[0.5, 0.1\]",
        ),
        (SSDConfig, {"time_step_limit": [-1, 1]}, r"time_step_limit must be a pair .* got \[-1.0, 1.0\]"),
        (SSDConfig, {"time_step_limit": [0, math.nan]}, r"time_step_limit must be a pair .* got \[0.0, nan\]"),
        (SSDConfig, {"time_step_limit": [1]}, r"time_step_limit must be a pair \(low, high\) .* got \[1.0\]"),
        (SSDConfig, {"time_step_limit": [1, 2, 3]}, r"time_step_limit must be a pair .* got \[1.0, 2.0, 3.0\]"),
        (SSDConfig, {"A_initializer_range": [3, 2]}, r"A_initializer_range must be a pair .* got \[3.0, 2.0\]"),
        (SSDConfig, {"A_initializer_range": []}, r"A_initializer_range must be a pair .* got \[\]"),
        (SSDConfig, {"time_step_min": 0.0}, "0 < time_step_min <= time_step_max .* got 0.0, 0.1 and 0.0001"),
        (SSDConfig, {"time_step_max": 1e-4}, "time_step_min <= time_step_max .* got 0.001, 0.0001 and 0.0001"),
        (SSDConfig, {"time_step_floor": 0.0}, "0 < time_step_floor; got 0.001, 0.1 and 0.0"),
        *(
            (config_class, {"expand": value}, rf"expand .*{value}")
            for config_class in (SSDConfig, RodimusConfig)
            for value in (0, -1.5)
        ),
        (
            RodimusConfig,
            {"block_type": "mamba"},
            r"block_type must be one of \('rodimus', 'rodimus_plus'\); got 'mamba'",
        ),
        *(
            (RodimusConfig, {name: value}, rf"{name} must be at least 1; got {value}")
            for name in ("vocab_size", "hidden_size", "num_hidden_layers", "state_size", "conv_kernel")
            for value in (0, -3)
        ),
        *(
            (RodimusConfig, {name: 0}, rf"{name} must be at least 1; got 0")
            for name in ("num_attention_heads", "num_key_heads", "num_value_heads", "sliding_window", "chunk_size")
        ),
        *(
            (RodimusConfig, {name: 0}, rf"{name} must be at least 1; got 0")
            for name in ("input_gate_rank", "intermediate_size")
        ),
        *(
            (RodimusConfig, {name: value}, rf"{name} must be positive; got {value}")
            for name in ("rms_norm_eps", "k_norm_eps", "rope_theta")
            for value in (0.0, -1.0, math.nan)
        ),
        *(
            (RodimusConfig, {name: value}, rf"{name} must lie in \[0, 1\); got {value}")
            for name in ("hidden_dropout", "activation_dropout", "attention_dropout")
            for value in (1.0, -0.1, math.nan)
        ),
        (
            RodimusConfig,
            {"input_gate": "half"},
            r"input_gate must be one of \('low_rank', 'full', 'none'\); got 'half'",
        ),
        (RodimusConfig, {"num_attention_heads": 3}, "num_attention_heads must divide hidden_size = 2048; got 3"),
        (RodimusConfig, {"num_key_heads": 3}, "num_key_heads must divide num_attention_heads = 16; got 3"),
        (RodimusConfig, {"num_value_heads": 5}, "num_value_heads must divide num_attention_heads = 16; got 5"),
        (RodimusConfig, {"rotary_dim": 3}, "rotary_dim must be even and at most head_dim = 128; got 3"),
        (RodimusConfig, {"rotary_dim": 130}, "rotary_dim must be even and at most head_dim = 128; got 130"),
        (RodimusConfig, {"rotary_dim": -2}, "rotary_dim must be even and .*got -2"),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else str(x) if isinstance(x, dict) else "",
)
def test_sizes_that_do_not_fit_are_refused_with_value_and_rule(config_class, given, said):
    with pytest.raises(StrictDataclassClassValidationError, match=said):
        config_class(**given)


@pytest.mark.parametrize(
    ("config_class", "given"),
    [
        *((config_class, {"expand": value}) for config_class in OTHER_VALUES for value in (math.nan, math.inf)),
        (SSDConfig, {"time_step_limit": [None, 1]}),
        (SSDConfig, {"A_initializer_range": [1, "x"]}),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else str(x),
)
def test_values_that_are_no_numbers_are_refused_by_name(config_class, given):
    """Whatever is derived from them first."""
    ((name, _),) = given.items()
    with pytest.raises((StrictDataclassError, ValueError), match=name):
        config_class(**given)


@pytest.mark.parametrize(
    ("config_class", "given"),
    [
        *((c, {"hidden_size": x}) for c in OTHER_VALUES for x in ("48", 48.5, None, True)),
        *((c, {"use_cache": 1}) for c in OTHER_VALUES),
        (SSDConfig, {"time_step_limit": 0.5}),
        (SSDConfig, {"A_initializer_range": None}),
        (SSDConfig, {"expand": "2"}),
        (RodimusConfig, {"block_type": None}),
        (RodimusConfig, {"num_key_heads": None}),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else str(x),
)
def test_values_of_a_wrong_type_are_refused_by_name(config_class, given):
    ((name, value),) = given.items()
    with pytest.raises(StrictDataclassFieldValidationError, match=rf"'{name}'(.|\n)*{value}"):
        config_class(**given)


@pytest.mark.parametrize("heads", [4, 20])
def test_heads_of_an_odd_size_turn_all_channels_that_pair(heads):
    config = RodimusConfig(hidden_size=100, num_attention_heads=heads)
    assert config.rotary_dim == config.head_dim - 1


@pytest.mark.parametrize("config_class", OTHER_VALUES, ids=lambda c: c.__name__)
def test_every_field_is_read(config_class):
    """In the configuration's own module or in the modeling files; those of another model do not count."""
    own = Path(inspect.getfile(config_class))
    other = {SSDConfig: "_rodimus", RodimusConfig: "_ssd"}[config_class]
    files = [own, *(file for file in (own.parents[1] / "modeling").rglob("*.py") if not file.stem.endswith(other))]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    fields = set(own_fields(config_class)) - READ_BY_TRANSFORMERS
    assert {name for name in fields if not re.search(rf"\b(config|self)\.{name}\b(?! = )", text)} == set()


@pytest.mark.parametrize("config_class", OTHER_VALUES, ids=lambda c: c.__name__)
def test_every_field_is_documented_and_none_that_is_gone(config_class):
    documented = re.findall(r"^ {4}(\w+(?:, \w+)*):", inspect.cleandoc(config_class.__doc__), re.MULTILINE)
    names = {name for line in documented for name in line.split(", ")}
    of_transformers = READ_BY_TRANSFORMERS | {"pad_token_id"}
    assert names == set(own_fields(config_class)) - of_transformers
