"""SSD as Triton kernels against the reference in float64: outputs, states and every gradient.

Chunks have 128 steps forwards and 64 backwards in 16 bits, 64 and 32 in float32. Bounds are those of PyTorch's path;
measured here: 4e-7 in float32, 9e-3 in bfloat16 (which the interpreter cuts off), 9e-4 in float16, states 3e-7 in all.
"""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import BF16, F16, F32, F64, assert_within, check, draw, error, results
from kernel_checks import FORGETTING, check_forgotten, forgetting
from ssd_cases import (
    LENGTHS,
    check_documents_of_ssd,
    check_forgetting_of_ssd,
    check_no_number,
    check_step,
    check_step_of,
    fast,
    strong,
)

from scrubjay.kernels.ssd import ssd
from scrubjay.kernels.ssd_triton import ssd_step_triton


@pytest.mark.parametrize("T", [1, 2, 31, 33, 65, 131])
def test_float32_equals_the_reference(T):
    check("ssd", draw("ssd", T, batch=1, states=1), fast)


@pytest.mark.parametrize("T", [1, 63, 65, 130])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_16_bits_equal_the_reference(T, dtype):
    check("ssd", draw("ssd", T, dtype, batch=1, states=1), fast)


def test_float32_decays_beside_bfloat16():
    check("ssd", draw("ssd", 65, BF16, batch=1, states=1, wide=("a", "g")), fast)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_of_heads_and_rows_of_a_batch(groups):
    check("ssd", draw("ssd", 33, groups=groups), fast)


def test_many_heads_of_one_group():
    check("ssd", draw("ssd", 20, batch=1, states=1, groups=1, heads=11), fast)


@pytest.mark.parametrize(("size", "head_dim"), [(1, 1), (16, 16), (20, 33), (70, 9), (9, 70), (130, 20), (20, 130)])
def test_sizes_that_are_no_powers_of_two_and_larger_than_a_tile(size, head_dim):
    check("ssd", draw("ssd", 34, batch=1, states=1, groups=1, heads=2, size=size, head_dim=head_dim), fast)


def test_without_an_initial_state():
    check("ssd", draw("ssd", 33, states=0), fast)


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_packed_documents(dtype, with_state):
    check_documents_of_ssd(dtype, with_state)


def test_packed_documents_without_a_step_hand_their_states_on():
    inputs = draw("ssd", 3, batch=1, states=4)
    _, state = fast(**inputs, cu_seqlens=torch.tensor([0, 0, 3, 3, 3]))
    for d in (0, 2, 3):
        assert torch.equal(state[d], inputs["initial_state"][d])


@pytest.mark.parametrize("scale", [1e-3, 10.0, 1e3])
def test_decays_of_any_strength(scale):
    check("ssd", strong(scale), fast)


def test_one_strong_decay_among_weak_ones_takes_nothing_from_them():
    inputs = draw("ssd", 40, batch=1, states=1)
    inputs["a"] *= 1e-3
    inputs["a"][:, 17] = -1e4
    check("ssd", inputs, fast)


@pytest.mark.parametrize("where", FORGETTING)
@pytest.mark.parametrize("strength", [-torch.inf, -1e14], ids=str)
def test_decays_that_forget_everything_take_nothing_from_weak_ones(strength, where):
    check_forgetting_of_ssd(strength, where)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_decays_that_forget_everything_in_16_bits(dtype):
    inputs = draw("ssd", 131, dtype, batch=1, states=1, groups=1, heads=2)
    check_forgotten("ssd", forgetting(inputs, -torch.inf, [5, 63, 64, 100, 127, 130]), fast)


def test_decays_that_forget_everything_in_packed_documents():
    inputs = draw("ssd", sum(LENGTHS), batch=1, states=len(LENGTHS), groups=1, heads=2)
    inputs = forgetting(inputs, -torch.inf, [*range(0, sum(LENGTHS), 4), sum(LENGTHS) - 1])
    check("ssd", inputs, fast, cu_seqlens=F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)))


