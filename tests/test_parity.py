"""Parity: the models against their recurrences written independently, against transformers, and their initialisation.

`recurrences.py` is the judge, in float64. An error is the largest difference over the root mean square of what is wanted.
"""

import json
import math
from functools import cache

import pytest
import torch
from recurrences import rodimus_logits, ssd_logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

from scrubjay import RodimusConfig, RodimusForCausalLM, SSDConfig, SSDForCausalLM

BOUND = 1e-10  # float64 against the recurrences; the worst of all cases below was WORST64
HF_BOUND = 1e-4  # float32 against transformers in float32; the worst was WORSTHF


def error(got, want):
    """Largest difference over the root mean square of what is wanted; NaN and wrong shapes are failures of their own."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    return float((got.double() - want.double()).abs().max() / want.double().square().mean().sqrt())


@torch.no_grad()
def through(model, ids, pieces):
    """Logits of ids given to a cache piece by piece."""
    past, logits = None, []
    for piece in ids.split(pieces, 1):
        out = model(piece, past_key_values=past, use_cache=True)
        past = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


def tokens(vocab, batch, length):
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def shake(model, seed=0):
    """Random weights that make every term matter: no norm, bias, gate or skip is at a neutral value."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        r = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        last = name.rsplit(".", 1)[-1]
        if last == "A_log":
            r = (0.05 + 4 * torch.rand(parameter.shape, generator=random, dtype=torch.float64)).log()
            r[0] = math.log(0.003)  # a memory longer than the longest test
        elif last == "dt_bias":
            r = r - 1.5
            r[-1] = 30.0  # a step so long that nothing older is left
        elif last == "mem_gate_bias":
            selection = torch.tensor([-110.0, -25.0, -6.0, -3.0, -1.0, 0.0, 3.0, 40.0])
            temperature = torch.tensor([-6.0, -4.0, -3.0, -1.0, 0.0, 2.0, -2.0, -5.0])
            n = len(r) // 2
            r = torch.cat([selection[torch.arange(n) % 8], temperature[torch.arange(n) % 8]]) + 0.1 * r
        elif "conv1d" in name:
            r = 0.5 * r
        elif "norm" in name:
            r = 1 + 0.3 * r
        elif last == "bias":
            r = 0.4 * r
        elif parameter.ndim == 2 and "embed" not in name:
            r = r * parameter.shape[1] ** -0.5
        parameter.copy_(r)
    return model.eval()


# ---- SSD ----

SSD = dict(hidden_size=16, head_dim=8, state_size=6, num_hidden_layers=2, vocab_size=29, pad_token_id=None)
LIMITS = {"no limit": None, "finite limit": (0.1, 0.6)}
OTHER_SSD = {
    "three heads, two taps": dict(expand=1.5, conv_kernel=2, use_conv_bias=False, layer_norm_epsilon=1e-2),
    "one tap, tied": dict(conv_kernel=1, tie_word_embeddings=True, num_hidden_layers=3),
    "untied, five taps": dict(conv_kernel=5, tie_word_embeddings=False, head_dim=4, n_groups=2, chunk_size=7),
}


@cache
def ssd_case(batch=2, length=150, **sizes):
    """Model in float64, ids and the recurrence's logits. The recurrence knows no chunks."""
    model = shake(SSDForCausalLM(SSDConfig(**SSD | sizes)).double())
    ids = tokens(model.config.vocab_size, batch, length)
    return model, ids, ssd_logits(model.state_dict(), model.config, ids)


def ssd_with_chunk(chunk, **sizes):
    model, ids, want = ssd_case(**sizes)
    rechunked = SSDForCausalLM(SSDConfig(**SSD | sizes | {"chunk_size": chunk})).double().eval()
    rechunked.load_state_dict(model.state_dict())
    return rechunked, ids, want


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_ssd_equals_its_recurrence(groups, bias, limit, chunk):
    sizes = dict(n_groups=groups, use_bias=bias, use_conv_bias=bias, time_step_limit=LIMITS[limit])
    model, ids, want = ssd_with_chunk(chunk, **sizes)
    errors = {}
    for T in (1, 3, 4, 5, 64, 65, 150):  # below, at and across the taps and the chunks
        with torch.no_grad():
            errors[T] = error(model(ids[:, :T]).logits, want[:, :T])
    assert max(errors.values()) < BOUND, errors


PIECES = {"steps": [1] * 70, "prefill 65": [65] + [1] * 5, "prefill 2": [2, 1, 1, 3, 1, 4, 5, 1, 1, 50, 1]}


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_ssd_prefill_and_steps_equal_its_recurrence(groups, bias, limit, pieces):
    sizes = dict(n_groups=groups, use_bias=bias, use_conv_bias=bias, time_step_limit=LIMITS[limit])
    model, ids, want = ssd_case(**sizes)
    assert error(through(model, ids[:, :70], PIECES[pieces]), want[:, :70]) < BOUND


@pytest.mark.parametrize("name", OTHER_SSD)
def test_other_ssd_sizes_equal_their_recurrence(name):
    model, ids, want = ssd_case(length=40, **OTHER_SSD[name])
    with torch.no_grad():
        assert error(model(ids).logits, want) < BOUND
    assert error(through(model, ids, [9] + [1] * 28 + [3]), want) < BOUND


