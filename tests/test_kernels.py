"""The kernels: each fast path against its reference, and what a caller may rely on."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    BF16,
    F16,
    F32,
    F64,
    KERNELS,
    RECURRENT,
    SEQUENCE,
    VARIANTS,
    LargestTensor,
    OutOfBoundError,
    against_reference,
    assert_within,
    check,
    check_packed,
    cut,
    draw,
    in_pieces,
    results,
    timed,
)

from scrubjay.kernels import conv as conv_module
from scrubjay.kernels import ddts as ddts_module
from scrubjay.kernels import norm as norm_module
from scrubjay.kernels import recurrence as recurrence_module
from scrubjay.kernels import ssd as ssd_module
from scrubjay.kernels import window as window_module
from scrubjay.kernels.conv import causal_conv
from scrubjay.kernels.dispatch import choose
from scrubjay.kernels.window import window_attention, window_attention_step

# Lengths of packed documents: none, one step, across two borders of the fast path, none, a few, one, none.
DOCUMENTS = {"ssd": (0, 1, 131, 0, 5, 1, 0), "ddts": (0, 1, 35, 0, 5, 1, 0), "causal_conv": (0, 1, 9, 0, 2, 1, 0)}
DOCUMENTS["window_attention"] = DOCUMENTS["ssd"]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """torch fills what `torch.empty` and its kin return with NaN, so that a result which is never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def offsets(kernel):
    return F.pad(torch.tensor(DOCUMENTS[kernel]).cumsum(0), (1, 0))


def draw_packed(kernel, dtype=F64, with_state=True):
    states = len(DOCUMENTS[kernel]) if with_state and kernel in RECURRENT else 0
    return draw(kernel, sum(DOCUMENTS[kernel]), dtype, batch=1, states=states)


def two_borders(kernel):
    """A length of two chunks and three steps."""
    return KERNELS[kernel].lengths[4]


def all_of(kernel, inputs, **options):
    """Every result of the fast path, by name."""
    return results(KERNELS[kernel].fast, inputs, **KERNELS[kernel].options, **options)[0]


def perturbed(kernel, inputs, start, stop):
    """The inputs with everything at the steps [start, stop) moved; a log-decay stays one."""
    moved = {name: x.clone() for name, x in inputs.items()}
    for name in timed(kernel, inputs):
        moved[name][:, start:stop] += -1 if name == "a" else 1
    return moved


def ssd_closed_form(q, k, v, a, initial_state):
    """y_i = sum over j <= i of exp(a_(j+1) + ... + a_i) (q_i . k_j) v_j, and what the initial state adds."""
    T, heads = v.shape[1:3]
    q, k = (x[:, :, [h // (heads // q.shape[2]) for h in range(heads)]] for x in (q, k))
    y, state = torch.zeros_like(v), initial_state * a.sum(1).exp()[..., None, None]
    for i in range(T):
        for j in range(i + 1):
            decay = a[:, j + 1 : i + 1].sum(1).exp()
            y[:, i] += (decay * (q[:, i] * k[:, j]).sum(-1))[..., None] * v[:, j]
        y[:, i] += a[:, : i + 1].sum(1).exp()[..., None] * torch.einsum("bhn,bhnp->bhp", q[:, i], initial_state)
        decay = a[:, i + 1 :].sum(1).exp()
        state = state + torch.einsum("bh,bhn,bhp->bhnp", decay, k[:, i], v[:, i])
    return y, state


def ddts_closed_form(q, k, v, a, initial_state):
    """As `ssd_closed_form`, with a decay for each key channel."""
    y, state = torch.zeros_like(v), initial_state * a.sum(1).exp()[..., None]
    for i in range(v.shape[1]):
        for j in range(i + 1):
            y[:, i] += (q[:, i] * a[:, j + 1 : i + 1].sum(1).exp() * k[:, j]).sum(-1, keepdim=True) * v[:, j]
        y[:, i] += torch.einsum("bn,bnm->bm", q[:, i] * a[:, : i + 1].sum(1).exp(), initial_state)
        state = state + torch.einsum("bn,bm->bnm", k[:, i] * a[:, i + 1 :].sum(1).exp(), v[:, i])
    return y, state


def causal_conv_closed_form(x, weight, bias, initial_state):
    window = torch.cat([initial_state, x], 1)
    y = F.conv1d(window.mT, weight[:, None], bias, groups=len(weight)).mT
    return y * torch.sigmoid(y), window[:, x.shape[1] :]


def window_attention_closed_form(q, k, v, past_k, past_v, window, real):
    """One row, one head, one query at a time."""
    steps, y = past_k.shape[1], torch.zeros_like(q)
    k, v = torch.cat([past_k, k], 1), torch.cat([past_v, v], 1)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for t in range(q.shape[1]):
                at = steps + t
                seen = [j for j in range(max(0, at - window + 1), at + 1) if j >= steps or real[b, j]]
                keys, values = k[b, seen, h % k.shape[2]], v[b, seen, h % v.shape[2]]
                y[b, t, h] += (keys @ q[b, t, h] / q.shape[3] ** 0.5).softmax(0) @ values
    return y


def gated_rms_norm_closed_form(y, z, weight, x, skip, eps, groups):
    u = (y + skip * x) * z / (1 + (-z).exp())
    parts = [part / (part.square().mean(-1, keepdim=True) + eps).sqrt() for part in u.chunk(groups, -1)]
    return torch.cat(parts, -1) * weight


CLOSED_FORMS = {
    "ssd": (ssd_closed_form, {}, {}),
    "ddts": (ddts_closed_form, {}, {}),
    "causal_conv": (causal_conv_closed_form, {}, {}),
    "gated_rms_norm": (gated_rms_norm_closed_form, {}, {"groups": 3}),
    "window_attention": (
        window_attention_closed_form,
        {"states": 4, "keys": 2, "values": 2},
        {"window": 3, "real": torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]]).bool()},
    ),
}


