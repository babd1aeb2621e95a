"""Programs of torch.export that decode: one takes prompts, one a token, and the state goes in and out as tensors.

    prefill, step = export_decoding(model)
    logits, *state = prefill.module()(input_ids, attention_mask)
    logits, *state = step.module()(logits.argmax(-1, keepdim=True), *state)

`torch.export.save` writes a program, and `torch.export.load` reads it where neither this library nor transformers is.
Keys and values of a hybrid's attention layers are part of the state: a step gives them back one slot longer, a copy.
B batch, T time, V vocabulary. state: the tensors of `cache.layers[i].tensors()`, layer after layer, batch first.
"""

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export

from scrubjay.kernels.dispatch import exported
from scrubjay.modeling.base import ZooForCausalLM
from scrubjay.modeling.caches.cache_state import StateCache
from scrubjay.modeling.inputs.columns import check_rows_hold_tokens
from scrubjay.modeling.inputs.masks import read_mask

BEGUN = 1  # columns seen: of them a step asks only whether there were any. Positions are in the state


class Prefill(nn.Module):
    """(B, T) tokens -> the logits (B, V) of each row's last token, and the state after it.

    Raises:
        ValueError: a model whose cache is no state, or that is being trained.
    """

    def __init__(self, model: ZooForCausalLM):
        super().__init__()
        _check(model)
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """attention_mask: (B, T), 1 for tokens, 0 for padding anywhere in a row, or what is added to scores. A row of
        padding alone is refused; the exported program asserts that there is none."""
        x, state = _advance(self.model, self.model.cache_class(self.model.config), input_ids, attention_mask)
        columns = torch.arange(input_ids.shape[1], device=x.device)
        real = read_mask(attention_mask, look=not exported())[0]
        check_rows_hold_tokens(real)
        last = (columns * real).amax(1)[:, None, None]
        return _given(self.model.head(x.gather(1, last.expand(-1, -1, x.shape[2]))[:, 0]), state)


class DecodeStep(nn.Module):
    """A token of each row (B, 1) and the state -> the logits (B, V) after it, and the new state. Any step of a text.

    Raises:
        ValueError: as `Prefill`; another number of tensors than the state has.
    """

    def __init__(self, model: ZooForCausalLM):
        super().__init__()
        _check(model)
        self.model = model

    def forward(self, input_ids: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """state: what the call before returned after its logits."""
        x, new = _advance(self.model, _holding(self.model, state), input_ids)
        return _given(self.model.head(x[:, 0]), new)


@torch.no_grad()
def export_decoding(
    model: ZooForCausalLM, batch_size: int | None = None, length: int | None = None
) -> tuple[ExportedProgram, ExportedProgram]:
    """Export `Prefill` and `DecodeStep` of a recurrent model; both take and give the same state.

    Args:
        model: in eval mode. The programs keep its weights.
        batch_size, length: rows of both programs and columns of a prompt; None: any number. With None the memory of
            attention grows with the square of a prompt's length.

    Raises:
        ValueError: as `Prefill`.
    """
    rows = {} if batch_size is not None else {0: Dim.DYNAMIC}
    columns = {} if length is not None else {1: Dim.DYNAMIC}
    shape = (2 if batch_size is None else batch_size, 2 if length is None else length)
    ids = torch.zeros(shape, dtype=torch.int64, device=model.device)
    prompt = (ids, torch.ones_like(ids))
    prefill, step = Prefill(model), DecodeStep(model)
    state = prefill(*prompt)[1:]
    layers = model.cache_class(model.config).layers
    shapes = [
        rows | ({layer.grows[n]: Dim.DYNAMIC} if n in layer.grows else {}) for layer in layers for n in layer.names
    ]
    return (
        export(prefill, prompt, dynamic_shapes=(rows | columns, rows | columns)),
        export(step, (ids[:, :1].contiguous(), *state), dynamic_shapes=(rows, tuple(shapes))),
    )


def _check(model):
    if not isinstance(model, ZooForCausalLM) or not issubclass(model.cache_class, StateCache):
        raise ValueError(
            "Decoding is exported of language models whose cache is a state (SSD and its hybrids, Rodimus, Taipan); "
            f"got {type(model).__name__}. Merge adapters first. Of a decoder of transformers export the whole forward "
            "pass, with use_cache=False."
        )
    if model.training:
        raise ValueError("A model is exported as it is used for inference: call model.eval() first.")


def _advance(model, cache, input_ids, attention_mask=None):
    """Hidden states (B, T, D) of the tokens, and the cache's tensors after them."""
    out = model.model(input_ids=input_ids, attention_mask=attention_mask, cache=cache, use_cache=True)
    return out.last_hidden_state, [tensor for layer in cache.layers for tensor in layer.tensors().values()]


def _holding(model, state):
    """A cache that holds the tensors."""
    cache = model.cache_class(model.config)
    count = sum(len(layer.names) for layer in cache.layers)
    if count != len(state):
        raise ValueError(f"The state of this model has {count} tensors; got {len(state)}.")
    left = iter(state)
    for layer in cache.layers:
        layer.fill({name: next(left) for name in layer.names}, BEGUN)
    return cache


def _given(logits, state):
    """What a program returns: no graph, which a loop over steps would make ever longer; laid out as inputs are."""
    return tuple(tensor.detach().contiguous() for tensor in (logits, *state))
