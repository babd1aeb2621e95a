"""The Triton kernels of recycle.py and release.py, in Triton's interpreter."""

import math
from contextlib import nullcontext

import pytest
import torch
from kernel_cases import BF16, F16, F32, F64
from recycled_cases import decoder, drive, padded, tokens
from recycled_triton_cases import (
    LOGP,
    OUTPUT,
    RATIOS,
    check_decode,
    check_gather,
    check_holes,
    check_long,
    check_pooled,
    check_put,
    check_ranking,
    check_release_step,
    check_top,
    draw,
    drawn_step,
    same,
    slots,
    within,
)

from scrubjay import RecycledCache
from scrubjay.kernels import recycle, recycle_triton, release, triton_tools

WIDTHS = (F32, F16, BF16)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched."""
    names, run = [], triton_tools._run

    def note(kernel, *args):
        names.append(kernel.fn.__name__)
        run(kernel, *args)

    monkeypatch.setattr(triton_tools, "_run", note)
    return names


@pytest.fixture
def on_triton(monkeypatch):
    """backend=None takes a kernel wherever one covers the call, as on a GPU."""

    def choose(backend, op, *tensors, fused=False):
        return "triton" if fused and backend is None else backend or "torch"

    for module in (recycle, release):
        monkeypatch.setattr(module, "choose", choose)


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@pytest.mark.parametrize("side", [None, "inner"])
@pytest.mark.parametrize(("H", "G"), RATIOS)
def test_triton_decode_gives_the_references_outputs_and_log_probabilities(H, G, side, dtype):
    check_decode(H, G, dtype=dtype, real=None if side is None else padded((70, 5), 70, side))


@pytest.mark.parametrize("n", [1, 16, 31, 32, 33, 64, 65])
def test_triton_decode_of_any_number_of_keys(n):
    check_decode(4, 2, n=n, real=padded((n, 1), n))


@pytest.mark.parametrize("P", [1, 20, 40, 130])
def test_triton_decode_of_any_head_size(P):
    check_decode(2, 1, P=P, scale=1 / math.sqrt(P))


def test_triton_decode_reads_parts_of_several_tiles():
    check_long()


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_triton_decode_of_narrow_types_adds_up_parts(dtype):
    check_decode(4, 2, n=150, dtype=dtype, B=1)


def test_triton_decode_in_one_launch_where_one_part_is_all(monkeypatch, launched):
    q, k, v = draw(4, 2)
    many = recycle.decode(q, k, v, 0.3, backend="triton")
    assert launched == ["_part_kernel", "_whole_kernel"]
    monkeypatch.setattr(recycle_triton, "PROGRAMS", 1)
    launched.clear()
    one = recycle.decode(q, k, v, 0.3, backend="triton")
    assert launched == ["_part_kernel"]
    within("one part", one, many.double(), OUTPUT[F32])
    check_decode(4, 2, real=padded((70, 5), 70))


def test_triton_decode_takes_a_mask_for_each_key_head_and_does_not_read_what_it_hides():
    check_holes()


def test_triton_decode_of_a_row_without_tokens_is_zero():
    q, k, v = draw(4, 2)
    real = padded((70, 0), 70)
    out, logp = recycle.decode_with_scores(q, k, v, 0.3, real, backend="triton")
    for found in (out, recycle.decode(q, k, v, 0.3, real, backend="triton")):
        assert not found[1].any()
        within("the other row", found[:1], recycle.decode_reference(q, k, v, 0.3)[0][:1].double(), OUTPUT[F32])
    assert logp[1].eq(-torch.inf).all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_triton_decode_reads_views_of_larger_buffers(dtype):
    """The first 70 of more columns, the rest NaN, and a query out of a transposed tensor, or one with gaps."""
    q, k, v = draw(8, 2, dtype=dtype)
    buffers = torch.full((2, *k.shape[:2], 90, 8), torch.nan, dtype=dtype)
    buffers[:, :, :, :70] = torch.stack([k, v])
    views = [buffer[:, :, :70] for buffer in buffers]
    for strange in (torch.stack([q, q + 1], 1).transpose(1, 2)[:, :, 0], torch.stack([q, q + 1], 3)[..., 0]):
        assert not strange.is_contiguous()
        same("decode", *(recycle.decode(*x, 0.3, backend="triton") for x in ((strange, *views), (q, k, v))))
        got = recycle.decode_with_scores(strange, *views, 0.3, backend="triton")
        want = recycle.decode_with_scores(q, k, v, 0.3, backend="triton")
        for name, x, y in zip(("output", "log-probabilities"), got, want, strict=True):
            same(name, x, y)


def test_triton_decode_stays_finite_where_scores_are_large():
    q, k, v = draw(8, 2, dtype=F16)
    q, k = 70 * q, 70 * k
    out, logp = recycle.decode_with_scores(q, k, v, 1e-2, backend="triton")
    want, logs = recycle.decode_reference(q.double(), k.double(), v.double(), 1e-2)
    within("log-probabilities", logp, logs, LOGP)
    within("output", out, want, OUTPUT[F16])


def test_triton_decode_is_the_same_every_time():
    q, k, v = draw(8, 2)
    found = [recycle.decode_with_scores(q, k, v, 0.3, backend="triton") for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q.double(), k.double(), v.double()),
        lambda q, k, v: (q, k.half(), v.half()),
        lambda q, k, v: (q, k, v.mT.contiguous().mT),
        lambda q, k, v: (q.requires_grad_(), k, v),
        lambda q, k, v: (q.repeat(1, 40, 1), k, v),
        lambda q, k, v: tuple(x.repeat(*(1,) * (x.ndim - 1), 33) for x in (q, k, v)),
    ],
    ids=["float64", "mixed", "turned", "gradient", "160 heads", "head size 264"],
)
def test_triton_decode_leaves_to_pytorch_what_it_does_not_cover(change):
    q, k, v = change(*draw(4, 1))
    for op in (recycle.decode, recycle.decode_with_scores):
        with pytest.raises(ValueError, match="no Triton kernel for this call"):
            op(q, k, v, 0.3, backend="triton")


def test_pytorchs_path_is_obeyed_where_a_kernel_would_be_chosen(on_triton, launched):
    q, k, v = draw(4, 2)
    _, logp = recycle.decode_with_scores(q, k, v, 0.3, backend="torch")
    recycle.decode(q, k, v, 0.3, backend="torch")
    recycle.top(recycle.pooled(logp, 2, backend="torch"), 8, backend="torch")
    release.release_step(*drawn_step(9, 9, 4), backend="torch")
    assert launched == []
    recycle.decode(q, k, v, 0.3)
    assert launched


def test_triton_decode_without_grad_mode_takes_tensors_that_want_gradients():
    q, k, v = draw(4, 1)
    with torch.no_grad():
        recycle.decode(q.requires_grad_(), k, v, 0.3, backend="triton")


@pytest.mark.parametrize("side", [None, "left", "right", "inner"])
@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("reduce", recycle.REDUCTIONS)
def test_triton_scores_are_pooled_as_by_pytorch(reduce, kernel, side):
    check_pooled(reduce, kernel, side)


@pytest.mark.parametrize("H", [2, 14])
@pytest.mark.parametrize("reduce", recycle.REDUCTIONS)
def test_triton_scores_of_any_number_of_heads_and_keys_are_pooled(reduce, H):
    check_pooled(reduce, H=H, n=1)
    check_pooled(reduce, 5, "inner", H=H, n=1030)


def test_triton_pooling_takes_a_mask_for_each_key_head():
    check_pooled(side="inner", by_head=True)
    check_pooled(side="inner", by_head=True, kernel=1)


def test_triton_pooling_keeps_what_is_no_number():
    logp = torch.randn(1, 4, 20)
    logp[0, 1, 9] = torch.nan
    for reduce in ("max", "mean"):
        got = recycle.pooled(logp, 2, reduce, 3, backend="triton")
        assert got.isnan().nonzero()[:, 2].tolist() == [8, 9, 10]


@pytest.mark.parametrize("side", [None, "left", "right", "inner"])
@pytest.mark.parametrize(("recent", "sinks"), [(0, 0), (1, 0), (3, 2), (0, 4)])
@pytest.mark.parametrize("ties", [False, True])
def test_triton_top_is_pytorchs(recent, sinks, side, ties):
    check_top(recent, sinks, side, ties)


def test_triton_top_of_many_columns_is_pytorchs():
    check_top(1, 2, "inner", n=1030)


def test_triton_choice_is_three_launches_without_padding(launched):
    q, k, _ = draw(4, 2)
    scores = recycle.pooled(recycle.scores_of(q, k, 0.3, backend="triton"), 2, backend="triton")
    recycle.top(scores, 8, 1, backend="triton")
    assert launched == ["_part_kernel", "_whole_kernel", "_pool_kernel", "_order_kernel"]


@pytest.mark.parametrize("dtype", [*WIDTHS, F64], ids=str)
def test_triton_gather_copies_rows_of_both_bit_for_bit_in_one_launch(dtype, launched):
    check_gather(dtype)
    assert launched == ["_rows_kernel"] * 2  # one call with buffers and one without


@pytest.mark.parametrize("dtype", [*WIDTHS, F64], ids=str)
@pytest.mark.parametrize("filled", [0, 4, 9])
def test_triton_put_writes_the_same_slots_as_pytorch_in_one_launch(filled, dtype, launched):
    check_put(filled, dtype=dtype)
    check_put(filled, dtype=dtype, reals=True)
    check_put(filled, dtype=dtype, real=torch.tensor([True, False, True]))
    assert launched == ["_put_kernel"] * 3


@pytest.mark.parametrize("ties", [False, True])
def test_triton_put_finds_the_lowest_of_many_slots(ties):
    check_put(1500, 1500, ties=ties)


def test_triton_put_where_slots_are_sealed_or_open_is_pytorchs():
    check_put(sealed=True)
    check_put(1500, 1500, sealed=True)


def test_triton_put_leaves_to_pytorch_buffers_with_gaps():
    held, k, v = slots(9)
    gaps = [x if x is None else torch.stack([x, x], -1)[..., 0] for x in held]
    with pytest.raises(ValueError, match="put_row has no Triton kernel for this call"):
        recycle.put_row(gaps, k, v, 1, torch.zeros(3, dtype=F64), None, 9, backend="triton")


@pytest.mark.parametrize("dtype", [*WIDTHS, F64], ids=str)
@pytest.mark.parametrize("protected", [False, True])
def test_triton_ranking_orders_every_kind_of_number_as_pytorch(protected, dtype):
    check_ranking(dtype, protected)
    check_ranking(dtype, protected, n=1030)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("all_real", [False, True])
@pytest.mark.parametrize(
    ("width", "budget", "new"), [(9, 9, 1), (9, 9, 4), (5, 9, 3), (0, 5, 4), (9, 9, 12), (33, 33, 9)]
)
def test_triton_release_step_is_the_law(width, budget, new, all_real, backend):
    check_release_step(width, budget, new, all_real, backend)


def test_triton_release_step_is_one_launch_and_leaves_its_inputs(launched):
    args = drawn_step(9, 9, 4)
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    release.release_step(*args, backend="triton")
    assert launched == ["_step_kernel"]
    assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(args, before, strict=True))


def test_triton_release_step_leaves_long_pieces_to_pytorch():
    with pytest.raises(ValueError, match="release_step has no Triton kernel for this call"):
        release.release_step(*drawn_step(0, 9, 65), backend="triton")


@pytest.mark.parametrize("policy", ["recycled", "snapkv", "h2o", "streaming"])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_a_cache_on_triton_keeps_the_same_keys_as_on_pytorch(policy, side, on_triton, monkeypatch, launched):
    """Logits within float32's rounding, and the slots to the bit."""
    model, ids = decoder(dtype=F32, layers=1), tokens(2, 21)
    real = None
    if side is not None:
        real = torch.cat([padded((14, 5), 14, side), torch.ones(2, 7, dtype=torch.bool)], 1)
    found = []
    for context in (nullcontext(), monkeypatch.context()):
        with context as patch, RecycledCache(model, budget=8, stride=3, policy=policy) as cache:
            if patch is not None:
                patch.setattr(recycle, "choose", lambda *args, **kwargs: "torch")
            logits = drive(model, ids, [14] + [1] * 7, cache, real)
            found.append((logits, cache.layers[0].kept))
    (got, ours), (want, theirs) = found
    shown = slice(None) if real is None else real
    within("logits", got[shown], want[shown].double(), 1e-5)
    for name in ("index", "rank", "real"):
        x, y = (getattr(kept, name) for kept in (ours, theirs))
        if policy == "h2o" and name == "rank":
            within(name, x, y, 1e-5)
        elif y is not None:
            same(name, x[:, :, : ours.filled], y[:, :, : ours.filled])
    assert {"_part_kernel", "_put_kernel", "_order_kernel", "_rows_kernel"} <= set(launched)


def test_a_partial_step_on_triton_is_two_launches(on_triton, launched):
    model, ids = decoder(dtype=F32, layers=1), tokens(2, 30)
    with RecycledCache(model, budget=8, stride=50) as cache:
        drive(model, ids[:, :16], [14, 1, 1], cache)
        launched.clear()
        drive(model, ids[:, 16:17], [1], cache)
    assert launched == ["_put_kernel", "_part_kernel"]  # so few keys are one part
