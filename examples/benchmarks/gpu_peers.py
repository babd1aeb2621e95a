"""The same work by others, for benchmark_gpu.py: each is made from a Work's shape, and imported only then.

https://github.com/fla-org/flash-linear-attention (fla), https://github.com/state-spaces/mamba (mamba_ssm), PyTorch.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from scrubjay.examples.benchmarks.gpu_work import Work, forward_or_both, log_decays, normal, train_step

Call = Callable[[], Any]


def fla_simple_gla(work: Work, device: torch.device) -> Call:
    """SSD in fla: q and k repeated over heads, as that kernel wants them."""
    from fla.ops.simple_gla import chunk_simple_gla

    B, T, H, P, N, back = (work.shape[key] for key in ("B", "T", "H", "P", "N", "back"))
    sizes = {"q": N, "k": N, "v": P}
    inputs = {name: normal(device, B, T, H, size, gradient=back) for name, size in sizes.items()}
    return forward_or_both(chunk_simple_gla, inputs | {"g": log_decays(device, B, T, H, gradient=back)}, back)


def mamba_ssm(work: Work, device: torch.device) -> Call:
    """SSD by its authors."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    B, T, H, P, N, back = (work.shape[key] for key in ("B", "T", "H", "P", "N", "back"))
    inputs = {"x": normal(device, B, T, H, P, gradient=back), "dt": -log_decays(device, B, T, H, gradient=back)}
    inputs |= {"A": -torch.ones(H, device=device).requires_grad_(back)}
    inputs |= {name: normal(device, B, T, 1, N, gradient=back) for name in ("B", "C")}
    return forward_or_both(mamba_chunk_scan_combined, inputs, back, chunk_size=256)


def fla_gla(work: Work, device: torch.device) -> Call:
    """DDTS in fla: one head."""
    from fla.ops.gla import chunk_gla

    B, T, N, M, back = (work.shape[key] for key in ("B", "T", "N", "M", "back"))
    inputs = {name: normal(device, B, T, 1, size, gradient=back) for name, size in (("q", N), ("k", N), ("v", M))}
    return forward_or_both(chunk_gla, inputs | {"g": log_decays(device, B, T, 1, N, gradient=back)}, back)


def heads_first(work: Work, device: torch.device) -> dict[str, torch.Tensor]:
    """q, k, v (B, H, T, P), the key repeated over heads."""
    B, T, H, P, back = (work.shape[key] for key in ("B", "T", "H", "P", "back"))
    return {name: normal(device, B, H, T, P, gradient=back) for name in ("query", "key", "value")}


def sdpa_causal(work: Work, device: torch.device) -> Call:
    """PyTorch's FlashAttention over ALL earlier keys: the rate of its products is what counts, not its time."""
    return forward_or_both(
        F.scaled_dot_product_attention, heads_first(work, device), work.shape["back"], is_causal=True
    )


def flex(work: Work, device: torch.device) -> Call:
    """PyTorch's flex_attention with the same window."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T, W = work.shape["T"], work.shape["W"]
    mask = create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < W), None, None, T, T, device=device)
    return forward_or_both(
        torch.compile(flex_attention), heads_first(work, device), work.shape["back"], block_mask=mask
    )


def torch_conv(work: Work, device: torch.device) -> Call:
    """F.conv1d over channels that lie apart, and SiLU."""
    B, T, C, back = (work.shape[key] for key in ("B", "T", "C", "back"))
    inputs = {"x": normal(device, B, C, T, gradient=back), "weight": normal(device, C, 1, 4, gradient=back)}
    return forward_or_both(lambda x, weight: F.silu(F.conv1d(x, weight, padding=3, groups=C)[..., :T]), inputs, back)


def torch_norm(work: Work, device: torch.device) -> Call:
    """Two operations of PyTorch."""
    B, T, C, back = (work.shape[key] for key in ("B", "T", "C", "back"))
    inputs = {name: normal(device, B, T, C, gradient=back) for name in ("y", "z")}
    inputs["weight"] = normal(device, C, gradient=back)
    return forward_or_both(lambda y, z, weight: F.rms_norm(y * F.silu(z), (C,), weight, 1e-5), inputs, back)


def sdpa_decode(work: Work, device: torch.device) -> Call:
    """One query a head against n keys."""
    B, H, G, P, n = (work.shape[key] for key in ("B", "H", "G", "P", "n"))
    inputs = {
        "query": normal(device, B, H, 1, P),
        "key": normal(device, B, G, n, P),
        "value": normal(device, B, G, n, P),
    }
    return forward_or_both(F.scaled_dot_product_attention, inputs, False, enable_gqa=True)


def fla_model(kind: str) -> Callable[[Work, torch.device], Call]:
    """A model of fla of the same width, depth and vocabulary."""

    def make(work: Work, device: torch.device) -> Call:
        from fla import models

        ours, (B, T) = work.shape["config"], (work.shape["B"], work.shape["T"])
        sizes = {key: getattr(ours, key) for key in ("hidden_size", "num_hidden_layers", "vocab_size")}
        config = getattr(models, f"{kind}Config")(**sizes)
        with torch.device(device):
            model = getattr(models, f"{kind}ForCausalLM")(config).bfloat16().train()
        return train_step(model, torch.randint(ours.vocab_size, (B, T), device=device))

    return make


PEERS: dict[str, dict[str, Callable[[Work, torch.device], Call]]] = {
    "ssd": {"fla simple_gla": fla_simple_gla, "mamba_ssm": mamba_ssm},
    "ddts": {"fla chunk_gla": fla_gla},
    "window": {"FlashAttention, all keys": sdpa_causal, "flex_attention": flex},
    "conv": {"torch": torch_conv},
    "norm": {"torch": torch_norm},
    "decode": {"torch SDPA": sdpa_decode},
    "SSD model": {"fla": fla_model("Mamba2")},
    "Rodimus+ model": {"fla": fla_model("Rodimus")},
}
