"""Documents of two tasks for lm-eval that need no network: what a model can still say of what it has read.

    mqar    a list of names with a number each, then questions for names of the list in any order, answered but for the
            last one (multi-query associative recall, arXiv:2312.04927, in words). Answered by the most likely of the
            list's own numbers, so chance is 1 / pairs
    needle  one sentence with a number somewhere between many that say nothing of it; the model has to write the number

A prompt of more than lm-eval's `max_length` loses its beginning, and with it what is asked for. Unless it is given, it
is 2048 where neither the model's configuration nor its tokenizer names a number, as with the recurrent models: pass
`--model_args pretrained=FOLDER,max_length=32768`, or what the longest prompt needs.

lm-eval calls these functions with the `metadata` of a task, to which its own `--metadata` adds. They take what they do
not know in silence, because lm-eval passes the model's arguments along. Every document is decided by `seed`.
"""

import random
from collections.abc import Iterator

from datasets import Dataset

GOLDEN = (5**0.5 - 1) / 2  # the first n multiples of it, whole parts left out, lie evenly in [0, 1) for every n
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
SENTENCES = (
    "The grass is green and the sky is blue.",
    "A train left the station and another one came in.",
    "It rained in the morning and was dry by noon.",
    "The shop at the corner opens early and closes late.",
    "Somebody was reading a newspaper under the tree.",
    "The river is wide here and the water is slow.",
)


def mqar(pairs: int = 16, questions: int = 4, num_docs: int = 200, seed: int = 0, **_) -> dict[str, Dataset]:
    """`num_docs` documents with `pairs` pairs and `questions` questions, the last of them open.

    Returns: {"test": rows with context (str), choices (list of str), answer (index of the right one)}.

    Raises:
        ValueError: fewer than two pairs or one question, or more questions than pairs.
    """
    if pairs < 2 or not 1 <= questions <= pairs or pairs > 900:
        raise ValueError(f"mqar needs 2 <= pairs <= 900 and 1 <= questions <= pairs; got {pairs} and {questions}.")
    rows = [_recall(random.Random(f"mqar {seed} {i}"), pairs, questions) for i in range(num_docs)]
    return {"test": Dataset.from_list(rows)}


def _recall(rng: random.Random, pairs: int, questions: int) -> dict:
    names = _names(rng, pairs)
    numbers = [str(number) for number in rng.sample(range(100, 1000), pairs)]
    lines = [f"{name}: {number}" for name, number in zip(names, numbers, strict=True)]
    asked = rng.sample(range(pairs), questions)
    answered = [f"{names[i]}: {numbers[i]}" for i in asked[:-1]]
    return {
        "context": "\n".join(["Remember:", *lines, "", "Recall:", *answered, f"{names[asked[-1]]}:"]),
        "choices": numbers,
        "answer": asked[-1],
    }


def needle(sentences: int = 64, num_docs: int = 100, seed: int = 0, **_) -> dict[str, Dataset]:
    """`num_docs` documents of `sentences` sentences and one that is asked for, at depths that any few of them spread.

    Returns: {"test": rows with context (str), answer (five digits), depth (share of the text before the needle)}.

    Raises:
        ValueError: no sentence.
    """
    if sentences < 1:
        raise ValueError(f"needle needs at least one sentence to hide between; got {sentences}.")
    rows = [_hidden(random.Random(f"needle {seed} {i}"), sentences, i * GOLDEN % 1) for i in range(num_docs)]
    return {"test": Dataset.from_list(rows)}


def _hidden(rng: random.Random, sentences: int, depth: float) -> dict:
    name, number = next(_words(rng)), str(rng.randrange(10_000, 100_000))
    text = [rng.choice(SENTENCES) for _ in range(sentences)]
    text.insert(round(depth * sentences), f"The code of {name} is {number}.")
    question = f"Question: what is the code of {name}?\nAnswer: The code of {name} is"
    return {"context": f"{' '.join(text)}\n\n{question}", "answer": number, "depth": depth}


def _names(rng: random.Random, count: int) -> list[str]:
    """`count` different ones."""
    names: dict[str, None] = {}
    words = _words(rng)
    while len(names) < count:
        names[next(words)] = None
    return list(names)


def _words(rng: random.Random) -> Iterator[str]:
    """Capitalised words of three syllables that mean nothing, so that no model knows their numbers beforehand."""
    while True:
        yield "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(3)).capitalize()
