"""Rows go into the slots named, in place, and nothing else of a buffer is written or copied."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from scrubjay.kernels.slots import put_rows, take_rows

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHARED = [(3, 4), (3, 1), (1, 1)]  # slots of each row and head; of each row; the same for all


def law(buffer, slots, rows):
    """One row at a time."""
    buffer = buffer.clone()
    for b in range(rows.shape[0]):
        for h in range(rows.shape[1]):
            for i in range(rows.shape[2]):
                buffer[b, h, slots[b % len(slots), h % slots.shape[1], i]] = rows[b, h, i]
    return buffer


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("shape", SHARED, ids=str)
@pytest.mark.parametrize("size", [(), (6,)], ids=["numbers", "rows"])
def test_rows_are_written_into_their_slots(size, shape, dtype):
    torch.manual_seed(0)
    buffer, rows = (torch.randint(0, 2**5, (3, 4, n, *size)).to(dtype) for n in (9, 5))
    slots = torch.stack([torch.randperm(9)[:5] for _ in range(shape[0] * shape[1])]).view(*shape, 5)
    want, at = law(buffer, slots, rows), buffer.data_ptr()
    assert put_rows(buffer, slots, rows) is buffer
    assert buffer.data_ptr() == at
    assert torch.equal(buffer, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_part_of_a_larger_buffer_is_written(dtype):
    torch.manual_seed(0)
    whole, rows = torch.randn(2, 3, 9, 12).to(dtype), torch.randn(2, 2, 1, 6).to(dtype).transpose(0, 1)
    want, slots = whole.clone(), torch.tensor([[[4], [0]], [[1], [8]]])
    want[:, 1:, :, ::2] = law(want[:, 1:, :, ::2], slots, rows)
    put_rows(whole[:, 1:, :, ::2], slots, rows)
    assert torch.equal(whole, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_copy_of_the_buffer_is_made(dtype):
    buffer, rows, slots = torch.zeros(2, 3, 500, 8).to(dtype), torch.ones(2, 3, 1, 8).to(dtype), torch.tensor([[[7]]])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        put_rows(buffer, slots, rows)
    taken = [event.cpu_memory_usage for event in seen.events()]
    assert max(taken) < buffer.nbytes / 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_read_from_buffers_of_any_strides(dtype):
    torch.manual_seed(0)
    whole = torch.randn(2, 3, 9, 6).to(dtype)
    part, turned = torch.randn(2, 3, 20, 6).to(dtype)[:, :, :9], torch.randn(2, 9, 3, 6).to(dtype).transpose(1, 2)
    index, buffers = torch.randint(0, 9, (2, 3, 4)), [whole, part, turned, whole]
    outs = take_rows(buffers, index, [whole.new_empty(2, 3, 4, 6) for _ in buffers])
    for x, got in zip(buffers, outs, strict=True):
        assert torch.equal(got, x.gather(2, index[..., None].expand(-1, -1, -1, 6)))
