"""What a language model must beat: interpolated n-grams over the same tokens, and lzma over the same bytes.

    P_0(w) = 1 / V
    P_n(w | c) = l P_ML(w | c) + (1 - l) P_{n-1}(w | c')      c: n - 1 tokens of context, c' without its oldest

(Jelinek-Mercer.) The weight l depends on how often the context was seen (its power of two; 0 where it never was), is
fitted by EM on a part of the training text that the counts have not seen, never on held-out text, and the counts are
then taken again on all of it. Every token has a probability above zero, and they sum to one.

A stream is (T + 1,) int64 ids whose first is context only (see corpus.py); scores are (T,), one for each other token.
"""

import lzma

import numpy as np

TUNING_SHARE = 20  # one twentieth of the training stream fits the weights
EM_STEPS = 30


def gram_keys(stream: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
    """One integer for the `order` tokens that end at each scored token: (T,) int64, newest token lowest.

    Before the stream its first token (eos) is repeated. `key // vocab_size` is the context's key.
    """
    padded = np.concatenate([np.full(order - 1, stream[0]), stream[1:]])
    keys = np.zeros(len(stream) - 1, dtype=np.int64)
    for age in range(order - 1, -1, -1):
        keys = keys * vocab_size + padded[order - 1 - age : len(padded) - age]
    return keys


class Counts:
    """How often each key occurred."""

    def __init__(self, keys: np.ndarray, weights: np.ndarray | None = None):
        if weights is None:
            self.keys, self.counts = np.unique(keys, return_counts=True)
        else:
            self.keys, inverse = np.unique(keys, return_inverse=True)
            self.counts = np.bincount(inverse, weights=weights).astype(np.int64)

    def __call__(self, keys: np.ndarray) -> np.ndarray:
        at = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.counts[at], 0)


class NGram:
    """Interpolated n-gram model of every order up to `order`."""

    def __init__(self, stream: np.ndarray, vocab_size: int, order: int = 3):
        if vocab_size**order >= 2**63:
            raise ValueError(
                f"{order}-grams over {vocab_size} tokens do not fit in 64-bit keys. Use a smaller vocabulary or order."
            )
        self.vocab_size, self.order = vocab_size, order
        tune = max(1, len(stream) // TUNING_SHARE)
        self.weights: list[np.ndarray] = []
        self._count(stream[:-tune])
        self._fit(stream[-tune - 1 :])
        self._count(stream)

    def probabilities(self, stream: np.ndarray, order: int | None = None) -> np.ndarray:
        """P of each scored token given up to `order` - 1 tokens before it: (T,) float64."""
        p = np.full(len(stream) - 1, 1 / self.vocab_size)
        for n in range(1, (self.order if order is None else order) + 1):
            likelihood, bucket = self._likelihood(stream, n)
            weight = self.weights[n - 1][bucket]
            p = weight * likelihood + (1 - weight) * p
        return p

    def bits(self, stream: np.ndarray, order: int | None = None) -> float:
        """Bits of the whole stream."""
        return float(-np.log2(self.probabilities(stream, order)).sum())

    def _count(self, stream: np.ndarray) -> None:
        """Grams and contexts of every order. A context counts where a token follows it, so P_ML sums to one."""
        self.grams = [Counts(gram_keys(stream, n, self.vocab_size)) for n in range(1, self.order + 1)]
        self.contexts = [Counts(gram.keys // self.vocab_size, gram.counts) for gram in self.grams]

    def _likelihood(self, stream: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """P_ML (0 in an unseen context) and the bucket of the context's count, 0 where it is 0: (T,) each."""
        keys = gram_keys(stream, n, self.vocab_size)
        seen = self.contexts[n - 1](keys // self.vocab_size)
        bucket = np.where(seen > 0, np.log2(np.maximum(seen, 1)).astype(np.int64) + 1, 0)
        return self.grams[n - 1](keys) / np.maximum(seen, 1), bucket

    def _fit(self, stream: np.ndarray) -> None:
        """Weights of each order in turn, by EM with the orders below held fixed."""
        p = np.full(len(stream) - 1, 1 / self.vocab_size)
        for n in range(1, self.order + 1):
            likelihood, bucket = self._likelihood(stream, n)
            size = np.bincount(bucket, minlength=64)
            weights = np.where(np.arange(64) > 0, 0.5, 0.0)  # an unseen context says nothing
            for _ in range(EM_STEPS):
                mixed = weights[bucket] * likelihood
                share = np.bincount(bucket, weights=mixed / (mixed + (1 - weights[bucket]) * p), minlength=64)
                weights = np.where(size > 0, share / np.maximum(size, 1), weights)
            # never 1: after the recount a token may be new in a context of any size
            self.weights.append(weights.clip(max=1 - 1e-4))
            p = self.weights[-1][bucket] * likelihood + (1 - self.weights[-1][bucket]) * p


def lzma_bits(train: bytes, heldout: bytes) -> dict[str, float]:
    """Bits of the held-out bytes compressed alone, and what they add to the compressed training bytes."""

    def compressed(raw: bytes) -> int:
        return 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))

    return {
        "lzma": compressed(heldout),
        "lzma after the training text": compressed(train + heldout) - compressed(train),
    }
