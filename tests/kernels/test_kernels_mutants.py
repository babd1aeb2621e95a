"""Deliberate errors: each is put into a kernel, and a comparison that tests make has to find it."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import BF16, OutOfBoundError, check, draw
from kernel_checks import (
    check_borders,
    check_closed_form,
    check_decays,
    check_documents,
    check_forgetting,
    check_packed,
)

from scrubjay.kernels import conv, ddts, norm, recurrence, ssd, window

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


def with_argument(at, change):
    """The original, called with its argument at this position changed."""

    def changed(original):
        return lambda *args, **kwargs: original(*args[:at], change(args[at]), *args[at + 1 :], **kwargs)

    return changed


def with_result(change):
    return lambda original: lambda *args: change(original(*args))


def left_as_it_is(original):
    return lambda x: x


def gradient_not_decayed(original):
    def _returned(part, *rest):
        keeping_all = SimpleNamespace(returned=part.returned, kept=lambda: torch.ones_like(part.kept()))
        return original(keeping_all, *rest)

    return _returned


def gradient_one_step_late(at):
    def late(original):
        def gradients(self, dy, s, ds):
            found = list(original(self, dy, s, ds))
            found[at] = found[at].roll(1, dims=1)
            return found

        return gradients

    return late


not_decayed = with_result(torch.ones_like)
in_bfloat16 = with_result(lambda states: states.copy_(states.to(BF16)))
last_one_forgotten = with_result(lambda found: list(found)[:-1])
heads_reversed = with_argument(0, lambda state: state.flip(1))
oldest_forgotten = with_result(lambda state: state.index_fill(1, torch.tensor([0]), 0))


def borders_forgotten(original):
    """As many documents as there are, but the first one covers all steps."""

    def documents(cu_seqlens, batch, length):
        found = original(cu_seqlens, batch, length)
        return found if cu_seqlens is None else [(found[0][0], 0, length)]

    return documents


def neighbours_share(original):
    return lambda x, heads: x.repeat_interleave(heads // x.shape[2], 2)


def gate_after_norm(original):
    def apply(y, z, x, weight, skip, eps, groups):
        return F.rms_norm(y + skip * x, weight.shape, weight, eps) * F.silu(z)

    return SimpleNamespace(apply=apply)


def check_padded_past(kernel):
    check(kernel, draw(kernel, 5, states=3), real=torch.zeros(2, 3, dtype=torch.bool))


def check_norm(kernel):
    check(kernel, draw(kernel, 33), groups=2)


def check_tiles(kernel):
    check(kernel, draw(kernel, 5 * conv.MIN_ROWS, channels=conv.TILE // (4 * conv.MIN_ROWS)))


def as_they_are(original):
    return dict.fromkeys(original, -torch.inf)


check_large = partial(check_forgetting, strength=-1e14)
check_bfloat16 = partial(check_borders, dtype=BF16)


# name: (what to replace: owner, attribute, the new one from the old one; the comparison that finds it)
MUTATIONS = {
    "ssd: no decay across a chunk's border": (ssd._Chunk, "kept", not_decayed, check_borders),
    "ssd: gradient of the state not decayed": (recurrence, "_returned", gradient_not_decayed, check_borders),
    "ssd: gradient of the decay one step late": (ssd._Chunk, "gradients", gradient_one_step_late(3), check_borders),
    "ssd: gradient of the gain one step late": (ssd._Chunk, "gradients", gradient_one_step_late(4), check_borders),
    "ssd: what enters the state has no gain": (ssd, "ssd_step", with_argument(4, torch.ones_like), check_closed_form),
    "ssd: sums of decays in the inputs' dtype": (torch.Tensor, "double", left_as_it_is, check_decays),
    "ssd: state rounded to bfloat16 between chunks": (recurrence, "_carried", in_bfloat16, check_bfloat16),
    "ssd: heads of the initial state in another order": (ssd, "_grouped", heads_reversed, check_borders),
    "ssd: a step sees the ones after it": (torch.Tensor, "tril_", left_as_it_is, check_borders),
    "ssd: single steps without decay": (ssd, "ssd_step", with_argument(3, lambda a: 0 * a), check_closed_form),
    "ssd: state kept across documents": (recurrence, "documents", borders_forgotten, check_documents),
    "ssd: last block never written": (recurrence, "_blocks", last_one_forgotten, check_borders),
    "ssd: a decay of minus infinity in sums": (recurrence, "FORGETS", as_they_are, check_forgetting),
    "ssd: decays of 1e14 in sums": (recurrence, "FORGETS", as_they_are, check_large),
    "ddts: no decay across a chunk's border": (ddts._Chunk, "kept", not_decayed, check_borders),
    "ddts: gradient of the state not decayed": (recurrence, "_returned", gradient_not_decayed, check_borders),
    "ddts: state rounded to bfloat16 between chunks": (recurrence, "_carried", in_bfloat16, check_bfloat16),
    "ddts: a step does not see itself": (ddts, "_lower", with_result(lambda mask: mask.tril(-1)), check_borders),
    "ddts: state kept across documents": (recurrence, "documents", borders_forgotten, check_documents),
    "ddts: a decay of minus infinity in sums": (recurrence, "FORGETS", as_they_are, check_forgetting),
    "ddts: decays of 1e14 in sums": (recurrence, "FORGETS", as_they_are, check_large),
    "causal_conv: taps in reverse": (conv, "_convolve", with_argument(1, lambda w: w.flip(1)), check_borders),
    "causal_conv: last tile never written": (conv, "chunks", last_one_forgotten, check_tiles),
    "causal_conv: no bias": (conv, "_convolve", with_argument(2, lambda bias: None), check_borders),
    "causal_conv: oldest step of the state lost": (conv, "_initial", oldest_forgotten, check_closed_form),
    "causal_conv: taps cross documents": (conv, "documents", borders_forgotten, check_packed),
    "window_attention: one key too many": (window, "_banded", with_argument(3, lambda size: size + 1), check_borders),
    "window_attention: one key too few": (window, "_banded", with_argument(3, lambda size: size - 1), check_borders),
    "window_attention: neighbouring heads share keys": (window, "_tiled", neighbours_share, check_closed_form),
    "window_attention: scores without scale": (window, "_attend", with_argument(4, lambda scale: 1.0), check_borders),
    "window_attention: documents see each other": (window, "documents", borders_forgotten, check_documents),
    "window_attention: padding in the past is seen": (F, "pad", with_argument(0, torch.logical_not), check_padded_past),
    "gated_rms_norm: gate after norm": (norm, "_GatedRMSNorm", gate_after_norm, check_norm),
    "gated_rms_norm: one mean for all groups": (norm, "_scale", with_argument(2, lambda groups: 1), check_norm),
    "gated_rms_norm: last tile never written": (norm, "_tiles", last_one_forgotten, check_norm),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_deliberate_error_exceeds_the_bound(name, monkeypatch):
    """That the comparisons can fail."""
    owner, attribute, change, comparison = MUTATIONS[name]
    kernel = name.split(":")[0]
    comparison(kernel)
    monkeypatch.setattr(owner, attribute, change(getattr(owner, attribute)))
    with pytest.raises(OutOfBoundError):
        comparison(kernel)
