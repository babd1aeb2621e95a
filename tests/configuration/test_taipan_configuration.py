"""TaipanConfig: what is derived, refused and kept; sizes and starts of the models it describes."""

import copy
import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from test_configuration import OTHER_VALUES as SSD_VALUES
from test_initialisation import distributed, gather, normal, uniform, without_decay
from transformers import AutoConfig, AutoModelForCausalLM
from zoo import own_fields, relative

from scrubjay import SSDConfig, TaipanConfig, TaipanForCausalLM
from scrubjay.configuration.configuration_ssd import SSDSizes
from scrubjay.configuration.configuration_taipan import CHOICES

# A value for each field that is not its default.
SHARED = {name: value for name, value in SSD_VALUES[SSDConfig].items() if name in own_fields(SSDSizes)}
OTHER_VALUES = SHARED | {
    "num_hidden_layers": 5,
    "attention_every": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "attention_head_dim": 12,
    "sliding_window": 9,
    "intermediate_size": 40,
    "capacity": 0.3,
    **{name: allowed[1] for name, allowed in CHOICES.items()},
    "kv_cap": 5,
    "gate_hidden": 7,
    "gate_norm": False,
    "gumbel_tau": 0.5,
    "budget_lambda": 2.0,
    "refine_first": True,
    "sal_post_norm": True,
    "rope_theta": 500.0,
    "mamba_mlp": True,
    "eval_threshold": [0.6],
}


@pytest.mark.parametrize("hidden_size", [*range(1, 34), 48, 97, 100, 255, 768, 2048])
def test_three_sizes_are_enough(hidden_size):
    config = TaipanConfig(hidden_size=hidden_size, num_hidden_layers=2, vocab_size=11)
    assert config.num_attention_heads * config.attention_head_dim == hidden_size
    assert config.num_key_value_heads == config.num_attention_heads
    assert config.attention_head_dim <= 64
    assert config.intermediate_size % 64 == 0
    assert 0 <= config.intermediate_size - 8 * hidden_size / 3 < 64
    with torch.device("meta"):
        TaipanForCausalLM(config)


@pytest.mark.parametrize("layers", [1, 2, 7])
@pytest.mark.parametrize("hidden_size", [1, 3, 48])
def test_a_model_of_three_sizes_computes(hidden_size, layers):
    model = TaipanForCausalLM(TaipanConfig(hidden_size=hidden_size, num_hidden_layers=layers, vocab_size=1))
    ids = torch.zeros(2, 5, dtype=torch.int64)
    assert model(ids).logits.isfinite().all()
    assert relative(model.eval()(ids[:, 4:], cache=model(ids[:, :4]).cache).logits[:, 0],
                    model(ids).logits[:, 4]) < 2e-5  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "every", "selective"),
    [(21, 6, (6, 13, 20)), (7, 6, (6,)), (6, 6, (5,)), (1, 6, (0,)), (2, 1, (1,)), (5, 1, (1, 3)), (8, 3, (3, 7))],
)
def test_selective_layers_stand_after_every_k_blocks_and_there_is_one_at_least(layers, every, selective):
    config = TaipanConfig(hidden_size=8, num_hidden_layers=layers, attention_every=every, vocab_size=3)
    assert config.selective_layers == selective
    model = TaipanForCausalLM(config)
    assert tuple(i for i, block in enumerate(model.model.layers) if hasattr(block, "attn")) == selective


@pytest.mark.parametrize(
    ("given", "heads", "size"),
    [({}, 12, 64), ({"num_attention_heads": 6}, 6, 128), ({"attention_head_dim": 32}, 24, 32),
     ({"num_attention_heads": 3, "attention_head_dim": 16}, 3, 16)],
    ids=str,
)  # fmt: skip
def test_heads_follow_from_what_is_given(given, heads, size):
    config = TaipanConfig(**given)
    assert (config.num_attention_heads, config.attention_head_dim) == (heads, size)


