"""The choice of tokens against Python's sort, and its rotations against transformers'."""

import math

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from scrubjay.kernels.release import compacted, highest, placement, ranking, survivors, visibility
from scrubjay.kernels.rotary import turned, unturned


def drawn(rows=4, columns=23, seed=0):
    draw = torch.Generator().manual_seed(seed)
    score = torch.randint(-3, 4, (rows, columns), generator=draw).float() / 2  # many ties
    pos = torch.stack([torch.randperm(40, generator=draw)[:columns] for _ in range(rows)])
    return score, pos, torch.rand(rows, columns, generator=draw) > 0.3


def in_order(score, pos, real):
    """Real columns, the lowest (score, position) first."""
    return sorted((i for i in range(len(real)) if real[i]), key=lambda i: (score[i].item(), pos[i].item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_ranking_orders_by_score_then_position(dtype):
    score, pos, real = drawn()
    rank = ranking(score.to(dtype), pos, real)
    for row in range(len(rank)):
        by_rank = [i for i in rank[row].argsort().tolist() if real[row, i]]
        assert by_rank == in_order(score[row], pos[row], real[row])


def test_ranking_orders_every_kind_of_number():
    score = torch.tensor([[math.nan, -math.inf, -3e38, -1.0, -1e-45, 0.0, -0.0, 1e-45, 1.0, 3e38, math.inf, -5.0]])
    pos, real = torch.arange(12)[None], torch.ones(1, 12, dtype=torch.bool)
    real[0, 10] = False
    protected = torch.zeros_like(real)
    protected[0, 11] = True
    rank = ranking(score, pos, real, protected)[0]
    assert rank.argsort().tolist() == [10, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11]
    assert len(set(rank.tolist())) == 12


@pytest.mark.parametrize("count", [0, 1, 5, 23])
def test_highest_and_survivors_are_the_end_of_the_order(count):
    score, pos, real = drawn()
    rank = ranking(score, pos, real)
    index, is_real = highest(rank, count)
    kept = survivors(rank, count) if count else torch.zeros_like(real)
    for row in range(len(rank)):
        want = in_order(score[row], pos[row], real[row])[::-1][:count]
        assert index[row][is_real[row]].tolist() == want
        assert kept[row].nonzero()[:, 0].tolist() == sorted(want)
    one_less = survivors(rank, rank.shape[1] - 1)
    for row in range(len(rank)):
        assert one_less[row].sum() == min(real[row].sum(), rank.shape[1] - 1)


def test_placement_fills_free_slots_in_order_and_nothing_twice():
    draw = torch.Generator().manual_seed(1)
    for _ in range(50):
        taken = torch.rand(3, 9, generator=draw) > 0.4
        enters = torch.rand(3, 6, generator=draw) > 0.4
        enters &= enters.cumsum(1) <= (~taken).sum(1, keepdim=True)
        target = placement(taken, enters)
        for row in range(3):
            free = (~taken[row]).nonzero()[:, 0].tolist()
            assert target[row][enters[row]].tolist() == free[: int(enters[row].sum())]
            assert (target[row][~enters[row]] == 9).all()


def test_visibility_is_one_rule():
    query_pos, key_pos = torch.tensor([[1, 3, 0]]), torch.tensor([[0, 2, 5, 1, 3, 0]])
    key_real = torch.tensor([[True, True, True, True, False, False]])
    want = [[1, 0, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1]]  # what is not real is seen by itself alone
    assert visibility(query_pos, key_pos, key_real)[0].int().tolist() == want


def test_compacted_counts_the_real_ones():
    pos, real = torch.tensor([[70, 3, 12, 900, 5]]), torch.tensor([[True, True, False, True, True]])
    assert compacted(pos, real).tolist() == [[2, 0, 0, 3, 1]]


@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_rotation_is_that_of_transformers_and_can_be_undone(scaling):
    x, angles = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    angles = torch.cat([angles, angles], -1)
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    assert torch.equal(turned(x, cos, sin), apply_rotary_pos_emb(x, x, cos, sin)[0])
    assert (unturned(turned(x, cos, sin), cos, sin) - x).abs().max() < 1e-14
