"""Another attention function in an unmodified decoder, for as long as it is wanted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask


@contextmanager
def attending_by(model: PreTrainedModel, name: str, attend: Callable) -> Iterator[None]:
    """Run `model` with `attend`, an attention function as transformers calls them, under `name`; then with its own."""
    before = model.config._attn_implementation
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
