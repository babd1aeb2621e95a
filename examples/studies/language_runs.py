"""One training of a language model on real text, and what it is worth at lengths that it was not trained at.

Text is the source of Python's standard library. Rates are chosen by the first part of the held-out files, reports are
of the second. Everything is float32. T tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from scrubjay.examples.data.corpus import encode, load_corpus, train_tokenizer
from scrubjay.examples.learning.optimizer import decay_groups
from scrubjay.examples.studies.cells import Cell, Tuning
from scrubjay.examples.studies.equal_models import Sizes, build, configured
from scrubjay.examples.studies.selection_picture import read_selection
from scrubjay.modeling.inputs.cache_argument import CACHE, named

PIECE = 512  # tokens of a row that are read in one call; what is longer goes on with the cache
AT_ONCE = 4096  # tokens of all rows
CALIBRATED = 4096  # tokens of training text by which Taipan's thresholds are set
POINTS = 64  # of a curve


@dataclass(frozen=True)
class Budget:
    """What a run reads.

    Args:
        tokens: of training text, none of them twice; rounded down to whole batches.
        length: of a training window.
        scored: lengths at which the trained model reads held-out text, each divides the longest.
        rows: pieces of held-out text of the longest length that every model is scored on, at every length.
        validation: tokens of held-out text by which rates are chosen.
        train_bytes: of the corpus; 0 is all of it.
    """

    tokens: int = 1 << 19
    batch_size: int = 8
    length: int = 128
    scored: Sequence[int] = (128, 512, 2048, 8192)
    rows: int = 8
    validation: int = 1 << 15
    train_bytes: int = 0

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch_size * self.length)


def settings_of(sizes: Sizes, budget: Budget, **more) -> dict:
    """Settings of a cell: the tokens, what else is not as `Sizes` and `Budget` have it, and `more`."""
    found = {"tokens": budget.tokens}
    for made in (sizes, budget):
        found |= {f.name: value for f in fields(made) if (value := getattr(made, f.name)) != f.default}
    return found | more


def read_settings(settings: Mapping) -> tuple[Sizes, Budget]:
    """The sizes and the budget of a cell."""
    sizes, budget = (
        kind(**{f.name: settings[f.name] for f in fields(kind) if f.name in settings}) for kind in (Sizes, Budget)
    )
    return sizes, budget


@dataclass(frozen=True)
class ShortTrials(Tuning):
    """Rates are tried in runs that are shorter, or score less.

    Args:
        short: settings of the trials, in place of those of the reported runs; None: without.
    """

    short: Mapping

    def trials(self, study: str, model: str, settings: Mapping) -> list[Cell]:
        shorter = {name: value for name, value in {**settings, **self.short}.items() if value is not None}
        return super().trials(study, model, shorter)


def queue(
    tuning: Tuning, study: str, variants: Mapping[str, tuple[str, dict]], records: list[dict], guess: bool = False
) -> list[Cell]:
    """All trials, then the reported runs of what is tuned, seed by seed: whenever it stops, the variants are even.

    Args:
        variants: model and settings by a name.
        guess: as `Tuning.cells` has it.
    """
    cells = [tuning.cells(study, model, settings, records, guess=guess) for model, settings in variants.values()]
    flat = [cell for some in cells for cell in some]
    return sorted(flat, key=lambda cell: [*tuning.seeds, *tuning.reported].index(cell.seed))


def train_cell(cell: Cell) -> dict:
    """The run that a cell describes. Its settings may have `shape` and `switches`, as `configured` takes them, and
    `drawn`: how many tokens of held-out text the record tells the selection of."""
    sizes, budget = read_settings(cell.settings)
    shape, switches = (cell.settings.get(name, {}) for name in ("shape", "switches"))
    text = read_text(sizes.vocab_size, budget.train_bytes)
    torch.manual_seed(cell.seed)  # again: reading the text is none of the run's chance
    model = build(configured(cell.model, sizes, shape=tuple(shape.items()), **switches))
    found = run(model, text, budget, cell.rate, cell.seed) | {"sizes": asdict(sizes), "budget": asdict(budget)}
    if count := cell.settings.get("drawn"):
        found["drawn"] = read_selection(model, excerpt(text, budget, count), text.tokenizer)
    return found


def excerpt(text: "Text", budget: Budget, count: int) -> torch.Tensor:
    """The beginning of a file, with the end of the one before it, of the held-out text that is reported: (count,)."""
    _, stream = text.parts(budget)
    ends = np.flatnonzero(stream[: len(stream) - count] == text.tokenizer.eos_token_id)
    start = int(ends[0]) if len(ends) else 0
    return torch.from_numpy(stream[start : start + count])


@dataclass(frozen=True)
class Text:
    """Streams of ids, (T + 1,) each, and the bytes that each id of the vocabulary stands for, (V,)."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    train: np.ndarray
    heldout: np.ndarray
    bytes_of: np.ndarray

    def parts(self, budget: Budget) -> tuple[np.ndarray, np.ndarray]:
        """The held-out streams for choosing a rate and for reports, which begins where the first one ends.

        Raises:
            ValueError: the text is too short.
        """
        reported = budget.rows * max(budget.scored, default=0)
        for what, need, have in (
            ("training", budget.tokens, len(self.train) - 1),
            ("held-out", budget.validation + reported, len(self.heldout) - 1),
        ):
            if need > have:
                raise ValueError(f"The {what} text has {have:,} tokens; the budget asks for {need:,}.")
        at = budget.validation
        return self.heldout[: at + 1], self.heldout[at : at + reported + 1]

    def num_bytes(self, ids: np.ndarray) -> int:
        return int(self.bytes_of[ids].sum())


