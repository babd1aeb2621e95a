"""RULER's kinds (arXiv:2404.06654) for lm-eval, without a network: the same samples as studies/real.py asks, by kind.

The prompts have `length` tokens of the tokenizer at `tokenizer`, or else of the model's own folder, which lm-eval
passes along as `pretrained`. They carry the model's chat template already.
"""

from functools import partial

from datasets import Dataset

from scrubjay.examples.studies.real_tasks import RULER, sample


def documents(
    kind: str, length: int = 1024, num_docs: int = 104, seed: int = 0, tokenizer: str = "", pretrained: str = "", **_
) -> dict[str, Dataset]:
    """`num_docs` documents of a kind.

    Returns: {"test": rows with context (str), answers (list of str)}.

    Raises:
        ValueError: no tokenizer is named, or the length is too small for the question.
    """
    from transformers import AutoTokenizer

    if not (name := tokenizer or pretrained):
        raise ValueError("RULER's kinds are cut by a tokenizer: pass --model_args pretrained=FOLDER.")
    own = AutoTokenizer.from_pretrained(name)
    found = [sample(kind, own, length, seed + number) for number in range(num_docs)]
    rows = [{"context": own.decode(one.prompt), "answers": one.answers} for one in found]
    return {"test": Dataset.from_list(rows)}


def found(doc: dict, results: list[str]) -> dict[str, float]:
    """The share of a document's answers that stand in what the model wrote."""
    return {"found": sum(answer in results[0] for answer in doc["answers"]) / len(doc["answers"])}


for _kind in RULER:
    globals()[_kind] = partial(documents, _kind)
