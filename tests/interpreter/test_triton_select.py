"""Selective window attention's Triton kernels equal its dense law, forward and backward, and its step."""

import pytest
import torch
from kernel_cases import BF16, F16, F32, F64
from parity_cases import tokens
from select_cases import BOUND, check, check_step, draw, expect, narrowed, normal, ring
from taipan_cases import build

from scrubjay import TaipanConfig
from scrubjay.kernels import select_attention as kernel
from scrubjay.kernels import select_attention_triton
from scrubjay.kernels.select_attention import pack
from scrubjay.modeling import selective_layer as selective
from scrubjay.modeling.caches.cache_taipan import RingLayer
from scrubjay.modeling.layout import Layout
from scrubjay.modeling.selective_layer import SelectiveAttention


@pytest.mark.parametrize(
    ("T", "window", "share"),
    [(1, 8, 1.0), (33, 1, 0.5), (65, 64, 1.0), (130, 60, 0.4), (130, 300, 0.15), (100, 40, 0.02)],
)
def test_outputs_and_gradients_equal_the_law(T, window, share):
    check(*draw(T, share, window, B=3), window)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_low_precision_within_its_bound(dtype):
    check(*draw(150, 0.6, 70, dtype=dtype), 70)


@pytest.mark.parametrize("past", [1, 70])
def test_a_past_of_another_length_in_each_row(past):
    check(*draw(80, 0.5, 60, past=past), 60)


@pytest.mark.parametrize(("H", "K"), [(1, 1), (3, 3), (6, 2)])
def test_groups_of_heads(H, K):
    check(*draw(70, 0.5, 30, H=H, K=K), 30)


@pytest.mark.parametrize(("P", "dtype"), [*((P, dtype) for P in (5, 24, 64, 80) for dtype in (F32, BF16)), (130, BF16)])
def test_heads_of_any_size(P, dtype):
    check(*draw(70, 0.5, 30, P=P, H=1, dtype=dtype), 30)


@pytest.mark.parametrize("way", ["documents", "limit", "readable", "all"])
def test_documents_limits_and_readable_columns(way):
    operands, ways = narrowed()
    check(*operands, **ways[way])


def test_limits_on_a_past_and_other_rows():
    q, k, v, packed, before = draw(70, 0.5, 60, past=20)
    places, readable = torch.randint(1, 4, (2, 90)).cumsum(1), torch.rand(2, 90) < 0.5
    check(q, k, v, packed, before, 60, limits=[(places, 40), (readable.cumsum(1), 5)], readable=readable)


def test_rows_without_a_query_runs_of_them_and_ones_further_apart_than_a_window():
    mask = torch.zeros(4, 150, dtype=torch.bool)
    mask[1, 70:90] = True
    mask[2, [0, 149]] = True
    mask[3] = True
    packed = pack(mask, 20)
    q, k, v = (normal(*shape) for shape in ((len(packed.index), 2, 8), (4, 150, 1, 8), (4, 150, 1, 8)))
    check(q, k, v, packed, torch.arange(150).expand(4, -1), 20)


def test_a_before_that_does_not_rise_as_documents_do():
    q, k, v, packed, _ = draw(130, 0.7, 100)
    check(q, k, v, packed, torch.randint(0, 100, (2, 130)).clamp(max=torch.arange(130)), 100)


def test_a_scale_of_ones_own():
    check(*draw(40, 0.5, 20), 20, scale=0.9)


def test_scores_a_thousand_times_as_large():
    q, *rest = draw(70, 0.5, 30)
    check(1000 * q, *rest, 30, bound=1e-4)  # a score of 2000 is off by 1e-4 in float32