@cache
def read_text(vocab_size: int, train_bytes: int = 0) -> Text:
    """The standard library with a vocabulary of its training part, the same for all models."""
    corpus = load_corpus()
    if train_bytes:
        corpus = corpus.limited(train_bytes, train_bytes)
    tokenizer = train_tokenizer(corpus.train, vocab_size)
    # of byte-level BPE a character stands for a byte; the end of a text is none
    bytes_of = np.array([len(token) for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))])
    bytes_of[tokenizer.eos_token_id] = 0
    streams = encode(tokenizer, corpus.train), encode(tokenizer, corpus.heldout)
    return Text(corpus.name, tokenizer, *streams, bytes_of)


def run(model: PreTrainedModel, text: Text, budget: Budget, rate: float, seed: int) -> dict:
    """Train a model and score it; a JSON-ready record."""
    validation, reported = text.parts(budget)
    losses, selected = learn(model, text.train, budget, rate, seed)
    if hasattr(model, "calibrate"):
        model.calibrate(torch.from_numpy(text.train[:CALIBRATED]).view(-1, budget.length))
    per_byte = (len(text.train) - 1) / text.num_bytes(text.train) / math.log(2)
    record = {
        "parameters": model.num_parameters(),
        "tokens": budget.steps * budget.batch_size * budget.length,
        "text": text.name,
        "curve": curve(losses, budget, per_byte),
        "validation": score(model, validation, budget.length, text)["bits_per_byte"],
    }
    if selected:  # mean over the last tenth of the steps, before thresholds are set
        late = np.array(selected[-max(len(selected) // 10, 1) :])
        record["selected_in_training"] = late.mean(0).round(4).tolist()
    scores = {str(length): score(model, reported, length, text) for length in budget.scored}
    record |= {"bits_per_byte": {length: found["bits_per_byte"] for length, found in scores.items()}}
    if any("selected" in found for found in scores.values()):
        record |= {"selected": {length: found["selected"] for length, found in scores.items()}}
    return record


def learn(
    model: PreTrainedModel, stream: np.ndarray, budget: Budget, rate: float, seed: int
) -> tuple[list[float], list[list[float]]]:
    """Train `model` in place with AdamW, warmup over a tenth of the steps, then a cosine to zero.

    Returns: cross-entropy of each step in nats per token, of text that the model has not seen before; and of a model
    that selects tokens, the share in each layer at each step.
    """
    windows = torch.from_numpy(stream[: len(stream) // budget.length * budget.length]).view(-1, budget.length)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(windows)))
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=rate, betas=(0.9, 0.95), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(budget.steps // 10, 1), budget.steps)
    losses, selected = [], []
    model.train()
    for rows in order[: budget.steps * budget.batch_size].view(budget.steps, budget.batch_size):
        ids = windows[rows]
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        budget_loss = getattr(out, "budget_loss", None)  # of Taipan's gate
        extra = 0.0 if budget_loss is None else model.config.budget_lambda * budget_loss.item()
        losses.append(out.loss.item() - extra)
        if (shares := getattr(out, "selection", None)) is not None:
            selected.append(shares[:, 0].tolist())
    model.eval()
    return losses, selected


def curve(losses: list[float], budget: Budget, per_byte: float) -> list[list[float]]:
    """(tokens read, mean bits per byte since the last point) at up to `POINTS` even distances."""
    edges = sorted({round(len(losses) * (i + 1) / POINTS) for i in range(POINTS)} - {0})
    starts = [0, *edges[:-1]]
    a_step = budget.batch_size * budget.length
    return [
        [edge * a_step, round(float(np.mean(losses[start:edge])) * per_byte, 4)]
        for start, edge in zip(starts, edges, strict=True)
    ]


@torch.no_grad()
def score(model: PreTrainedModel, stream: np.ndarray, length: int, text: Text) -> dict:
    """Bits per byte of the T tokens after the first of a stream, cut into contexts of `length` tokens.

    Each token is scored once, and has from 0 to length - 1 tokens before the one that predicts it. Every model reads a
    context in the same way: in pieces, from an empty cache on. Cuts are where they fall, as in training.

    Returns: {"bits_per_byte"}, and of a model that selects tokens {"selected": share in each layer}.
    """
    model.eval()
    inputs, labels = (torch.from_numpy(part).view(-1, length) for part in (stream[:-1], stream[1:]))
    nats, shares = 0.0, []
    batch = max(AT_ONCE // min(length, PIECE), 1)
    for ids, targets in zip(inputs.split(batch), labels.split(batch), strict=True):
        past = None
        for x, y in zip(ids.split(PIECE, 1), targets.split(PIECE, 1), strict=True):
            out = model(input_ids=x, use_cache=length > PIECE, **named(past))
            past = out.get(CACHE)
            nats += cross_entropy(out.logits.flatten(0, 1), y.flatten(), reduction="sum").item()
            if getattr(out, "sequence_selection", None) is not None:
                shares.append(out.sequence_selection[..., 0].mean(0) * x.numel())
    found = {"bits_per_byte": round(nats / math.log(2) / text.num_bytes(stream[1:]), 5)}
    if shares:
        found["selected"] = [round(share, 4) for share in (sum(shares) / labels.numel()).tolist()]
    return found
