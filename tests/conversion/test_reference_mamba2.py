"""The judge of hybrid Mamba-2 conversions against other implementations: of transformers, and of these tests."""

import pytest
import torch
import torch.nn.functional as F
from conversion_cases import CASES, judge, prompt
from hybrid_cases import HYBRIDS, hybrid
from transformers import BambaConfig, BambaForCausalLM, LlamaConfig, LlamaForCausalLM

from scrubjay.conversion import reference_mamba2
from scrubjay.conversion.checkpoint import Checkpoint
from scrubjay.conversion.reference_mamba2 import hybrid_logits

EXACT = 1e-12  # float64 against float64
ROUNDED = 2e-5  # against float32 inside Bamba


def far(got, want):
    assert got.shape == want.shape
    return float((got.double() - want.double()).abs().max())


@pytest.mark.parametrize("name", ["mamba_ssm", "mamba_ssm, grouped"])
def test_of_plain_mamba2_it_is_the_recurrence(name, tmp_path):
    tensors = CASES[name][0](tmp_path / "source")
    ids = prompt(tensors)
    assert far(hybrid_logits(Checkpoint(tmp_path / "source"), ids, {}), judge(tensors, ids)) < EXACT


def llama_names(tensors, heads, groups, size):
    """Weights of transformers' Llama from those of a model of attention layers and MLPs."""
    out = {
        "model.embed_tokens.weight": tensors["backbone.embedding.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
    }
    out["model.norm.weight"] = tensors["backbone.norm_f.weight"]
    for i in range(2):
        theirs, ours = f"backbone.layers.{i}.", f"model.layers.{i}."
        parts = tensors[f"{theirs}mixer.in_proj.weight"].split([heads * size, groups * size, groups * size])
        out |= {f"{ours}self_attn.{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}
        up, gate = tensors[f"{theirs}mlp.fc1.weight"].chunk(2)
        out |= {f"{ours}mlp.up_proj.weight": up, f"{ours}mlp.gate_proj.weight": gate}
        out[f"{ours}self_attn.o_proj.weight"] = tensors[f"{theirs}mixer.out_proj.weight"]
        out[f"{ours}mlp.down_proj.weight"] = tensors[f"{theirs}mlp.fc2.weight"]
        out[f"{ours}input_layernorm.weight"] = tensors[f"{theirs}norm.weight"]
        out[f"{ours}post_attention_layernorm.weight"] = tensors[f"{theirs}norm2.weight"]
    return {name: tensor.double() for name, tensor in out.items()}


def test_attention_alone_without_a_convolution_is_llama(tmp_path):
    """Which settles order and grouping of heads, the pairs that are turned, their angles, and the halves of fc1."""
    tensors = hybrid("attention alone", tmp_path / "source")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=48)
    llama = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=128, rms_norm_eps=1e-5)).double().eval()
    llama.load_state_dict(llama_names(tensors, 4, 2, 8))
    ids = prompt(tensors)
    with torch.no_grad():
        want = llama(ids).logits
    # Llama takes angles in float32, and norms too
    assert far(hybrid_logits(Checkpoint(tmp_path / "source"), ids, {}), want) < ROUNDED


def test_a_hybrid_without_a_convolution_of_keys_is_bamba(tmp_path, monkeypatch):
    """transformers' Bamba is Mamba-2 with attention layers, whose keys are not convolved, and an MLP behind each."""
    attention = dict(causal=True, num_heads=4, num_heads_kv=2, rotary_emb_dim=4, qkv_proj_bias=False)
    attention |= dict(out_proj_bias=False)
    monkeypatch.setitem(HYBRIDS, "bamba", HYBRIDS["attention"] | dict(attention=attention, F=128))
    tensors = hybrid("bamba", tmp_path / "source")
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=48)
    sizes |= dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8)
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = BambaConfig(**sizes, intermediate_size=128, attn_layer_indices=[1], rope_parameters=rotary)
    bamba = BambaForCausalLM(config).double().eval()
    weights = {}
    for name in bamba.state_dict():
        layer = ".".join(name.split(".")[2:3])
        theirs = f"backbone.layers.{layer}."
        last = name.split(f"model.layers.{layer}.")[-1] if layer.isdigit() else name
        parts = tensors.get(f"{theirs}mixer.in_proj.weight")
        halves = tensors.get(f"{theirs}mlp.fc1.weight")
        weights[name] = {
            "model.embed_tokens.weight": lambda: tensors["backbone.embedding.weight"],
            "lm_head.weight": lambda: tensors["backbone.embedding.weight"],
            "model.final_layernorm.weight": lambda: tensors["backbone.norm_f.weight"],
            "input_layernorm.weight": lambda t=theirs: tensors[f"{t}norm.weight"],
            "pre_ff_layernorm.weight": lambda t=theirs: tensors[f"{t}norm2.weight"],
            "feed_forward.up_proj.weight": lambda h=halves: h.chunk(2)[0],
            "feed_forward.gate_proj.weight": lambda h=halves: h.chunk(2)[1],
            "feed_forward.down_proj.weight": lambda t=theirs: tensors[f"{t}mlp.fc2.weight"],
            "self_attn.q_proj.weight": lambda p=parts: p[:32],
            "self_attn.k_proj.weight": lambda p=parts: p[32:48],
            "self_attn.v_proj.weight": lambda p=parts: p[48:],
            "self_attn.o_proj.weight": lambda t=theirs: tensors[f"{t}mixer.out_proj.weight"],
        }.get(last, lambda t=theirs, n=last: tensors[f"{t}mixer.{n.removeprefix('mamba.')}"])().double()
    bamba.load_state_dict(weights)
    ids = prompt(tensors)
    with torch.no_grad():
        want = bamba(ids).logits
    assert float(want.abs().max()) > 1
    assert far(hybrid_logits(Checkpoint(tmp_path / "source"), ids, {}), want) < ROUNDED


