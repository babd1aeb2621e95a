"""Calls of Rodimus' two operations, DDTS and its gates, and the comparisons of their kernels with the references."""

from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from kernel_cases import BF16, F16, F32, F64, MARGIN, assert_within, draw, results, widened

from scrubjay.kernels import ddts as paths
from scrubjay.kernels.ddts import ddts, ddts_reference, ddts_step
from scrubjay.kernels.rodimus_gates import rodimus_gates
from scrubjay.kernels.triton_tools import tl

# Largest errors over the calls of the tests. The interpreter cuts off what it stores as bfloat16; others round.
DDTS_MEASURED = {F32: 3.6e-7, F16: 4.5e-4, BF16: 6.6e-3}
GATES_MEASURED = {F32: 3e-7, F16: 4.5e-4, BF16: 6e-3, F64: 1e-15}
EPS = 1e-5
LENGTHS = (0, 1, 70, 0, 5, 1, 64, 0)  # of packed documents

fast = partial(ddts, backend="triton")


def drawn(T, dtype=F32, **arguments):
    """In 16 bits as the mixer calls it: v and y have them, keys and decays (and here the queries) are float32."""
    wide = ("q", "k", "a") if dtype == F16 else ()
    return draw("ddts", T, dtype, wide=wide, **{"batch": 1, "states": 1} | arguments)


def documents(dtype):
    inputs = drawn(sum(LENGTHS), dtype, states=len(LENGTHS))
    return inputs, {"cu_seqlens": F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0))}


def check_ddts(inputs, **options):
    """Each result within the bound of its own dtype. Returns the results."""
    got, cotangents = results(fast, inputs, **options)
    want, _ = results(ddts_reference, widened(inputs), cotangents, **options)
    assert got.keys() == want.keys()
    for name, value in want.items():
        limit = MARGIN * DDTS_MEASURED[got[name].dtype]
        assert_within("ddts", {name: got[name]}, {name: value}, inputs, limit)
    return got


def check_products_in_16_bits():
    """As on a GPU: products are formed of 16-bit numbers, and yet states and their gradients keep float32's bound."""
    inputs = drawn(65, F16)
    low = {"dot_dtype": lambda v: tl.float16, "_product_dtype": lambda v: v.dtype}
    with mock.patch.dict(paths.ddts_triton.__globals__, low):
        got, cotangents = results(fast, inputs)
    want, _ = results(ddts_reference, widened(inputs), cotangents)
    for name, value in want.items():
        limit = MARGIN * DDTS_MEASURED[F32 if name in ("state", "d initial_state") else F16]
        assert_within("ddts", {name: got[name]}, {name: value}, inputs, limit)


def step_inputs(dtype=F32, rows=3, size=20, width=70):
    inputs = drawn(1, dtype, batch=rows, states=rows, size=size, width=width)
    return *(inputs[name][:, 0] for name in "qkva"), inputs["initial_state"]


def check_step(*operands):
    got, want = paths.ddts_step_triton(*operands), ddts_step(*(x.double() for x in operands))
    for mine, reference in zip(got, want, strict=True):
        assert_within("ddts", {"step": mine}, {"step": reference}, {}, MARGIN * DDTS_MEASURED[mine.dtype])


def draw_gates(T=9, size=6, dtype=F32, spread=1.0, tempered=True):
    torch.manual_seed(0)
    gates = 2 * size if tempered else size
    shapes = {"qk": (2, T, 2 * size), "gates": (2, T, gates), "bias": (gates,)}
    inputs = {name: spread * torch.randn(shape, dtype=F64) for name, shape in shapes.items()}
    return {name: x.to(F32 if name == "bias" and dtype != F64 else dtype) for name, x in inputs.items()}


def formula(qk, gates, bias, eps):
    """Channel by channel, with powers as powers."""
    n = qk.shape[-1] // 2
    q, k = qk[..., :n], qk[..., n:]
    g = (1 + (gates + bias)[..., :n].exp()).log()
    t = 1 / (1 + (-(gates + bias)[..., n:]).exp()) if gates.shape[-1] > n else 1
    length = k.square().sum(-1, keepdim=True).sqrt().clamp(min=eps)
    return q / n**0.5, k / length * g**t, -g * t


def named(op):
    """`results` knows two outputs by name: the third joins the second."""

    def call(**inputs):
        q, k, a = op(**inputs, eps=EPS)
        return q, torch.cat([k, a], -1)

    return call


def check_gates(inputs, **options):
    """Each result within the bound of its own dtype."""
    got, cotangents = results(named(partial(rodimus_gates, **options)), inputs)
    want, _ = results(named(formula), widened(inputs), cotangents)
    for name, value in want.items():
        limit = MARGIN * GATES_MEASURED[got[name].dtype]
        assert_within("rodimus_gates", {name: got[name]}, {name: value}, inputs, limit)
