"""Deliberate errors in the norms' Triton kernels: a comparison that the tests make has to find each."""

from functools import partial

import pytest
from kernel_cases import check, draw
from triton_mutation import must_be_found

from scrubjay.kernels import norm, norm_triton


def gated(T=2, channels=12, **options):
    """The norm is looked up when it is called: by then its kernels may be others."""
    check("gated_rms_norm", draw("gated_rms_norm", T, channels=channels), norm_of("gated_rms_norm"), **options)


def plain():
    check("rms_norm", draw("rms_norm", 2), norm_of("rms_norm"))


def norm_of(name):
    return partial(getattr(norm, name), backend="triton")


def over_pieces():
    gated(channels=5000)


def over_rows():
    gated(600)


def in_groups():
    gated(channels=60, groups=3)


# name: (the line as it is, the line with the error, the comparison that finds it)
MUTATIONS = {
    "forward: another epsilon": (
        "r = tl.rsqrt(tl.sum(u * u, 1) / size + eps)",
        "r = tl.rsqrt(tl.sum(u * u, 1) / size + 3 * eps)",
        plain,
    ),
    "forward: mean over the padded block": (
        "r = tl.rsqrt(tl.sum(u * u, 1) / size + eps)",
        "r = tl.rsqrt(tl.sum(u * u, 1) / BLOCK + eps)",
        plain,
    ),
    "forward: sigmoid in place of silu": ("u *= gate * tl.sigmoid(gate)", "u *= tl.sigmoid(gate)", gated),
    "forward: skip forgotten": ("u += scale * tl.load(x", "u += tl.load(x", gated),
    "forward: every group has the first one's weights": (
        "    w = tl.load(weight + c, mask=inside",
        "    w = tl.load(weight + at, mask=inside",
        in_groups,
    ),
    "forward: only the first rows of a program": (
        "for first in range(tl.program_id(0) * ROWS, rows, ",
        "for first in range(tl.program_id(0) * ROWS, (tl.program_id(0) + 1) * ROWS, ",
        over_rows,
    ),
    "backward: mean of the products not scaled": ("/ size)[:, None] * r * r", "/ size)[:, None] * r", plain),
    "backward: mean of the products forgotten": ("weights[p] - u * mean) * r", "weights[p]) * r", plain),
    "backward: gradient of sigmoid for that of silu": ("* (1 + gate * (1 - sigma))", "* (1 - sigma)", gated),
    "backward: gradient of y without its gate": ("                d *= gate * sigma\n", "", gated),
    "backward: gradient of x without skip": ("(d * skips[p]).to", "d.to", gated),
    "backward: gradient of the weight of the last rows alone": (
        "old_dweights[p] + d * u * r)",
        "d * u * r)",
        over_rows,
    ),
    "backward: gradient of skip of the last rows alone": ("old_dskips[p] + d * fed)", "d * fed)", over_rows),
    "backward: mean over the last piece alone": (
        "            squares += u * u",
        "            squares = u * u",
        over_pieces,
    ),
    "backward: every piece has the first one's weights": (
        "products += d * weights[p]",
        "products += d * weights[0]",
        over_pieces,
    ),
    "backward: sums of the groups in one place": ("* channels + group\n", "* channels\n", in_groups),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_error_is_found(name, monkeypatch, tmp_path):
    must_be_found(monkeypatch, tmp_path, norm_triton, *MUTATIONS[name])
