"""transformers' pipelines, which take a batch's output apart row by row."""

import copy

import numpy
import pytest
import torch
from heads_cases import KINDS, with_head
from tiny_tokenizer import tiny_tokenizer
from transformers import pipeline
from zoo import ZOO, tokens

TEXTS = ["w5 w7 w9", "w11", "w3 w4 w8 w2 w6"]
OPTIONS = {"candidate_labels": ["w3", "w9 w4"], "hypothesis_template": "w8 {}"}
TASKS = {
    "text-classification": (KINDS[0], {}),
    "zero-shot-classification": (KINDS[0], OPTIONS),
    "token-classification": (KINDS[1], {}),
    "feature-extraction": (None, {}),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_gives_in_batches_what_it_gives_one_by_one(entry, task):
    kind, options = TASKS[task]
    labels = {0: "entailment", 1: "contradiction"}
    changes = {"id2label": labels, "label2id": {name: i for i, name in labels.items()}, "pad_token_id": 0}
    model = with_head(entry, kind).build(**changes) if kind else entry.build(pad_token_id=0).model
    ask = pipeline(task, model=model, tokenizer=tiny_tokenizer(), device="cpu")
    want = [ask(text, **options) for text in TEXTS]
    got = ask(copy.copy(TEXTS), batch_size=2, **options)
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        one, other = list(leaves(one)), list(leaves(other))
        if task == "feature-extraction":
            one = one[: len(other)]  # those of padding come last
        assert one == [pytest.approx(x, abs=1e-4) if isinstance(x, float) else x for x in other]


def leaves(x):
    """The numbers and names in lists and dictionaries."""
    if isinstance(x, dict):
        yield from leaves(list(x.items()))
    elif isinstance(x, list | tuple):
        for part in x:
            yield from leaves(part)
    else:
        yield float(x) if isinstance(x, numpy.floating) else x


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_what_taipan_says_of_a_whole_batch_is_an_item_in_training_and_an_attribute_after(kind):
    (entry,) = (entry for entry in ZOO if entry.name == "taipan")
    model, ids = with_head(entry, kind).build(num_labels=2) if kind else entry.build().model, tokens(2, 12)
    with torch.no_grad():
        out = model(ids)
        assert {"budget_loss", "selection"}.isdisjoint(out.keys())
        assert out.budget_loss.ndim == 0
        torch.testing.assert_close(out.selection, out.sequence_selection.mean(0))
        assert all(len(x) == 2 for x in out.to_tuple() if isinstance(x, torch.Tensor))
        assert {"budget_loss", "selection"} <= model.train()(ids).keys()
