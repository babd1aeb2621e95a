"""Settings of a cache of few keys for a promised loss, found on the user's own text (ours).

Each row of the text is read up to its last 64 tokens. These are given one at a time, as if they were being written, to
full attention and to every candidate. What counts is the loss of a token above that of full attention on the same
token, in the mean of a row; half of the rows decide, and the other half says what the decision was worth.

B rows, T columns, n columns held, H query heads, G key heads, M columns attended, P head size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from scrubjay.modeling.decoder.attached import decoder_of
from scrubjay.modeling.decoder.attending import attending_by
from scrubjay.modeling.inputs.cache_argument import named

DECODED = 64  # tokens at the end of each row that are given one at a time: as many queries as caches remember
LOOKS = (0, 3, 11, 17, 26, 34, 39, 47, 52, 61)  # steps at which mass is taken: no stride is met at one phase alone
SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of a row's tokens, candidates for the number of keys
LEAST = 4 * DECODED  # tokens of a row
IGNORED = -100  # a label that does not count, as in transformers


@dataclass
class Trial:
    """What a candidate did. loss: nats a token above full attention, mean of rows, with its standard error. keys: read
    a step, in the mean of the layers; what choosing them reads counts as keys of the same bytes."""

    settings: dict
    loss: float
    error: float
    keys: float

    def __str__(self):
        said = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{said}: {self.loss:+.4f} ± {self.error:.4f} nats, {self.keys:.0f} keys a step"


@dataclass
class Calibration:
    """What `calibrate` found.

    settings: those chosen. promise: nats a token above full attention. found: the choice on the rows that decided.
    held_out: the same on the others. full_loss: full attention's on those, nats a token. columns: tokens of a row.
    mass: share of full attention's probability that falls on the keys attended, mean of heads, of each layer.
    stride: steps from one that reads all keys to the next, mean of the layers that have such; None: none has. trials:
    all candidates, in the order in which they were tried.
    """

    settings: dict
    promise: float
    found: Trial
    held_out: Trial
    full_loss: float
    columns: int
    mass: list[float]
    stride: float | None
    trials: list[Trial] = field(repr=False)

    @property
    def holds(self) -> bool:
        """Whether the held-out rows keep the promise."""
        return self.held_out.loss <= self.promise

    def __str__(self):
        often = "" if self.stride is None else f"; all keys at one step in {self.stride:.3g}"
        return (
            f"{self.found} of {self.columns} (chosen among {len(self.trials)})\n"
            f"promised {self.promise:.4f}; held out {self.held_out.loss:+.4f} ± {self.held_out.error:.4f} nats beside "
            f"full attention's {self.full_loss:.3f}: {'kept' if self.holds else 'NOT kept'}\n"
            f"{fmean(self.mass):.3f} of the attention falls on what is read ({min(self.mass):.3f} in the worst layer)"
            f"{often}"
        )


class Calibrated:
    """A cache with `calibrate`. It gives

    size: the setting that is the number of keys. best_first(): the other setting and its candidates. refuses(settings):
    why these cannot be, or None. read(prompt): a cache of the prompt (B, n) for all candidates, or None.
    begun(settings, read, prompt): a cache that has read it. looked(prompt, rest, read): full attention's logits of the
    rest, and a function of a layer and a number of columns that gives the probabilities (B, G, columns) of the last
    one's query, mean over the heads that share a key. attended(): columns that each layer read at the last step,
    (B, G or 1, M), -1: none; None: all. reads(n): keys a step, of n. stride_found: see `Calibration`. adopt(settings):
    make them its own.
    """

    size: str

    @torch.no_grad()
    def calibrate(
        self: Any,
        text,
        loss: float = 0.01,
        *,
        tokenizer=None,
        labels=None,
        length=1024,
        rows=16,
        layers=False,
        **candidates,
    ) -> Calibration:
        """Find the settings that read the fewest keys at a loss of no more than `loss` above full attention; they
        become this cache's, and those of the model's configuration where it has them, which `save_pretrained` keeps.

        The promise is for text like this, of rows as long as these; a row has `DECODED` tokens that are written, so the
        answers, where the text has any, belong at its end.

        Args:
            text: (B, T) token ids without padding, of four rows at least; or a text, which `tokenizer` turns into up
                to `rows` rows of `length` tokens, each with the token that it puts before every text, if any.
            loss: nats a token, with one standard error over the rows that decide.
            labels: (B, T), as text with -100 where a token's loss does not count.
            layers: of the policy "lowrank": find as well which layers need not choose at every step
                (`choosing_layers`), in one more trial a layer.
            candidates: values for a setting by its name; of others than the number of keys, the best first. One
                setting beside the number of keys can be searched.

        Raises:
            ValueError: a cache in use, a text too short, candidates that are no settings, or no candidate that keeps
                the promise; then nothing has changed.
        """
        if layers and getattr(self.settings, "policy", None) != "lowrank":
            raise ValueError("layers=True finds the layers that choose at every step: those of policy='lowrank' alone.")
        model = self._model()
        ids, counted = _rows(text, tokenizer, labels, length, rows, model)
        grid = self._grid(ids.shape[1], candidates)
        if self.get_seq_length():
            raise ValueError("calibrate needs an empty cache: call reset() first, or make another.")
        training = model.training
        model.eval()
        try:
            return self._calibrated(ids, counted, loss, grid, layers)
        finally:
            model.train(training)

    def _grid(self, columns, candidates):
        """(the other setting, its candidates, numbers of keys), the candidates the best first."""
        own, default = self.best_first()
        if unknown := [name for name in candidates if name not in self.searched]:
            raise ValueError(f"calibrate cannot search {unknown}; settings of this cache are {list(self.searched)}.")
        sizes = candidates.pop(self.size, [int(columns * share) for share in SHARES])
        if len(candidates) > 1:
            raise ValueError(
                f"calibrate searches {self.size} and one other setting; got {sorted(candidates)}. Give the cache "
                "itself those that are known."
            )
        name, values = next(iter(candidates.items()), (own, default))
        return name, list(values), sorted(sizes)

    def _calibrated(self, ids, counted, promise, grid, layers):
        decide = Bench(self, ids[::2], counted[::2])
        with decide:
            found = decide.cheapest(grid, promise)
            if layers and found is not None:
                found = decide.fewer_layers(found, promise)
            trials = decide.trials
        if found is None:
            listed = "\n".join(f"  {trial}" for trial in trials)
            raise ValueError(
                f"No candidate stays within {promise} nats of full attention, with one standard error:\n{listed}\n"
                f"Give more text, larger candidates ({self.size}=...), or a larger loss."
            )
        with Bench(self, ids[1::2], counted[1::2]) as check:
            held_out = check.trial(found.settings, look=True)
            full = fmean(check.full.tolist())
        self.adopt(found.settings)
        return Calibration(
            found.settings, promise, found, held_out, full, ids.shape[1], check.mass, check.stride, trials
        )


class Bench:
    """Rows ids (B, T) of which all but the last tokens have been read; candidates go on from there.

    full: (B,), the mean loss of full attention. mass, stride: see `Calibration`, of the last trial that looked.
    """

    def __init__(self, cache: Any, ids: torch.Tensor, counted: torch.Tensor):
        self.cache, self.model, self.ids, self.counted = cache, cache._model(), ids, counted
        self.prompt, self.rest = ids[:, :-DECODED], ids[:, -DECODED:]
        self.trials: list[Trial] = []
        self.mass: list[float] = []
        self.stride: float | None = None

    def __enter__(self):
        self.read = self.cache.read(self.prompt)
        logits, self.look = self.cache.looked(self.prompt, self.rest, self.read)
        self.full = self.mean(self.losses(logits[:, :-1]))
        return self

    def __exit__(self, *error):
        if self.read is not None:
            self.read.close()

    def losses(self, logits, first=0):
        """(B, q) of logits (B, q, V) after the rest's columns from `first` on."""
        wanted = self.rest[:, first + 1 : first + 1 + logits.shape[1]]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        return F.cross_entropy(logits, wanted.flatten(), reduction="none").view(wanted.shape)

    def mean(self, losses):
        """(B,) of (B, 63), over what counts."""
        return (losses * self.counted).sum(1) / self.counted.sum(1)

    def trial(self, settings: dict, look: bool = False) -> Trial:
        """What a candidate does; `look` takes mass and stride too."""
        losses, looked, full = [], [], []
        with self.cache.begun(settings, self.read, self.prompt) as cache:
            for t in range(DECODED - 1):
                logits = self.model(self.rest[:, t : t + 1], **named(cache)).logits
                losses.append(self.losses(logits, t))
                if look:
                    attended = cache.attended()
                    full.append([index is None for index in attended])
                    if t in LOOKS:
                        looked.append(list(_mass(self.look, attended, self.prompt.shape[1] + t + 1)))
            keys = cache.reads(self.ids.shape[1] - DECODED // 2)
            if look:
                self.mass, self.stride = _mean_mass(looked, full), cache.stride_found
        apart = self.mean(torch.cat(losses, 1)) - self.full
        error = apart.std().item() / len(apart) ** 0.5
        self.trials.append(Trial(settings, apart.mean().item(), error, keys))
        return self.trials[-1]

    def cheapest(self, grid, promise) -> Trial | None:
        """The passing candidate that reads the fewest keys. A worse value of the other setting needs at least as many
        keys as a better one did, so a walk along the border tries about as many as there are values in both."""
        name, values, sizes = grid
        passing, j = [], 0
        for value in values:
            while j < len(sizes):
                settings = ({} if name is None else {name: value}) | {self.cache.size: sizes[j]}
                if self.cache.refuses(settings) is None:
                    trial = self.trial(settings)
                    if trial.loss + trial.error <= promise:
                        passing.append(trial)
                        break
                j += 1
        return min(passing, key=lambda trial: trial.keys, default=None)

    def fewer_layers(self, found: Trial, promise) -> Trial:
        """As many layers as pass that do not choose at every step, those first without which the loss rises least."""
        count, alone = len(self.cache.layers), {}
        for layer in range(count):
            rest = [i for i in range(count) if i != layer]
            alone[layer] = self.trial(found.settings | {"choosing_layers": rest}).loss
        order = sorted(alone, key=alone.__getitem__)
        low, high = 0, count  # `low` pass, `high` are not known to
        while high - low > 1:
            middle = (low + high) // 2
            trial = self.trial(found.settings | {"choosing_layers": sorted(order[middle:])})
            if trial.loss + trial.error <= promise and trial.keys <= found.keys:
                low, found = middle, trial
            else:
                high = middle
        return found


def _mass(look, attended, columns) -> Iterator[float]:
    """Of each layer: full attention's probability of the query of the last of `columns` that falls on what a cache
    attended."""
    for layer, index in enumerate(attended):
        if index is None:
            yield 1.0
            continue
        share = look(layer, columns)
        index = index.expand(-1, share.shape[1], -1)
        yield (share.gather(2, index.clamp(min=0)) * (index >= 0)).sum(2).mean().item()


def _mean_mass(looked, full) -> list[float]:
    """Of each layer, over all steps: 1 where it attended all keys (`full`), and what was looked at where it did not."""
    found = []
    for masses, whole in zip(zip(*looked, strict=True), zip(*full, strict=True), strict=True):
        some = [mass for mass, step in zip(masses, LOOKS, strict=False) if not whole[step]]
        found.append(fmean(whole) + (1 - fmean(whole)) * (fmean(some) if some else 1.0))
    return found


def share_of(query, keys, scaling) -> torch.Tensor:
    """(B, G, n) probabilities of a query (B, H, P) over keys (B, G, n, P), mean over the heads that share a key."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.unflatten(1, (keys.shape[1], -1)).to(wide) @ keys.to(wide).mT * scaling
    return scores.softmax(-1).mean(2)


def looked_at(model, ids, start: int):
    """`Calibrated.looked` of ids (B, T) by a pass of the model itself, the rest from column `start` on."""
    shares: dict[tuple[int, int], torch.Tensor] = {}
    asked = [start + 1 + step for step in LOOKS]

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        for columns in asked:
            shares[module.layer_idx, columns] = share_of(query[:, :, columns - 1], key[:, :, :columns], scaling)
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)

    with attending_by(decoder_of(model), "scrubjay_looking", attend):
        logits = model(ids, use_cache=False, logits_to_keep=ids.shape[1] - start).logits
    return logits, lambda layer, columns: shares[layer, columns]


def _cut(text, tokenizer, length, rows):
    """Up to `rows` rows of `length` ids of a text; fewer and shorter ones where it has too few, to be refused."""
    flat = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = [id for id in tokenizer("")["input_ids"] if id == getattr(tokenizer, "bos_token_id", None)]
    own = length - len(first)
    count = max(1, min(rows, len(flat) // own))
    return torch.tensor([first + flat[i * own : (i + 1) * own] for i in range(count)])


def _rows(text, tokenizer, labels, length, rows, model):
    """ids (B, T) on the model's device, and which of the last tokens' losses count, (B, DECODED - 1)."""
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("A text needs its tokenizer: calibrate(text, tokenizer=...), or give (B, T) token ids.")
        if labels is not None:
            raise ValueError("labels belong to token ids: give (B, T) of both.")
        text = _cut(text, tokenizer, length, rows)
    if not isinstance(text, torch.Tensor) or text.ndim != 2:
        raise ValueError(f"calibrate needs a text or (B, T) token ids; got {type(text).__name__}.")
    if len(text) < 4 or text.shape[1] < LEAST:
        raise ValueError(
            f"calibrate needs at least 4 rows of {LEAST} tokens, two that decide and two that check; got "
            f"{tuple(text.shape)}. Give more text, or a smaller length."
        )
    counted = torch.ones(text.shape, dtype=torch.bool) if labels is None else labels != IGNORED
    if counted.shape != text.shape or not bool(counted[:, 1 - DECODED :].any(1).all()):
        raise ValueError(
            f"labels must have the shape of the text, {tuple(text.shape)}, and count one of the last {DECODED - 1} "
            f"tokens of each row at least; got {tuple(counted.shape)}."
        )
    device = model.get_input_embeddings().weight.device
    return text.to(device), counted[:, 1 - DECODED :].to(device)
