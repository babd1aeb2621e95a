"""What the study of ADORE measures: caches that release tokens, after one prompt that all of them share.

A pass over the prompt and what is given after it, with full attention, has it all: the loss of full attention, the keys
and values that every cache would have read, and what each query looks at, mean over heads and layers. B rows, n tokens
of the prompt, N given after it, H key heads, P head size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from scrubjay import AdoreCache
from scrubjay.examples.learning.attention_capture import CAPTURE, Request, answering
from scrubjay.examples.learning.importance import top
from scrubjay.examples.studies.real import answered, given_to, judged, written
from scrubjay.examples.studies.real_tasks import Sample
from scrubjay.modeling.decoder.attached import decoder_of
from scrubjay.modeling.decoder.controller import Scorer
from scrubjay.modeling.inputs.cache_argument import named


class Oracle(Scorer):
    """Scores a token by what full attention looks at in this step: what no controller can know.

    attention: (B, N, T) rows of the queries at positions `start`, start + 1, ...
    """

    def __init__(self, attention: torch.Tensor, start: int):
        super().__init__()
        self.attention, self.start = attention, start

    def score(self, features, positions, now, state, table):
        """Attention of the current token."""
        rows = torch.arange(len(positions), device=positions.device)
        return self.attention[rows, now[:, 0] - self.start].gather(1, positions)


class Watched(AdoreCache):
    """A cache that remembers which columns each of its steps attended: `steps`, each (B, .), -1 for none."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.steps: list[torch.Tensor] = []

    def enter(self, decoder, kwargs):
        """As `AdoreCache` does it."""
        first = self.slots is None
        kwargs = super().enter(decoder, kwargs)
        if not first:
            self.steps.append(self.last_attended)
        return kwargs


@dataclass
class Read:
    """What one pass with full attention has given.

    samples: with all that follows. keys_values: of each layer, (B, H, n + N - 1, P). logits: (B, N, V), the first after
    the prompt. attention: (B, N, n + N - 1) of the queries from the prompt's last token on.
    """

    samples: list[Sample]
    keys_values: list[tuple[torch.Tensor, torch.Tensor]]
    logits: torch.Tensor
    attention: torch.Tensor

    @property
    def prompt(self) -> torch.Tensor:
        """(B, n) ids."""
        return torch.tensor([one.prompt for one in self.samples])


@torch.no_grad()
def read(model, samples: list[Sample]) -> Read:
    """One pass; where nothing is given after the prompt, what the model writes greedily, every token to be found."""
    prompt = torch.tensor([one.prompt for one in samples])
    if not samples[0].forced:
        cache = DynamicCache(config=model.config)
        first = model(prompt, **named(cache), logits_to_keep=1).logits[:, -1]
        every = [(i, i + 1) for i in range(samples[0].new)]
        wrote = written(model, cache, first, samples[0].new).tolist()
        samples = [Sample(one.prompt, forced=row, spans=every) for one, row in zip(samples, wrote, strict=True)]
    given = given_to(samples)
    whole, n = torch.cat([prompt, given[:, :-1]], 1), prompt.shape[1]
    cache = DynamicCache(config=model.config)
    with answering(model, CAPTURE, Request(torch.arange(n - 1, whole.shape[1]), 1)) as request:
        logits = model(whole, **named(cache), logits_to_keep=given.shape[1]).logits
    keys_values = [(layer.keys, layer.values) for layer in cache.layers]
    return Read(samples, keys_values, logits, request.found["mean"] / request.num_layers)


def filled(cache: AdoreCache, model, ids: torch.Tensor, keys_values) -> AdoreCache:
    """The cache after it has read ids (B, n), whose keys and values are known: no layer runs again."""
    decoder, n = decoder_of(model), ids.shape[1]
    cache.begin(decoder, {"input_ids": ids})
    for i, (keys, values) in enumerate(keys_values):
        cache.update(keys[:, :, :n], values[:, :, :n], i)
    cache.end(decoder, ())
    return cache


def caches(model, controllers: dict, oracle: Oracle, cache_size: int, rebuild: int) -> dict:
    """{name: settings} of caches that attend `cache_size` + `rebuild` tokens and the new one.

    "guarded": four sinks and the newest sixth of m are never released, whatever their scores.
    """
    budget, guards = cache_size + rebuild, {"": {}, " guarded": dict(sinks=SINKS, recent=max(cache_size // 6, 1))}
    found: dict = {name: dict(cache_size=budget, rebuild=0, controller=policy) for name, policy in POLICIES.items()}
    for name, scorer in (*controllers.items(), ("oracle", oracle)):
        for guarded, guard in guards.items():
            for r in dict.fromkeys((0, rebuild)):
                settings = dict(cache_size=budget - r, rebuild=r, controller=scorer)
                found[f"{name}{guarded}, R = {r}"] = settings | guard
    return found


SINKS = 4
POLICIES = {"newest": "recency", "StreamingLLM": "streaming"}


@torch.no_grad()
def compared(model, tokenizer, samples: list[Sample], controllers: dict, cache_size: int, rebuild: int, k: int) -> dict:
    """{cache: {"scores", "losses", of each row; "mass", "recall": means, of the steps}} after the same prompts.

    mass: share of full attention on the tokens that are attended; recall: share of its top k among them.
    """
    known = read(model, samples)
    samples, given = known.samples, given_to(known.samples)
    losses = F.cross_entropy(known.logits.float().transpose(1, 2), given, reduction="none")
    found = {"full": judged(samples, known.logits.argmax(-1) == given, losses)}
    oracle = Oracle(known.attention, known.prompt.shape[1] - 1)
    for name, settings in caches(model, controllers, oracle, cache_size, rebuild).items():
        with filled(Watched(model, **settings), model, known.prompt, known.keys_values) as cache:
            found[name] = answered(model, tokenizer, cache, known.logits[:, 0], samples)
            found[name] |= kept(known, cache.steps, k) | {"nbytes": cache.nbytes}
    return found


def kept(known: Read, attended: list[torch.Tensor], k: int) -> dict[str, float]:
    """{"mass", "recall"}, mean over rows and steps, of the columns that each step attended."""
    a, start = known.attention[:, 1:], known.prompt.shape[1]  # the first row chose what the prompt left
    at = torch.arange(start, start + a.shape[1])
    seen = torch.zeros(*a.shape[:2], a.shape[2] + 1, dtype=torch.bool)
    for step, columns in enumerate(attended):
        seen[:, step].scatter_(1, torch.where(columns < 0, a.shape[2], columns), True)
    seen = seen[..., :-1] | (torch.arange(a.shape[2]) == at[:, None])
    best = top(a, at, k)
    recall = (best & seen).sum(-1) / best.sum(-1)
    return {"mass": round((a * seen).sum(-1).mean().item(), 4), "recall": round(recall.mean().item(), 4)}