def check_closed_form(kernel):
    closed_form, arguments, options = CLOSED_FORMS[kernel]
    options = KERNELS[kernel].options | options
    inputs = draw(kernel, 6, F64, **arguments)
    expected, cotangents = results(closed_form, inputs, **options)
    assert_within(kernel, results(KERNELS[kernel].reference, inputs, cotangents, **options)[0], expected, inputs)


@pytest.mark.parametrize("kernel", CLOSED_FORMS)
def test_reference_equals_closed_form(kernel):
    check_closed_form(kernel)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize(
    ("kernel", "arguments", "options"),
    VARIANTS,
    ids=lambda x: x if isinstance(x, str) else "-".join(f"{k}={v}" for k, v in x.items()) or "default",
)
def test_fast_path_equals_reference(kernel, arguments, options, dtype):
    for T in KERNELS[kernel].lengths:
        check(kernel, draw(kernel, T, dtype, seed=T, **arguments), **options)


@pytest.mark.parametrize(
    ("kernel", "wide"),
    [
        ("ssd", ["a"]),
        ("ddts", ["k", "a"]),
        ("ddts", ["v"]),
        ("causal_conv", ["weight", "bias"]),
        ("gated_rms_norm", ["weight", "skip"]),
        ("gated_rms_norm", ["z"]),
        ("rms_norm", ["x"]),
    ],
)
def test_bfloat16_beside_float32_equals_reference(kernel, wide):
    for T in KERNELS[kernel].lengths:
        check(kernel, draw(kernel, T, BF16, seed=T, wide=wide))


@pytest.mark.parametrize("kernel", KERNELS)
def test_float16_equals_reference(kernel):
    check(kernel, draw(kernel, 35, F16))


@pytest.mark.parametrize("chunk", [1, 3, 34, 35, 36])
@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_chunk_changes_nothing_beyond_rounding(kernel, chunk):
    check(kernel, draw(kernel, 35, F64), chunk=chunk)


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_gated_rms_norm_tiles_change_nothing_beyond_rounding(rows, monkeypatch):
    monkeypatch.setattr(norm_module, "TILE", rows * 12)
    for skip in (True, False):
        check("gated_rms_norm", draw("gated_rms_norm", 7, F64, skip=skip), groups=2)


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 5, 12)], ids=str)
@pytest.mark.parametrize("kernel", ["gated_rms_norm", "rms_norm"])
def test_norms_take_any_number_of_leading_axes(kernel, shape):
    inputs = {name: torch.randn(shape if name in "xyz" else 12, dtype=F64) for name in draw(kernel, 1)}
    check(kernel, inputs)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("kernel", SEQUENCE)
def test_any_split_in_two_equals_the_whole(kernel, dtype):
    *_, chunk, after, T, _ = KERNELS[kernel].lengths
    for at in (1, chunk - 1, chunk, after, T - 1):
        inputs = draw(kernel, T, dtype, seed=at, states=2 if kernel in RECURRENT else 0)
        check(kernel, inputs, in_pieces(kernel, [at]))


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("prefill", [1, 2, 17, 30])
@pytest.mark.parametrize("kernel", SEQUENCE)
def test_prefill_and_steps_equal_one_pass(kernel, prefill, dtype):
    inputs = draw(kernel, 33, dtype, seed=prefill, states=2 if kernel in RECURRENT else 0)
    check(kernel, inputs, in_pieces(kernel, range(prefill, 33)))


@pytest.mark.parametrize("kernel", RECURRENT)
def test_one_token_takes_the_step_path(kernel, monkeypatch):
    module, calls = sys.modules[KERNELS[kernel].fast.__module__], []
    step = getattr(module, f"{kernel}_step")
    monkeypatch.setattr(module, f"{kernel}_step", lambda *args: calls.append(args) or step(*args))
    for whole in ("ChunkedRecurrence", "_convolve"):
        monkeypatch.setattr(module, whole, None, raising=False)
    for states in (0, 2):
        y, state = KERNELS[kernel].fast(**draw(kernel, 1, states=states))
        assert y.shape[1] == 1
        assert len(state) == 2
    assert len(calls) == 2


