"""Attention of selected tokens: against its dense law, and that it does as little work as it promises."""

import pytest
import torch
import torch.nn.functional as F
from parity_cases import tokens
from taipan_cases import build, gates
from zoo import relative

from scrubjay.kernels import select_attention as kernel
from scrubjay.kernels.gate import mix
from scrubjay.kernels.select_attention import (
    pack,
    select_attention,
    select_attention_reference,
    select_attention_step,
)

BOUND = {torch.float32: 2e-6, torch.float64: 1e-13}  # fp32: worst of 20 seeds 4.8e-7


def draw(T, share, window, *, past=0, B=3, H=4, K=2, P=8, dtype=torch.float64, seed=0):
    """q, k, v, packed, before of a random selection."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=random) < share
    packed = pack(mask, window)

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    k, v = normal(B, past + T, K, P), normal(B, past + T, K, P)
    start = torch.randint(0, past + 1, (B, 1), generator=random)  # of what the past holds for each row
    return normal(len(packed.index), H, P), k, v, packed, start + torch.arange(T)


def check(q, k, v, packed, before, window, bound, **options):
    """Outputs and gradients against the law in float64."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    got = select_attention(*leaves, packed, before, window, **options)
    want = select_attention_reference(*wide, packed, before, window, **options)
    with torch.no_grad():  # slices of k and v instead of blocks
        assert relative(select_attention(q, k, v, packed, before, window, **options), want) < bound
    assert relative(got, want) < bound
    given = torch.randn_like(want)
    grads = torch.autograd.grad((got * given.to(got.dtype)).sum(), leaves)
    expected = torch.autograd.grad((want * given).sum(), wide)
    largest = max(float(e.abs().max()) for e in expected)  # with one key a window, that of q is zero
    assert max(float((g - e).abs().max()) for g, e in zip(grads, expected, strict=True)) < bound * largest


@pytest.mark.parametrize("share", [0.02, 0.15, 0.5, 1.0])
@pytest.mark.parametrize(("T", "window"), [(61, 8), (64, 64), (65, 64), (63, 64), (200, 1), (300, 70), (517, 300)])
def test_selected_attention_equals_its_reference_gradients_included(T, window, share):
    check(*draw(T, share, window), window, BOUND[torch.float64])


@pytest.mark.parametrize("past", [1, 7, 100])
def test_with_a_past_of_another_length_in_each_row(past):
    check(*draw(130, 0.2, 40, past=past), 40, BOUND[torch.float64])


@pytest.mark.parametrize(("H", "K"), [(1, 1), (6, 6), (6, 1), (6, 2)])
def test_groups_of_heads(H, K):
    check(*draw(100, 0.3, 30, H=H, K=K), 30, BOUND[torch.float64])


def test_float32_stays_within_its_bound():
    for seed in range(3):
        check(*draw(300, 0.15, 70, dtype=torch.float32, seed=seed), 70, BOUND[torch.float32])


def test_limits_readable_columns_and_documents():
    random = torch.Generator().manual_seed(1)
    q, k, v, packed, _ = draw(200, 0.3, 50, B=1)
    documents = torch.arange(200)[None] - torch.repeat_interleave(
        torch.tensor([0, 30, 31, 120]), torch.tensor([30, 1, 89, 80])
    )
    places = torch.randint(1, 4, (1, 200), generator=random).cumsum(1)
    readable = torch.rand(1, 200, generator=random) < 0.5
    ranks = readable.cumsum(1)
    for options in (
        {},
        dict(limits=[(places, 25)]),
        dict(readable=readable),
        dict(limits=[(places, 60), (ranks, 5)], readable=readable),
    ):
        check(q, k, v, packed, documents, 50, BOUND[torch.float64], **options)


def test_rows_without_a_selected_token_and_adjacent_ones():
    mask = torch.zeros(4, 150, dtype=torch.bool)
    mask[1, 70:90] = True  # a run
    mask[2, [0, 149]] = True  # further apart than the window
    mask[3] = True
    q, k, v, *_ = draw(150, 1.0, 20, B=4)
    packed = pack(mask, 20)
    check(q[: len(packed.index)], k, v, packed, torch.arange(150).expand(4, -1), 20, BOUND[torch.float64])


def test_nothing_selected_gives_nothing_and_zero_gradients():
    q, k, v, packed, before = draw(50, 0.0, 8)
    k.requires_grad_()
    out = select_attention(q, k, v, packed, before, 8)
    assert out.shape == (0, 4, 8)
    (grad,) = torch.autograd.grad(out.sum(), k)
    assert not grad.any()


def test_two_runs_give_the_same_bits():
    operands = draw(300, 0.15, 70, dtype=torch.float32)
    assert torch.equal(select_attention(*operands, 70), select_attention(*operands, 70))


