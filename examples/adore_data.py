"""What ADORE's two training scripts share: a decoder to smoke-test with, and real text as streams of token ids."""

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from scrubjay.examples.corpus import encode, load_corpus, train_tokenizer

SMOKE_VOCABULARY = 512


def smoke_model() -> LlamaForCausalLM:
    """A random Llama of two small layers, whose attention is peaked enough to tell tokens apart."""
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=SMOKE_VOCABULARY, initializer_range=0.2))


def streams(model: str | None, text: str | None, train_bytes: int, heldout_bytes: int) -> list[np.ndarray]:
    """[training, held-out] ids of about so many bytes of `text`, or of Python's standard library where it is None.

    model: whose tokenizer is used; None trains one for `smoke_model`.
    """
    corpus = load_corpus(text).limited(train_bytes, heldout_bytes)
    parts = (corpus.train, corpus.heldout)
    if model is None:
        own = train_tokenizer(corpus.train, SMOKE_VOCABULARY)
        return [encode(own, part) for part in parts]
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [
        np.concatenate([tokenizer(document, add_special_tokens=False)["input_ids"] for document in part])
        for part in parts
    ]


def windows(stream: np.ndarray, length: int, count: int, rng: np.random.Generator, device) -> torch.Tensor:
    """(count, length) texts that start anywhere in a stream of ids."""
    if len(stream) <= length:
        raise ValueError(f"The text has {len(stream)} tokens, more than length = {length} are needed. Pass more text.")
    starts = rng.integers(len(stream) - length, size=count)
    return torch.from_numpy(np.stack([stream[a : a + length] for a in starts])).long().to(device)