@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_a_short_sequence_is_not_padded_to_a_chunk(kernel):
    check(kernel, draw(kernel, 3), chunk=10**9)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("kernel", SEQUENCE)
def test_packed_documents_equal_reference(kernel, with_state, dtype):
    check(kernel, draw_packed(kernel, dtype, with_state), cu_seqlens=offsets(kernel))


@pytest.mark.parametrize("kernel", SEQUENCE)
def test_packed_documents_equal_separate_calls(kernel):
    check_packed(kernel, draw_packed(kernel), offsets(kernel))


@pytest.mark.parametrize("kernel", SEQUENCE)
def test_a_document_of_one_step_alone_equals_reference(kernel):
    check(kernel, draw(kernel, 1, F64, batch=1, states=int(kernel in RECURRENT)), cu_seqlens=torch.tensor([0, 1]))


@pytest.mark.parametrize("kernel", SEQUENCE)
def test_documents_do_not_leak_into_each_other(kernel):
    """Moving one leaves the outputs, states and gradients of all others as they are, bit for bit."""

    def others(found, d, start, stop):
        found = {name: x for name, x in found.items() if name not in ("d weight", "d bias")}  # sums over all documents
        by_document = ("state", "d initial_state")
        kept = {name: torch.cat([x[:d], x[d + 1 :]]) for name, x in found.items() if name in by_document}
        return kept | {n: torch.cat([x[:, :start], x[:, stop:]], 1) for n, x in found.items() if n not in by_document}

    inputs, cu_seqlens = draw_packed(kernel, F32), offsets(kernel)
    before = all_of(kernel, inputs, cu_seqlens=cu_seqlens)
    for d, length in enumerate(DOCUMENTS[kernel]):
        start, stop = cu_seqlens[d : d + 2].tolist()
        moved = perturbed(kernel, inputs, start, stop)
        if "initial_state" in moved:
            moved["initial_state"][d] += 1
        after = all_of(kernel, moved, cu_seqlens=cu_seqlens)
        assert_within(kernel, others(after, d, start, stop), others(before, d, start, stop), inputs, bound=0.0)
        assert not length or not torch.equal(after["y"][:, start:stop], before["y"][:, start:stop])


@pytest.mark.parametrize("kernel", SEQUENCE)
def test_no_output_depends_on_a_later_step(kernel):
    *_, chunk, after, T, _ = KERNELS[kernel].lengths
    inputs = draw(kernel, T)
    before = all_of(kernel, inputs)["y"]
    for t in (1, chunk - 1, chunk, after, T - 1):
        now = all_of(kernel, perturbed(kernel, inputs, t, T))["y"]
        assert torch.equal(now[:, :t], before[:, :t])
        assert not torch.equal(now[:, t], before[:, t])


@pytest.mark.parametrize("kernel", SEQUENCE)
def test_no_gradient_reaches_a_later_step(kernel):
    *_, chunk, after, T, _ = KERNELS[kernel].lengths
    inputs = draw(kernel, T)
    found = all_of(kernel, inputs)
    for t in (1, chunk - 1, chunk, after, T - 1):
        cotangents = [torch.zeros_like(found[name]) for name in ("y", "state") if name in found]
        cotangents[0][:, :t] = 1
        got, _ = results(KERNELS[kernel].fast, inputs, cotangents, **KERNELS[kernel].options)
        gradients = [got[f"d {name}"] for name in timed(kernel, inputs)]
        assert not any(gradient[:, t:].any() for gradient in gradients)
        assert any(gradient[:, t - 1].any() for gradient in gradients)


def check_decays(kernel, dtype=F32, scale=1e3):
    inputs = draw(kernel, two_borders(kernel), dtype)
    inputs["a"] *= scale
    check(kernel, inputs)  # an error that is not finite is out of every bound


@pytest.mark.parametrize("scale", [1e3, 1e-9, 0.0])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_extreme_decays_stay_finite_and_exact(kernel, dtype, scale):
    check_decays(kernel, dtype, scale)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_one_strong_decay_among_weak_ones_forgets_all_that_was_before(kernel, dtype):
    """A factored decay, exp(c_i) exp(-c_j), would overflow here."""
    T = two_borders(kernel)
    t = 2 * T // 3  # inside a chunk
    inputs = draw(kernel, T, dtype)
    inputs["a"] *= 0.01
    inputs["a"][:, t] = -500
    check(kernel, inputs)
    y, state = KERNELS[kernel].fast(**inputs)
    after = cut(kernel, inputs, t, T) | {"initial_state": torch.zeros_like(inputs["initial_state"])}
    fresh_y, fresh_state = KERNELS[kernel].fast(**after)
    assert_within(kernel, {"y": y[:, t:], "state": state}, {"y": fresh_y, "state": fresh_state}, inputs)


