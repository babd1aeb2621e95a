"""The kernels under test: inputs for each, a common way to call every path, and the one comparison that the tests use.

A call is inputs (a dict of floating tensors, each with a gradient) and options (everything else). `results` gives all
that a call computes: outputs, final states and every gradient, as a dict from a name to a tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from scrubjay.kernels.conv import causal_conv, causal_conv_reference
from scrubjay.kernels.ddts import ddts, ddts_reference
from scrubjay.kernels.norm import gated_rms_norm, gated_rms_norm_reference, rms_norm
from scrubjay.kernels.ssd import ssd, ssd_reference
from scrubjay.kernels.window import window_attention, window_attention_reference

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
MARGIN = 5  # of a bound over the measured error: other processors and other seeds
OF_THE_FAST_PATH = ("chunk", "backend")  # options that a reference does not take


class OutOfBoundError(AssertionError):
    """A result differs from what it must equal by more than its bound."""


@dataclass(frozen=True)
class Kernel:
    """One operation.

    measured: dtype -> largest error of the fast path, by `worst_error` on a CPU with torch 2.13.
    lengths: below, at and across the borders where the fast path cuts a sequence.
    states: names of results that stay in float32, whatever the inputs, and so have float32's bound.
    """

    name: str
    fast: Callable
    reference: Callable
    draw: Callable[..., dict[str, torch.Tensor]]
    measured: dict[torch.dtype, float]
    lengths: tuple[int, ...]
    states: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)

    def bound(self, dtype):
        """Largest error that passes, relative to the largest value of a tensor."""
        return 1e-12 if dtype == F64 else MARGIN * self.measured[dtype]


def log_decays(*shape):
    """From 0.001 to 4, half of them below 0.13: a state that is remembered over many chunks."""
    return -torch.nn.functional.softplus(2 * torch.randn(*shape, dtype=F64) - 2)


def draw_ssd(T, batch=2, states=2, groups=2, heads=4, size=5, head_dim=7):
    """`states`: rows of the initial state; 0 is none."""
    inputs = {
        "q": torch.randn(batch, T, groups, size, dtype=F64),
        "k": torch.randn(batch, T, groups, size, dtype=F64),
        "v": torch.randn(batch, T, heads, head_dim, dtype=F64),
        "a": log_decays(batch, T, heads),
        "g": torch.rand(batch, T, heads, dtype=F64).round(decimals=1),  # sometimes 0, as padding is
    }
    return inputs | with_state(states, heads, size, head_dim)


def draw_ddts(T, batch=2, states=2, size=5, width=7):
    """`states`: rows of the initial state; 0 is none."""
    inputs = {name: torch.randn(batch, T, size, dtype=F64) for name in "qk"}
    inputs |= {"v": torch.randn(batch, T, width, dtype=F64), "a": log_decays(batch, T, size)}
    return inputs | with_state(states, size, width)


def draw_conv(T, batch=2, states=2, channels=12, taps=4, bias=True):
    """`states`: rows of the initial state; 0 is none."""
    inputs = {"x": torch.randn(batch, T, channels, dtype=F64), "weight": torch.randn(channels, taps, dtype=F64)}
    if bias:
        inputs["bias"] = torch.randn(channels, dtype=F64)
    return inputs | with_state(states, taps - 1, channels)


def with_state(states, *shape):
    return {"initial_state": torch.randn(states, *shape, dtype=F64)} if states else {}


def draw_window(T, batch=2, states=0, heads=4, keys=1, values=4, head_dim=7):
    """`states`: steps of the past; 0 is none."""
    inputs = {
        "q": torch.randn(batch, T, heads, head_dim, dtype=F64),
        "k": torch.randn(batch, T, keys, head_dim, dtype=F64),
        "v": torch.randn(batch, T, values, head_dim, dtype=F64),
    }
    if states:
        inputs["past_k"] = torch.randn(batch, states, keys, head_dim, dtype=F64)
        inputs["past_v"] = torch.randn(batch, states, values, head_dim, dtype=F64)
    return inputs


def draw_gated_norm(T, batch=2, states=0, channels=12, skip=True):
    inputs = {name: torch.randn(batch, T, channels, dtype=F64) for name in ("y", "z")}
    inputs["weight"] = torch.randn(channels, dtype=F64)
    if skip:
        inputs |= {"x": torch.randn(batch, T, channels, dtype=F64), "skip": torch.randn(channels, dtype=F64)}
    return inputs


def draw_norm(T, batch=2, states=0, channels=12):
    return {"x": torch.randn(batch, T, channels, dtype=F64), "weight": torch.randn(channels, dtype=F64)}


def flat_past(op):
    """A window-attention function that takes its past as `past_k`, `past_v` (tensors) and `real` (an option)."""

    def call(q, k, v, past_k=None, past_v=None, *, window, real=None, **options):
        if past_k is not None and real is None:
            real = torch.ones(past_k.shape[:2], dtype=torch.bool)
        past = None if past_k is None else (past_k, past_v, real)
        return op(q, k, v, window, past, **options)

    return call


def rms_norm_formula(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "ssd",
            ssd,
            ssd_reference,
            draw_ssd,
            measured={F32: 6.5e-7, F16: 1.2e-3, BF16: 1.0e-2},
            lengths=(1, 63, 64, 65, 131, 200),
            states=("state", "d initial_state"),
        ),
        Kernel(
            "ddts",
            ddts,
            ddts_reference,
            draw_ddts,
            measured={F32: 3.7e-7, F16: 1.0e-3, BF16: 7.3e-3},
            lengths=(1, 15, 16, 17, 35, 200),
            states=("state", "d initial_state"),
        ),
        Kernel(
            "causal_conv",
            causal_conv,
            causal_conv_reference,
            draw_conv,
            measured={F32: 8.8e-7, F16: 1.4e-3, BF16: 9.5e-3},
            lengths=(1, 2, 3, 4, 131, 200),
        ),
        Kernel(
            "window_attention",
            flat_past(window_attention),
            flat_past(window_attention_reference),
            draw_window,
            measured={F32: 2.4e-6, F16: 2.7e-3, BF16: 1.3e-2},
            lengths=(1, 63, 64, 65, 131, 200),
            options={"window": 20},
        ),
        Kernel(
            "gated_rms_norm",
            gated_rms_norm,
            gated_rms_norm_reference,
            draw_gated_norm,
            measured={F32: 1.2e-6, F16: 4.8e-4, BF16: 3.8e-3},
            lengths=(1, 2, 33),
            options={"eps": 1e-5},
        ),
        Kernel(
            "rms_norm",
            rms_norm,
            rms_norm_formula,
            draw_norm,
            measured={F32: 2.3e-7, F16: 4.8e-4, BF16: 3.7e-3},
            lengths=(1, 2, 33),
            options={"eps": 1e-5},
        ),
    )
}
RECURRENT = ("ssd", "ddts", "causal_conv")  # those with a state
SEQUENCE = (*RECURRENT, "window_attention")  # those that know of time

# (kernel, arguments of its `draw`, options)
VARIANTS = [
    *(("ssd", {"groups": groups, "states": states}, {}) for groups in (1, 2, 4) for states in (0, 2)),
    *(("ddts", {"states": states}, {}) for states in (0, 2)),
    *(("causal_conv", {"taps": taps, "states": states}, {}) for taps in (1, 2, 4) for states in (0, 2)),
    ("causal_conv", {"bias": False}, {}),
    *(("causal_conv", {"taps": taps, "bias": bias}, {"activate": False}) for taps, bias in ((4, True), (2, False))),
    *(
        ("window_attention", {"keys": keys, "values": values, "states": past}, {"window": window})
        for keys, values in ((1, 4), (2, 4), (4, 1), (1, 2), (4, 4))
        for past, window in ((0, 1), (0, 20), (0, 64), (0, 500), (70, 20), (30, 100))
    ),
    ("window_attention", {"states": 30}, {"scale": 0.3, "window": 20}),
    *(("gated_rms_norm", {"skip": skip}, {"groups": groups}) for skip in (True, False) for groups in (1, 2, 4)),
    ("rms_norm", {}, {}),
]


def draw(kernel, T, dtype=F32, seed=0, wide=(), **arguments):
    """Inputs of `kernel` in `dtype`; states and the names in `wide` in float32 at least."""
    torch.manual_seed(seed)
    inputs = KERNELS[kernel].draw(T, **arguments)
    keep = (*wide, *(("initial_state",) if KERNELS[kernel].states else ()))
    return {name: x.to(torch.promote_types(dtype, F32) if name in keep else dtype) for name, x in inputs.items()}


def results(op, inputs, cotangents=None, **options):
    """({name: tensor} of outputs ("y", "state") and gradients ("d q", ...), cotangents).

    Gradients are those of the outputs' product with `cotangents`; None draws them, in the outputs' dtypes.
    """
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = op(**leaves, **options)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    if cotangents is not None and [c.shape for c in cotangents] != [y.shape for y in outputs]:
        raise OutOfBoundError(f"outputs have shapes {[tuple(y.shape) for y in outputs]}, not those of `cotangents`")
    if cotangents is None:
        generator = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(y.shape, generator=generator, dtype=F64, device="cpu").to(y) for y in outputs]
    matching = [c.to(y.dtype) for c, y in zip(cotangents, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), matching, materialize_grads=True)
    named = dict(zip(("y", "state"), (y.detach() for y in outputs), strict=False))
    return named | {f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)}, cotangents


def widened(inputs):
    return {name: x.to(F64) for name, x in inputs.items()}


def error(got, expected):
    """Largest difference over the largest expected value; inf where something is not finite."""
    if got.numel() == 0:
        return 0.0
    largest = expected.to(F64).abs().max().item()
    difference = (got.to(F64) - expected.to(F64)).abs().max().item()
    value = difference / largest if largest > 0 else difference
    return value if value < float("inf") else float("inf")


def bound_of(kernel, name, inputs):
    """The bound for the coarsest of the inputs' dtypes."""
    dtypes = {x.dtype for x in inputs.values()}
    coarsest = next(dtype for dtype in (BF16, F16, F32, F64) if dtype in dtypes)
    if name in KERNELS[kernel].states and coarsest != F64:
        coarsest = F32
    return KERNELS[kernel].bound(coarsest)


