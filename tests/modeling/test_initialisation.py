"""How parameters start, by every way to a model, and which of them decay: as the authors' code has it."""

import math
import re

import pytest
import torch
from parity_cases import PLUS, SSD, shake
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from scrubjay import RodimusConfig, RodimusForCausalLM, SSDConfig, SSDForCausalLM


def directly(config, folder):
    return (SSDForCausalLM if isinstance(config, SSDConfig) else RodimusForCausalLM)(config)


def by_auto_class(config, folder):
    return AutoModelForCausalLM.from_config(config)


def after_meta(config, folder):
    """Built without memory, given memory full of NaN, then initialised."""
    with torch.device("meta"):
        model = directly(config, folder)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.init_weights()
    return model


def from_a_checkpoint_without_them(config, folder):
    """from_pretrained where the file holds one tensor, so that all others have to be initialised."""
    config.save_pretrained(folder)
    save_file(
        {"model.norm.weight": torch.ones(config.hidden_size)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    return type(directly(config, folder)).from_pretrained(folder)


WAYS = [directly, by_auto_class, after_meta, from_a_checkpoint_without_them]
by_every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
rescaled_or_not = pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "not rescaled"])
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def gather(model, pattern):
    """All numbers of the parameters whose whole name matches, float64; at least one must."""
    found = [
        parameter.detach().double().flatten()
        for name, parameter in model.named_parameters()
        if re.fullmatch(pattern, name)
    ]
    assert found, pattern
    return torch.cat(found)


def distributed(values, cdf):
    """Kolmogorov and Smirnov's test of independent values; true draws fail it once in a thousand seeds."""
    x = values.sort().values
    n, p = len(x), cdf(x)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = float(torch.maximum(steps[1:] - p, p - steps[:-1]).max())
    assert distance < 1.95 / math.sqrt(n), f"distance {distance:.4f} of {n} values, limit {1.95 / math.sqrt(n):.4f}"


def uniform(low, high):
    return lambda x: ((x - low) / (high - low)).clip(0, 1)


def normal(std):
    return lambda x: 0.5 * (1 + torch.erf(x / (std * math.sqrt(2))))


def softplus(x):
    return torch.log1p(torch.exp(x))


@by_every_way
@rescaled_or_not
def test_ssd_starts_as_the_authors_do(tmp_path, way, rescale):
    d, inner, layers = 128, 256, 4
    torch.manual_seed(0)
    config = SSDConfig(
        hidden_size=d,
        head_dim=1,  # many heads, many draws
        state_size=16,
        num_hidden_layers=layers,
        vocab_size=311,
        use_bias=True,
        rescale_prenorm_residual=rescale,
    )
    model = way(config, tmp_path)
    mixer = r"model\.layers\.\d\.mixer\."
    distributed(gather(model, mixer + "A_log").exp(), uniform(1, 16))
    steps = softplus(gather(model, mixer + "dt_bias"))
    distributed(steps.log(), uniform(math.log(0.001), math.log(0.1)))
    assert 0.000999 < steps.min() < 0.00105
    assert 0.095 < steps.max() < 0.1001
    distributed(gather(model, mixer + r"conv1d\.(weight|bias)"), uniform(-0.5, 0.5))  # fan-in 4
    distributed(gather(model, mixer + r"conv1d\.bias"), uniform(-0.5, 0.5))
    distributed(gather(model, mixer + r"in_proj\.weight"), uniform(-(d**-0.5), d**-0.5))
    bound = inner**-0.5 / (math.sqrt(layers) if rescale else 1)
    distributed(gather(model, mixer + r"out_proj\.weight"), uniform(-bound, bound))
    distributed(gather(model, r"model\.embed_tokens\.weight"), normal(0.02))
    assert (gather(model, r"model\.(norm|layers\.\d\.norm|layers\.\d\.mixer\.norm)\.weight|.*\.D") == 1).all()
    assert (gather(model, r".*_proj\.bias") == 0).all()


def test_step_sizes_of_ssd_start_at_their_floor():
    torch.manual_seed(0)
    config = SSDConfig(
        hidden_size=256, head_dim=1, num_hidden_layers=1, vocab_size=7, time_step_min=1e-6, time_step_floor=1e-4
    )
    steps = softplus(gather(SSDForCausalLM(config), ".*dt_bias"))
    at_floor = (steps < 1.0001e-4).double().mean()
    assert steps.min() > 0.9999e-4
    assert 0.3 < at_floor < 0.5  # ln 100 / ln 100000 = 0.4


@pytest.mark.parametrize(("vocab_size", "name", "bound"), [(296, "in_proj", 64**-0.5), (64, "out_proj", 128**-0.5)])
def test_ssd_starts_the_same_whatever_the_vocabulary(vocab_size, name, bound):
    """A projection may have as many rows as the vocabulary: bytes and 256 channels, say."""
    torch.manual_seed(0)
    config = SSDConfig(
        hidden_size=64,
        head_dim=16,
        state_size=16,
        num_hidden_layers=2,
        vocab_size=vocab_size,
        rescale_prenorm_residual=False,
    )
    distributed(gather(SSDForCausalLM(config), rf".*{name}\.weight"), uniform(-bound, bound))


