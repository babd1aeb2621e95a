"""The Triton kernels of window attention against its reference in float64, in Triton's interpreter.

Bounds are five times the worst error seen; the interpreter truncates where it rounds to bfloat16.
"""

from functools import partial
from itertools import pairwise

import pytest
import torch
from kernel_cases import BF16, F16, F32, F64, against_reference, assert_within, draw, flat_past, results

from scrubjay.kernels import window_triton
from scrubjay.kernels.window import window_attention, window_attention_step

BOUNDS = {F32: 5e-6, F16: 3e-3, BF16: 3e-2}
PAIRS = [(1, 4), (2, 4), (4, 1), (1, 2), (2, 2), (4, 4)]  # key heads and value heads of four query heads
fast = flat_past(partial(window_attention, backend="triton"))


def check(inputs, path=fast, **options):
    """Every output and gradient within the bound for the inputs' dtype."""
    got, want = against_reference("window_attention", inputs, path, **options)
    assert_within("window_attention", got, want, inputs, BOUNDS[inputs["q"].dtype])
    return got


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 steps: short sequences then have tiles inside the band, at both of its edges and beyond the end."""
    for name in ("forward_tiles", "query_gradient_tiles", "key_gradient_tiles"):
        monkeypatch.setattr(window_triton, name, lambda P, dtype: window_triton._tiles(16, 16, 4, 1))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("T", "window"), [(1, 1), (16, 5), (17, 500), *((50, window) for window in (1, 16, 17, 40, 500))]
)
def test_window_kernels_equal_the_reference_around_the_borders_of_tiles(T, window):
    check(draw("window_attention", T, batch=1, heads=2, values=2), window=window)


def test_window_kernels_equal_the_reference_with_the_tiles_they_ship_with():
    for dtype in (F32, BF16):
        check(draw("window_attention", 260, dtype, batch=1, heads=1, values=1, head_dim=20), window=200)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("keys", "values", "programs"), [*((*pair, 1) for pair in PAIRS), (1, 4, 4), (1, 4, 10**6), (2, 4, 10**6)]
)
def test_window_kernels_sum_gradients_over_the_heads_that_share(keys, values, programs, monkeypatch):
    """With one program for all heads of a key, two, and one for each; a batch row has two tiles of keys."""
    monkeypatch.setattr(window_triton, "PROGRAMS", programs)
    check(draw("window_attention", 20, batch=1, keys=keys, values=values), window=9)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("programs", [1, 10**6])
def test_window_kernels_take_numbers_of_heads_that_do_not_divide_each_other(programs, monkeypatch):
    monkeypatch.setattr(window_triton, "PROGRAMS", programs)
    check(draw("window_attention", 17, batch=1, heads=12, keys=2, values=3), window=9)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("window", [1, 20, 100])
@pytest.mark.parametrize("keys", [1, 2])
def test_window_kernels_skip_past_steps_that_are_not_real(keys, window):
    """Rows with all, some and none of 37 past steps."""
    real = torch.arange(37) >= torch.tensor([0, 20, 37])[:, None]
    real[1, 30] = False
    inputs = draw("window_attention", 18, batch=3, states=37, heads=2, values=2, keys=keys)
    for name in ("past_k", "past_v"):
        inputs[name][~real] = 1e4
    got = check(inputs, window=window, real=real)
    assert not got["d past_k"][~real].any()
    assert not got["d past_v"][~real].any()


def test_window_kernels_take_a_past_of_no_steps():
    inputs = draw("window_attention", 5)
    nothing = (torch.zeros(2, 0, 1, 7), torch.zeros(2, 0, 4, 7), torch.zeros(2, 0, dtype=torch.bool))
    call = partial(window_attention, **inputs, window=3, backend="triton")
    assert torch.equal(call(past=nothing), call())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("window", [3, 20, 500])
def test_window_kernels_keep_packed_documents_apart(window):
    lengths = torch.tensor([0, 1, 40, 0, 5, 1, 30, 0])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    inputs = draw("window_attention", 77, batch=1, heads=2, values=2)
    check(inputs, window=window, cu_seqlens=cu_seqlens)
    got = fast(**inputs, window=window, cu_seqlens=cu_seqlens)
    alone = [
        fast(**{name: x[:, a:b] for name, x in inputs.items()}, window=window)
        for a, b in pairwise(cu_seqlens.tolist())
        if a < b
    ]
    assert_within("window_attention", {"y": got}, {"y": torch.cat(alone, 1)}, inputs, BOUNDS[F32])


@pytest.mark.parametrize("head_dim", [1, 33, 128, 200])
def test_window_kernels_take_any_head_size(head_dim):
    check(draw("window_attention", 35, batch=1, heads=2, values=2, head_dim=head_dim), window=20)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("states", [0, 30])
def test_window_kernels_in_half_precision(dtype, states):
    got = check(draw("window_attention", 131, dtype, batch=1, states=states, heads=2, values=2), window=50)
    assert {x.dtype for x in got.values()} == {dtype}


def strided(x, way):
    if way == "heads before time":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if way == "part of a projection":
        return torch.cat([x.new_full(x.shape, 1e4), x, x.new_full(x.shape, 1e4)], 2)[:, :, x.shape[2] : 2 * x.shape[2]]
    return x.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize("way", ["heads before time", "part of a projection", "every second channel"])
def test_window_kernels_read_inputs_of_any_strides(way):
    inputs = draw("window_attention", 20, head_dim=8)

    def call(**leaves):
        return strided(fast(**{name: strided(x, way) for name, x in leaves.items()}, window=9), way)

    plain, cotangents = results(fast, inputs, window=9)
    assert_within("window_attention", results(call, inputs, cotangents)[0], plain, inputs, 0.0)


def test_window_kernels_stay_finite_and_exact_where_one_key_has_all_the_weight():
    """Scores of some thousands: float32 knows them to 1e-4, which decides nothing."""
    inputs = draw("window_attention", 40)
    inputs["q"] *= 1e3
    got, want = against_reference("window_attention", inputs, fast, window=20)
    for name in ("y", "d v"):
        assert_within("window_attention", {name: got[name]}, {name: want[name]}, inputs, 7e-4)
    assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_window_kernels_take_a_scale(scale):
    check(draw("window_attention", 20, states=9), window=12, scale=scale)


@pytest.mark.parametrize("states", [0, 30])
def test_window_kernels_equal_the_torch_path(states):
    inputs = draw("window_attention", 67, states=states)
    torch_path, cotangents = results(flat_past(window_attention), inputs, window=20)
    assert_within("window_attention", results(fast, inputs, cotangents, window=20)[0], torch_path, inputs, BOUNDS[F32])


def ring(dtype, batch=3, heads=4, keys=1, values=4, window=21, head_dim=7):
    """q, keys, values, held: one row holds everything, one every third entry, one the last alone."""
    torch.manual_seed(0)
    held = torch.arange(window) >= torch.tensor([0, 0, window - 1])[:, None]
    held[1] = torch.arange(window) % 3 == 0
    sizes = ((batch, heads), (batch, keys, window), (batch, values, window))
    return *(torch.randn(*size, head_dim, dtype=F64).to(dtype) for size in sizes), held


def check_step(q, keys, values, held, scale=None):
    got = window_attention_step(q, keys, values, held, scale, backend="triton")
    want = window_attention_step(*(x.to(F64) for x in (q, keys, values)), held, scale)
    assert got.dtype == q.dtype
    assert_within("window_attention", {"y": got}, {"y": want}, {"q": q}, BOUNDS[q.dtype])


@pytest.mark.parametrize("tile", [8192, 64])
@pytest.mark.parametrize(("keys", "values"), [*PAIRS, (1, 6), (2, 6), (3, 2)])
def test_window_step_equals_the_reference(keys, values, tile, monkeypatch):
    """One split of the window, and splits of 4 of which some hold nothing; groups of heads that are not full."""
    monkeypatch.setattr(window_triton, "STEP_TILE", tile)
    check_step(*ring(F32, heads=4 if 4 % keys == 4 % values == 0 else 6, keys=keys, values=values))


def test_window_step_combines_more_splits_than_it_reads_at_once(monkeypatch):
    monkeypatch.setattr(window_triton, "STEP_TILE", 64)
    check_step(*ring(F32, heads=2, values=2, window=150))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_window_step_in_half_precision(dtype):
    check_step(*ring(dtype, head_dim=40), scale=0.3)


def test_window_step_does_not_read_what_is_not_held():
    q, keys, values, held = ring(F32)
    for x in (keys, values):
        x.masked_fill_(~held[:, None, :, None], torch.nan)
    assert window_attention_step(q, keys, values, held, backend="triton").isfinite().all()


def test_window_step_reads_inputs_of_any_strides():
    q, keys, values, held = ring(F32, head_dim=8)
    got = window_attention_step(
        *(strided(q[:, :, None], "every second channel")[:, :, 0], strided(keys, "heads before time")),
        *(strided(values, "every second channel"), held.T.contiguous().T),
        backend="triton",
    )
    assert torch.equal(got, window_attention_step(q, keys, values, held, backend="triton"))


@pytest.mark.parametrize(
    "change",
    [{"dropout": 0.1}, {"scale": -1.0}, {"dtype": F64}, {"head_dim": 257}, {"v": BF16}],
    ids=lambda change: next(iter(change)),
)
def test_window_kernels_refuse_what_they_do_not_cover(change):
    options = {name: x for name, x in change.items() if name in ("dropout", "scale")}
    inputs = draw("window_attention", 5, change.get("dtype", F32), head_dim=change.get("head_dim", 7))
    if "v" in change:
        inputs["v"] = inputs["v"].to(change["v"])
    with pytest.raises(ValueError, match="no Triton kernel for this call"):
        fast(**inputs, window=3, **options)


def test_window_step_kernel_refuses_to_lose_a_gradient():
    q, keys, values, held = ring(F32)
    with pytest.raises(ValueError, match="no Triton kernel for this call"):
        window_attention_step(q.requires_grad_(), keys, values, held, backend="triton")
    with torch.no_grad():
        window_attention_step(q, keys, values, held, backend="triton")