def test_long_ssd_prompt_equals_its_recurrence():
    model, ids, want = ssd_case(batch=1, length=700, n_groups=2)
    for grad in (False, True):  # without gradients a long prompt is taken in segments
        with torch.set_grad_enabled(grad):
            assert error(model(ids).logits.detach(), want) < BOUND


SSD_MISTAKES = {
    "A_log taken for the rate": {},
    "B and C exchanged": {},
    "B and C not convolved": {},
    "clamp before softplus": {"time_step_limit": (0.1, 0.6)},
    "clamp ignored": {"time_step_limit": (0.1, 0.6)},
    "decay not applied": {},
    "dt_bias after softplus": {},
    "gate without its activation": {},
    "gated norm over all channels": {"n_groups": 2},
    "groups tiled": {"n_groups": 2},
    "input not times dt": {},
    "no activation after the convolution": {},
    "no final norm": {},
    "norm before gate": {},
    "residual after the norm": {},
    "skip of dt times x": {},
    "skip of x before the convolution": {},
    "state read before its update": {},
    "taps reversed": {},
    "z and x exchanged": {},
}


@pytest.mark.parametrize("wrong", SSD_MISTAKES)
def test_a_wrong_ssd_recurrence_is_found(wrong):
    model, ids, _ = ssd_case(**SSD_MISTAKES[wrong])
    mistaken = ssd_logits(model.state_dict(), model.config, ids[:, :20], wrong)
    with torch.no_grad():
        whole = model(ids[:, :20]).logits
    assert min(error(got, mistaken) for got in (whole, through(model, ids[:, :20], [12] + [1] * 8))) > 100 * BOUND


# ---- SSD and transformers' Mamba-2 ----

HF = dict(hidden_size=64, num_heads=8, head_dim=16, state_size=16, num_hidden_layers=2, vocab_size=61, initializer_range=0.1)
LENGTHS = (1, 3, 4, 5, 255, 256, 257, 1000)  # around the taps and the chunk, and past one segment


@cache
def mamba2(**sizes):
    """transformers' model, ids, and its logits for each length."""
    torch.manual_seed(0)
    model = shake(Mamba2ForCausalLM(Mamba2Config(**HF | sizes)))
    ids = tokens(61, 1, max(LENGTHS))
    with torch.no_grad():
        return model, ids, {T: model(ids[:, :T]).logits for T in LENGTHS}


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
    with torch.no_grad():
        errors = {T: error(model(ids[:, :T]).logits, want[T]) for T in LENGTHS}
    assert max(errors.values()) < HF_BOUND, errors


@pytest.mark.parametrize("more", [{"use_bias": True, "use_conv_bias": False}, {"time_step_limit": (0.1, 0.6)}], ids=str)
def test_a_mamba2_folder_with_biases_or_limits_gives_its_logits(tmp_path, more):
    theirs, ids, want = mamba2(n_groups=2, chunk_size=64, **more)
    theirs.save_pretrained(tmp_path)
    model = loads_whole(tmp_path)
    with torch.no_grad():
        assert error(model(ids).logits, want[1000]) < HF_BOUND
    assert error(through(model, ids[:, :257], [240] + [1] * 17), want[257]) < HF_BOUND


def test_the_recurrence_is_transformers_too():
    theirs, ids, want = mamba2(n_groups=2, chunk_size=64, time_step_limit=(0.1, 0.6))
    names = {"backbone.embeddings.": "model.embed_tokens.", "backbone.layers.": "model.layers.", "backbone.norm_f.": "model.norm."}
    weights = {}
    for name, weight in theirs.state_dict().items():
        old = next((prefix for prefix in names if name.startswith(prefix)), "")
        weights[names.get(old, "") + name.removeprefix(old)] = weight
    assert error(ssd_logits(weights, theirs.config, ids[:, :257]), want[257]) < HF_BOUND


def test_the_mamba2_configuration_arrives(tmp_path):
    sizes = HF | dict(n_groups=2, conv_kernel=3, use_bias=True, chunk_size=32, layer_norm_epsilon=1e-3)
    Mamba2Config(**sizes, tie_word_embeddings=False, bos_token_id=5, eos_token_id=7, pad_token_id=9).save_pretrained(tmp_path)
    config = SSDConfig.from_pretrained(tmp_path)
    for name, value in sizes.items():
        assert getattr(config, name) == value, name
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (5, 7, 9)
    assert not config.tie_word_embeddings
    assert config.model_type == "scrubjay_ssd"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("[0.0, Infinity]", (0.0, math.inf)),
        ('[0.0, {"__float__": "Infinity"}]', (0.0, math.inf)),
        ('{"__float__": "Infinity"}', None),
        ("[0.001, 0.1]", (0.001, 0.1)),
    ],
)
def test_step_limits_as_published_files_write_them(tmp_path, written, read):
    if read is None:
        pytest.skip("a bare number is no pair and no published file has one")
    Mamba2Config(**HF).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["time_step_limit"] = "LIMIT"
    (tmp_path / "config.json").write_text(json.dumps(stored).replace('"LIMIT"', written))
    assert tuple(SSDConfig.from_pretrained(tmp_path).time_step_limit) == read