@by_every_way
@rescaled_or_not
@pytest.mark.parametrize(("block_type", "hops"), [("rodimus", 1), ("rodimus_plus", 3)])
def test_rodimus_starts_as_the_authors_do(tmp_path, block_type, hops, rescale, way):
    d, m, n, r, layers, pad = 64, 128, 200, 16, 5, 3
    torch.manual_seed(0)
    config = RodimusConfig(
        block_type=block_type,
        hidden_size=d,
        state_size=n,
        num_hidden_layers=layers,
        vocab_size=311,
        num_attention_heads=4,
        initializer_range=0.02,
        rescale_prenorm_residual=rescale,
        tie_word_embeddings=False,
        norm_embedding=True,
        pad_token_id=pad,
    )
    model = way(config, tmp_path)
    layer = r"model\.layers\.\d\."

    def xavier(fan_in, fan_out):
        bound = 2**-2.5 * math.sqrt(6 / (fan_in + fan_out))
        return uniform(-bound, bound)

    distributed(gather(model, layer + r"mixer\.(in_proj|mem_gate_proj)\.weight"), xavier(m, 2 * n))
    distributed(gather(model, layer + r"mixer\.mem_gate_proj\.weight"), xavier(m, 2 * n))
    distributed(gather(model, layer + r"mixer\.ch_gate_(down|up)\.weight"), xavier(m, r))
    biases = gather(model, layer + r"mixer\.mem_gate_bias").view(layers, 2, n)
    distributed(softplus(biases[:, 0]).log().flatten(), uniform(math.log(0.001), math.log(0.1)))
    distributed(torch.sigmoid(biases[:, 1]).flatten(), uniform(1 / 16, 0.9))
    distributed(gather(model, layer + r"mixer\.conv1d\.weight"), uniform(-0.5, 0.5))
    distributed(gather(model, layer + r"mixer\.conv1d\.bias"), uniform(-0.5, 0.5))
    distributed(gather(model, layer + r"mixer\.fc\.weight"), normal(0.02))
    distributed(gather(model, r"lm_head\.weight"), normal(0.02))
    rows = gather(model, r"model\.embed_tokens\.weight").view(-1, d)
    assert (rows[pad] == 0).all()
    distributed(torch.cat([rows[:pad], rows[pad + 1 :]]).flatten(), normal(0.02))
    out = 0.02 / (math.sqrt(hops * layers) if rescale else 1)
    distributed(gather(model, layer + r"mixer\.out_proj\.weight"), normal(out))
    if block_type == "rodimus_plus":
        distributed(gather(model, layer + r"(attn\.[qkv]_proj|ffn\.fc)\.weight"), normal(0.02))
        distributed(gather(model, layer + r"attn\.o_proj\.weight"), normal(out))
        distributed(gather(model, layer + r"ffn\.out_proj\.weight"), normal(out))
    assert (gather(model, r".*norm\.weight|.*residual_weight") == 1).all()
    assert (gather(model, r".*ch_gate_up\.bias") == 0).all()


@pytest.mark.parametrize(
    "config", [SSDConfig(**SSD | {"use_bias": True}), RodimusConfig(**PLUS)], ids=lambda c: c.model_type
)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_checkpoint_without_every_second_tensor_keeps_the_others(tmp_path, config, lost):
    model = shake(directly(config, tmp_path))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = set(sorted(weights)[lost::2])
    kept = {name: weight for name, weight in weights.items() if name not in missing}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) - {"lm_head.weight"} == missing
    for name, weight in loaded.named_parameters():
        assert torch.isfinite(weight).all()
        assert torch.equal(weight, weights[name]) == (name in kept), name


def without_decay(model):
    """Names in the group of no decay, after a check that every parameter is in one group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, kept = model.weight_decay_groups(0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert sorted(names[p] for p in decayed["params"] + kept["params"]) == sorted(names.values())
    return {names[p] for p in kept["params"]}


@tied_or_not
def test_ssd_decays_all_but_biases_norms_and_the_recurrence(tied):
    sizes = dict(use_bias=True, num_hidden_layers=1, tie_word_embeddings=tied)
    mixer = ("A_log", "D", "dt_bias", "norm.weight", "conv1d.bias", "in_proj.bias", "out_proj.bias")
    want = {"model.norm.weight", "model.layers.0.norm.weight"} | {f"model.layers.0.mixer.{name}" for name in mixer}
    assert without_decay(SSDForCausalLM(SSDConfig(**SSD | sizes))) == want


@tied_or_not
def test_rodimus_decays_all_but_biases_norms_and_the_feed_through(tied):
    """An embedding that is no head too does not decay, as the authors' code has it by default."""
    sizes = dict(norm_embedding=True, num_hidden_layers=1, tie_word_embeddings=tied)
    mixer = ("mem_gate_bias", "ch_gate_up.bias", "conv1d.bias", "residual_weight", "act_norm.weight")
    want = {"model.norm.weight", "model.embed_norm.weight"}
    want |= {f"model.layers.0.{name}_norm.weight" for name in ("mixer", "attn", "ffn")}
    want |= {f"model.layers.0.mixer.{name}" for name in mixer}
    want |= set() if tied else {"model.embed_tokens.weight"}
    assert without_decay(RodimusForCausalLM(RodimusConfig(**PLUS | sizes))) == want
