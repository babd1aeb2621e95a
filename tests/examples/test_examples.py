"""The examples' parts against their definitions."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scrubjay.examples.measuring.memory import high_water
from scrubjay.examples.studies.mqar import IGNORED, accuracy, causal_labels, draw_distinct, mqar_batch

PAIRS, LENGTH, VOCAB = 5, 32, 40  # keys 1..19, values 20..39


def batch(num_examples=200, seed=0, **options):
    return mqar_batch(num_examples, LENGTH, PAIRS, VOCAB, np.random.default_rng(seed), **options)


@pytest.mark.parametrize("random_fill", [False, True])
def test_mqar_lists_each_pair_once_and_asks_each_key_once(random_fill):
    inputs, labels = batch(random_fill=random_fill)
    assert inputs.shape == labels.shape == (200, LENGTH)
    for row, answers in zip(inputs, labels, strict=True):
        keys, values = row[0 : 2 * PAIRS : 2], row[1 : 2 * PAIRS : 2]
        assert len(set(keys)) == len(set(values)) == PAIRS
        assert keys.min() >= 1
        assert keys.max() < VOCAB // 2 <= values.min() <= values.max() < VOCAB
        asked = np.flatnonzero(answers != IGNORED)
        assert set(row[asked]) == set(keys)
        assert {row[i]: answers[i] for i in asked} == dict(zip(keys, values, strict=True))
        assert asked.min() >= 2 * PAIRS
        assert not (asked % 2).any()


def test_mqar_fills_with_zeros_or_with_anything():
    inputs, labels = batch()
    rest = labels[:, 2 * PAIRS :] == IGNORED
    assert not inputs[:, 2 * PAIRS :][rest].any()
    inputs, labels = batch(random_fill=True)
    assert len(np.unique(inputs[:, 2 * PAIRS :][labels[:, 2 * PAIRS :] == IGNORED])) == VOCAB


def test_mqar_is_decided_by_its_generator():
    for one, other in zip(batch(seed=3), batch(seed=3), strict=True):
        assert (one == other).all()
    assert (batch(seed=3)[0] != batch(seed=4)[0]).any()


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_first_gap_follows_the_power_law(power):
    num_examples, space = 20_000, LENGTH // 2 - PAIRS
    inputs, _ = batch(num_examples, power=power)
    first = (inputs[:, 2 * PAIRS :] == inputs[:, :1]).argmax(1) // 2  # where the first listed key is asked
    law = np.arange(1.0, space + 1) ** (power - 1)
    law /= law.sum()
    seen = np.bincount(first, minlength=space) / num_examples
    # Five standard deviations of a share of 20,000 draws.
    assert (np.abs(seen - law) < 5 * np.sqrt(law * (1 - law) / num_examples)).all()


def test_draw_distinct_draws_every_number_equally_often():
    drawn = draw_distinct(np.random.default_rng(0), 10_000, 6, 4)
    assert all(len(set(row)) == 4 for row in drawn[:100])
    share = np.stack([np.bincount(column, minlength=6) for column in drawn.T]) / 10_000
    assert np.abs(share - 1 / 6).max() < 5 * math.sqrt(1 / 6 * 5 / 6 / 10_000)


def test_labels_are_shifted_so_that_the_query_predicts_its_value():
    _, labels = batch()
    shifted = causal_labels(labels)
    assert (shifted[:, 1:] == labels[:, :-1]).all()
    assert (shifted[:, 0] == IGNORED).all()
    assert (shifted != IGNORED).sum() == (labels != IGNORED).sum() == 200 * PAIRS


@pytest.mark.parametrize(
    ("length", "pairs", "vocab_size", "words"),
    [(18, 5, 40, "at least 4 \\* pairs = 20, got 18"), (21, 5, 40, "even"), (80, 20, 40, "vocab_size = 40 has 19")],
)
def test_mqar_refuses_sizes_that_do_not_fit(length, pairs, vocab_size, words):
    with pytest.raises(ValueError, match=words):
        mqar_batch(2, length, pairs, vocab_size, np.random.default_rng(0))


class Oracle:
    """Answers `right` of the queries of known sequences correctly and the others with token 0."""

    def __init__(self, labels, right):
        self.labels, self.right, self.seen = labels, right, 0

    def eval(self):
        pass

    def __call__(self, input_ids, use_cache):
        labels = self.labels[self.seen : self.seen + len(input_ids)]
        self.seen += len(input_ids)
        answers = np.where(np.cumsum(labels != IGNORED, 1) <= self.right, labels, 0)
        return SimpleNamespace(logits=torch.eye(VOCAB)[torch.from_numpy(answers).clamp(min=0)])


@pytest.mark.parametrize("right", [0, 2, PAIRS])
def test_accuracy_is_the_share_of_queries_answered_right(right):
    inputs, labels = batch(50)
    assert accuracy(Oracle(labels, right), inputs, labels, batch_size=16) == pytest.approx(right / PAIRS)


def test_high_water_sees_what_was_freed():
    before = high_water(reset=True)
    torch.ones(2**24)  # 64 MiB, freed at once
    assert 60 < (high_water() - before) / 2**20 < 100