def test_decays_that_forget_everything_in_single_steps():
    inputs = {name: x[:, 0] for name, x in draw("ssd", 1, states=0).items()}
    inputs["a"][:, ::2] = -torch.inf
    check_step_of(inputs, torch.randn(2, 4, 5, 7))


def test_a_decay_that_is_no_number_is_not_taken_for_one_that_forgets():
    check_no_number()


def test_inputs_that_are_not_contiguous():
    inputs = draw("ssd", 33)
    spread = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in inputs.items()}
    spread["v"] = inputs["v"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(x.is_contiguous() for x in spread.values())
    check("ssd", spread, fast)


def test_slices_of_a_wider_projection():
    inputs = draw("ssd", 33)
    wide = torch.randn(2, 33, 28 + 20 + 3)
    wide[..., 3:31], wide[..., 31:41] = inputs["v"].flatten(2), inputs["k"].flatten(2)
    inputs |= {"v": wide[..., 3:31].unflatten(-1, (4, 7)), "k": wide[..., 31:41].unflatten(-1, (2, 5))}
    check("ssd", inputs, fast)


def test_a_gradient_of_one_output_alone():
    inputs = draw("ssd", 33, batch=1, states=1)
    for at in (0, 1):
        leaves, plain = ({n: x.clone().requires_grad_() for n, x in inputs.items()} for _ in range(2))
        for backend, tensors in (("triton", leaves), ("torch", plain)):
            ssd(**tensors, backend=backend)[at].square().sum().backward()
        for name, x in plain.items():
            want = torch.zeros_like(x) if x.grad is None else x.grad
            got = torch.zeros_like(x) if leaves[name].grad is None else leaves[name].grad
            assert error(got, want) < 5e-6, name


def test_equals_the_torch_path():
    inputs = draw("ssd", 70)
    got, cotangents = results(fast, inputs)
    assert_within("ssd", got, results(ssd, inputs, cotangents, backend="torch")[0], inputs)


def test_a_call_gives_the_same_bits_twice():
    inputs = draw("ssd", 40, groups=1)
    first, cotangents = results(fast, inputs)
    again, _ = results(fast, inputs, cotangents)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("bad", [{"size": 257}, {"head_dim": 257}, {"dtype": F64}])
def test_what_the_kernels_do_not_cover_is_refused(bad):
    with pytest.raises(ValueError, match="no Triton kernel"):
        fast(**draw("ssd", 3, **bad))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("size", "head_dim"), [(5, 7), (16, 64), (70, 33)])
def test_a_step_equals_the_reference(size, head_dim, dtype):
    check_step(dtype, size=size, head_dim=head_dim)


def test_a_step_without_a_state_is_one_from_zero():
    inputs = {name: x[:, 0] for name, x in draw("ssd", 1, states=0).items()}
    zero = torch.zeros(2, 4, 5, 7)
    for got, want in zip(ssd_step_triton(**inputs), ssd_step_triton(**inputs, state=zero), strict=True):
        assert torch.equal(got, want)


def test_a_step_overwrites_the_state_only_if_it_may():
    inputs = draw("ssd", 1)
    state = inputs["initial_state"]
    before = state.clone()
    y, kept = fast(**inputs)
    assert torch.equal(state, before)
    again, new = fast(**inputs, overwrite=True)
    assert new.data_ptr() == state.data_ptr()
    assert torch.equal(y, again)
    assert torch.equal(new, kept)
    assert not torch.equal(new, before)


def test_single_steps_equal_one_pass():
    inputs = draw("ssd", 9)
    y, final = fast(**inputs)
    state, ys = inputs.pop("initial_state"), []
    for t in range(9):
        out, state = fast(**{name: x[:, t : t + 1] for name, x in inputs.items()}, initial_state=state)
        ys.append(out)
    assert error(torch.cat(ys, 1), y) < 3e-6
    assert error(state, final) < 3e-6
