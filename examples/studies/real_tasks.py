"""Questions to a pretrained model about a text that it has just read, made offline from a seed.

The kinds of RULER (arXiv:2404.06654, section 3 and appendix), in words of our own, and four with more output:

    single       a number hidden in a text, asked for
    multikey     four numbers under four names, one asked for
    multivalue   four numbers under one name, all asked for
    multiquery   four numbers under four names, all asked for
    tracking     a chain of assignments: the five variables that have a value (RULER's "variable tracking")
    common       the ten words of a list that occur ten times, all others once (RULER's "common words", fewer times)
    frequent     the three most frequent of coded words whose counts follow a zeta law (RULER's "frequent words")
    questions    sixteen records in a text, then eight of them asked for, one after the other, in one output
    copy         a passage of the text again, of which the beginning is given
    text         the text goes on: its loss
    agree        what full attention writes about a text, greedily

The text is English documentation that every Python has (`pydoc_data.topics`); names are words of it, numbers have seven
digits. A prompt has exactly the wanted number of tokens of the model's own tokenizer, its chat template included, so
that rows of a batch need no padding. In RULER's kinds the model writes freely, and the share of the answers found in
what it writes counts. In the others what follows the prompt is given, token by token, and it counts whether each answer
was the most likely text: a miss does not spoil the next question.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pydoc_data.topics import topics

RECORDS, ASKED = 16, 8  # of "questions"
COPIED, SHOWN = (
    192,
    16,
)  # tokens of the passage of "copy", a quarter of the prompt at most, and how many of them are given
GOES_ON = 128  # tokens of "text" whose loss is taken
WRITES = 64  # tokens of "agree"
OFTEN = 10  # times that ten words of "common" occur
ZETA = 2.0  # of "frequent"
PLACE = "\x1f"  # where a chat template puts what the user says


@dataclass
class Sample:
    """A prompt and what counts as an answer.

    prompt: token ids. answers: texts looked for in `new` tokens that the model writes. forced: instead, the ids that
    follow the prompt, with the `spans` (start, end) of its answers; where there are neither, what full attention writes
    in `new` tokens follows, and every token of it is an answer.
    """

    prompt: list[int]
    answers: list[str] = field(default_factory=list)
    new: int = 0
    forced: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)


def sample(kind: str, tokenizer, length: int, seed: int) -> Sample:
    """One sample of `length` prompt tokens.

    Raises:
        ValueError: an unknown kind; a length too small for the question itself.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}; got {kind!r}.")
    return MAKERS[kind](Writer(tokenizer, length, random.Random(f"{kind} {length} {seed}")))


@cache
def sentences() -> tuple[str, ...]:
    """The prose of the documentation, in its order."""
    text = " ".join(topics[name] for name in sorted(topics))
    parts = re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text))
    return tuple(part for part in parts if re.fullmatch(r"[A-Z][A-Za-z ,;()'\-]{30,240}[.!?]", part))


@cache
def words() -> tuple[str, ...]:
    """Lower-case words that occur in it at least three times."""
    counts: dict[str, int] = {}
    for word in re.findall(r"\b[a-z]{4,9}\b", " ".join(topics.values())):
        counts[word] = counts.get(word, 0) + 1
    return tuple(sorted(word for word, count in counts.items() if count >= 3))


