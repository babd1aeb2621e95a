"""What full attention looks at, taken from an unmodified model while it runs, in blocks of queries.

`output_attentions` would hold layers x heads x T x T numbers; here only one block of queries of one layer exists at a
time, and what is kept is one number per query and token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from scrubjay.examples.learning.importance import BLOCK, agreed, merged, probabilities, top, tuning_mask
from scrubjay.modeling.decoder.attending import attending_by

CAPTURE, PER_HEAD = "adore_capture", "adore_per_head"


@dataclass
class Request:
    """What is asked of every layer: rows `at` (Q,) of each aggregation in `aggs`, or a top k of each head's own."""

    at: torch.Tensor | None
    k: int
    aggs: tuple[str, ...] = ("mean",)
    layers: tuple[int, ...] = ()
    recent: int = 1
    found: dict[str, torch.Tensor] = field(default_factory=dict)
    num_layers: int = 0


_requests: list[Request] = []  # the innermost one is answered


def _capturing(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """sdpa attention of a whole unpadded text that answers the request of its layer on the way."""
    request = _requests[-1]
    if not request.layers or module.layer_idx in request.layers:
        request.num_layers += 1
        blocks: dict[str, list] = {agg: [] for agg in request.aggs}
        for at in request.at.split(BLOCK):
            p = probabilities(query[:, :, at], key, scaling, at)
            for agg in request.aggs:
                blocks[agg].append(agreed(p, at, agg, request.k))
        for agg, rows in blocks.items():
            request.found[agg] = merged(request.found.get(agg), torch.cat(rows, 1), agg)
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def _per_head(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention of each head to its own top k, itself and the newest tokens; differentiable, in blocks of queries."""
    request, outs = _requests[-1], []
    values = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    for at in torch.arange(query.shape[2], device=query.device).split(BLOCK):
        p = probabilities(query[:, :, at], key, scaling, at)
        flat = p.detach().flatten(0, 1)
        mask = tuning_mask(top(flat, at, request.k), at, request.recent).view(p.shape)
        p = p * mask
        outs.append((p / p.sum(-1, keepdim=True)).to(values.dtype) @ values)
    return torch.cat(outs, 2).transpose(1, 2).contiguous(), None


FUNCTIONS = {CAPTURE: _capturing, PER_HEAD: _per_head}


@contextmanager
def answering(model: PreTrainedModel, name: str, request: Request) -> Iterator[Request]:
    """Run `model` with one of the attention functions above, and put its own back."""
    with attending_by(model, name, FUNCTIONS[name]):
        _requests.append(request)
        try:
            yield request
        finally:
            _requests.pop()


@torch.no_grad()
def attention_rows(
    model: PreTrainedModel,
    ids: torch.Tensor,
    at: torch.Tensor,
    k: int,
    aggs: tuple[str, ...] = ("mean",),
    layers: tuple[int, ...] = (),
) -> dict[str, torch.Tensor]:
    """{aggregation: (B, Q, T)} of the queries `at` (Q,) of whole texts ids (B, T); "mean" is over heads and layers."""
    with answering(model, CAPTURE, Request(at, k, aggs, tuple(layers))) as request:
        model.get_decoder()(input_ids=ids, use_cache=False)
    if "mean" in request.found:
        request.found["mean"] /= request.num_layers
    return request.found
