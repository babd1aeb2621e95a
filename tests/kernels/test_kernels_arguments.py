"""Arguments: wrong ones are refused by name and shape, a backend is obeyed or refused with a reason."""

from types import SimpleNamespace

import pytest
import torch
from kernel_cases import KERNELS, RECURRENT, SEQUENCE, draw

from scrubjay.kernels import dispatch, triton_tools
from scrubjay.kernels.conv import causal_conv
from scrubjay.kernels.dispatch import choose
from scrubjay.kernels.window import window_attention

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "rms_norm"])
def test_backends_are_obeyed_or_refused_with_a_reason(kernel):
    inputs, options = draw(kernel, 5), KERNELS[kernel].options
    with pytest.raises(
        ValueError, match=rf"{kernel}.*(cpu|no Triton kernel|needs Triton).*Pass backend=None to let it choose"
    ):
        KERNELS[kernel].fast(**inputs, **options, backend="triton")
    with pytest.raises(ValueError, match=rf"{kernel}: backend must be None or one of .*torch.*triton.*got 'cuda'"):
        KERNELS[kernel].fast(**inputs, **options, backend="cuda")
    obeyed = KERNELS[kernel].fast(**inputs, **options, backend="torch")
    chosen = KERNELS[kernel].fast(**inputs, **options)
    pairs = zip(obeyed, chosen, strict=True) if isinstance(obeyed, tuple) else [(obeyed, chosen)]
    assert all(torch.equal(a, b) for a, b in pairs)


def test_choose_obeys_or_refuses_and_never_replaces(monkeypatch):
    monkeypatch.setattr(dispatch, "triton", object())  # as where it is installed
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    monkeypatch.setattr(dispatch, "works", lambda: True)
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


def test_without_triton_a_gpu_takes_pytorch_and_a_request_is_refused(monkeypatch):
    cuda = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(dispatch, "triton", None)
    assert choose(None, "op", cuda, fused=True) == "torch"
    with pytest.raises(ValueError, match=r"op: .*needs Triton, which is not installed: pip install 'scrubjay\[gpu\]'"):
        choose("triton", "op", cuda, fused=True)


@pytest.fixture
def unasked():
    """Whether Triton works is asked once, and again after the test."""
    triton_tools.works.cache_clear()
    yield
    triton_tools.works.cache_clear()


@pytest.mark.usefixtures("unasked")
@pytest.mark.skipif(triton_tools.triton is None, reason="Triton is not installed")
def test_where_triton_finds_no_gpu_or_no_compiler_pytorch_runs_and_one_warning_says_why(monkeypatch):
    def no_compiler(driver):
        asked.append(driver)
        raise RuntimeError("Failed to find C compiler.")

    asked, cuda = [], SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(type(triton_tools.triton.runtime.driver), "active", property(no_compiler))
    with pytest.warns(
        UserWarning, match=r"PyTorch's operations .* needs a C compiler.* Failed to find C compiler"
    ) as said:
        assert [choose(None, "op", cuda, fused=True) for _ in range(3)] == ["torch"] * 3
    assert len(said) == len(asked) == 1
    assert choose("triton", "op", cuda, fused=True) == "triton"  # obeyed: Triton itself says what is missing
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose(None, "op", cuda, fused=True) == "triton"
    target = SimpleNamespace(get_current_target=lambda: "sm_90")
    monkeypatch.setattr(type(triton_tools.triton.runtime.driver), "active", target)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    triton_tools.works.cache_clear()
    assert choose(None, "op", cuda, fused=True) == "triton"


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
        (bad("ssd", g=(2, 6, 2)), r"ssd needs .* g \(2, 6, 2\)"),
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


@torch.no_grad()
@pytest.mark.parametrize("steps", [0, 2])
def test_one_token_refuses_a_state_of_another_length(steps):
    with pytest.raises(ValueError, match=r"initial_state must have shape \(2, 3, 4\)"):
        causal_conv(torch.ones(2, 1, 4), torch.ones(4, 4), initial_state=torch.ones(2, steps, 4))
