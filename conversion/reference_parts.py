"""What the references of several models share: norms, rotary encodings, heads; in the dtype that they are given.

B batch, T time, D hidden size, P head size, V vocabulary.
"""

import torch

ROWS = 8192  # of the head that are multiplied at a time: in float64 a whole one takes gigabytes


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def turn(x: torch.Tensor, theta: float, channels: int, interleaved: bool) -> torch.Tensor:
    """Each pair of the first `channels` of x (B, T, heads, P) as one complex number, times exp(i t theta^(-2 j / n)).

    n channels, j the pair. A pair is channel j with j + n / 2, or, where `interleaved`, 2 j with 2 j + 1.
    """
    if not channels:
        return x
    pairs = channels // 2
    rates = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * rates
    first = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    second = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    turned, result = (
        torch.complex(x[..., first], x[..., second]) * torch.polar(torch.ones_like(angles), angles),
        x.clone(),
    )
    result[..., first], result[..., second] = turned.real, turned.imag
    return result


def logits(x: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """(B, T, D) float64 hidden states and a head (V, D) to (B, T, V) float64 logits."""
    return torch.cat([x @ rows.double().T for rows in head.split(ROWS)], -1)