@pytest.mark.parametrize(
    ("name", "selective", "millions", "untied"),
    [("190M", 3, 187.5, 286), ("450M", 6, 444.9, 576), ("1.3B", 5, 1291.2, 1554)],
)
def test_reconstructed_sizes_have_the_number_of_parameters_in_their_name(name, selective, millions, untied):
    config = TaipanConfig.reconstructed(name)
    assert len(config.selective_layers) == selective
    assert config.num_hidden_layers == 7 * selective
    assert (config.capacity, config.sliding_window, config.vocab_size) == (0.15, 2048, 128256)
    for given, want, digits in (({}, millions, 1), ({"tie_word_embeddings": False}, untied, 0)):
        with torch.device("meta"):
            model = TaipanForCausalLM(TaipanConfig.reconstructed(name, **given))
        assert round(model.num_parameters() / 1e6, digits) == want


def test_the_default_is_the_smallest_reconstruction():
    named, default = TaipanConfig.reconstructed("190M"), TaipanConfig()
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "attention_head_dim", "intermediate_size")
    assert (
        [getattr(default, name) for name in sizes]
        == [getattr(named, name) for name in sizes]
        == [768, 21, 12, 64, 2048]
    )
    with pytest.raises(ValueError, match=r"one of \('190M', '450M', '1.3B'\); got '7B'"):
        TaipanConfig.reconstructed("7B")


def test_shapes_of_the_parameters():
    d, n, H, K, P, f, V = 24, 5, 4, 2, 6, 40, 31
    config = TaipanConfig(
        hidden_size=d, num_hidden_layers=2, vocab_size=V, num_attention_heads=H, num_key_value_heads=K,
        attention_head_dim=P, intermediate_size=f, gate_hidden=n, sal_post_norm=True, mamba_mlp=True,
    )  # fmt: skip
    found = {
        name: tuple(p.shape)
        for name, p in TaipanForCausalLM(config).named_parameters()
        if ".mixer." not in name and "embed" not in name
    }
    ffn = {"ffn_norm.weight": (d,), "ffn.fc.weight": (2 * f, d), "ffn.out_proj.weight": (d, f)}
    want = {f"layers.0.{name}": shape for name, shape in ({"norm.weight": (d,)} | ffn).items()}
    attn = {
        "norm.weight": (d,), "post_norm.weight": (d,), "gate.weight": (2, n), "gate.bias": (2,),
        "gate.hidden_weight": (n, d), "gate.hidden_bias": (n,), "q_proj.weight": (H * P, d),
        "k_proj.weight": (K * P, d), "v_proj.weight": (K * P, d), "o_proj.weight": (d, H * P),
    }  # fmt: skip
    want |= {f"layers.1.attn.{name}": shape for name, shape in attn.items()}
    want |= {f"layers.1.{name}": shape for name, shape in ffn.items()} | {"norm.weight": (d,)}
    assert found == {f"model.{name}": shape for name, shape in want.items()}


def content(config):
    return {n: value for n, value in config.to_dict().items() if n not in ("transformers_version", "_name_or_path")}


def test_every_field_survives_a_file(tmp_path):
    assert OTHER_VALUES.keys() == own_fields(TaipanConfig).keys(), "give each field a value in OTHER_VALUES"
    assert [name for name, value in OTHER_VALUES.items() if value == getattr(TaipanConfig(), name)] == []
    config = TaipanConfig(**OTHER_VALUES)
    config.save_pretrained(tmp_path)
    for loaded in (TaipanConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path), copy.deepcopy(config)):
        assert type(loaded) is TaipanConfig
        assert content(loaded) == content(config)
        assert {name: getattr(loaded, name) for name in OTHER_VALUES} == OTHER_VALUES
    TaipanForCausalLM(config)(torch.zeros(1, 5, dtype=torch.int64))


