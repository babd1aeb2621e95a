"""Decode attention of Recycled Attention beside full attention on the same preallocated buffer with packed heads.

One step appends a token to every layer and attends; projections and feed-forward networks, which both sides share, are
left out. B = 1, G key heads, H query heads, P head size, L tokens held, K budget, S stride. Times in seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import LlamaConfig

from scrubjay import RecycledConfig
from scrubjay.examples.benchmarks.comparison import Comparison
from scrubjay.modeling.caches.kept_keys import Call
from scrubjay.modeling.caches.recycled_layer import RecycledLayer


@dataclass(frozen=True)
class Sizes:
    """The attention of Llama-3-8B, four layers of it."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    layers: int = 4
    length: int = 32768
    budget: int = 2048
    stride: int = 10


LARGE = Sizes()
SMALL = Sizes(heads=4, kv_heads=2, head_dim=16, layers=2, length=512, budget=32, stride=5)


def settings_of(sizes: Sizes, **changes) -> RecycledConfig:
    base = LlamaConfig(
        hidden_size=sizes.heads * sizes.head_dim,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
    )
    return RecycledConfig(base_config=base, budget=sizes.budget, stride=sizes.stride, **changes)


class Decoding:
    """Layers that hold `length` random tokens, and a step of all of them.

    Args:
        policy: "full" attends all keys at every step, "recycled" at every S-th.
    """

    def __init__(self, sizes: Sizes, dtype: torch.dtype, policy: str, **changes):
        settings, self.call = settings_of(sizes, policy=policy, **changes), Call()
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(1, *shape, sizes.head_dim, generator=generator).to(dtype)

        self.layers = [RecycledLayer(settings, i, self.call) for i in range(sizes.layers)]
        for layer in self.layers:
            keys, values = normal(sizes.kv_heads, sizes.length), normal(sizes.kv_heads, sizes.length)
            layer.update(keys, values)
            layer.attend(normal(sizes.heads, 2), keys, values, 1.0)  # as a prompt that full attention has read
        self.new = [(normal(sizes.kv_heads, 1), normal(sizes.kv_heads, 1), normal(sizes.heads, 1)) for _ in range(64)]
        self.scale, self.taken = sizes.head_dim**-0.5, 0

    @torch.no_grad()
    def step(self) -> None:
        """One token through every layer's attention."""
        k, v, q = self.new[self.taken % len(self.new)]
        self.taken += 1
        for layer in self.layers:
            keys, values = layer.update(k, v)
            layer.attend(q, keys, values, self.scale)


def passes(decoding: Decoding) -> Callable[[], int]:
    """S steps, so that each pass holds one full step of the recycled policy; returns S."""
    stride = decoding.layers[0].settings.stride

    def work() -> int:
        for _ in range(stride):
            decoding.step()
        return stride

    return work


def decode(sizes: Sizes, dtype: torch.dtype) -> dict[str, Callable[[], int]]:
    """Every step from all keys (peer), and one in S."""
    return {
        side: passes(Decoding(sizes, dtype, policy)) for side, policy in (("peer", "full"), ("scrubjay", "recycled"))
    }


def partial_steps(sizes: Sizes) -> dict[str, Callable[[], int]]:
    """Steps that read K keys and nothing else, at a quarter of L (peer) and at L: they should cost the same."""
    sides = {}
    for side, length in (("peer", sizes.length // 4), ("scrubjay", sizes.length)):
        decoding = Decoding(replace(sizes, length=length), torch.float32, "recycled")
        work = passes(decoding)
        for layer in decoding.layers:
            layer.settings.stride = 10**9
        decoding.step()  # the one that chooses
        sides[side] = work
    return sides


def lines(sizes: Sizes) -> list[Comparison]:
    """What the benchmark shows of Recycled Attention."""
    L, K, S = sizes.length, sizes.budget, sizes.stride
    floors = {torch.float32: 3.0, torch.bfloat16: 4.0}
    what = f"Recycled decode at {L}, K = {K}, S = {S}"
    return [
        *(Comparison(f"{what} {str(x)[6:]}", partial(decode, sizes, x), floor) for x, floor in floors.items()),
        Comparison(f"Recycled partial step at {L // 4} and {L}", partial(partial_steps, sizes), 0.85),
    ]
