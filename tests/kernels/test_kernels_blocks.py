"""Chunks are taken in blocks: of any size, with the same result. And nothing on the way is subnormal."""

import pytest
import torch
from kernel_cases import BF16, F32, F64, KERNELS, check, draw, results, two_borders
from torch.utils._python_dispatch import TorchDispatchMode

from scrubjay.kernels import linear, recurrence

KINDS = ("ssd", "ddts")


@pytest.fixture(params=[1, 2, 3, 100], ids="{} chunks a block".format)
def block(request, monkeypatch):
    """A call that sets the block to that many chunks of states like this one."""
    return lambda state: monkeypatch.setattr(recurrence, "BLOCK", request.param * state.numel())


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("kernel", KINDS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_block_of_any_size_gives_the_recurrence(block, kernel, batch, dtype):
    chunk = KERNELS[kernel].lengths[2]
    inputs = draw(kernel, 5 * chunk + 3, dtype, batch=batch, states=batch)
    block(inputs["initial_state"])
    check(kernel, inputs)


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("kernel", KINDS)
def test_documents_in_blocks_of_any_size(block, kernel):
    chunk = KERNELS[kernel].lengths[2]
    lengths = torch.tensor([0, 3 * chunk + 1, 2 * chunk, 1])
    inputs = draw(kernel, int(lengths.sum()), F64, batch=1, states=len(lengths) - 1)
    block(inputs["initial_state"][:1])
    check(kernel, inputs, cu_seqlens=lengths.cumsum(0))


class Subnormals(TorchDispatchMode):
    """The operations that wrote a float32 or bfloat16 number which is too small for its full precision, by name."""

    def __init__(self):
        super().__init__()
        self.found, self.seen = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "empty" in str(func) or any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
            return out  # memory that is still to be written, or a view
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.dtype in (F32, BF16):
                self.seen += 1
                if ((x != 0) & (x.abs() < torch.finfo(F32).tiny)).any():
                    self.found.add(str(func))
        return out


def strong(kernel, dtype):
    """Decays as a model of 24 heads begins with: up to exp(-2.4) a step, exp(-150) a chunk."""
    inputs = draw(kernel, two_borders(kernel), dtype, wide=("a", "g"))
    rates = torch.linspace(0.05, 2.4 if kernel == "ssd" else 8, inputs["a"].shape[-1])
    return inputs | {"a": -rates * (0.5 + torch.rand_like(inputs["a"]))}


@pytest.mark.parametrize("kernel", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("without", [frozenset(), frozenset([BF16])], ids=["has bfloat16", "has none"])
def test_strong_decays_make_no_subnormal_number(kernel, dtype, without, monkeypatch):
    monkeypatch.setattr(linear, "WITHOUT_PRODUCTS", without)
    inputs = strong(kernel, dtype)
    with Subnormals() as numbers:
        results(KERNELS[kernel].fast, inputs)
    assert numbers.seen > 50
    assert numbers.found == set()


@pytest.mark.parametrize("kernel", KINDS)
def test_without_the_floor_there_would_be_some(kernel, monkeypatch):
    monkeypatch.setattr(recurrence, "NOTHING", dict.fromkeys(recurrence.NOTHING, -200))
    inputs = strong(kernel, F32)
    with Subnormals() as numbers:
        results(KERNELS[kernel].fast, inputs)
    assert numbers.found


@pytest.mark.parametrize("kernel", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("without", [frozenset(), frozenset([BF16])], ids=["has bfloat16", "has none"])
def test_strong_decays_equal_the_recurrence(kernel, dtype, without, monkeypatch):
    monkeypatch.setattr(linear, "WITHOUT_PRODUCTS", without)
    check(kernel, strong(kernel, dtype))