def test_every_field_is_read():
    """In its own module, the model's or those of the Mamba-2 blocks."""
    root = Path(inspect.getfile(TaipanConfig)).parents[1]
    names = ("selective_layer", "modeling_taipan", "cache_taipan", "modeling_ssd", "cache_ssd", "base")
    own = [root / "configuration" / f"configuration_{name}.py" for name in ("taipan", "ssd")]
    text = "\n".join(
        p.read_text(encoding="utf-8") for p in (*own, *(next((root / "modeling").rglob(f"{n}.py")) for n in names))
    )
    fields = set(own_fields(TaipanConfig)) - {"tie_word_embeddings", "bos_token_id", "eos_token_id"}
    assert {name for name in fields if not re.search(rf"\b(config|self)\.{name}\b(?! = )", text)} == set()


def test_every_field_is_documented_and_none_that_is_gone():
    documented = re.findall(r"^ {4}(\w+(?:, \w+)*):", inspect.cleandoc(TaipanConfig.__doc__), re.MULTILINE)
    names = {name for line in documented for name in line.split(", ")}
    of_transformers = {"tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
    assert names == set(own_fields(TaipanConfig)) - of_transformers


@pytest.mark.parametrize(
    ("given", "said"),
    [
        *(
            ({name: value}, rf"{name} must be at least 1; got {value}")
            for name in ("vocab_size", "hidden_size", "num_hidden_layers", "state_size", "attention_every")
            for value in (0, -3)
        ),
        *(
            ({name: 0}, f"{name} must be at least 1; got 0")
            for name in ("num_attention_heads", "num_key_value_heads", "attention_head_dim", "sliding_window")
        ),
        ({"intermediate_size": 0}, "intermediate_size must be at least 1; got 0"),
        *(({name: "other"}, f"{name} must be one of .*; got 'other'") for name in CHOICES),
        ({"num_key_value_heads": 5}, "num_key_value_heads must divide num_attention_heads = 12; got 5"),
        *(({name: -1}, f"{name} must be at least 0; got -1") for name in ("kv_cap", "gate_hidden")),
        *(
            ({name: value}, f"{name} must lie between 0 and 1; got {value}")
            for name in ("capacity", "eval_threshold")
            for value in (0.0, 1.0, -0.1, math.nan)
        ),
        *(
            ({name: value}, f"{name} must be positive and finite; got {value}")
            for name in ("gumbel_tau", "rope_theta")
            for value in (0.0, -1.0, math.inf, math.nan)
        ),
        ({"eval_threshold": [0.5, 1.0, 0.5]}, "eval_threshold must lie between 0 and 1; got 1.0"),
        ({"eval_threshold": [0.5, 0.4]}, r"list of 3, one for each selective layer \(6, 13, 20\); got 2: \[0.5, 0.4\]"),
        ({"eval_threshold": []}, r"list of 3, .* got 0: \[\]"),
        *(({"budget_lambda": x}, f"budget_lambda must be finite .* got {x}") for x in (-1.0, math.inf, math.nan)),
        ({"sal_pos": "rope", "attention_head_dim": 1}, "needs attention_head_dim of at least 2; got 1"),
        ({"n_groups": 5}, "n_groups must divide num_heads = 24; got 5"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon must be positive; got 0.0"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused_with_value_and_rule(given, said):
    with pytest.raises(StrictDataclassClassValidationError, match=said):
        TaipanConfig(**given)


@pytest.mark.parametrize(
    "given",
    [{"kv_scope": 1}, {"capacity": "0.15"}, {"gate_norm": 1}, {"kv_cap": 0.5}, {"eval_threshold": ["0.5"]}],
    ids=str,
)
def test_values_of_a_wrong_type_are_refused_by_name(given):
    ((name, value),) = given.items()
    with pytest.raises(StrictDataclassFieldValidationError, match=rf"'{name}'(.|\n)*{value}"):
        TaipanConfig(**given)


def test_thresholds_survive_a_file_in_every_bit_and_one_is_that_of_all_layers(tmp_path):
    """A folder that was saved when there was one threshold holds a number."""
    each = [0.1 + 1e-16, 1 / 3, 1 - 2**-53]
    for given, want in ((0.3, (0.3, 0.3, 0.3)), (each, tuple(each))):
        TaipanConfig(eval_threshold=given).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["eval_threshold"] == given
        loaded = TaipanConfig.from_pretrained(tmp_path)
        assert (loaded.eval_threshold, loaded.thresholds) == (given, want)
    with pytest.raises(StrictDataclassClassValidationError, match=r"list of 2, .* got 3"):
        TaipanConfig.from_pretrained(tmp_path, num_hidden_layers=14).validate()


def test_chunk_size_survives_a_file_of_either_kind(tmp_path):
    for kind in (SSDConfig, TaipanConfig):
        kind(chunk_size=17).save_pretrained(tmp_path)
        assert kind.from_pretrained(tmp_path).chunk_size == 17


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "not rescaled"])
@pytest.mark.parametrize("from_auto", [True, False], ids=["AutoModel", "directly"])
def test_parameters_start_as_documented(rescale, from_auto):
    torch.manual_seed(0)
    d, inner, layers, std = 128, 256, 6, 0.03
    config = TaipanConfig(
        hidden_size=d, num_hidden_layers=layers, attention_every=2, vocab_size=311, state_size=16, gate_hidden=9,
        initializer_range=std, rescale_prenorm_residual=rescale, mamba_mlp=True, use_bias=True,
        gate_bias_init="capacity", capacity=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config) if from_auto else TaipanForCausalLM(config)
    layer = r"model\.layers\.\d\."
    distributed(gather(model, layer + r"attn\.[qkv]_proj\.weight"), normal(std))
    distributed(gather(model, layer + r"attn\.gate\.(hidden_)?weight"), normal(std))
    distributed(gather(model, layer + r"ffn\.fc\.weight"), normal(std))
    distributed(gather(model, r"lm_head\.weight"), normal(std))
    branches = 2 * 2 + 2 * 4
    assert config.num_branches == branches
    out = std / (math.sqrt(branches) if rescale else 1)
    distributed(gather(model, layer + r"(attn\.o_proj|ffn\.out_proj)\.weight"), normal(out))
    distributed(gather(model, layer + r"mixer\.in_proj\.weight"), uniform(-(d**-0.5), d**-0.5))
    bound = inner**-0.5 / (math.sqrt(layers) if rescale else 1)
    distributed(gather(model, layer + r"mixer\.out_proj\.weight"), uniform(-bound, bound))
    biases = gather(model, layer + r"attn\.gate\.bias").view(-1, 2)
    assert torch.allclose(torch.sigmoid(biases[:, 1] - biases[:, 0]), torch.tensor(0.2).double(), atol=1e-6)
    assert (gather(model, r".*(norm|norm_f)\.weight") == 1).all()
    assert (gather(model, layer + r"(attn\.gate\.hidden_bias|mixer\.(in|out)_proj\.bias)") == 0).all()


def test_gates_start_at_a_rate_of_one_half_by_default():
    model = TaipanForCausalLM(TaipanConfig(hidden_size=16, num_hidden_layers=2, vocab_size=7))
    assert (gather(model, r".*gate\.bias") == 0).all()


def test_gates_norms_biases_and_the_recurrence_do_not_decay():
    config = TaipanConfig(hidden_size=16, num_hidden_layers=2, vocab_size=7, gate_hidden=3, sal_post_norm=True)
    attn = ("norm.weight", "post_norm.weight", "gate.weight", "gate.bias", "gate.hidden_weight", "gate.hidden_bias")
    mixer = ("A_log", "D", "dt_bias", "norm.weight", "conv1d.bias")
    want = {"model.norm.weight", "model.layers.0.norm.weight", "model.layers.1.ffn_norm.weight"}
    want |= {f"model.layers.1.attn.{name}" for name in attn} | {f"model.layers.0.mixer.{name}" for name in mixer}
    assert without_decay(TaipanForCausalLM(config)) == want
