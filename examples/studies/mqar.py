"""Multi-query associative recall (MQAR, arXiv:2312.04927): the task, and who has solved it.

A sequence lists key-value pairs once, then asks for every key again. Own generator after the description in the paper;
zeros between the queries are the setting of its figure 2. The study is `recall.py`; the same task in words, for any
model with a tokenizer, is in examples/lm_eval_tasks.
"""

import numpy as np
import torch
from transformers import PreTrainedModel

IGNORED = -100  # the label that transformers' loss skips


def draw_distinct(
    rng: np.random.Generator, num_rows: int, population: int, count: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """`count` distinct numbers below `population` for each row, in the order drawn: (num_rows, count) int64.

    Sorting log-weights plus Gumbel noise is drawing one after the other without replacement, for all rows at once.
    """
    scores = rng.gumbel(size=(num_rows, population))
    if weights is not None:
        scores += np.log(weights)
    return np.argsort(-scores, axis=1)[:, :count]


def mqar_batch(
    num_examples: int,
    length: int,
    pairs: int,
    vocab_size: int,
    rng: np.random.Generator,
    *,
    power: float = 0.01,
    random_fill: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences and the answers expected in them, as two (num_examples, length) int64 arrays.

    `length=16, pairs=2, vocab_size=12` gives rows like this one, with 1..5 for keys and 6..11 for values:

                key val key val             query       query
        inputs   4   9   2   6   0   0   0   0   2   0   4   0   0   0   0   0
        labels   -   -   -   -   -   -   -   -   6   -   9   -   -   -   -   -        (- is -100: not scored)

    The label stands at the query's own position: what the model must say there is the value, which is not shown again.
    A key is listed once and asked once. Its query stands 2 * gap after the list, gaps drawn without replacement with
    p(gap) ~ power * (gap + 1) ** (power - 1): near queries are common, far ones rare, `power=1` is uniform.

    Args:
        rng: numpy Generator, the only source of chance.
        random_fill: fill the positions that are no pair and no query with any token instead of 0.
    """
    num_keys = vocab_size // 2 - 1
    if length % 2 or 4 * pairs > length:
        raise ValueError(f"length must be even and at least 4 * pairs = {4 * pairs}, got {length}.")
    if pairs > num_keys:
        raise ValueError(f"pairs = {pairs} needs as many keys, vocab_size = {vocab_size} has {num_keys}.")
    listed, space = 2 * pairs, length // 2 - pairs
    keys = 1 + draw_distinct(rng, num_examples, num_keys, pairs)
    values = vocab_size // 2 + draw_distinct(rng, num_examples, vocab_size - vocab_size // 2, pairs)
    gaps = draw_distinct(rng, num_examples, space, pairs, power * np.arange(1.0, space + 1) ** (power - 1))

    shape = (num_examples, length)
    inputs = rng.integers(vocab_size, size=shape) if random_fill else np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    inputs[:, 0:listed:2], inputs[:, 1:listed:2] = keys, values
    np.put_along_axis(inputs, listed + 2 * gaps, keys, axis=1)
    np.put_along_axis(labels, listed + 2 * gaps, values, axis=1)
    return inputs, labels


def causal_labels(labels: np.ndarray) -> np.ndarray:
    """Labels moved one step later, (B, T): models shift them back inside, so that the query itself predicts the value.

    Nothing is lost: queries stand at even positions, so the last label of a row is never one.
    """
    return np.concatenate([np.full_like(labels[:, :1], IGNORED), labels[:, :-1]], axis=1)


@torch.no_grad()
def accuracy(model: PreTrainedModel, inputs: np.ndarray, labels: np.ndarray, batch_size: int = 256) -> float:
    """Share of queries answered right, over int64 arrays as `mqar_batch` returns them."""
    model.eval()
    right = 0
    for start in range(0, len(inputs), batch_size):
        logits = model(input_ids=torch.from_numpy(inputs[start : start + batch_size]), use_cache=False).logits
        right += (logits.argmax(-1).numpy() == labels[start : start + batch_size]).sum()
    return float(right / (labels != IGNORED).sum())
