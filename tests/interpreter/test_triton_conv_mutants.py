"""Deliberate errors in the causal convolution's Triton kernels: a comparison that the tests make has to find each.

None makes a kernel write beyond its tensors: the interpreter would write there.
"""

import pytest
import torch
from kernel_cases import assert_within, check, draw, results
from kernel_checks import draw_packed, offsets
from triton_mutation import must_be_found

from scrubjay.kernels import conv, conv_triton


def fused(**inputs):
    """The convolution is looked up when it is called: by then its kernels may be others."""
    return conv.causal_conv(**inputs, backend="triton")


def few(**arguments):
    check("causal_conv", draw("causal_conv", 5, **arguments), fused)


def over_groups():
    check("causal_conv", draw("causal_conv", 13, batch=1, states=1), fused)


def over_chunks():
    check("causal_conv", draw("causal_conv", 34, batch=1, states=1), fused)


def packed():
    check("causal_conv", draw_packed("causal_conv", torch.float32), fused, cu_seqlens=offsets("causal_conv"))


def side_by_side():
    """Documents that fill their groups of steps: behind the last step of one is the first of the next."""
    inputs = draw("causal_conv", 12, batch=1, states=2)
    check("causal_conv", inputs, fused, cu_seqlens=torch.tensor([0, 8, 12]))


def ends():
    """Each row's state ends where the row does; only the gradients count, which the reference gives from all steps."""
    lengths = torch.tensor([2, 5])
    inputs = draw("causal_conv", 5)

    def state_of(x, weight, bias, initial_state, **options):
        seen = torch.cat([initial_state, x], 1)
        return torch.stack([row[n : n + 3] for row, n in zip(seen, lengths.tolist(), strict=True)])

    got, cotangents = results(lambda **x: fused(**x, lengths=lengths)[1], inputs)
    assert_within("causal_conv", got, results(state_of, inputs, cotangents)[0], inputs)


# name: (the line as it is, the line with the error, the comparison that finds it)
MUTATIONS = {
    "taps one step late": ("        u += taps[i] * seen[j + i]", "        u += taps[i] * seen[j + i - 1]", few),
    "bias forgotten": ("u = b + taps[0]", "u = taps[0]", few),
    "history from the document before": ("_steps(x, t - (K - 1), first, t,", "_steps(x, t - (K - 1), 0, t,", packed),
    "every document has the first one's initial state": (
        "state += (row.to(tl.int64) * (K - 1) + K - 1 - first)",
        "state += (K - 1 - first)",
        packed,
    ),
    "forward: no sigmoid": ("u / (1 + tl.exp(-u))", "u", few),
    "forward: history not carried to the next group": (
        "        seen = seen[GROUP:]\n",
        "        seen = seen[: K - 1]\n",
        over_groups,
    ),
    "forward: the final state is the one at the end of the row": (
        "start = last if lengths is None else first + tl.load(lengths + row).to(tl.int32)",
        "start = last",
        ends,
    ),
    "backward: gradient of sigmoid for that of silu": ("(1 + u * (1 - s))", "(1 - s)", few),
    "backward: taps in the wrong order": ("g += taps[i] * slopes[j + K - 1 - i]", "g += taps[i] * slopes[j + i]", few),
    "backward: nothing from the chunk after": (
        "dys = _steps(dy, t, None, last, dy_step",
        "dys = _steps(dy, t, None, stop, dy_step",
        over_chunks,
    ),
    "backward: the chunk after from another document too": (
        "dys = _steps(dy, t, None, last, dy_step",
        "dys = _steps(dy, t, None, tl.minimum(last + 3, T), dy_step",
        side_by_side,
    ),
    "backward: gradient of the final state forgotten": (
        "real = (i >= 0) & (i < K - 1)",
        "real = (i >= 0) & (i < 0)",
        few,
    ),
    "backward: gradient of the final state one step late": ("i = p - end + K - 1", "i = p - end + K - 2", few),
    "backward: gradient of the final state at the end of the row": (
        "end = last if lengths is None else first + tl.load(lengths + row).to(tl.int32)",
        "end = last",
        ends,
    ),
    "backward: gradient of the initial state in the wrong order": (
        "at = dstate + (p - first + K - 1)",
        "at = dstate + (first - 1 - p)",
        over_groups,
    ),
    "backward: sums of the last group alone": ("            db += d\n", "            db = d\n", over_groups),
    "backward: sums of the weights one step late": (
        "dtaps[i] + d * seen[i + j])",
        "dtaps[i] + d * seen[K - 1 - i + j])",
        few,
    ),
    "backward: gradients carried from the wrong step": (
        "seen, slopes = seen[GROUP:], slopes[GROUP:]",
        "seen, slopes = seen[GROUP:], slopes[: K - 1]",
        over_groups,
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_error_is_found(name, monkeypatch, tmp_path):
    must_be_found(monkeypatch, tmp_path, conv_triton, *MUTATIONS[name])
