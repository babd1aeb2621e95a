"""What selection saves in Taipan, and that neither bytes nor time grow with the context.

The same weights, with a share C of the tokens selected (scrubjay) and with all of them (peer). One unit of six Mamba-2
blocks and a selective layer, at the width of the reconstructed 190M shape; its gate's threshold is set so that the
share of the prompt's tokens that is selected is C, to the token.

B = 1, T time. Times in seconds, memory in bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from scrubjay import TaipanCache, TaipanConfig, TaipanForCausalLM
from scrubjay.examples.benchmarks.comparison import Comparison
from scrubjay.modeling.layout import Layout
from scrubjay.modeling.modeling_taipan import SelectiveBlock

ALL = 1e-9  # a threshold below every a
CHUNK = 4096  # tokens of a call that reads a context


@dataclass(frozen=True)
class Sizes:
    """The 190M shape with a small vocabulary, whose head would hide what is measured."""

    hidden_size: int = 768
    state_size: int = 128
    sliding_window: int = 2048
    vocab_size: int = 1024
    capacity: float = 0.15
    length: int = 8192  # tokens of a prefill
    contexts: tuple[int, int] = (4096, 65536)  # before decoding
    decoded: int = 32  # tokens of one decode pass
    weighed: tuple[int, int] = (4096, 2**20)  # contexts at which the cache of a narrow model is weighed
    narrow: int = 64


LARGE = Sizes()
SMALL = Sizes(64, 16, 32, 64, 0.15, 256, (64, 256), 4, (64, 256), 32)


@lru_cache(maxsize=1)
def unit(sizes: Sizes) -> tuple[TaipanForCausalLM, float | list[float]]:
    """One unit with random weights, and the threshold at which it selects a share C of `prompt`."""
    model = build(sizes, sizes.hidden_size)
    model.calibrate(prompt(sizes, sizes.length), sizes.capacity)
    return model, model.config.eval_threshold


def build(sizes: Sizes, hidden_size: int) -> TaipanForCausalLM:
    torch.manual_seed(0)
    config = TaipanConfig(
        hidden_size=hidden_size,
        num_hidden_layers=7,
        vocab_size=sizes.vocab_size,
        state_size=sizes.state_size,
        sliding_window=sizes.sliding_window,
    )
    return TaipanForCausalLM(config).eval()


def prompt(sizes: Sizes, length: int) -> torch.Tensor:
    """(1, T) random ids."""
    return torch.randint(sizes.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))


def all_and_few(sizes: Sizes, work: Callable[[], object], units: int) -> dict[str, Callable[[], int]]:
    """The same work with all tokens selected (peer) and with a share C of them."""
    model, threshold = unit(sizes)

    def at(value: float | list[float]) -> Callable[[], int]:
        @torch.no_grad()
        def run() -> int:
            model.config.eval_threshold = value
            work()
            return units

        return run

    return {"peer": at(ALL), "scrubjay": at(threshold)}


def layer_prefill(sizes: Sizes) -> dict[str, Callable[[], int]]:
    """The selective layer alone."""
    model, _ = unit(sizes)
    (block,) = (block for block in model.model.layers if isinstance(block, SelectiveBlock))
    generator = torch.Generator().manual_seed(0)
    h, layout = (
        torch.randn(1, sizes.length, sizes.hidden_size, generator=generator),
        Layout(torch.arange(sizes.length)[None]),
    )
    return all_and_few(sizes, lambda: block(h, layout, threshold=model.config.thresholds[0]), 1)


def unit_prefill(sizes: Sizes) -> dict[str, Callable[[], int]]:
    model, _ = unit(sizes)
    ids = prompt(sizes, sizes.length)
    return all_and_few(sizes, lambda: model(ids, logits_to_keep=1, use_cache=False), 1)


@torch.no_grad()
def read(model: TaipanForCausalLM, sizes: Sizes, contexts: tuple[int, ...]) -> list[TaipanCache]:
    """The caches that have read each context."""
    caches = []
    for context in contexts:
        caches.append(TaipanCache(model))
        for piece in prompt(sizes, context).split(CHUNK, dim=1):
            model(piece, cache=caches[-1], logits_to_keep=1)
    return caches


def decode(sizes: Sizes) -> dict[str, Callable[[], int]]:
    """Steps after a short context (peer) and after a long one, of the same model at the share C."""
    model, threshold = unit(sizes)
    model.config.eval_threshold = threshold
    steps = prompt(sizes, sizes.decoded).split(1, dim=1)

    def after(cache: TaipanCache) -> Callable[[], int]:
        @torch.no_grad()
        def run() -> int:
            model.config.eval_threshold = threshold
            for step in steps:
                model(step, cache=cache)
            return len(steps)

        return run

    short, long = read(model, sizes, sizes.contexts)
    return {"peer": after(short), "scrubjay": after(long)}


def weights(sizes: Sizes) -> dict[str, Callable[[], int]]:
    """Bytes of a narrow model's cache after a short context (peer) and a long one."""
    short, long = read(build(sizes, sizes.narrow), sizes, sizes.weighed)
    return {"peer": lambda: short.nbytes, "scrubjay": lambda: long.nbytes}


def lines(sizes: Sizes) -> list[Comparison]:
    """What the benchmark shows of Taipan."""
    few, T, (short, long), (early, late) = sizes.capacity, sizes.length, sizes.contexts, sizes.weighed
    return [
        Comparison(f"Taipan's selective layer, prefill {T}, {few:.0%}", lambda: layer_prefill(sizes)),
        Comparison(f"Taipan's unit, prefill {T}, {few:.0%}", lambda: unit_prefill(sizes)),
        Comparison(f"Taipan decode after {short} and {long}, per token", lambda: decode(sizes), 0.9),
        Comparison(f"memory, Taipan's cache at {early} and {late}", lambda: weights(sizes), 1.0, "bytes"),
    ]
