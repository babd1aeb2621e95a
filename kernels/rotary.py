"""Rotary encoding of positions: by the zoo's own table, and by the tables of transformers' decoders, and back.

B batch, T time, H heads, K keys, P head size, R channels that turn.
"""

import torch


def rotary_table(positions: torch.Tensor, dim: int, theta: float, dtype: torch.dtype):
    """cos, sin of shape (B, T, dim / 2) for positions (B, T).

    Angles are taken in float64: at position 10^6 a float32 angle is off by 0.06.
    """
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
    angles = positions[..., None].double() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, table, interleaved: bool = False) -> torch.Tensor:
    """Turn the first R channels of x (B, T, H, P) by `table`, (cos, sin) of shape (B, T, R / 2).

    Pairs channel i with i + R / 2; `interleaved` pairs 2 i with 2 i + 1.
    """
    cos, sin = (t[:, :, None].to(x.dtype) for t in table)
    turned, kept = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    a, b = turned.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned, kept], -1) if kept.shape[-1] else turned


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary encoding of x (B, H, K, P) by cos, sin (B, K, P), pairing channel i with i + P / 2."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat([-two, one], -1) * sin


def unturned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The inverse of `turned`, also where the table is scaled: divides by cos^2 + sin^2, taken in float32 or wider."""
    wide = torch.promote_types(cos.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    norm = cos.square() + sin.square()
    return turned(x, cos / norm, -sin / norm)
