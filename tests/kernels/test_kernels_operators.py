"""The operators that torch.compile calls: what they give is what the functions give, whichever copy of the file they
are of."""

import importlib.util
import sys

import pytest
import torch
from torch.library import opcheck

from scrubjay.kernels import causal_attention, conv, ddts, operators, select_attention, ssd, window

# Five times the worst difference that was measured; sums are taken in the same order.
BOUND = 1e-12


def some(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def decays(*shape):
    return -some(*shape).exp()


def recurrence(keys, values, per_step, docs=None):
    """Operands of two rows, or of three documents, the second one empty."""
    batch, cut = (2, None) if docs is None else (1, torch.tensor(docs))
    sequences = [some(batch, 9, *shape) for shape in (keys, keys, values)]
    return batch if docs is None else len(docs) - 1, cut, [*sequences, decays(batch, 9, *per_step)]


def ssd_case(docs=None):
    rows, cut, sequences = recurrence((2, 3), (4, 5), (4,), docs)
    return ssd._Chunk.operator, [some(rows, 2, 3, 10), cut, *sequences, some(*sequences[-1].shape)], [4], []


def ddts_case(docs=None):
    rows, cut, sequences = recurrence((3,), (5,), (3,), docs)
    return ddts._Chunk.operator, [some(rows, 3, 5), cut, *sequences], [4], []


def conv_case(docs=None):
    batch, rows, cut = (2, 2, None) if docs is None else (1, len(docs) - 1, torch.tensor(docs))
    lengths = torch.tensor([4, 9]) if docs is None else None
    return conv._OPERATOR, [some(batch, 9, 4), some(4, 3), some(4), some(rows, 2, 4), cut, lengths], [1], []


def bare_conv_case(docs=None):
    """Without the activation."""
    operator, tensors, _, _ = conv_case(docs)
    return operator, tensors, [0], []


def documents_case():
    return causal_attention._DOCUMENTS, [some(1, 9, 4, 6), *some(2, 1, 9, 2, 6), torch.tensor(PACKED)], [], [0.4]


def window_case(docs=None):
    q, k, v = some(1, 9, 4, 6), some(1, 9, 1, 6), some(1, 9, 4, 6)
    past = [None] * 3 if docs else [some(1, 2, 1, 6), some(1, 2, 4, 6), torch.tensor([[False, True]])]
    return window._OPERATOR, [q, k, v, *past, torch.tensor(docs) if docs else None, None], [3], [0.4, 0.0]


def select_case(docs=None):
    asked = torch.rand(2, 9) < 0.5
    before = torch.arange(9).expand(2, 9).contiguous()
    readable, places = torch.rand(2, 9) < 0.8, torch.arange(9).expand(2, 9).contiguous()
    operands = [some(18, 4, 6), some(2, 9, 2, 6), some(2, 9, 2, 6), asked, before, readable, places]
    return select_attention._OPERATOR, operands, [5, 3], [0.4]


PACKED = (0, 5, 5, 9)
CASES = {
    **{
        f"{case.__name__[:-5]}": case
        for case in (ssd_case, ddts_case, conv_case, bare_conv_case, window_case, select_case, documents_case)
    },
    **{
        f"{case.__name__[:-5]} packed": lambda case=case: case(PACKED)
        for case in (ssd_case, ddts_case, conv_case, bare_conv_case, window_case)
    },
}


@pytest.mark.parametrize("name", CASES)
def test_an_operator_is_what_torch_asks_of_one(name):
    """Shapes without values, nothing written, nothing aliased, a backward pass."""
    operator, tensors, integers, floats = CASES[name]()
    tensors = [x.requires_grad_() if x is not None and x.is_floating_point() else x for x in tensors]
    given = [x is not None for x in tensors]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(operator.call, ([x for x in tensors if x is not None], given, integers, floats), test_utils=tests)


@pytest.mark.parametrize("name", CASES)
def test_an_operator_has_the_values_and_gradients_of_its_function(name):
    operator, tensors, integers, floats = CASES[name]()
    leaves = [x.requires_grad_() for x in tensors if x is not None and x.is_floating_point()]
    found = []
    for call in (operator.function, operator):
        outs = call(tensors, integers, floats)
        torch.manual_seed(1)
        loss = sum((out * torch.randn_like(out)).sum() for out in outs)
        found.append([*outs, *torch.autograd.grad(loss, leaves, materialize_grads=True)])
    for got, want in zip(found[1], found[0], strict=True):
        assert got.shape == want.shape
        assert got.is_contiguous()
        assert (got - want).abs().max() <= BOUND * max(want.abs().max(), 1)


def test_dropout_is_the_same_in_both_passes():
    """Outputs are linear in the values: their gradient times them is the loss."""
    q, k, v = some(2, 70, 4, 6), some(2, 70, 1, 6), some(2, 70, 4, 6).requires_grad_()
    tensors = [q, k, v, None, None, None, None, torch.tensor(7)]
    state = torch.get_rng_state()
    (o,) = window._OPERATOR(tensors, [20], [0.4, 0.5])
    (whole,) = window._OPERATOR(tensors, [20], [0.4, 0.0])
    loss = (o * some(2, 70, 4, 6)).sum()
    (dv,) = torch.autograd.grad(loss, v)
    assert (o - whole).abs().max() > 0.1
    torch.testing.assert_close((dv * v).sum(), loss)
    torch.set_rng_state(state)
    torch.testing.assert_close(o, window._OPERATOR(tensors, [20], [0.4, 0.5])[0])


def copy(name):
    """The file once more, as a module of another name or of one that was imported before."""
    spec = importlib.util.spec_from_file_location(name, operators.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_copies_of_the_file_have_operators_of_their_own():
    assert "copy_of_operators" not in sys.modules
    calls = []
    for number, module in enumerate([copy("copy_of_operators"), copy("copy_of_operators"), copy("another_copy")], 1):
        operator = module.Operator(
            "scaled",
            lambda tensors, *_, by=number: [tensors[0] * by],
            lambda tensors, _: [torch.empty_like(tensors[0])],
        )
        calls.append(torch.compile(lambda x, f=operator: f([x, None])[0] + 1, backend="eager", fullgraph=True))
    assert [float(call(torch.tensor(10.0))) for call in calls] == [11, 21, 31]


def test_a_namespace_is_the_same_in_every_process():
    """A compiler's cache on disk is kept by the names of operators."""
    assert (
        operators._OWN.ns
        == "scrubjay_" + operators.hashlib.sha256(b"scrubjay.kernels.operators").hexdigest()[:12] + "_0"
    )