def test_a_step_equals_the_reference_in_any_order_of_the_ring():
    q, k, v, packed, before = draw(1, 1.0, 9, past=8, B=3)
    before = torch.tensor([[8], [3], [0]])
    want = select_attention_reference(q, k, v, packed, before, 9)
    order = torch.randperm(9)
    held = torch.arange(9) >= 8 - before
    keys, values = (x[:, order].transpose(1, 2) for x in (k, v))
    assert relative(select_attention_step(q, keys, values, held[:, order]), want) < 1e-13


def test_no_result_depends_on_uninitialised_memory(uninitialised_memory_is_nan):
    assert torch.isfinite(select_attention(*draw(300, 0.15, 70), 70)).all()


def test_wrong_shapes_are_named():
    q, k, v, packed, before = draw(20, 0.5, 8)
    bad = {
        r"packed queries, k and v": (q[1:], k, v, packed, before, 8),
        r"K dividing H": (q[:, :3], k, v, packed, before, 8),
        r"before of shape \(3, 20\); got \(3, 19\)": (q, k, v, packed, before[:, 1:], 8),
        r"window must be at least 1.*got 0": (q, k, v, packed, before, 0),
        r"a limit of shape": (q, k, v, packed, before, 8, [(before[:, 1:], 3)]),
        r"readable of shape": (q, k, v, packed, before, 8, (), torch.ones(3, 3, dtype=torch.bool)),
    }
    for said, arguments in bad.items():
        with pytest.raises(ValueError, match=said):
            select_attention(*arguments)
    with pytest.raises(ValueError, match="no Triton kernel"):
        select_attention(q, k, v, packed, before, 8, backend="triton")


@pytest.mark.parametrize("share", [0.02, 0.15])
def test_scores_are_those_of_selected_tokens_and_their_windows(share, monkeypatch):
    """Never T x T: the whole of it is counted."""
    T, w, scores = 4096, 128, []
    operands = draw(T, share, w, B=1, H=1, K=1)
    original = F.scaled_dot_product_attention

    def counted(q, k, *args, **kwargs):
        scores.append(q.shape[1] * q.shape[2] * k.shape[2])
        return original(q, k, *args, **kwargs)

    monkeypatch.setattr(kernel.F, "scaled_dot_product_attention", counted)
    select_attention(*operands, w)
    n, tile = len(operands[3].index), operands[3].tile
    assert sum(scores) <= n * (w + tile)
    assert sum(scores) < T * T * share / 15


@pytest.mark.parametrize("name", ["defaults", "selected keys"])
def test_compaction_projects_selected_rows_alone(name, monkeypatch):
    """In a prefill and in steps: queries and outputs of selected tokens, keys of those that write them."""
    from scrubjay.modeling import selective_layer as selective

    model, ids = build(name), tokens(29, 2, 100)
    attn = next(module.attn for module in model.modules() if hasattr(module, "attn"))
    counts = {proj: [] for proj in ("q_proj", "k_proj", "v_proj", "o_proj")}
    names, project = {getattr(attn, proj): proj for proj in counts}, selective.project

    def counted(layer, x):  # no hook: somebody who waits for a call gets one even where nothing is selected
        if layer in names:
            counts[names[layer]].append(x[..., 0].numel())
        return project(layer, x)

    monkeypatch.setattr(selective, "project", counted)
    with torch.no_grad(), gates(model) as found:
        cache = model(ids[:, :80], use_cache=True).cache
        for t in range(80, 100):
            model(ids[:, t : t + 1], cache=cache)
    selected = sum(int((delta > 0).sum()) for i, delta in found if i == 0)
    assert 0 < selected < 120
    writing = 200 if name == "defaults" else selected
    assert {proj: sum(seen) for proj, seen in counts.items()} == {
        "q_proj": selected, "o_proj": selected, "k_proj": writing, "v_proj": writing
    }  # fmt: skip


def test_a_step_reads_the_rings_of_selected_rows_alone(monkeypatch):
    from scrubjay.modeling import selective_layer as selective

    model, ids, read = build(), tokens(29, 6, 40), []
    original = selective.select_attention_step
    monkeypatch.setattr(selective, "select_attention_step", lambda q, *args: read.append(len(q)) or original(q, *args))
    with torch.no_grad(), gates(model) as found:
        cache = model(ids[:, :20], use_cache=True).cache
        found.clear()
        for t in range(20, 40):
            model(ids[:, t : t + 1], cache=cache)
    counts = [int((delta > 0).sum()) for _, delta in found]
    assert read == [count for count in counts if count]
    assert 0 in counts or min(counts) < 6


@pytest.mark.parametrize("refine", ["convex", "residual"])
def test_the_mixture_of_low_precision_states_is_rounded_once(refine):
    h, o = (torch.randn(500, 16, dtype=torch.float64).to(torch.bfloat16) for _ in "ho")
    a = torch.rand(500)
    exact = h.double() * (1 - a[:, None].double() if refine == "convex" else 1) + a[:, None].double() * o.double()
    got = mix(h, o, a, refine)
    assert got.dtype == torch.bfloat16
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()  # half a unit in the last place
