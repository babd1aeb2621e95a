"""The gate's Triton kernels: the bits of delta, and that norm, delta and gradients equal the formula."""

import pytest
import torch
from gate_cases import (
    BOUND,
    EPS,
    check,
    check_alone,
    check_low_precision,
    check_parts,
    delta_of,
    draw,
    expect,
    expect_bits,
)
from kernel_cases import BF16, F16, F32
from taipan_cases import build, recorded, tokens

from scrubjay.kernels import gate, gate_triton, triton_tools
from scrubjay.modeling import selective_layer as selective


@pytest.mark.parametrize("D", [1, 3, 48, 2047, 2048])
def test_a_token_has_the_same_bits_alone_and_at_any_place_of_a_batch(D):
    check_alone(D)


@pytest.mark.parametrize("D", [7, 48])
def test_the_bits_do_not_depend_on_where_the_rows_lie_in_memory(D):
    h, *rest = draw(37, D)
    want = delta_of(h, *rest)
    expect_bits("a slice that is not aligned", delta_of(h[1:], *rest), want[1:])
    expect_bits("another shape", delta_of(h[:36].view(3, 12, D), *rest).flatten(), want[:36])
    expect_bits("columns first", delta_of(h.t().contiguous().t(), *rest), want)


def test_one_compiled_kernel_serves_every_batch_and_mode(monkeypatch):
    """Triton compiles anew for a number that is 1 or a multiple of 16, and for a pointer that is a multiple of 16."""
    seen = []

    def record(kernel, grid, args, meta):
        if kernel.fn.__name__ == "_forward":
            kinds = [(a.dtype, a.data_ptr() % 16) if isinstance(a, torch.Tensor) else a for a in args]
            seen.append((kinds, meta, grid))

    monkeypatch.setattr(triton_tools, "_run", record)
    h, norm, weight, bias = draw(64, 7)
    for rows, leaf in ((h, True), (h[:1], False), (h[1:], False), (h[3:40], True)):
        delta_of(rows.requires_grad_(leaf) if rows.is_leaf else rows, norm, weight, bias)
    grids = [grid for *_, grid in seen]
    assert grids == [(64,), (1,), (63,), (37,)]
    assert all((kinds, meta) == seen[0][:2] for kinds, meta, _ in seen)
    assert seen[0][1]["enable_fp_fusion"] is False


@pytest.mark.parametrize("D", [2, 64, 2048])
def test_sums_have_the_bits_of_the_torch_path_where_the_width_is_a_power_of_two(D):
    x, _, weight, bias = draw(33, D)
    expect_bits("delta", *(gate.gate_logit(x, weight, bias, backend=b) for b in ("triton", "torch")))


def test_a_stream_of_low_precision_is_read_as_float32():
    check_low_precision()


def test_one_pass_gives_the_bits_of_two():
    check_parts()


@pytest.mark.parametrize("normed", [True, False], ids=["norm", "stream"])
@pytest.mark.parametrize("D", [3, 100, 2048])  # with one channel the norm has no gradient
def test_norm_delta_and_gradients_equal_the_formula(D, normed):
    check(draw(33, D), normed)


@pytest.mark.parametrize(("stream", "dtype"), [(F32, BF16), (BF16, BF16), (F16, F16)], ids=str)
def test_low_precision_within_its_bound(stream, dtype):
    check(draw(33, 100, stream, dtype))


def test_gradients_of_parameters_are_summed_over_all_programs(monkeypatch):
    monkeypatch.setattr(gate_triton, "PROGRAMS", 4)
    monkeypatch.setattr(gate_triton, "LEAST", 2)
    check(draw(33, 12))


@pytest.mark.parametrize("part", ["row_norm", "gate_logit"])
def test_the_parts_alone_and_their_gradients(part):
    h, norm, weight, bias = draw(33, 100)
    leaves = [h, norm] if part == "row_norm" else [h, weight, bias]
    options = (EPS,) if part == "row_norm" else ()
    results = {}
    for backend in ("triton", "torch"):
        own = [t.detach().requires_grad_() for t in leaves]
        out = getattr(gate, part)(*own, *options, backend=backend)
        given = torch.linspace(-1, 1, out.numel()).view(out.shape)
        results[backend] = (out, *torch.autograd.grad(out, own, given))
    for got, want in zip(*results.values(), strict=True):
        expect(part, got, want, BOUND[F32])


def test_a_gradient_of_delta_alone_and_of_nothing():
    h, norm, weight, bias = draw(33, 20)
    h.requires_grad_()
    (got,) = torch.autograd.grad(delta_of(h, norm, weight, bias).sum(), h)
    want = torch.autograd.grad(gate.gate_logit(gate.row_norm(h, norm, EPS), weight, bias).sum(), h)[0]
    expect("d h", got, want, BOUND[F32])
    assert delta_of(h[:0], norm, weight, bias).shape == (0,)


def test_calls_that_the_kernels_do_not_cover_are_refused():
    h, norm, weight, bias = draw(4, 8)
    hidden = torch.zeros(8, 8), torch.zeros(8)
    for call in (
        lambda: gate.row_norm(h.double(), norm, EPS, backend="triton"),
        lambda: gate.gate_logit(h, weight.double(), bias, backend="triton"),
        lambda: gate.gate_logit(h, weight, bias, hidden, backend="triton"),
        lambda: gate.norm_gate(h, norm, EPS, weight, bias, hidden, backend="triton"),
        lambda: gate.row_norm(*(torch.zeros(n, 2**15) for n in (1, 1)), EPS, backend="triton"),
    ):
        with pytest.raises(ValueError, match="no Triton kernel"):
            call()


@pytest.mark.parametrize("name", ["defaults", "gate of the stream", "gate network"])
def test_a_layer_gates_in_one_pass_what_it_gates_in_two(name, monkeypatch):
    model, ids = build(name), tokens(29, 2, 20)
    want, calls = recorded(model, ids)[0], {"norm_gate": 0, "gate_logit": 0}
    monkeypatch.setattr(selective, "in_one_pass", lambda h, norm, weight, bias, hidden: hidden is None)

    def counted(function):  # without a hook on the gate, which has to be called then
        def call(*args, **kwargs):
            calls[function.__name__] += 1
            return function(*args, **kwargs)

        return call

    for function in (selective.norm_gate, selective.gate_logit):
        monkeypatch.setattr(selective, function.__name__, counted(function))
    with torch.no_grad():
        expect("logits", model(ids).logits, want, 1e-12)
    one, two = (0, 2) if name == "gate network" or model.config.gate_hidden else (2, 0)
    assert (calls["norm_gate"], calls["gate_logit"]) == (one, two)
