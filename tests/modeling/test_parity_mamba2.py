"""SSD and transformers' Mamba-2: its configurations arrive, its folders load, its logits are the same."""

import json
import math
from functools import cache

import pytest
import torch
from parity_cases import error, shake, through, tokens, whole
from recurrences import ssd_logits
from safetensors.torch import load_file, save_file
from transformers import Mamba2Config, Mamba2ForCausalLM

from scrubjay import SSDConfig, SSDForCausalLM

HF = dict(
    hidden_size=64, num_heads=8, head_dim=16, state_size=16, num_hidden_layers=2, vocab_size=61, initializer_range=0.1
)
LENGTHS = (1, 3, 4, 5, 255, 256, 257, 1000)  # around the taps and the chunk, and past one segment
HF_BOUND = 1e-4  # float32 against float32; the worst was 4.5e-5, where transformers itself is 4.8e-5 off the recurrence


@cache
def mamba2(**sizes):
    """transformers' model, ids, and its logits for each length."""
    torch.manual_seed(0)
    model = shake(Mamba2ForCausalLM(Mamba2Config(**HF | sizes)))
    ids = tokens(61, 1, max(LENGTHS))
    return model, ids, {T: whole(model, ids[:, :T]) for T in LENGTHS}


def grouped(model):
    """Whether this transformers normalises each group, as the authors' kernel does; older ones take all channels."""
    return hasattr(model.backbone.layers[0].mixer.norm, "group_size")


def needs_grouped_norm(model):
    if model.config.n_groups > 1 and not grouped(model):
        pytest.skip("this transformers has no grouped norm in Mamba-2 and gives other logits where n_groups > 1")


def loads_whole(folder):
    model, info = SSDForCausalLM.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(kind), (kind, info[kind])
    return model.eval()


def official_names(folder, tied):
    """Give a folder of transformers' Mamba-2 the key names of the authors' code, which stores a tied head too."""
    weights = load_file(folder / "model.safetensors")
    weights["backbone.embedding.weight"] = weights.pop("backbone.embeddings.weight")
    if tied:
        weights["lm_head.weight"] = weights["backbone.embedding.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("names", ["transformers", "official"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("chunk", [64, 256])
@pytest.mark.parametrize("groups", [1, 8])
def test_a_mamba2_folder_loads_and_gives_its_logits(tmp_path, groups, chunk, tied, names):
    theirs, ids, want = mamba2(n_groups=groups, chunk_size=chunk, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    if names == "official":
        official_names(tmp_path, tied)
    model = loads_whole(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    needs_grouped_norm(theirs)
    errors = {T: error(whole(model, ids[:, :T]), want[T]) for T in LENGTHS}
    assert max(errors.values()) < HF_BOUND, errors


@pytest.mark.parametrize("more", [{"use_bias": True, "use_conv_bias": False}, {"time_step_limit": (0.1, 0.6)}], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_mamba2_folder_with_biases_or_limits_gives_its_logits(tmp_path, groups, more):
    theirs, ids, want = mamba2(n_groups=groups, chunk_size=64, **more)
    theirs.save_pretrained(tmp_path)
    model = loads_whole(tmp_path)
    needs_grouped_norm(theirs)
    assert error(whole(model, ids), want[1000]) < HF_BOUND
    assert error(through(model, ids[:, :257], [240] + [1] * 17), want[257]) < HF_BOUND


def test_the_recurrence_is_transformers_too():
    theirs, ids, want = mamba2(n_groups=2, chunk_size=64, time_step_limit=(0.1, 0.6))
    names = {
        "backbone.embeddings.": "model.embed_tokens.",
        "backbone.layers.": "model.layers.",
        "backbone.norm_f.": "model.norm.",
    }
    weights = {}
    for name, weight in theirs.state_dict().items():
        old = next((prefix for prefix in names if name.startswith(prefix)), "")
        weights[names.get(old, "") + name.removeprefix(old)] = weight
    wrong = None if grouped(theirs) else "gated norm over all channels"
    assert error(ssd_logits(weights, theirs.config, ids[:, :257], wrong), want[257]) < HF_BOUND


def test_the_mamba2_configuration_arrives(tmp_path):
    sizes = HF | dict(n_groups=2, conv_kernel=3, use_bias=True, chunk_size=32, layer_norm_epsilon=1e-3)
    theirs = Mamba2Config(**sizes, tie_word_embeddings=False, bos_token_id=5, eos_token_id=7, pad_token_id=9)
    theirs.save_pretrained(tmp_path)
    assert SSDConfig.from_pretrained(tmp_path, chunk_size=16).chunk_size == 16
    config = SSDConfig.from_pretrained(tmp_path)
    sizes["chunk_size"] = SSDConfig().chunk_size  # theirs suits other kernels, and no result depends on it
    for name, value in sizes.items():
        assert getattr(config, name) == value, name
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (5, 7, 9)
    assert not config.tie_word_embeddings
    assert config.model_type == "scrubjay_ssd"


def test_defaults_of_the_mamba2_configuration_arrive(tmp_path):
    theirs = Mamba2Config()
    theirs.save_pretrained(tmp_path)
    ours, fresh = SSDConfig.from_pretrained(tmp_path), SSDConfig()
    elsewhere = ("model_type", "transformers_version", "chunk_size")
    shared = [name for name in theirs.to_dict() if name in fresh.to_dict() and name not in elsewhere]
    assert {"n_groups", "num_heads", "tie_word_embeddings", "eos_token_id", "time_step_limit"} < set(shared)
    for name in shared:
        want = getattr(theirs, name)
        assert getattr(ours, name) == (list(want) if isinstance(want, tuple) else want), name


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("[0.0, Infinity]", (0.0, math.inf)),
        ('[0.0, {"__float__": "Infinity"}]', (0.0, math.inf)),
        ("[0.001, 0.1]", (0.001, 0.1)),
    ],
)
def test_step_limits_as_published_files_write_them(tmp_path, written, read):
    Mamba2Config(**HF).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["time_step_limit"] = "LIMIT"
    (tmp_path / "config.json").write_text(json.dumps(stored).replace('"LIMIT"', written))
    assert tuple(SSDConfig.from_pretrained(tmp_path).time_step_limit) == read
