"""Layers whose weights have 8 or 4 bits (`kernels/bits.py` says how): projections, embedding, tied head.

For inference: nothing in them learns, and a gradient passes to their input by the dequantized weight.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from scrubjay.kernels.bits import GROUPS, Packed, dequantize_weight, multiply, pack, quantize_weight
from scrubjay.kernels.dispatch import traced

logger = logging.get_logger(__name__)


class FewBits(nn.Module):
    """A matrix (O, I) in few bits: what is saved, and what products take, made of it where the layer is.

    Buffers: `codes`, `factors` (4 bits alone) and `scales`, which stays float32 in a model of any dtype.
    """

    codes: Tensor
    factors: Tensor | None
    scales: Tensor

    def __init__(self, weight: Tensor, bits: int, group_size: int, empty: bool = False):
        """`weight`: what to quantize, or if `empty`, the shape, dtype and device of what will be loaded."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits, self.group_size, self.dtype = bits, group_size, weight.dtype
        held = self._empty(weight.device) if empty else quantize_weight(weight, bits, group_size)
        for name, tensor in zip(("codes", "factors", "scales"), held, strict=True):
            self.register_buffer(name, tensor)
        self._packed: tuple | None = None

    def _empty(self, device):
        rows, groups = self.out_features, -(-self.in_features // self.group_size)
        eight = self.bits == 8
        width = self.in_features if eight else groups * self.group_size // 2
        return (
            torch.zeros(rows, width, dtype=torch.int8 if eight else torch.uint8, device=device),
            None if eight else torch.zeros(rows, groups, dtype=torch.int8, device=device),
            torch.ones(rows, dtype=torch.float32, device=device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of what is saved."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def dequantized(self) -> Tensor:
        """(O, I) float32."""
        return dequantize_weight(self.codes, self.factors, self.scales, self.in_features)

    def pack(self) -> Any:
        """What products take: a matrix of FBGEMM, or where it cannot run, the dequantized weight."""
        held = (self.codes, self.scales)
        if self._packed is None or self._packed[0] is not held[0] or self._packed[1] is not held[1]:
            packed: Packed | Tensor | None = pack(self.codes, self.factors, self.scales, self.in_features)
            if packed is None:
                _say_slow(self.codes.device)
                packed = self.dequantized()
            self._packed = (*held, packed)
        return self._packed[2]

    def multiply(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O) in x's dtype."""
        if traced() or (x.requires_grad and torch.is_grad_enabled()):
            return F.linear(x, self.dequantized().to(x.dtype))
        packed = self.pack()
        return F.linear(x, packed.to(x.dtype)) if isinstance(packed, Tensor) else multiply(x, packed)

    def _apply(self, fn, recurse=True):
        scales = self.scales
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scales.device)).dtype
        if self.scales.dtype != torch.float32:
            self.scales = scales.to(self.scales.device)
        self._packed = None
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._packed = None  # the numbers change, the tensors stay

    def __getstate__(self):
        """Copies and pickles make their own packed matrix."""
        return self.__dict__ | {"_packed": None}

    def extra_repr(self):
        groups = f", group_size={self.group_size}" if self.bits == 4 else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}{groups}"


def _say_slow(device):
    why = f"The model is on {device.type}" if device.type != "cpu" else "This PyTorch has no FBGEMM for this processor"
    logger.warning_once(
        f"{why}: weights of few bits are held in float32 as well, and are as slow and large as those. Only what is "
        "saved is small."
    )


class FewBitsLinear(FewBits):
    """`nn.Linear` in few bits; its bias stays as it is."""

    def __init__(self, layer: nn.Linear, bits: int, group_size: int, empty: bool = False):
        super().__init__(layer.weight, bits, group_size, empty)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias


class FewBitsEmbedding(FewBits):
    """`nn.Embedding` in few bits: only the rows that are asked for are dequantized."""

    def __init__(self, layer: nn.Embedding, bits: int, group_size: int, empty: bool = False):
        super().__init__(layer.weight, bits, group_size, empty)
        self.num_embeddings, self.embedding_dim, self.padding_idx = *layer.weight.shape, layer.padding_idx

    def successor(self, new: nn.Module) -> nn.Module:
        """`new` in the place of this embedding: an `nn.Embedding` in as many bits, and the tied head goes with it. An
        adapter around this embedding is left as it is.

        Raises:
            ValueError: another shape, or a module of another kind.
        """
        if self in new.modules():
            return new
        if isinstance(new, nn.Embedding) and new.weight.shape == (self.num_embeddings, self.embedding_dim):
            new = type(self)(new, self.bits, self.group_size)
        if not isinstance(new, FewBits) or (new.out_features, new.in_features) != (self.out_features, self.in_features):
            raise ValueError(
                f"In the place of an embedding of {self.bits} bits goes an Embedding({self.num_embeddings}, "
                f"{self.embedding_dim}); got {new}. Put another into the float model, then quantize it."
            )
        head = self.__dict__.get("head")
        if head is not None:
            head.share(new)
        return new

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int -> (..., I) in the model's dtype."""
        factors = None if self.factors is None else self.factors[ids]
        return dequantize_weight(self.codes[ids], factors, self.scales[ids], self.in_features).to(self.dtype)


class TiedHead(nn.Module):
    """The head that has the embedding's matrix: one set of codes serves lookup and product."""

    embedding: FewBitsEmbedding

    def __init__(self, embedding: FewBitsEmbedding, bias: nn.Parameter | None = None):
        super().__init__()
        self.in_features, self.out_features, self.bias = embedding.in_features, embedding.out_features, bias
        self.share(embedding)

    def share(self, embedding: FewBitsEmbedding) -> None:
        """Have this embedding's matrix. Neither is the other's module: the buffers are the embedding's, saved once."""
        self.__dict__["embedding"], embedding.__dict__["head"] = embedding, self

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        y = self.embedding.multiply(x)
        return y if self.bias is None else y + self.bias


LAYERS = (FewBits, TiedHead)
SMALLEST = min(GROUPS)  # a matrix with a side below it, such as a gate of low rank, has few bytes and one more rounding