def test_both_orders_of_queries_give_the_same_bits():
    mask = torch.rand(3, 100) < 0.4
    first, second = pack(mask, 40, tiled=True), pack(mask, 40, tiled=False)
    assert not torch.equal(first.index, second.index)
    assert torch.equal(second.index, first.index.sort().values)
    every, k, v = normal(300, 1, 8), normal(3, 100, 1, 8), normal(3, 100, 1, 8)
    before = torch.arange(100).expand(3, -1)
    a, b = (
        torch.zeros_like(every).index_copy(
            0, packed.index, kernel.select_attention(every[packed.index], k, v, packed, before, 40, backend="triton")
        )
        for packed in (first, second)
    )
    assert torch.equal(a, b)
    for backend in ("triton", "torch"):
        check(every[second.index], k, v, second, before, 40, backend=backend)


def test_all_columns_without_asking_the_mask():
    mask = torch.rand(2, 70) < 0.5
    for tiled in (True, False):
        assert torch.equal(
            pack(mask, 300, every=True, tiled=tiled).index, pack(mask | True, 300, tiled=tiled).index
        )  # fmt: skip


def test_operands_that_are_not_contiguous():
    q, k, v, packed, before = draw(40, 0.5, 20, H=4, K=2)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    v = torch.cat([v, v], -1)[..., :8]
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    check(q, k, v.mT.contiguous().mT, packed, before.expand(2, -1), 20)
    q.requires_grad_()
    o = kernel.select_attention(q, k, v, packed, before, 20, backend="triton")
    want = kernel.select_attention(q, k, v, packed, before, 20, backend="torch")
    grads = [torch.autograd.grad(x.sum(), q)[0] for x in (o, want)]  # the gradient of a sum has no memory of its own
    expect("d q", *grads, BOUND[F32])


def test_equals_the_torch_path():
    operands = draw(150, 0.4, 60, past=30, H=4, K=2)
    expect("o", *(kernel.select_attention(*operands, 60, backend=b) for b in ("triton", "torch")), BOUND[F32])


def test_nothing_selected_gives_nothing_and_zero_gradients():
    q, k, v, packed, before = draw(50, 0.0, 8)
    k.requires_grad_()
    out = kernel.select_attention(q, k, v, packed, before, 8, backend="triton")
    assert out.shape == (0, 2, 8)
    assert not torch.autograd.grad(out.sum(), k)[0].any()


def test_calls_that_the_kernels_do_not_cover_are_refused():
    for changes in (dict(dtype=F64), dict(P=129), dict(P=257, dtype=BF16)):
        with pytest.raises(ValueError, match="no Triton kernel"):
            kernel.select_attention(*draw(20, 0.5, 8, **changes), 8, backend="triton")
    *operands, before = draw(20, 0.5, 8)
    with pytest.raises(ValueError, match="no Triton kernel"):
        kernel.select_attention(*operands, before, 8, [(before, 3)] * 3, backend="triton")
    q, keys, values, seen = ring(2, 2, 1, 9, 8)
    with pytest.raises(ValueError, match="no Triton kernel"):  # the step has no backward pass
        kernel.select_attention_step(q.requires_grad_(), keys, values, seen, backend="triton")


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("H", "K", "W", "P"), [(2, 2, 40, 8), (6, 2, 100, 24), (20, 1, 64, 80), (1, 1, 9, 120)])
def test_a_step_equals_the_law(H, K, W, P, dtype):
    check_step(ring(3, H, K, W, P, dtype))


def test_a_step_of_wide_heads():
    check_step(ring(2, 1, 1, 40, 130, BF16))


@pytest.mark.parametrize("W", [64, 65, 200])
def test_a_step_over_parts_of_the_ring(W, monkeypatch):
    monkeypatch.setattr(select_attention_triton, "PART", 64)
    check_step(ring(3, 4, 2, W, 8))
    check_step(ring(3, 4, 2, W, 8, BF16), torch.tensor([False, True, True]), scale=0.3)


