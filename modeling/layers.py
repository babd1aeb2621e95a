"""Layers that models share: projections, norms, convolution, feed-forward. B batch, T time, D hidden size."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from scrubjay.kernels.conv import causal_conv
from scrubjay.kernels.linear import multiplied, wins
from scrubjay.kernels.norm import gated_rms_norm, rms_norm
from scrubjay.kernels.one_token import causal_conv_token, gated_rms_norm_token, rms_norm_token
from scrubjay.modeling.training.adapters import hooked


def project(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """layer(x), of a plain `torch.nn.Linear` by the product that is faster on some CPUs.

    The layers are no class of their own, because quantizers look for torch's by its exact type. What acts on a layer's
    call (a hook, an adapter, another class in its place) acts here too: then the layer is called.
    """
    if type(layer) is nn.Linear and wins(x, layer.weight) and not hooked(layer):
        return multiplied(x, layer.weight, layer.bias)
    return layer(x)


def normed(norm: nn.Module, x: torch.Tensor, layout) -> torch.Tensor:
    """norm(x), told of a single token (`Layout.one_token`) where it is `RMSNorm` itself, which knows of that."""
    return norm(x, True) if layout.one_token and type(norm) is RMSNorm else norm(x)


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis, (..., D) -> (..., D) in weight's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x, one_token=False):
        """`one_token`: see `normed`."""
        return rms_norm_token(x, self.weight, self.eps) if one_token else rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """RMSNorm of (y + skip * x) * silu(z) over `groups` groups of channels: (B, T, D) each, skip (D,) -> (B, T, D)."""

    def __init__(self, size: int, eps: float, groups: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.groups = eps, groups

    def forward(self, y, z, x=None, skip=None):
        """Without x and skip: of one token, as `Layout` says, whose y holds the sum already."""
        if x is None:
            return gated_rms_norm_token(y, z, self.weight, self.eps, self.groups)
        return gated_rms_norm(y, z, self.weight, self.eps, self.groups, x, skip)


class CausalConv(nn.Module):
    """Causal depthwise convolution and SiLU, (B, T, C) -> (B, T, C), with the state that continues it, (B, K - 1, C).

    Parameters are named and shaped as those of a depthwise `nn.Conv1d`: weight (C, 1, K), bias (C,).
    `activate`: whether the SiLU follows.
    """

    def __init__(self, size: int, taps: int, bias: bool = True, activate: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, 1, taps))
        self.bias = nn.Parameter(torch.empty(size)) if bias else None
        self.taps, self.activate = taps, activate

    def reset_parameters(self):
        """torch's own start of a convolution: uniform up to K ** -0.5."""
        bound = self.taps**-0.5
        init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            init.uniform_(self.bias, -bound, bound)

    def forward(self, x, state, layout):
        if layout.one_token and state is not None and x.dtype == state.dtype == self.weight.dtype:
            return causal_conv_token(x, self.weight[:, 0], self.bias, state, self.activate)
        marks = {"cu_seqlens": layout.cu_seqlens, "lengths": layout.lengths}
        return causal_conv(x, self.weight[:, 0], self.bias, state, activate=self.activate, **marks)


def swiglu(packed):
    """silu(gate) * up of (..., 2 C) that packs [up, gate]."""
    up, gate = packed.chunk(2, -1)
    return F.silu(gate) * up


class GatedMLP(nn.Module):
    """SwiGLU, (B, T, D) -> (B, T, D): W_out(silu(gate) * up); `fc` packs [up, gate]."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.out_proj = ends_branch(nn.Linear(intermediate_size, hidden_size, bias=False))

    def forward(self, x):
        return project(self.out_proj, swiglu(project(self.fc, x)))


def ends_branch(projection: nn.Linear) -> nn.Linear:
    """Mark the last projection of a residual branch, whose initial weights shrink with the depth of the model.

    A mark on the layer itself: transformers initialises no module that has parameters in its children alone.
    """
    projection.ends_branch = True  # type: ignore[assignment]
    return projection


def inverse_softplus(y: torch.Tensor) -> torch.Tensor:
    """x with softplus(x) = y, for y > 0."""
    return y + torch.log(-torch.expm1(-y))


def log_uniform(shape, low: float, high: float, floor: float) -> torch.Tensor:
    """Step sizes exp(U[ln low, ln high]), at least `floor`: how Mamba-2 and Rodimus start their gates."""
    return torch.exp(torch.empty(shape).uniform_(math.log(low), math.log(high))).clamp(min=floor)
