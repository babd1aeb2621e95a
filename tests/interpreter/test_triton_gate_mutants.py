"""Deliberate errors in the gate's Triton kernels: a comparison that the tests make has to find each."""

import pytest
from gate_cases import check, check_alone, check_low_precision, check_parts, draw
from kernel_cases import BF16
from triton_mutation import must_be_found

from scrubjay.kernels import gate_triton


def values():
    check(draw(5, 100))


def of_the_stream():
    check(draw(5, 100), normed=False)


def many_rows():
    check(draw(40, 12))


def rounded():
    """The gate reads the norm before it is rounded."""
    check(draw(5, 100, dtype=BF16))


# name: (the line as it is, the line with the error, the comparison that finds it)
MUTATIONS = {
    "mean over the padded row": ("tl.div_rn(_tree_sum(own * own), D * 1.0)", "_tree_sum(own * own) / BLOCK", values),
    "epsilon forgotten": ("tl.sqrt_rn(mean + eps)", "tl.sqrt_rn(mean + 0.1)", values),
    "the norm without its weight": (
        "normal = own * scale * tl.load(norm + d, mask=inside, other=0.0).to(tl.float32)\n        tl.store",
        "normal = own * scale\n        tl.store",
        values,
    ),
    "a sum in float16": (
        "found = _tree_sum(read * _difference(weight, d, inside, D))",
        "found = _tree_sum((read * _difference(weight, d, inside, D)).to(tl.float16).to(tl.float32))",
        values,
    ),
    "the gate reads what was rounded": (
        "read = normal",
        "read = normal.to(x.dtype.element_ty).to(tl.float32)",
        rounded,
    ),
    "the gate of the stream reads the norm": (
        "        if NORMED:\n            read",
        "        if True:\n            read",
        of_the_stream,
    ),
    "the gate reads the stream": ("read = normal", "read = own", values),
    "keep and drop exchanged": (
        "return tl.load(weight + D + at, mask=inside, other=0.0).to(tl.float32) - drop",
        "return drop - tl.load(weight + D + at, mask=inside, other=0.0).to(tl.float32)",
        values,
    ),
    "bias of the drop logit alone": ("tl.load(bias + 1).to(tl.float32) - tl", "0.0 - tl", values),
    "a sum that knows its row's number": (
        "found = _tree_sum(read",
        "found = _tree_sum((read + 1e-6 * row)",
        check_alone,
    ),
    "an order of the sum that depends on the row": (
        "found = _tree_sum(read * _difference(weight, d, inside, D))",
        "found = _tree_sum(read * _difference(weight, d, inside, D))\n"
        "        if row % 2:\n            found = tl.sum(read * _difference(weight, d, inside, D), 0)",
        check_alone,
    ),
    "a sum that knows its operands' dtype": (
        "found = _tree_sum(read",
        "found = _tree_sum((read + 0.0 if h.dtype.element_ty == tl.float32 else read * 1.001)",
        check_low_precision,
    ),
    "another sum without the norm": (
        "found = _tree_sum(read * _difference(weight, d, inside, D))",
        "product = read * _difference(weight, d, inside, D)\n"
        "        found = _tree_sum(product) if norm is not None else tl.sum(product, 0)",
        check_parts,
    ),
    "the gradient without that of the mean": (
        "scale * (gradient - normal * (tl.sum(gradient * normal, 0) / D))",
        "scale * gradient",
        values,
    ),
    "its mean over the padded row": (
        "(tl.sum(gradient * normal, 0) / D)",
        "(tl.sum(gradient * normal, 0) / BLOCK)",
        values,
    ),
    "the weight's gradient after the weight": (
        "of_norm += gradient * normal\n            gradient *= factor",
        "gradient *= factor\n            of_norm += gradient * normal",
        values,
    ),
    "no gradient from delta to the norm": (
        "gradient += given * gate\n                of_gate += given * normal",
        "of_gate += given * normal",
        values,
    ),
    "the gate's gradient without the norm's weight": (
        "of_gate += given * normal * factor",
        "of_gate += given * normal",
        values,
    ),
    "the last rows of a program left out": (
        "tl.minimum(program * share + share, rows)",
        "tl.minimum(program * share + share - 1, rows)",
        many_rows,
    ),
    "rows past the end": (
        "programs = -(-rows // share)",
        "programs = rows // share",
        values,
    ),
    "gradients of keep and drop exchanged": ("torch.stack([-drow, drow])", "torch.stack([drow, -drow])", values),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_deliberate_error_is_found(name, monkeypatch, tmp_path):
    old, new, comparison = MUTATIONS[name]
    must_be_found(monkeypatch, tmp_path, gate_triton, old, new, comparison)
