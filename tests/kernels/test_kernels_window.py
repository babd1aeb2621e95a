"""Window attention: its past, its step on a ring of keys, its memory, its dropout."""

import pytest
import torch
from kernel_cases import BF16, F32, F64, KERNELS, against_reference, check, draw, results
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scrubjay.kernels.window import window_attention, window_attention_step

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("keys", [1, 2, 4])
def test_window_attention_skips_past_steps_that_are_not_real(keys, dtype):
    """Rows with all, some and none of 70 past steps."""
    real = torch.arange(70) >= torch.tensor([0, 50, 70])[:, None]
    real[1, 60] = False
    for window in (1, 20, 64, 500):
        inputs = draw("window_attention", 66, dtype, window, batch=3, states=70, keys=keys)
        check("window_attention", inputs, window=window, real=real)
        got, _ = against_reference("window_attention", inputs, window=window, real=real)
        assert not got["d past_k"][~real].any()
        assert not got["d past_v"][~real].any()


def test_window_attention_with_a_past_of_no_steps_equals_without():
    inputs = draw("window_attention", 5)
    nothing = (torch.zeros(2, 0, 1, 7), torch.zeros(2, 0, 4, 7), torch.zeros(2, 0, dtype=torch.bool))
    assert torch.equal(window_attention(**inputs, window=3, past=nothing), window_attention(**inputs, window=3))


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize(("keys", "values"), [(1, 4), (2, 4), (4, 1), (1, 2), (4, 4)])
def test_window_attention_steps_equal_one_pass(keys, values, dtype):
    """A window is a ring: its entries may come in any order, and some of them may not be held."""
    window, T = 5, 12
    order = torch.randperm(window)

    def steps(q, k, v, window, scale=None):
        ys = []
        for t in range(T):
            at = torch.arange(t - window + 1, t + 1)[order]
            ring = [x[:, at.clamp(min=0)].transpose(1, 2) for x in (k, v)]
            held = (at >= 0).expand(len(q), -1)
            ring = [torch.where(held[:, None, :, None], x, 1e4) for x in ring]
            ys.append(window_attention_step(q[:, t], *ring, held, scale))
        return torch.stack(ys, 1)

    for scale in (None, 0.3):
        inputs = draw("window_attention", T, dtype, keys=keys, values=values)
        check("window_attention", inputs, steps, window=window, scale=scale)


def test_window_attention_step_takes_its_scale_by_name():
    q, keys, values = torch.randn(2, 4, 7), torch.randn(2, 1, 9, 7), torch.randn(2, 4, 9, 7)
    held = torch.ones(2, 9, dtype=torch.bool)
    by_name = window_attention_step(q, keys, values, held, scale=0.3)
    assert torch.equal(by_name, window_attention_step(q, keys, values, held, 0.3))


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest memory that an operation inside it returned; views own none."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("with_past", [False, True])
def test_window_attention_memory_grows_with_the_window_not_the_length(with_past):
    T, W, H = 1024, 64, 4
    inputs = draw("window_attention", T, batch=1, heads=H, head_dim=8, states=W - 1 if with_past else 0)
    limit = T * (W + 64) * H
    with LargestTensor() as largest:
        results(KERNELS["window_attention"].fast, inputs, window=W)
    assert largest.numel <= limit
    with LargestTensor() as dense:
        results(KERNELS["window_attention"].reference, inputs, window=W)
    assert dense.numel > 4 * limit


@pytest.mark.parametrize("shared", ["keys", "values"])
def test_window_attention_does_not_repeat_what_heads_share(shared):
    """64 queries of 16 heads on 1024 keys: one copy of the keys for each head would be the largest tensor by far."""
    T, S, H, P = 64, 960, 16, 32
    inputs = draw("window_attention", T, batch=1, states=S, heads=H, head_dim=P, keys=1, values=1)
    with torch.no_grad(), LargestTensor() as largest:
        KERNELS["window_attention"].fast(**inputs, window=1024)
    assert largest.numel < (T + S) * P * H // 2


def test_window_attention_dropout_zeroes_weights_and_keeps_the_mean():
    """Values of 1 give 1 without dropout; with it each output is a sum of kept weights over 1 - p."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 200, 4, 8), torch.randn(1, 200, 1, 8), torch.ones(1, 200, 4, 8)
    y = window_attention(q, k, v, 50, dropout=0.3)
    assert y[:, 0].unique().tolist() in ([0.0], [pytest.approx(1 / 0.7)], [0.0, pytest.approx(1 / 0.7)])
    assert y.mean().item() == pytest.approx(1, abs=0.05)  # 800 sums of about 50 weights: 0.02 is four deviations
    assert y.std().item() > 0.05
