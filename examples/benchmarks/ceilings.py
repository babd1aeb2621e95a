"""What a machine can do at most, in the run that is held against it: matrix products, copies, reads.

A model's products alone are those that one of its passes makes, each on its own weights, so that these come from memory
as they do in the model, by the library that is fastest for the shape. What keeps the products is hardly faster.

Rates in multiplications and additions a second, bandwidth in bytes a second.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from scrubjay.kernels.linear import linear
from scrubjay.modeling.bits_layers import FewBits, TiedHead

FEW_ROWS = 64  # up to these a product is bound by reading its weight, and all weights of a shape are timed
TRIED = 2  # weights of a shape on which libraries are compared at more rows
ENOUGH_ROWS = 512  # of those on which they are


@dataclass(frozen=True)
class Product:
    """x (rows, I) times the transpose of weight (O, I)."""

    weight: torch.Tensor
    rows: int

    @property
    def shape(self) -> tuple:
        return (*self.weight.shape, self.weight.dtype, self.rows)


def onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product by oneDNN, whatever the processor."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, None, "none", [], "")


def widened(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product of float32 copies: faster where the processor cannot multiply 16 bits."""
    return linear(x.float(), weight.float()).to(x.dtype)


def libraries(dtype: torch.dtype) -> dict[str, Callable]:
    """What can multiply numbers of this type here. In bfloat16 `F.linear` is oneDNN already, where that can do it."""
    found: dict[str, Callable] = {"F.linear": F.linear, "scrubjay": linear}
    if dtype != torch.float32:
        found["float32 copies"] = widened
    elif torch.backends.mkldnn.is_available():
        found["oneDNN"] = onednn
    return found


def least(work: Callable[[], object], repetitions: int = 5) -> float:
    """Seconds of the fastest of some passes, after one unmeasured: what the machine can do."""
    work()
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def bandwidth(nbytes: int) -> dict[str, float]:
    """Bytes a second of a copy (read and written count) and of the fastest of three ways to read once."""
    width = 2**10
    a = torch.ones(nbytes // 4 // width, width)
    b, x, flat = torch.empty_like(a), torch.ones(width), a.view(-1)
    reads = [lambda: a.sum(), lambda: torch.mv(a, x), lambda: torch.dot(flat, flat)]
    return {"copy": 2 * a.nbytes / least(lambda: b.copy_(a)), "read": a.nbytes / min(least(read) for read in reads)}


@torch.no_grad()
def gemm_rates(shapes: Iterable[tuple[int, int, int]], dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Operations a second of each library on x (R, I) times weight^T (I, O), by "R x I x O"."""
    rates = {}
    for R, I, O in shapes:
        x, weight = torch.randn(R, I).to(dtype), torch.randn(O, I).to(dtype)
        seconds = {name: least(partial(f, x, weight), 3) for name, f in libraries(dtype).items()}
        rates[f"{R} x {I} x {O}"] = {name: 2 * R * I * O / each for name, each in seconds.items()}
    return rates


def products_of(model: nn.Module, run: Callable[[], object]) -> list[Product]:
    """The products with a weight that one call of `run` makes, in its order."""
    found = []

    def note(layer, arguments):
        found.append(Product(layer.weight.detach(), arguments[0].numel() // layer.in_features))

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


class Alone:
    """A model's products and nothing else; a call does all of them once and returns `units`.

    Args:
        gradients: with those of the inputs and of the weights: three products for each.
    """

    def __init__(self, products: list[Product], *, gradients: bool = False, units: int = 1):
        self.products, self.gradients, self.units = products, gradients, units
        self.operands = {p.shape: self._operands(p) for p in products}
        by_shape: dict[tuple, list[Product]] = {}
        for product in {(p.weight.data_ptr(), p.rows): p for p in products}.values():
            by_shape.setdefault(product.shape, []).append(product)
        self.chosen = {shape: self._fastest(group) for shape, group in by_shape.items()}

    def _operands(self, product: Product) -> tuple[torch.Tensor, torch.Tensor]:
        """x (rows, I) and, for gradients, that of the outputs (rows, O)."""
        generator = torch.Generator().manual_seed(0)
        O, I = product.weight.shape
        sizes = [(product.rows, I), (product.rows, O if self.gradients else 0)]
        x, dy = (torch.randn(size, generator=generator).to(product.weight.dtype) for size in sizes)
        return x, dy

    def _fastest(self, group: list[Product]) -> tuple[Callable, ...]:
        """The library for the product of this shape and, with gradients, for each of its two."""
        tried = group if group[0].rows <= FEW_ROWS else group[:TRIED]
        found = libraries(group[0].weight.dtype).values()

        def seconds(kind: int, library: Callable) -> float:
            return least(lambda: [self._multiply(p, kind, library, ENOUGH_ROWS) for p in tried], 2)

        return tuple(min(found, key=partial(seconds, kind)) for kind in range(3 if self.gradients else 1))

    def _multiply(self, product: Product, kind: int, library: Callable, rows: int | None = None) -> torch.Tensor:
        """0: the outputs; 1: the gradient of the inputs; 2: of the weight. Of the first `rows`, None for all."""
        x, dy = (operand[:rows] for operand in self.operands[product.shape])
        if kind == 0:
            return library(x, product.weight)
        return library(dy, product.weight.t()) if kind == 1 else library(dy.t(), x.t())

    @torch.no_grad()
    def __call__(self) -> int:
        for product in self.products:
            for kind, library in enumerate(self.chosen[product.shape]):
                self._multiply(product, kind, library)
        return self.units


def weight_bytes(model: nn.Module) -> int:
    """Bytes that a decode step cannot but read: all parameters, of an embedding that is no head only its row."""
    embedding, head = (getattr(f(), "weight", None) for f in (model.get_input_embeddings, model.get_output_embeddings))
    matrices = [m for m in model.modules() if isinstance(m, FewBits)]
    if not isinstance(model.get_output_embeddings(), TiedHead):
        matrices = [m for m in matrices if m is not model.get_input_embeddings()]
    packed = sum(m.in_features * m.out_features for m in matrices)  # a byte each, in 4 bits too
    whole = (p.nbytes // len(p) if p is embedding and p is not head else p.nbytes for p in model.parameters())
    return packed + sum(whole)
