"""What benchmark_gpu.py measures of ours: inputs at the published shapes, the call, and what it needs at least.

B batch, T time, H heads, G groups, P head size, N state (key) size, M value size, C channels, W window, n keys.
Products are counted once a multiplication and once an addition; bytes are those of the inputs and outputs, once each.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from scrubjay import RodimusConfig, RodimusForCausalLM, SSDConfig, SSDForCausalLM
from scrubjay.kernels.conv import causal_conv
from scrubjay.kernels.ddts import ddts
from scrubjay.kernels.norm import gated_rms_norm
from scrubjay.kernels.recycle import decode, decode_with_scores
from scrubjay.kernels.ssd import ssd
from scrubjay.kernels.window import window_attention

CHUNK = 64  # steps of a chunk in the counts of products


@dataclass(frozen=True)
class Sizes:
    """Shapes of all works. ssd: (B, T, H, P, N); ddts: (B, T, N, M); window: (B, T, H, P, W); rows: (B, T, C);
    steps: batch sizes of decoding; recycled: (B, H, G, P, n)."""

    ssd: tuple = ((8, 2048, 24, 64, 128), (2, 16384, 64, 64, 128), (1, 65536, 80, 64, 128))
    ddts: tuple = ((8, 2048, 64, 4096), (1, 16384, 64, 4096))
    window: tuple = ((2, 8192, 16, 128, 2048),)
    rows: tuple = ((8, 2048, 4096),)
    steps: tuple = (1, 64)
    step_shape: tuple = (64, 64, 128)  # heads, head size, state size of the step
    recycled: tuple = ((1, 32, 8, 128, 32768), (8, 32, 8, 128, 32768))
    ssd_model: dict | None = None
    rodimus_model: dict | None = None
    trained: tuple = (4, 4096)
    copied: int = 2**30
    product: int = 8192


LARGE = Sizes(
    ssd_model=dict(hidden_size=2048, num_hidden_layers=48, vocab_size=50288),
    rodimus_model=dict(block_type="rodimus_plus", hidden_size=2048, num_hidden_layers=24, vocab_size=126464),
)
SMALL = Sizes(
    ssd=((1, 64, 2, 16, 16),),
    ddts=((1, 64, 16, 64),),
    window=((1, 64, 2, 16, 32),),
    rows=((1, 64, 64),),
    steps=(1,),
    step_shape=(2, 16, 16),
    recycled=((1, 4, 2, 16, 64),),
    ssd_model=dict(hidden_size=32, num_hidden_layers=1, vocab_size=64),
    rodimus_model=dict(block_type="rodimus_plus", hidden_size=64, num_hidden_layers=1, vocab_size=64),
    trained=(1, 32),
    copied=2**16,
    product=64,
)


@dataclass(frozen=True)
class Work:
    """One thing to do. `kind` finds its peers; `shape` is what they need to do the same.

    ours: (device) -> a call without arguments. flops or bytes: what one call needs; flops 0 where memory bounds it.
    peer_flops: of peers that do more than is asked, so that rates are compared instead of times.
    """

    name: str
    kind: str
    shape: dict[str, Any]
    ours: Callable[[torch.device], Callable[[], object]]
    flops: float = 0
    bytes: float = 0
    peer_flops: dict[str, float] = field(default_factory=dict)


def normal(device: torch.device, *shape: int, gradient: bool = False) -> torch.Tensor:
    """bfloat16, as the models compute."""
    return torch.randn(shape, device=device).bfloat16().requires_grad_(gradient)


def log_decays(device: torch.device, *shape: int, gradient: bool = False) -> torch.Tensor:
    """About -0.1 a step, float32 as in the models."""
    return (-0.1 * torch.rand(shape, device=device)).requires_grad_(gradient)


def forward_or_both(op: Callable[..., Any], inputs: dict[str, torch.Tensor], back: bool, **options) -> Callable:
    """A call of `op`, with its backward pass from a gradient of the first output."""
    if not back:
        return torch.no_grad()(lambda: op(**inputs, **options))
    leaves = [x for x in inputs.values() if x.requires_grad]

    def both():
        found = op(**inputs, **options)
        y = found[0] if isinstance(found, tuple) else found
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return both


def works(sizes: Sizes) -> Iterator[Work]:
    """All of them, in the order of the table."""
    for back in (False, True):
        yield from (ssd_work(*shape, back) for shape in sizes.ssd)
        yield from (ddts_work(*shape, back) for shape in sizes.ddts)
        yield from (window_work(*shape, back) for shape in sizes.window)
        yield from (row_work(kind, *shape, back) for shape in sizes.rows for kind in ("conv", "norm"))
    yield from (step_work(kind, batch, *sizes.step_shape) for kind in ("ssd", "ddts") for batch in sizes.steps)
    yield from (recycled_work(kind, *shape) for shape in sizes.recycled for kind in ("partial", "full"))
    yield model_work("SSD", SSDForCausalLM, SSDConfig(**sizes.ssd_model), *sizes.trained)
    yield model_work("Rodimus+", RodimusForCausalLM, RodimusConfig(**sizes.rodimus_model), *sizes.trained)


def titled(kind: str, back: bool, **shape: int) -> str:
    """A line's name."""
    return f"{kind} {'forward + backward' if back else 'forward'} " + " ".join(f"{k}{v}" for k, v in shape.items())