class Writer:
    """Puts a sample together: an instruction, a context that fills the length, a question, the answer's beginning."""

    def __init__(self, tokenizer, length: int, rng: random.Random):
        self.tokenizer, self.length, self.rng = tokenizer, length, rng
        self.before, self.after = "", "\n"
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": PLACE}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            self.before, self.after = text.split(PLACE)

    def ids(self, text: str) -> list[int]:
        """Tokens of a piece of text."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def number(self) -> str:
        """Seven digits."""
        return str(self.rng.randrange(1_000_000, 10_000_000))

    def names(self, count: int) -> list[str]:
        """Different names of two words."""
        found: dict[str, None] = {}
        while len(found) < count:
            found["-".join(self.rng.sample(words(), 2))] = None
        return list(found)

    def around(self, instruction: str, question: str, start: str, fill: Callable[[int], list[int]]) -> list[int]:
        """A prompt in which `fill(room)` gives so many tokens of context."""
        head = self.ids(f"{self.before}{instruction}\n")
        tail = self.ids(f"\n{question}{self.after}{start}")
        room = self.length - len(head) - len(tail)
        context = fill(room) if room > 0 else []
        if len(context) != room:
            needed = self.length - room + len(context)
            raise ValueError(f"{self.length} tokens are too few for this question: it needs {needed}.")
        return head + context + tail

    def hide(self, needles: list[str]) -> Callable[[int], list[int]]:
        """A context of sentences, with the needles between them in their order."""
        pieces = [self.ids(f" {needle}") for needle in needles]

        def fill(room: int) -> list[int]:
            text, context = self.text(room - sum(map(len, pieces))), []
            at = sorted(self.rng.choices(range(len(text) + 1), k=len(pieces)))
            for i, sentence in enumerate([*text, []]):
                for _ in range(at.count(i)):
                    context += pieces.pop(0)
                context += sentence
            return context

        return fill

    def text(self, room: int) -> list[list[int]]:
        """Sentences of `room` tokens in all; the last may have lost its end."""
        found: list[list[int]] = []
        start, count = self.rng.randrange(len(sentences())), 0
        while count < room:
            found.append(self.ids(f" {sentences()[start % len(sentences())]}"))
            start, count = start + 1, count + len(found[-1])
        if count > room and found:
            found[-1] = found[-1][: room - count]
        return found

    def listed(self, often: list[str], others: list[str]) -> Callable[[int], list[int]]:
        """A context of shuffled words: `often` OFTEN times each, as many of the others as there is room for."""

        def fill(room: int) -> list[int]:
            found = [self.ids(f" {word}") for word in often] * OFTEN
            count = sum(map(len, found))
            for word in others:
                if count + len(piece := self.ids(f" {word}")) <= room:
                    found, count = [*found, piece], count + len(piece)
            self.rng.shuffle(found)
            dots = self.ids(".") * max(room - count, 0)  # what no word fits into
            return [token for piece in found for token in piece] + dots

        return fill


def _needles(names: list[str], numbers: list[str]) -> list[str]:
    pairs = zip(names, numbers, strict=True)
    return [f"One of the special magic numbers for {name} is: {number}." for name, number in pairs]


def _hidden(writer: Writer, names: list[str], asked: list[str]) -> Sample:
    """Numbers under names, of which `asked` are asked for. A name may occur several times."""
    numbers = [writer.number() for _ in names]
    answers = [number for name, number in zip(names, numbers, strict=True) if name in asked]
    many = len(answers) > 1
    what = "are all the special magic numbers" if many else "is the special magic number"
    about = ", ".join(asked[:-1]) + f", and {asked[-1]}" if len(asked) > 1 else asked[0]
    of = f"special magic number{'s' * many} for {about} in the text above"
    prompt = writer.around(
        "The text below mentions special magic numbers. Remember them: a question about them comes at its end.",
        f"What {what} for {about} in the text above?",
        f"The {of} {'are' if many else 'is'}",
        writer.hide(_needles(names, numbers)),
    )
    return Sample(prompt, answers, new=16 * len(answers))


def _single(writer: Writer) -> Sample:
    return _hidden(writer, name := writer.names(1), name)


def _multikey(writer: Writer) -> Sample:
    return _hidden(writer, names := writer.names(4), writer.rng.sample(names, 1))


def _multivalue(writer: Writer) -> Sample:
    return _hidden(writer, 4 * (name := writer.names(1)), name)


def _multiquery(writer: Writer) -> Sample:
    return _hidden(writer, names := writer.names(4), writer.rng.sample(names, 4))


def _tracking(writer: Writer) -> Sample:
    value = str(writer.rng.randrange(10_000, 100_000))
    names: list[str] = []
    while len(names) < 5:
        name = "".join(writer.rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5))
        names += [name] * (name not in names)
    values = [value, *(f"VAR {name}" for name in names[:-1])]
    prompt = writer.around(
        "The text below assigns values to variables, some by way of others. Keep track of them.",
        f"Which five variables of the text above have the value {value}?",
        f"The five variables that have the value {value} are:",
        writer.hide([f"VAR {name} = {of}." for name, of in zip(names, values, strict=True)]),
    )
    return Sample(prompt, names, new=48)


def _common(writer: Writer) -> Sample:
    chosen = writer.rng.sample(words(), len(words()))
    prompt = writer.around(
        "In the list of words below ten stand more often than all others. Find them.",
        "Which ten words stand most often in the list above?",
        "The ten words that stand most often in the list are:",
        writer.listed(chosen[:10], chosen[10:]),
    )
    return Sample(prompt, chosen[:10], new=64)


def _frequent(writer: Writer) -> Sample:
    """Coded words drawn by a zeta law; the three most frequent are fixed by drawing the counts, not the words."""
    codes = ["".join(writer.rng.choices("bcdfghjklmnpqrstvwxz", k=6)) for _ in range(40)]
    weights = [(rank + 1) ** -ZETA for rank in range(len(codes))]

    def fill(room: int) -> list[int]:
        pieces = [writer.ids(f" {code}") for code in codes]
        mean = sum(w * len(p) for w, p in zip(weights, pieces, strict=True)) / sum(weights)
        counts = [int(room / mean * w / sum(weights)) for w in weights]
        found = [piece for piece, count in zip(pieces, counts, strict=True) for _ in range(count)]
        while sum(map(len, found)) > room:
            found.remove(pieces[0])
        writer.rng.shuffle(found)
        return [t for piece in found for t in piece] + writer.ids(".") * (room - sum(map(len, found)))

    prompt = writer.around(
        "The text below is made of coded words. Count how often each of them stands in it.",
        "Which three coded words are the most frequent in the text above? Name them alone.",
        "The three most frequent coded words are:",
        fill,
    )
    return Sample(prompt, codes[:3], new=48)


def _questions(writer: Writer) -> Sample:
    names = writer.names(RECORDS)
    numbers = [writer.number() for _ in names]
    prompt = writer.around(
        "Memorize the following text. I will quiz you about the numbers in it afterwards.",
        "Write down some of the numbers that the text above mentions.",
        "",
        writer.hide(_needles(names, numbers)),
    )
    found = Sample(prompt)
    for i in writer.rng.sample(range(RECORDS), ASKED):
        asked = f"One of the special magic numbers for {names[i]} is:"
        found.forced += writer.ids(f" {asked}" if found.forced else asked)
        answer = writer.ids(f" {numbers[i]}")
        found.spans.append((len(found.forced), len(found.forced) + len(answer)))
        found.forced += answer + writer.ids(".")
    return found


def _copy(writer: Writer) -> Sample:
    prompt = writer.around(
        "Read the following text.", "Repeat a passage of the text above, word for word.", "", writer.hide([])
    )
    count = min(COPIED, writer.length // 4)
    start = writer.rng.randrange(64, len(prompt) - count - 64)  # neither instruction nor template
    spans = [(i, i + 1) for i in range(SHOWN, count)]
    return Sample(prompt, forced=prompt[start : start + count], spans=spans)


def _text(writer: Writer) -> Sample:
    """No question: documentation as it stands, from a place that the seed decides."""
    text = " ".join(topics[name] for name in sorted(topics))
    start = writer.rng.randrange(len(text) - 12 * (writer.length + GOES_ON))  # no token has as many letters in the mean
    ids = writer.ids(text[start : start + 12 * (writer.length + GOES_ON)])[: writer.length + GOES_ON]
    return Sample(ids[: writer.length], forced=ids[writer.length :])


def _agree(writer: Writer) -> Sample:
    prompt = writer.around(
        "Read the following text.", "Explain in your own words what the text above says.", "", writer.hide([])
    )
    return Sample(prompt, new=WRITES)


MAKERS = {
    "single": _single,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "multiquery": _multiquery,
    "tracking": _tracking,
    "common": _common,
    "frequent": _frequent,
    "questions": _questions,
    "copy": _copy,
    "text": _text,
    "agree": _agree,
}
KINDS = tuple(MAKERS)
RULER = KINDS[:7]