@pytest.mark.parametrize("part", [64, 256])
def test_rows_that_are_not_selected_read_nothing_and_get_zeros(part, monkeypatch):
    monkeypatch.setattr(select_attention_triton, "PART", part)
    rows = torch.tensor([False, True, False])
    operands = ring(3, 2, 1, 100, 8)
    for x in operands[:3]:
        x[~rows] = torch.nan
    q, keys, values, seen = operands
    got = kernel.select_attention_step(q, keys, values, seen, rows=rows, backend="triton")
    assert not got[~rows].any()
    alone = kernel.select_attention_step(*(x[1:2] for x in operands), backend="triton")
    assert torch.equal(got[1:2], alone)  # the bits of a row depend on no other
    clean = [x.nan_to_num() if x.is_floating_point() else x for x in operands]
    check_step(clean, rows)


def test_slots_that_are_not_seen_are_not_read():
    q, keys, values, seen = ring(3, 2, 1, 100, 8)
    got = kernel.select_attention_step(
        q, *(x.masked_fill(~seen[:, None, :, None], torch.nan) for x in (keys, values)), seen, backend="triton"
    )
    expect("o", got, kernel.select_attention_step(q, keys, values, seen, backend="torch"), BOUND[F32])


def test_a_ring_that_is_not_contiguous():
    q, keys, values, seen = ring(3, 4, 2, 40, 8)
    keys = keys.transpose(1, 2).contiguous().transpose(1, 2)
    check_step((q.mT.contiguous().mT, keys, torch.cat([values, values], -1)[..., :8], seen.t().contiguous().t()))


MODELS = ["defaults", "selected keys", "selected keys by rank", "norm after attention", "rope", "residual"]


@torch.no_grad()
def stepped(model, ids):
    cache, logits = model(ids[:, :12], use_cache=True).cache, []
    for t in range(12, ids.shape[1]):
        logits.append(model(ids[:, t : t + 1], cache=cache).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("name", MODELS)
def test_steps_by_mask_give_what_steps_of_the_selected_rows_give(name, monkeypatch):
    model, ids = build(name), tokens(29, 3, 30)
    want, masks = stepped(model, ids), []
    monkeypatch.setattr(selective, "steps_by_mask", lambda keys: True)
    original = selective.select_attention_step

    def recorded(*args, rows):
        masks.append(rows)
        return original(*args, rows=rows)

    monkeypatch.setattr(selective, "select_attention_step", recorded)
    expect("logits", stepped(model, ids), want, 1e-12)
    selected = torch.cat(masks)
    assert len(masks) == 18 * 2  # every step of both layers
    assert 0.1 < selected.double().mean() < 0.9


ASKING = ("nonzero", "item", "tolist", "__bool__", "__int__", "__index__", "__float__", "cpu", "numpy")


@pytest.mark.parametrize("scope", ["all", "selected"])
@torch.no_grad()
def test_a_step_by_mask_asks_nothing_of_the_device(scope, monkeypatch):
    """A GPU has to be waited for by what reads a tensor's numbers on the host."""

    class AskedError(Exception):
        pass

    def asked(*args, **kwargs):
        raise AskedError

    config = TaipanConfig(hidden_size=32, num_attention_heads=2, sliding_window=8, kv_scope=scope)
    layer = SelectiveAttention(config).eval()
    for parameter in layer.parameters():
        parameter.normal_()
    state, h, layout = (
        RingLayer([2, 8, 16], scope == "selected"),
        torch.randn(3, 1, 32),
        Layout(torch.zeros(3, 1).long()),
    )
    monkeypatch.setattr(selective, "steps_by_mask", lambda keys: masked)
    for name in ASKING:
        monkeypatch.setattr(torch.Tensor, name, asked)
    masked = True
    layer(h, layout, state)
    masked = False
    with pytest.raises(AskedError):
        layer(h, layout, state)


def test_steps_go_by_mask_where_the_kernel_runs_and_no_gradient_is_wanted(monkeypatch):
    keys = torch.zeros(1, 1, 4, 8)
    with torch.no_grad():
        assert not kernel.steps_by_mask(keys)
    monkeypatch.setattr(kernel, "choose", lambda backend, op, *tensors, fused: "triton" if fused else "torch")
    assert not kernel.steps_by_mask(keys)
    with torch.no_grad():
        assert kernel.steps_by_mask(keys)
        assert not kernel.steps_by_mask(keys.double())
