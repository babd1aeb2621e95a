"""The largest numbers of rows, by numpy and by torch."""

import pytest
import torch

from scrubjay.kernels import largest as module
from scrubjay.kernels.largest import largest, largest_columns

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64]


def draw(dtype, n=50):
    torch.manual_seed(0)
    return torch.stack([torch.randperm(n) for _ in range(6)]).view(2, 3, n).to(dtype)  # no two are equal


@pytest.mark.parametrize("count", [0, 1, 7, 50])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_are_those_of_a_sorted_row(dtype, count):
    x = draw(dtype)
    want = x.sort(-1).values[..., 50 - count :]
    columns = largest_columns(x, count)
    assert columns.dtype == torch.int64
    assert columns.is_contiguous()
    assert torch.equal(x.gather(-1, columns).sort(-1).values, want)
    if dtype in (torch.float32, torch.int64):
        assert torch.equal(largest(x, count).sort(-1).values, want)


def test_largest_of_equal_numbers_are_as_many_as_wanted():
    x = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert sorted(largest(x, 3).tolist()[0]) == [2.0] * 3
    assert len(set(largest_columns(x, 2).tolist()[0]) & {1, 2, 3}) == 2


def test_largest_is_no_number_first_as_in_torch():
    x = torch.tensor([[1.0, torch.nan, torch.inf, -torch.inf]])
    assert largest_columns(x, 1).item() == x.topk(1).indices.item() == 1


def test_largest_in_a_graph_is_torchs_own(monkeypatch):
    x = draw(torch.float32)
    monkeypatch.setattr(module.np, "argpartition", None)  # would fail
    program = torch.export.export(Columns(), (x,))
    assert torch.equal(program.module()(x).sort(-1).values, x.topk(7, sorted=False).indices.sort(-1).values)


class Columns(torch.nn.Module):
    def forward(self, x):
        return largest_columns(x, 7)