def whole_attention(u, w, sizes):
    """The attention layer at once, by PyTorch's own convolution and attention."""
    cfg, T = reference_mamba2.MHA | sizes.attn_cfg, u.shape[1]
    H, size = cfg["num_heads"], cfg["head_dim"] or u.shape[-1] // cfg["num_heads"]
    K = cfg["num_heads_kv"] or H
    packed = F.linear(u, w["in_proj.weight"], w.get("in_proj.bias"))
    qkv, network = packed[..., : (H + 2 * K) * size], packed[..., (H + 2 * K) * size :]
    if "conv1d.weight" in w:
        taps = w["conv1d.weight"].shape[-1]
        padded = F.pad(qkv.mT, (taps - 1, 0))
        qkv = F.conv1d(padded, w["conv1d.weight"], w["conv1d.bias"], groups=qkv.shape[-1]).mT
    heads = qkv.view(*u.shape[:2], H + 2 * K, size).transpose(1, 2)
    R = cfg["rotary_emb_dim"]
    rates = torch.tensor([cfg["rotary_emb_base"] ** (-2 * j / R) for j in range(R // 2)], dtype=torch.float64)
    angles = torch.arange(T)[:, None] * rates
    turning = heads[:, : H + K, :, :R]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if cfg["rotary_emb_interleaved"] else turning.chunk(2, -1)
    a, b = a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()
    both = torch.stack([a, b], -1).flatten(-2) if cfg["rotary_emb_interleaved"] else torch.cat([a, b], -1)
    turned = torch.cat([both, heads[:, : H + K, :, R:]], -1)
    o = F.scaled_dot_product_attention(
        turned[:, :H], turned[:, H:], heads[:, H + K :], is_causal=True, scale=cfg["softmax_scale"], enable_gqa=K < H
    )
    o = o.transpose(1, 2).flatten(2)
    up, gate = network.chunk(2, -1)
    return F.linear(torch.cat([o, up * F.silu(gate)], -1), w["out_proj.weight"], w.get("out_proj.bias"))


@pytest.mark.parametrize("name", [name for name in HYBRIDS if name != "MLP"])
def test_its_attention_is_that_of_pytorch(name, tmp_path, monkeypatch):
    tensors = hybrid(name, tmp_path / "source")
    ids = prompt(tensors)
    want = hybrid_logits(Checkpoint(tmp_path / "source"), ids, {})
    monkeypatch.setattr(reference_mamba2, "_attention", whole_attention)
    assert far(hybrid_logits(Checkpoint(tmp_path / "source"), ids, {}), want) < EXACT


def test_settings_hold_before_the_configuration(tmp_path):
    tensors = hybrid("attention", tmp_path / "source")
    ids = prompt(tensors)
    checkpoint = Checkpoint(tmp_path / "source")
    plain = hybrid_logits(checkpoint, ids, {})
    cfg = HYBRIDS["attention"]["attention"] | {"rotary_emb_dim": 16}
    for settings in ({"attn_cfg": cfg}, {"time_step_limit": [0.0, 0.05]}, {"layer_norm_epsilon": 0.1}):
        assert far(hybrid_logits(checkpoint, ids, settings), plain) > 1e-3
