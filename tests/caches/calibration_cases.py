"""What the tests of `calibrate` share: a random model with a text that it wrote itself, and the slow law of a trial."""

import torch
import torch.nn.functional as F
from recycled_cases import decoder

from scrubjay import RecycledCache
from scrubjay.modeling.caches.calibration import DECODED, Bench
from scrubjay.modeling.inputs.cache_argument import named

ROWS, COLUMNS = 8, 4 * DECODED
PROMISE = 2.2  # nats: a random model looks at everything


def random_model():
    """A decoder without gradients."""
    return decoder(initializer_range=0.4).requires_grad_(False)


def own_text(model):
    """(ROWS, COLUMNS) that the model wrote itself: a random model knows more of no other text the more it reads."""
    torch.manual_seed(0)
    start = torch.randint(3, 61, (ROWS, 1))
    return model.generate(start, do_sample=True, top_k=0, max_new_tokens=COLUMNS - 1, eos_token_id=None)


def bench(model, text, **settings):
    """(cache, `Bench` of all rows) of which every token counts."""
    cache = RecycledCache(model, **settings)
    return cache, Bench(cache, text, torch.ones(len(text), DECODED - 1, dtype=torch.bool))


@torch.no_grad()
def by_hand(model, text, cache):
    """(B,) loss of each row above full attention without any of the code that calibrates: a cache of its own reads the
    prompt, and goes on token by token."""
    start, losses = text.shape[1] - DECODED, []
    full = model(text).logits
    full = F.cross_entropy(full[:, start:-1].transpose(1, 2), text[:, start + 1 :], reduction="none")
    with cache:
        model(text[:, :start], **named(cache))
        for t in range(start, text.shape[1] - 1):
            logits = model(text[:, t : t + 1], **named(cache)).logits[:, -1]
            losses.append(F.cross_entropy(logits, text[:, t + 1], reduction="none"))
    return (torch.stack(losses, 1) - full).mean(1)
