"""What tests of parity share: small sizes, weights with which every term matters, and errors against a recurrence.

`recurrences.py` is the judge, in float64. An error is the largest difference over the root mean square wanted.
"""

import math

import torch

from scrubjay.modeling.inputs.cache_argument import CACHE, named

BOUND = 1e-10  # float64 against the recurrences; the worst of all cases was 9.2e-13, of all gradients 9.1e-14
SSD = dict(hidden_size=16, head_dim=8, state_size=6, num_hidden_layers=2, vocab_size=29, pad_token_id=None)
RODIMUS = dict(hidden_size=24, state_size=8, num_hidden_layers=2, vocab_size=31, block_type="rodimus", chunk_size=16)
PLUS = RODIMUS | dict(block_type="rodimus_plus", num_attention_heads=4, sliding_window=5)


def tokens(vocab, batch, length):
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def shake(model, seed=0):
    """Random weights that make every term matter: no norm, bias, gate or skip is at a neutral value."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        r = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        last = name.rsplit(".", 1)[-1]
        if last == "A_log":
            r = (0.05 + 4 * torch.rand(parameter.shape, generator=random, dtype=torch.float64)).log()
            r[0] = math.log(0.003)  # a memory longer than the longest test
        elif last == "dt_bias":
            r = r - 1.5
            r[-1] = 30.0  # a step so long that nothing older is left
        elif last == "mem_gate_bias":
            selection = torch.tensor([-110.0, -25.0, -6.0, -3.0, -1.0, 0.0, 3.0, 40.0])
            temperature = torch.tensor([-6.0, -4.0, -3.0, -1.0, 0.0, 2.0, -2.0, -5.0])
            channels = torch.arange(model.config.state_size) % 8
            r = torch.cat([selection[channels], temperature[channels]])[: len(r)] + 0.1 * r
        elif "conv1d" in name:
            r = 0.5 * r
        elif "norm" in name:
            r = 1 + 0.3 * r
        elif last == "bias":
            r = 0.4 * r
        elif parameter.ndim == 2 and "embed" not in name:
            r = r * parameter.shape[1] ** -0.5
        parameter.copy_(r)
    return model.eval()


def error(got, want):
    """Largest difference over the root mean square wanted; NaN and wrong shapes are failures of their own."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    return float((got.double() - want.double()).abs().max() / want.double().square().mean().sqrt())


@torch.no_grad()
def whole(model, ids):
    """Logits of ids in one pass."""
    return model(ids).logits


@torch.no_grad()
def through(model, ids, pieces):
    """Logits of ids given to a cache piece by piece."""
    past, logits = None, []
    for piece in ids.split(pieces, 1):
        out = model(piece, **named(past), use_cache=True)
        past = out[CACHE]
        logits.append(out.logits)
    return torch.cat(logits, 1)


def errors_by_length(model, ids, want, lengths):
    return {T: error(whole(model, ids[:, :T]), want[:, :T]) for T in lengths}


def long_errors(model, ids, want):
    """Without and with gradients: without them a long prompt is taken in segments."""
    return error(whole(model, ids), want), error(model(ids).logits.detach(), want)


def mistaken_error(model, recurrence, ids, wrong):
    """Error against a recurrence with a mistake: of one pass or of a prefill with steps, whichever is the smaller."""
    ids = ids[:, :20]
    mistaken = recurrence(model.state_dict(), model.config, ids, wrong)
    return min(error(got, mistaken) for got in (whole(model, ids), through(model, ids, [12] + [1] * 8)))


def gradient_errors(model, recurrence, ids):
    """Error of the gradient of each parameter, for a random weighting of the logits."""
    given = torch.randn(
        *ids.shape, model.config.vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    named = weights | ({} if "lm_head.weight" in weights else {"lm_head.weight": weights["model.embed_tokens.weight"]})
    want = torch.autograd.grad((recurrence(named, model.config, ids) * given).sum(), list(weights.values()))
    got = torch.autograd.grad((model(ids).logits * given).sum(), list(model.parameters()))
    return {name: error(g, w) for name, g, w in zip(weights, got, want, strict=True)}
