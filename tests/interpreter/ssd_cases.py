"""Comparisons of SSD's Triton kernels with the reference, which their tests and their deliberate errors share."""

import torch
import torch.nn.functional as F
from kernel_cases import F32, OutOfBoundError, assert_within, check, draw
from kernel_checks import FORGETTING, check_forgotten, forgetting

from scrubjay.kernels import ssd

LENGTHS = (0, 1, 70, 0, 5, 1, 64, 0)  # of packed documents


def fast(**inputs):
    """Looked up when it is called: by then its kernels may be others."""
    return ssd.ssd(**inputs, backend="triton")


def check_documents_of_ssd(dtype=F32, with_state=True):
    inputs = draw("ssd", sum(LENGTHS), dtype, batch=1, states=len(LENGTHS) if with_state else 0)
    check("ssd", inputs, fast, cu_seqlens=F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)))


def check_chunks(**arguments):
    """Two chunks and three steps, in the backward pass four."""
    check("ssd", draw("ssd", 131, **{"batch": 1, "states": 1} | arguments), fast)


def check_tiles():
    """More state and head channels than a tile has."""
    check("ssd", draw("ssd", 34, batch=1, states=1, groups=1, heads=2, size=34, head_dim=20), fast)


def strong(scale):
    inputs = draw("ssd", 70, batch=1, states=1)
    inputs["a"] *= scale
    return inputs


def check_decays():
    check("ssd", strong(1e3), fast)


def check_forgetting_of_ssd(strength=-torch.inf, where="several of a chunk"):
    """A chunk and six steps; in the backward pass, whose chunks `where` means, two and six."""
    inputs = draw("ssd", 70, batch=1, states=1, groups=1, heads=2)
    check_forgotten("ssd", forgetting(inputs, strength, list(FORGETTING[where](32, 70))), fast)


def check_no_number():
    inputs = draw("ssd", 5, batch=1, states=1, groups=1, heads=2)
    inputs["a"][:, 3] = torch.nan
    y, state = fast(**inputs)
    if not (y[:, 3:].isnan().all() and state.isnan().all() and y[:, :3].isfinite().all()):
        raise OutOfBoundError("ssd: a decay that is no number leaves numbers behind it")


def check_step(dtype=F32, **arguments):
    inputs = draw("ssd", 1, dtype, batch=3, states=3, **arguments)
    state = inputs.pop("initial_state")
    check_step_of({name: x[:, 0] for name, x in inputs.items()}, state)


def check_step_of(one, state):
    got = ssd.ssd_step_triton(**one, state=state)
    want = ssd.ssd_step(*(x.double() for x in one.values()), state.double())
    for name, mine, reference in zip(("y", "state"), got, want, strict=True):
        assert_within("ssd", {name: mine}, {name: reference}, one)