def assert_within(kernel, got, expected, inputs, bound=None):
    """Every tensor of `expected` is in `got`, within `bound`; None is that of `kernel` for the inputs' dtypes.

    Raises:
        OutOfBoundError: the first that is not: its name, its error, its bound.
    """
    if got.keys() != expected.keys():
        raise OutOfBoundError(f"{kernel}: results are {sorted(got)}, not {sorted(expected)}")
    for name, want in expected.items():
        if got[name].shape != want.shape:
            raise OutOfBoundError(f"{kernel} {name}: shape {tuple(got[name].shape)}, not {tuple(want.shape)}")
        limit = bound_of(kernel, name, inputs) if bound is None else bound
        found = error(got[name], want)
        if not found <= limit:
            raise OutOfBoundError(f"{kernel} {name}: error {found:.2e}, bound {limit:.0e}")


def against_reference(kernel, inputs, fast=None, **options):
    """(results of the fast path, results of the reference on the same numbers in float64)."""
    options = KERNELS[kernel].options | options
    got, cotangents = results(fast or KERNELS[kernel].fast, inputs, **options)
    for name in OF_THE_FAST_PATH:
        options.pop(name, None)
    return got, results(KERNELS[kernel].reference, widened(inputs), cotangents, **options)[0]


def check(kernel, inputs, fast=None, **options):
    """The fast path gives the reference's outputs, states and gradients. The comparison behind most tests."""
    assert_within(kernel, *against_reference(kernel, inputs, fast, **options), inputs)


