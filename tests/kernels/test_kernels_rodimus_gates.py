"""The gates of Rodimus against their formula, and what the mixer relies on."""

import pytest
import torch
from kernel_cases import BF16, F32, F64
from rodimus_cases import EPS, GATES_MEASURED, check_gates, draw_gates

from scrubjay.kernels.rodimus_gates import log_softplus, rodimus_gates

tempered_or_not = pytest.mark.parametrize("tempered", [True, False], ids=["", "no temperature"])


@tempered_or_not
@pytest.mark.parametrize("dtype", GATES_MEASURED, ids=str)
def test_outputs_and_gradients_equal_the_formula(dtype, tempered):
    check_gates(draw_gates(dtype=dtype, tempered=tempered))


@tempered_or_not
def test_keys_shorter_than_eps_are_divided_by_it(tempered):
    inputs = draw_gates(dtype=F64, tempered=tempered)
    inputs["qk"][0] *= 2e-6  # some just shorter than eps
    check_gates(inputs)


def test_a_selection_whose_softplus_underflows_has_exact_gradients():
    x = torch.tensor([-800.0, -110.0, -40.0, -15.5, -14.5, -3.0, 2.0, 30.0], requires_grad=True)
    (slope,) = torch.autograd.grad(log_softplus(x).sum(), x)
    want = torch.where(x < -700, 1.0, torch.sigmoid(x.double()) / torch.logaddexp(x.double(), x.new_zeros(1).double()))
    assert torch.allclose(slope.double(), want, rtol=1e-6)
    assert torch.allclose(log_softplus(x).double()[1:], torch.nn.functional.softplus(x[1:].double()).log(), rtol=1e-6)


def test_without_a_temperature_gates_are_those_of_a_temperature_of_1():
    inputs = draw_gates(dtype=F64)
    inputs["gates"][..., 6:], inputs["bias"][6:] = 40.0, 0.0  # whose sigmoid is 1
    alone = inputs | {"gates": inputs["gates"][..., :6], "bias": inputs["bias"][:6]}
    for got, want in zip(rodimus_gates(**alone, eps=EPS), rodimus_gates(**inputs, eps=EPS), strict=True):
        assert torch.allclose(got, want, rtol=1e-14)


def test_keys_and_decays_are_float32_and_queries_keep_their_dtype():
    q, k, a = rodimus_gates(**draw_gates(dtype=BF16), eps=EPS)
    assert (q.dtype, k.dtype, a.dtype) == (BF16, F32, F32)
    assert (a <= 0).all()


@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 2, 6), (1, 2, 4), (6,)),
        ((1, 2, 5), (1, 2, 5), (5,)),
        ((1, 2, 6), (1, 2, 6), (3,)),
        ((1, 2, 6), (1, 2, 3), (6,)),
        ((1, 2, 6), (2, 3), (3,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="rodimus_gates needs"):
        rodimus_gates(*(torch.zeros(shape) for shape in shapes), EPS)