def ssd_work(B: int, T: int, H: int, P: int, N: int, back: bool) -> Work:
    """One group of heads, as the published models have."""

    def ours(device):
        drawn = {"q": (B, T, 1, N), "k": (B, T, 1, N), "v": (B, T, H, P)}
        inputs = {name: normal(device, *shape, gradient=back) for name, shape in drawn.items()}
        inputs |= {"a": log_decays(device, B, T, H, gradient=back), "g": -log_decays(device, B, T, H)}
        return forward_or_both(ssd, inputs, back)

    shape = dict(B=B, T=T, H=H, P=P, N=N)
    flops = 2 * B * T * (CHUNK * N + H * P * (CHUNK + 2 * N)) * (3.5 if back else 1)  # backward: 2.5 of the forward
    return Work(titled("SSD", back, **shape), "ssd", shape | {"back": back}, ours, flops)


def ddts_work(B: int, T: int, N: int, M: int, back: bool) -> Work:
    """Rodimus' recurrence."""

    def ours(device):
        inputs = {name: normal(device, B, T, size, gradient=back) for name, size in (("q", N), ("k", N), ("v", M))}
        return forward_or_both(ddts, inputs | {"a": log_decays(device, B, T, N, gradient=back)}, back)

    shape = dict(B=B, T=T, N=N, M=M)
    flops = 2 * B * T * (CHUNK * N + M * (CHUNK + 2 * N)) * (3.5 if back else 1)
    return Work(titled("DDTS", back, **shape), "ddts", shape | {"back": back}, ours, flops)


def window_work(B: int, T: int, H: int, P: int, W: int, back: bool) -> Work:
    """SW-SKA: one key head."""

    def ours(device):
        heads = {"q": H, "k": 1, "v": H}
        inputs = {name: normal(device, B, T, count, P, gradient=back) for name, count in heads.items()}
        return forward_or_both(window_attention, inputs, back, window=W)

    shape = dict(B=B, T=T, H=H, P=P, W=W)
    pairs, passes = min(W, T) * (2 * T - min(W, T)) / 2, 3.5 if back else 1
    flops = [4 * B * H * P * count * passes for count in (pairs, T * T / 2)]
    every = {"FlashAttention, all keys": flops[1]}
    return Work(titled("SW-SKA", back, **shape), "window", shape | {"back": back}, ours, flops[0], peer_flops=every)


def row_work(kind: str, B: int, T: int, C: int, back: bool) -> Work:
    """Convolution with SiLU, or the gated norm: bound by memory."""

    def ours(device):
        weight = torch.randn(C, device=device, requires_grad=back)
        if kind == "norm":
            inputs = {name: normal(device, B, T, C, gradient=back) for name in ("y", "z")}
            return forward_or_both(gated_rms_norm, inputs | {"weight": weight}, back, eps=1e-5)
        inputs = {"x": normal(device, B, T, C, gradient=back), "weight": normal(device, C, 4, gradient=back)}
        return forward_or_both(causal_conv, inputs, back)

    tensors = {"norm": (3, 5), "conv": (2, 3)}[kind]  # read or written by the forward, by the backward pass
    moved = 2 * B * T * C * (tensors[0] + (tensors[1] if back else 0))
    name = {"norm": "gated norm", "conv": "convolution"}[kind]
    return Work(titled(name, back, B=B, T=T, C=C), kind, dict(B=B, T=T, C=C, back=back), ours, bytes=moved)


def step_work(kind: str, B: int, H: int, P: int, N: int) -> Work:
    """One token: the state is read and written once."""

    def ours(device):
        if kind == "ssd":
            x = {"q": normal(device, B, 1, 1, N), "k": normal(device, B, 1, 1, N), "v": normal(device, B, 1, H, P)}
            x |= {"a": log_decays(device, B, 1, H), "g": -log_decays(device, B, 1, H)}
            state = torch.randn(B, H, N, P, device=device)
            return torch.no_grad()(lambda: ssd(**x, initial_state=state, overwrite=True))
        x = {name: normal(device, B, 1, size) for name, size in (("q", N), ("k", N), ("v", H * P))}
        state = torch.randn(B, N, H * P, device=device)
        return torch.no_grad()(lambda: ddts(**x, a=log_decays(device, B, 1, N), initial_state=state, overwrite=True))

    shape = dict(B=B, H=H, P=P, N=N)
    name = f"{kind.upper()} step " + " ".join(f"{k}{v}" for k, v in shape.items())
    return Work(name, f"{kind} step", shape, ours, bytes=2 * 4 * B * H * P * N)


def recycled_work(kind: str, B: int, H: int, G: int, P: int, n: int) -> Work:
    """Decode attention; a full step returns what it looked at."""

    def ours(device):
        q, k, v = normal(device, B, H, P), normal(device, B, G, n, P), normal(device, B, G, n, P)
        op = decode if kind == "partial" else decode_with_scores
        return torch.no_grad()(lambda: op(q, k, v, P**-0.5))

    shape = dict(B=B, H=H, G=G, P=P, n=n)
    moved = 2 * 2 * B * G * n * P + (4 * B * H * n if kind == "full" else 0)
    name = f"recycled {kind} step " + " ".join(f"{k}{v}" for k, v in shape.items())
    return Work(name, "decode", shape, ours, bytes=moved)


def model_work(name: str, cls: type, config: Any, B: int, T: int) -> Work:
    """Forward and backward of a whole model in bfloat16; its rate counts 6 operations a parameter and token."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in cls(config).parameters())

    def ours(device):
        with torch.device(device):
            model = cls(config).bfloat16().train()
        return train_step(model, torch.randint(config.vocab_size, (B, T), device=device))

    shape = dict(B=B, T=T, config=config)
    size = f"{parameters / 1e9:.1f}B"
    return Work(f"{name} {size} training B{B} T{T}", f"{name} model", shape, ours, 6 * parameters * B * T)


def train_step(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """Forward and backward; no optimizer."""

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return step