def all_of(kernel, inputs, **options):
    """Every result of the fast path, by name."""
    return results(KERNELS[kernel].fast, inputs, **KERNELS[kernel].options, **options)[0]


def worst_error(kernel, dtype, seeds=20):
    """Largest error over seeds, lengths, variants and results; those that have float32's bound count as float32."""
    worst = 0.0
    for name, arguments, options in VARIANTS:
        for T in KERNELS[kernel].lengths if name == kernel else ():
            for seed in range(seeds):
                got, want = against_reference(kernel, draw(kernel, T, dtype, seed, **arguments), **options)
                counted = set(want) - (set() if dtype == F32 else set(KERNELS[kernel].states))
                worst = max(worst, *(error(got[result], want[result]) for result in counted))
    return worst


def two_borders(kernel):
    """A length of two chunks and three steps."""
    return KERNELS[kernel].lengths[4]


def around_borders(kernel):
    """Steps at both ends of `two_borders` and on either side of the first border."""
    chunk, after, T = KERNELS[kernel].lengths[2:5]
    return 1, chunk - 1, chunk, after, T - 1


def timed(kernel, inputs):
    """Names of the inputs that have one entry a step."""
    return [name for name in inputs if name in {"causal_conv": ("x",)}.get(kernel, ("q", "k", "v", "a", "g"))]


def cut(kernel, inputs, start, stop):
    """The inputs of the steps [start, stop); what is not one entry a step stays."""
    return {name: x[:, start:stop] if name in timed(kernel, inputs) else x for name, x in inputs.items()}


def perturbed(kernel, inputs, start, stop):
    """The inputs with everything at the steps [start, stop) moved; a log-decay stays one."""
    moved = {name: x.clone() for name, x in inputs.items()}
    for name in timed(kernel, inputs):
        moved[name][:, start:stop] += -1 if name == "a" else 1
    return moved


def in_pieces(kernel, cuts):
    """A path that calls the fast one on each piece between `cuts`, handing the state or the past on."""

    def call(**inputs):
        T = inputs[timed(kernel, inputs)[0]].shape[1]
        pieces = pairwise((0, *cuts, T))
        if kernel == "window_attention":
            window = inputs.pop("window")
            return torch.cat([_windowed(inputs, start, stop, window) for start, stop in pieces], 1)
        ys = []
        for start, stop in pieces:
            y, inputs["initial_state"] = KERNELS[kernel].fast(**cut(kernel, inputs, start, stop))
            ys.append(y)
        return torch.cat(ys, 1), inputs["initial_state"]

    return call


def _windowed(inputs, start, stop, window):
    past = cut("window_attention", inputs, max(0, start - window + 1), start)
    now = cut("window_attention", inputs, start, stop)
    return KERNELS["window_attention"].fast(**now, past_k=past["k"], past_v=past["v"], window=window)
