"""Rodimus, Rodimus+ and Taipan at the width and depth of the SSD model, beside their own matrix products.

Nothing else runs these models on a CPU, so there is no peer: what is held against them is what they cannot do without.
Random weights; Taipan's gate is calibrated to its capacity on the prompt that is read.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from scrubjay import RodimusConfig, RodimusForCausalLM, TaipanConfig, TaipanForCausalLM
from scrubjay.examples.benchmarks.benchmark_rows import Row, Shape
from scrubjay.examples.benchmarks.ceilings import weight_bytes
from scrubjay.examples.benchmarks.comparison import in_turn, summarized
from scrubjay.examples.benchmarks.model_work import counted, model_pass, products, tokens


def rodimus(shape: Shape, block_type: str) -> PreTrainedModel:
    sizes = {"hidden_size": shape.hidden_size, "num_hidden_layers": shape.num_hidden_layers}
    heads = {"num_attention_heads": max(1, shape.hidden_size // 128)}
    config = RodimusConfig(**sizes, **heads, vocab_size=shape.vocab_size, block_type=block_type)
    return RodimusForCausalLM(config).eval()


def taipan(shape: Shape) -> PreTrainedModel:
    config = TaipanConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        vocab_size=shape.vocab_size,
        state_size=shape.state_size,
        head_dim=shape.head_dim,
    )
    model = TaipanForCausalLM(config).eval()
    if config.thresholds:  # two layers have no selective one
        model.calibrate(tokens(shape.vocab_size, shape.long))
    return model


MODELS: dict[str, Callable[[Shape], PreTrainedModel]] = {
    "Rodimus": lambda shape: rodimus(shape, "rodimus"),
    "Rodimus+": lambda shape: rodimus(shape, "rodimus_plus"),
    "Taipan": taipan,
}


@dataclass(frozen=True)
class WidthLine:
    """One model's work beside its products."""

    name: str
    make: Callable[[Shape], PreTrainedModel]
    row: Row
    shape: Shape

    def measure(self, repetitions: int) -> dict:
        """A record of the line."""
        torch.manual_seed(0)
        model = self.make(self.shape)
        ours = counted(model_pass(model, self.row), self.row.passes)
        sides = {"scrubjay": ours, "products": products(model, self.row)}
        record = summarized(self.name, in_turn(sides, repetitions), None)
        record |= {"limit": self.row.limit, "tokens_per_second": self.row.tokens / record["scrubjay"]}
        return record | ({"weight_bytes": weight_bytes(model)} if self.row.work == "decode" else {})


def lines(shape: Shape) -> list[WidthLine]:
    """A prefill and a decode step of each model."""
    long, short = shape.long, shape.short
    works = [
        Row(f"prefill {long} float32", "prefill", long, limit=2.0),
        Row(f"decode after {short} float32, per token", "decode", short, passes=shape.decoded),
    ]
    return [
        WidthLine(f"{name} of width {shape.hidden_size}, {row.name}", make, row, shape)
        for name, make in MODELS.items()
        for row in works
    ]
