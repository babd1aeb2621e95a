"""Decay rates so large that every step forgets all before it: an `A_log` whose exp is infinite is one of them."""

import pytest
import torch
from zoo import ZOO, tokens

FINITE = 30.0  # exp(-dt exp(30)) is 0 for all steps dt that are drawn here
PACKED = {"position_ids": torch.cat([torch.arange(13), torch.arange(27)])[None]}
PADDED = {"attention_mask": (torch.arange(40) >= torch.tensor([[0], [9], [33]])).long()}
TRAINED = {"rows": (2, {}), "packed documents": (1, PACKED), "padded rows": (3, PADDED)}


@pytest.fixture(params=[entry for entry in ZOO if hasattr(entry.config(), "A_initializer_range")], ids=lambda e: e.name)
def rated(request):
    """Architectures with such a rate."""
    return request.param


def built(rated, log_rate, dtype=torch.float32, **changes):
    """Every second head of every mixer has that rate."""
    model = rated.build(dtype, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter[::2] = log_rate
    return model


def trained(rated, log_rate, dtype, batch, options):
    """Logits and gradients."""
    model = built(rated, log_rate, dtype)
    logits = model(tokens(batch, 40), **options).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
    (logits * weights).sum().backward()
    return {"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("how", TRAINED)
@pytest.mark.parametrize("log_rate", [89.0, 200.0, torch.inf])
def test_a_rate_that_overflows_forgets_as_a_finite_one_does_gradients_included(rated, log_rate, how):
    want = trained(rated, FINITE, torch.float32, *TRAINED[how])
    got = trained(rated, log_rate, torch.float32, *TRAINED[how])
    assert all(bool(x.isfinite().all()) for x in got.values() if x is not None)
    for name, x in want.items():
        assert (x is None and got[name] is None) or torch.equal(got[name], x), name


@torch.no_grad()
def test_a_rate_that_overflows_forgets_in_prefill_and_steps(rated):
    def run(log_rate):
        model, ids, cache, logits = built(rated, log_rate), tokens(3, 44), None, []
        mask = torch.nn.functional.pad(PADDED["attention_mask"], (0, 4), value=1)
        for a, b in ((0, 40), (40, 41), (41, 42), (42, 44)):
            out = model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        return torch.cat(logits, 1)

    want = run(FINITE)
    assert bool(want.isfinite().all())
    assert torch.equal(run(89.0), want)