@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_steps_that_add_and_forget_nothing_leave_the_state(kernel):
    inputs = draw(kernel, two_borders(kernel), F64)
    for real in (1, 20, two_borders(kernel) - 1):
        idle = {name: x.clone() for name, x in inputs.items()}
        idle["a"][:, real:] = idle["v"][:, real:] = 0
        state, expected = KERNELS[kernel].fast(**idle)[1], KERNELS[kernel].fast(**cut(kernel, inputs, 0, real))[1]
        assert_within(kernel, {"state": state}, {"state": expected}, inputs)


@pytest.mark.parametrize("kernel", ["gated_rms_norm", "rms_norm"])
def test_norms_of_zero_and_of_large_rows_are_finite(kernel):
    for scale in (0.0, 1e12):
        inputs = draw(kernel, 5)
        for name in set(inputs) & {"x", "y"}:
            inputs[name] *= scale
        check(kernel, inputs)


def reversed_axes(x):
    """The same numbers, the first axis the fastest."""
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def every_other(x):
    """The same numbers, every second one of a larger tensor."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), 1e9)
    wide[..., ::2] = x
    return wide[..., ::2]


def expanded(x):
    """The first entry of the first axis, again and again without memory of its own."""
    return x[:1].expand_as(x)


@pytest.mark.parametrize("layout", [reversed_axes, every_other, expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("T", [1, 35])
@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_layout_of_inputs_does_not_matter(kernel, T, layout):
    inputs = {name: layout(x) for name, x in draw(kernel, T, F64, states=2 if kernel in SEQUENCE else 0).items()}
    assert not all(x.is_contiguous() for x in inputs.values())
    check(kernel, inputs)


@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_layout_of_output_gradients_does_not_matter(kernel):
    inputs = draw(kernel, 35, F64)
    cotangents = results(KERNELS[kernel].fast, inputs, **KERNELS[kernel].options)[1]
    for layout in (reversed_axes, every_other, expanded):
        laid_out = [layout(x) for x in cotangents]
        plain = [x.contiguous() for x in laid_out]
        got, want = (results(KERNELS[kernel].fast, inputs, c, **KERNELS[kernel].options)[0] for c in (laid_out, plain))
        assert_within(kernel, got, want, inputs)


@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_results_have_the_inputs_dtype_and_states_float32_at_least(kernel, dtype, T):
    inputs = draw(kernel, T, dtype, states=0)
    found = all_of(kernel, inputs)
    states = {"state": torch.promote_types(dtype, F32)} if KERNELS[kernel].states else {"state": dtype}
    wanted = {"y": dtype} | {f"d {name}": x.dtype for name, x in inputs.items()} | states
    assert {name: x.dtype for name, x in found.items()} == {name: wanted[name] for name in found}


@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.parametrize("kernel", ["ssd", "ddts"])
def test_a_bfloat16_initial_state_is_continued_in_float32(kernel, T):
    inputs = draw(kernel, T, BF16)
    inputs["initial_state"] = inputs["initial_state"].to(BF16)
    found = all_of(kernel, inputs)
    assert found["state"].dtype == F32
    assert found["d initial_state"].dtype == BF16


@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.parametrize("kernel", KERNELS)
def test_inputs_are_left_as_they_are_and_results_own_their_memory(kernel, T):
    """No input is written to, no result is a view of one, and a second backward pass gives what the first gave."""
    inputs = draw(kernel, T, states=2 if kernel in SEQUENCE else 0)
    copies = {name: x.clone() for name, x in inputs.items()}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    outputs = KERNELS[kernel].fast(**leaves, **KERNELS[kernel].options)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    cotangents = [torch.ones_like(y) for y in outputs]
    first, second = (
        torch.autograd.grad(outputs, list(leaves.values()), cotangents, retain_graph=True, materialize_grads=True)
        for _ in range(2)
    )
    assert all(torch.equal(inputs[name], copies[name]) for name in copies)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(bool((c == 1).all()) for c in cotangents)
    taken = {x.untyped_storage().data_ptr() for x in inputs.values()}
    assert not taken & {x.untyped_storage().data_ptr() for x in (*outputs, *first)}


def without_and_with_autocast(call):
    """The results of `call`, backward pass included, outside and inside an autocast region."""
    plain = call()
    with torch.autocast("cpu", BF16):
        return plain, call()


@pytest.mark.parametrize("T", [1, 35])
@pytest.mark.parametrize("kernel", ["ssd", "ddts", "gated_rms_norm"])
def test_autocast_lowers_nothing_forward_or_backward(kernel, T):
    inputs = draw(kernel, T)
    plain, inside = without_and_with_autocast(lambda: all_of(kernel, inputs))
    assert_within(kernel, inside, plain, inputs, bound=0.0)


def test_autocast_does_not_lower_packed_documents():
    for kernel in ("ssd", "ddts"):
        inputs = draw_packed(kernel, F32)
        plain, inside = without_and_with_autocast(lambda k=kernel, x=inputs: all_of(k, x, cu_seqlens=offsets(k)))
        assert_within(kernel, inside, plain, inputs, bound=0.0)


def test_autocast_does_not_lower_the_step_of_window_attention():
    q, keys, values = torch.randn(2, 4, 7), torch.randn(2, 1, 9, 7), torch.randn(2, 4, 9, 7)
    held = torch.ones(2, 9, dtype=torch.bool)
    plain, inside = without_and_with_autocast(lambda: window_attention_step(q, keys, values, held))
    assert torch.equal(plain, inside)


@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.parametrize("kernel", RECURRENT)
def test_autocast_leaves_the_dtypes_of_results(kernel, T):
    inputs = draw(kernel, T)
    plain, inside = without_and_with_autocast(lambda: all_of(kernel, inputs))
    assert {name: x.dtype for name, x in inside.items()} == {name: x.dtype for name, x in plain.items()}


TINY = {
    "ssd": ({"heads": 2, "size": 2, "head_dim": 2}, {"chunk": 2}),
    "ddts": ({"size": 2, "width": 2}, {"chunk": 2}),
    "causal_conv": ({"channels": 2, "taps": 3}, {}),
    "window_attention": ({"heads": 2, "head_dim": 2, "values": 2}, {"window": 3}),
    "gated_rms_norm": ({"channels": 4}, {"groups": 2}),
    "rms_norm": ({"channels": 4}, {}),
}


@pytest.mark.parametrize(("kernel", "packed"), [*((k, False) for k in KERNELS), *((k, True) for k in SEQUENCE)])
def test_gradients_equal_finite_differences(kernel, packed):
    arguments, options = TINY[kernel]
    states = {"window_attention": 0 if packed else 2}.get(kernel, 2 if packed else 1)
    if packed:
        options = options | {"cu_seqlens": torch.tensor([0, 2, 5])}
    inputs = draw(kernel, 5, F64, batch=1, states=states, **arguments)
    options = KERNELS[kernel].options | options

    def call(*tensors):
        return KERNELS[kernel].fast(**dict(zip(inputs, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs.values()])


@pytest.mark.parametrize("kernel", ["ssd", "ddts", "gated_rms_norm"])
def test_second_derivatives_are_refused(kernel):
    leaves = {name: x.requires_grad_() for name, x in draw(kernel, 5).items()}
    y = KERNELS[kernel].fast(**leaves, **KERNELS[kernel].options)
    y = y[0] if isinstance(y, tuple) else y
    grads = torch.autograd.grad(y.square().sum(), list(leaves.values()), create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(sum(g.square().sum() for g in grads), list(leaves.values()))


@pytest.mark.parametrize("T", [1, 2, 9])
@pytest.mark.parametrize("states", [0, 4])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_causal_conv_state_ends_at_each_rows_length(taps, states, T):
    lengths = torch.tensor([0, 1, min(4, T), T])
    inputs = draw("causal_conv", T, F64, batch=4, states=states, taps=taps)
    real = (torch.arange(T) < lengths[:, None])[..., None]

    def ragged(**inputs):
        y, state = causal_conv(**inputs, lengths=lengths)
        return y * real, state

    def row_by_row(x, initial_state=None, **inputs):
        ys, states = [], []
        for b, n in enumerate(lengths.tolist()):
            state = x.new_zeros(1, taps - 1, x.shape[2]) if initial_state is None else initial_state[b : b + 1]
            y = x[b : b + 1, :0]
            if n:
                y, state = causal_conv(x[b : b + 1, :n], initial_state=state, **inputs)
            ys.append(F.pad(y, (0, 0, 0, T - n)))
            states.append(state)
        return torch.cat(ys), torch.cat(states)

    want, cotangents = results(row_by_row, inputs)
    assert_within("causal_conv", results(ragged, inputs, cotangents)[0], want, inputs)


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


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "rms_norm"])
def test_backends_are_obeyed_or_refused_with_a_reason(kernel):
    inputs, options = draw(kernel, 5), KERNELS[kernel].options
    with pytest.raises(ValueError, match=rf"{kernel}.*(cpu|no Triton kernel).*Pass backend=None to let it choose"):
        KERNELS[kernel].fast(**inputs, **options, backend="triton")
    with pytest.raises(ValueError, match=rf"{kernel}: backend must be None or one of .*torch.*triton.*got 'cuda'"):
        KERNELS[kernel].fast(**inputs, **options, backend="cuda")
    obeyed = KERNELS[kernel].fast(**inputs, **options, backend="torch")
    chosen = KERNELS[kernel].fast(**inputs, **options)
    pairs = zip(obeyed, chosen, strict=True) if isinstance(obeyed, tuple) else [(obeyed, chosen)]
    assert all(torch.equal(a, b) for a, b in pairs)


def test_choose_obeys_or_refuses_and_never_replaces():
    cpu, cuda = (SimpleNamespace(device=torch.device(name)) for name in ("cpu", "cuda"))
    assert choose(None, "op", cpu) == choose(None, "op", cpu, fused=True) == "torch"
    assert choose(None, "op", cuda) == choose(None, "op", cuda, cpu, fused=True) == "torch"
    assert choose("torch", "op", cuda, fused=True) == "torch"
    assert choose(None, "op", cuda, fused=True) == choose("triton", "op", cuda, fused=True) == "triton"
    with pytest.raises(ValueError, match=r"op: .*'triton' was asked for but the operands are on \['cpu'\].*needs cuda"):
        choose("triton", "op", cpu, fused=True)
    with pytest.raises(ValueError, match=r"the operands are on \['cpu', 'cuda'\]"):
        choose("triton", "op", cuda, cpu, fused=True)
    with pytest.raises(ValueError, match="op has no Triton kernel for this call"):
        choose("triton", "op", cuda)
    with pytest.raises(ValueError, match=r"op: backend must be None or one of .* got 'Torch'"):
        choose("Torch", "op", cpu)


def bad(kernel, options=None, **shapes):
    """Arguments of `kernel` with some inputs replaced by zeros of other shapes; None leaves one out."""
    inputs = draw(kernel, 6) | {name: s if s is None else torch.zeros(s) for name, s in shapes.items()}
    return kernel, {name: x for name, x in inputs.items() if x is not None} | KERNELS[kernel].options | (options or {})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (bad("ssd", q=(2, 6, 5)), r"ssd needs q, k \(B, T, G, N\).*got q \(2, 6, 5\)"),
        (bad("ssd", k=(2, 6, 2, 4)), r"ssd needs .* k \(2, 6, 2, 4\)"),
        (bad("ssd", v=(2, 5, 4, 7)), r"ssd needs .* v \(2, 5, 4, 7\)"),
        (bad("ssd", v=(2, 6, 28)), r"ssd needs .* v \(2, 6, 28\)"),
        (bad("ssd", a=(2, 6)), r"ssd needs .* a \(2, 6\)"),
        (bad("ssd", a=(2, 6, 2)), r"ssd needs .* a \(2, 6, 2\)"),
        (bad("ssd", q=(2, 6, 3, 5), k=(2, 6, 3, 5)), r"H a multiple of G.*got q \(2, 6, 3, 5\)"),
        (bad("ssd", initial_state=(2, 4, 7, 5)), r"initial_state must have shape \(2, 4, 5, 7\); got \(2, 4, 7, 5\)"),
        (bad("ssd", {"chunk": 0}), "ssd: chunk must be at least 1; got 0"),
        (bad("ddts", q=(2, 6, 1, 5)), r"ddts needs q, k, a \(B, T, N\).*got q \(2, 6, 1, 5\)"),
        (bad("ddts", k=(2, 6, 4)), r"ddts needs .* k \(2, 6, 4\)"),
        (bad("ddts", a=(2, 6)), r"ddts needs .* a \(2, 6\)"),
        (bad("ddts", v=(2, 5, 7)), r"ddts needs .* v \(2, 5, 7\)"),
        (bad("ddts", initial_state=(1, 5, 7)), r"initial_state must have shape \(2, 5, 7\); got \(1, 5, 7\)"),
        (bad("ddts", {"chunk": -1}), "ddts: chunk must be at least 1; got -1"),
        (bad("causal_conv", x=(6, 12)), r"causal_conv needs x \(B, T, C\).*got \(6, 12\)"),
        (bad("causal_conv", weight=(12, 1, 4)), r"causal_conv needs .* \(12, 1, 4\)"),
        (bad("causal_conv", weight=(11, 4)), r"causal_conv needs .* \(11, 4\)"),
        (bad("causal_conv", bias=(11,)), r"causal_conv needs bias \(12,\); got \(11,\)"),
        (bad("causal_conv", initial_state=(2, 4, 12)), r"must have shape \(2, 3, 12\); got \(2, 4, 12\)"),
        (bad("window_attention", q=(2, 6, 28)), r"window_attention needs q \(B, T, H, P\).*got q \(2, 6, 28\)"),
        (bad("window_attention", k=(2, 6, 3, 7)), r"K and V dividing H.* k \(2, 6, 3, 7\)"),
        (bad("window_attention", v=(2, 6, 3, 7)), r"K and V dividing H.* v \(2, 6, 3, 7\)"),
        (bad("window_attention", k=(2, 6, 1, 8)), r"window_attention needs .* k \(2, 6, 1, 8\)"),
        (bad("window_attention", v=(2, 5, 4, 7)), r"window_attention needs .* v \(2, 5, 4, 7\)"),
        (bad("window_attention", {"window": 0}), "window must be at least 1, the query's own key; got 0"),
        (bad("gated_rms_norm", z=(2, 5, 12)), r"gated_rms_norm needs .* z \(2, 5, 12\)"),
        (bad("gated_rms_norm", weight=(11,)), r"gated_rms_norm needs .* weight \(11,\)"),
        (bad("gated_rms_norm", {"groups": 5}), "groups dividing C; .* groups 5"),
        (bad("gated_rms_norm", x=None), "needs x in y's shape together with skip"),
        (bad("gated_rms_norm", skip=None), "needs x in y's shape together with skip"),
        (bad("gated_rms_norm", x=(2, 5, 12)), "needs x in y's shape together with skip"),
        (bad("gated_rms_norm", skip=(11,)), "needs x in y's shape together with skip"),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else None,
)
def test_wrong_arguments_are_named(call, said):
    kernel, arguments = call
    with pytest.raises(ValueError, match=said):
        KERNELS[kernel].fast(**arguments)


@pytest.mark.parametrize(
    "past",
    [
        [(2, 3, 2, 7), (2, 3, 4, 7), (2, 3)],
        [(2, 3, 1, 7), (2, 2, 4, 7), (2, 3)],
        [(2, 3, 1, 7), (2, 3, 4, 7), (2, 4)],
        [(1, 3, 1, 7), (1, 3, 4, 7), (1, 3)],
    ],
    ids=str,
)
def test_window_attention_names_a_past_of_the_wrong_shape(past):
    past = tuple(torch.zeros(shape) for shape in past)
    with pytest.raises(ValueError, match="past"):
        window_attention(**draw("window_attention", 6), window=4, past=(*past[:2], past[2].bool()))


def test_window_attention_refuses_past_and_documents_together():
    inputs = draw("window_attention", 6, batch=1, states=3)
    with pytest.raises(ValueError, match="past keys or packed documents, not both"):
        KERNELS["window_attention"].fast(**inputs, window=4, cu_seqlens=torch.tensor([0, 2, 6]))


def test_causal_conv_refuses_lengths_and_documents_together():
    inputs = draw("causal_conv", 6, batch=1)
    with pytest.raises(ValueError, match=r"lengths.*cu_seqlens|cu_seqlens.*lengths"):
        causal_conv(**inputs, cu_seqlens=torch.tensor([0, 2, 6]), lengths=torch.tensor([3]))


@pytest.mark.parametrize("kernel", SEQUENCE)
def test_a_sequence_of_length_0_is_refused(kernel):
    with pytest.raises(ValueError, match=f"{kernel} needs at least one step; got a sequence of length 0"):
        KERNELS[kernel].fast(**draw(kernel, 0), **KERNELS[kernel].options)


@pytest.mark.parametrize("cu_seqlens", [[0, 5], [1, 6], [0, 4, 2, 6], [0, 7], [0], []], ids=str)
@pytest.mark.parametrize("kernel", SEQUENCE)
def test_offsets_that_do_not_cover_the_row_are_refused(kernel, cu_seqlens):
    inputs = draw(kernel, 6, batch=1, states=0)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the sequence length 6"):
        KERNELS[kernel].fast(
            **inputs, **KERNELS[kernel].options, cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int64)
        )


@pytest.mark.parametrize("kernel", SEQUENCE)
def test_documents_in_more_than_one_row_are_refused(kernel):
    inputs = draw(kernel, 6, states=0)
    with pytest.raises(ValueError, match="packed into one row; got a batch of 2 rows"):
        KERNELS[kernel].fast(**inputs, **KERNELS[kernel].options, cu_seqlens=torch.tensor([0, 2, 6]))


@pytest.mark.parametrize("kernel", RECURRENT)
def test_packed_documents_need_a_state_each(kernel):
    inputs = draw(kernel, 6, batch=1, states=1)
    with pytest.raises(ValueError, match=r"initial_state must have shape \(2, .*; got \(1, "):
        KERNELS[kernel].fast(**inputs, cu_seqlens=torch.tensor([0, 2, 6]))


def decay_not_applied(original):
    return lambda self, s: None


def state_not_decayed(original):
    def advance_(self, s):
        s /= self.into[:, -1, :, None]
        original(self, s)

    return advance_


def gradient_of_state_not_decayed(original):
    def gradients_(self, dy, s, ds):
        before = ds.clone()
        found = original(self, dy, s, ds)
        ds += before - before * self.into[:, -1].mean()
        return found

    return gradients_


def gradient_of_decay_one_step_late(original):
    def gradients_(self, dy, s, ds):
        *found, da = original(self, dy, s, ds)
        return *found, da.roll(1, dims=1)

    return gradients_


def state_in_bfloat16(original):
    def advance_(self, s):
        original(self, s)
        s.copy_(s.to(BF16))

    return advance_


def last_one_forgotten(original):
    return lambda *args: list(original(*args))[:-1]


def borders_forgotten(original):
    """As many documents as there are, but the first one covers all steps."""

    def documents(cu_seqlens, batch, length):
        found = original(cu_seqlens, batch, length)
        return found if cu_seqlens is None else [(found[0][0], 0, length)]

    return documents


def gate_after_norm(original):
    def apply(y, z, x, weight, skip, eps, groups):
        return F.rms_norm(y + skip * x, weight.shape, weight, eps) * F.silu(z)

    return SimpleNamespace(apply=apply)


def check_borders(kernel, dtype=F32):
    check(kernel, draw(kernel, two_borders(kernel), dtype))


def check_documents(kernel):
    check(kernel, draw_packed(kernel), cu_seqlens=offsets(kernel))


def check_padded_past(kernel):
    check(kernel, draw(kernel, 5, states=3), real=torch.zeros(2, 3, dtype=torch.bool))


def check_norm(kernel):
    check(kernel, draw(kernel, 33), groups=2)


# name: (what to replace: owner, attribute, the new one from the old one; a comparison that tests above make)
MUTATIONS = {
    "ssd: no decay across a chunk's border": (ssd_module._Chunk, "decay_", decay_not_applied, check_borders),
    "ssd: gradient of the state not decayed": (
        *(ssd_module._Chunk, "gradients_", gradient_of_state_not_decayed),
        check_borders,
    ),
    "ssd: gradient of the decay one step late": (
        *(ssd_module._Chunk, "gradients_", gradient_of_decay_one_step_late),
        check_borders,
    ),
    "ssd: sums of decays in the inputs' dtype": (torch.Tensor, "double", lambda f: lambda x: x, check_decays),
    "ssd: state rounded to bfloat16 between chunks": (
        *(ssd_module._Chunk, "advance_", state_in_bfloat16),
        lambda kernel: check_borders(kernel, BF16),
    ),
    "ssd: heads of the initial state in another order": (
        *(ssd_module, "_grouped", lambda f: lambda state, groups: f(state.flip(1), groups)),
        check_borders,
    ),
    "ssd: a step sees the ones after it": (torch.Tensor, "tril_", lambda f: lambda x: x, check_borders),
    "ssd: single steps without decay": (
        *(ssd_module, "ssd_step", lambda f: lambda q, k, v, a, s: f(q, k, v, 0 * a, s)),
        check_closed_form,
    ),
    "ssd: state kept across documents": (recurrence_module, "documents", borders_forgotten, check_documents),
    "ssd: last chunk never written": (recurrence_module, "chunks", last_one_forgotten, check_borders),
    "ddts: no decay across a chunk's border": (ddts_module._Chunk, "advance_", state_not_decayed, check_borders),
    "ddts: gradient of the state not decayed": (
        *(ddts_module._Chunk, "gradients_", gradient_of_state_not_decayed),
        check_borders,
    ),
    "ddts: state rounded to bfloat16 between chunks": (
        *(ddts_module._Chunk, "advance_", state_in_bfloat16),
        lambda kernel: check_borders(kernel, BF16),
    ),
    "ddts: a step does not see itself": (
        *(ddts_module, "_lower", lambda f: lambda size, like: f(size, like).tril(-1)),
        check_borders,
    ),
    "ddts: state kept across documents": (recurrence_module, "documents", borders_forgotten, check_documents),
    "causal_conv: taps in reverse": (
        *(conv_module, "_convolve", lambda f: lambda x, weight, bias: f(x, weight.flip(1), bias)),
        check_borders,
    ),
    "causal_conv: no bias": (
        *(conv_module, "_convolve", lambda f: lambda x, weight, bias: f(x, weight, None)),
        check_borders,
    ),
    "causal_conv: oldest step of the state lost": (
        *(conv_module, "_initial", lambda f: lambda *args: f(*args).index_fill(1, torch.tensor([0]), 0)),
        check_closed_form,
    ),
    "causal_conv: taps cross documents": (
        *(conv_module, "documents", borders_forgotten),
        lambda kernel: check_packed(kernel, draw_packed(kernel), offsets(kernel)),
    ),
    "window_attention: one key too many": (
        *(window_module, "_banded", lambda f: lambda q, k, v, window, *rest: f(q, k, v, window + 1, *rest)),
        check_borders,
    ),
    "window_attention: one key too few": (
        *(window_module, "_banded", lambda f: lambda q, k, v, window, *rest: f(q, k, v, window - 1, *rest)),
        check_borders,
    ),
    "window_attention: neighbouring heads share keys": (
        *(window_module, "_tiled", lambda f: lambda x, heads: x.repeat_interleave(heads // x.shape[2], 2)),
        check_closed_form,
    ),
    "window_attention: scores without scale": (
        *(window_module, "_attend", lambda f: lambda q, k, v, seen, scale, dropout: f(q, k, v, seen, 1.0, dropout)),
        check_borders,
    ),
    "window_attention: documents see each other": (window_module, "documents", borders_forgotten, check_documents),
    "window_attention: padding in the past is seen": (
        *(F, "pad", lambda f: lambda x, *args, **kwargs: f(x.logical_not(), *args, **kwargs)),
        check_padded_past,
    ),
    "gated_rms_norm: gate after norm": (norm_module, "_GatedRMSNorm", gate_after_norm, check_norm),
    "gated_rms_norm: one mean for all groups": (
        *(norm_module, "_scale", lambda f: lambda u, eps, groups: f(u, eps, 1)),
        check_norm,
    ),
    "gated_rms_norm: last tile never written": (norm_module, "_tiles", last_one_forgotten, check_norm),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_deliberate_error_exceeds_the_bound(name, monkeypatch):
    """That the tests above can fail."""
    owner, attribute, change, comparison = MUTATIONS[name]
    kernel = name.split(":")[0]
    comparison(kernel)
    monkeypatch.setattr(owner, attribute, change(getattr(owner, attribute)))
    with pytest.raises(OutOfBoundError):
        comparison(kernel)
