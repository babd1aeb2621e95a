"""The gates of Rodimus as one pass over memory forward and one backward (the equations are in rodimus_gates.py).

One program computes ROWS steps; the backward pass computes everything again from the inputs. TEMPERED: gates and bias
pack a temperature too. The gradient of the bias
is a sum over all steps: each program writes its own part of it, and torch adds these up.
"""

import torch
from torch.autograd.function import once_differentiable

from scrubjay.kernels.triton_tools import jit, launch, tl, triton

NARROW = (torch.float32, torch.bfloat16, torch.float16)


def rodimus_gates_fits(qk, gates, bias):
    """Whether the kernels cover these operands: no float64, a state of at most 256."""
    return all(x.dtype in NARROW for x in (qk, gates, bias)) and qk.shape[-1] <= 512


def rodimus_gates_triton(qk, gates, bias, eps):
    """`rodimus_gates` on a GPU: the same shapes, dtypes and result."""
    return _Gates.apply(qk, gates, bias, eps)


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qk, gates, bias, eps):
        qk, gates, bias = (x.contiguous() for x in (qk, gates, bias))  # projections, which are contiguous already
        ctx.save_for_backward(qk, gates, bias)
        ctx.eps, n = eps, qk.shape[-1] // 2
        shape = (*qk.shape[:-1], n)
        q = torch.empty(shape, dtype=qk.dtype, device=qk.device)
        k, a = (torch.empty(shape, dtype=torch.float32, device=qk.device) for _ in range(2))
        steps, rows, meta = _sizes(qk, gates)
        launch(_forward, (triton.cdiv(steps, rows),), qk, gates, bias, q, k, a, steps, n**-0.5, eps, **meta)
        return q, k, a

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, da):
        qk, gates, bias = ctx.saved_tensors
        dq, dk, da = (x.contiguous() for x in (dq, dk, da))
        dqk, dgates = torch.empty_like(qk), torch.empty_like(gates)
        steps, rows, meta = _sizes(qk, gates)
        grid = (triton.cdiv(steps, rows),)
        parts = torch.empty(*grid, len(bias), dtype=torch.float32, device=qk.device)
        scale = (qk.shape[-1] // 2) ** -0.5
        launch(_backward, grid, qk, gates, bias, dq, dk, da, dqk, dgates, parts, steps, scale, ctx.eps, **meta)
        return dqk, dgates, parts.sum(0).to(bias.dtype), None


def _sizes(qk, gates):
    """Number of steps, steps of a program, constants of the kernels."""
    n = qk.shape[-1] // 2
    padded = triton.next_power_of_2(n)
    rows = max(1, 1024 // padded)  # 8 numbers of each tile a thread
    meta = {"N": n, "NP": padded, "ROWS": rows, "TEMPERED": gates.shape[-1] == 2 * n, "num_warps": 4}
    return qk.numel() // (2 * n), rows, meta


@jit
def _log1p(u):
    """ln(1 + u) for 0 <= u <= 1, to float32's last digits: twice the series of artanh(u / (2 + u)).

    The logarithm of a GPU is exact to 1e-7 of 1, which is a poor part of ln(1 + u) for a small u."""
    z = u / (2 + u)
    s = z * z
    series = 1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15))))))
    return 2 * z * (1 + s * series)


@jit
def _gate(x):
    """softplus(x), its logarithm and its derivative sigmoid(x), without overflow; see `log_softplus`."""
    u = tl.exp(-tl.abs(x))
    gate = tl.maximum(x, 0.0) + _log1p(u)
    log = tl.where(x < -15, x - 0.5 * u, tl.log(tl.maximum(gate, 1e-7)))
    return gate, log, tl.where(x < 0, u, 1.0) / (1 + u)


@jit
def _gates(gates, bias, at, to, real, n, N: tl.constexpr, TEMPERED: tl.constexpr):
    """softplus of the selection, its logarithm and derivative, (ROWS, N) each; the selection; the temperature."""
    if TEMPERED:
        temperature = tl.load(gates + at + N, mask=real, other=0).to(tl.float32)
        temperature += tl.load(bias + N + n, mask=n < N, other=0).to(tl.float32)[None, :]
        _, _, temperature = _gate(temperature)
    else:
        at = to
        temperature = tl.full([1, 1], 1.0, tl.float32)
    selection = tl.load(gates + at, mask=real, other=0).to(tl.float32)
    selection += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    gate, log, slope = _gate(selection)
    return gate, log, slope, selection, temperature


@jit
def _tile(steps, N: tl.constexpr, NP: tl.constexpr, ROWS: tl.constexpr):
    """This program's places: in (T, 2 N) of the first half, in (T, N), their mask and the channels."""
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    n = tl.arange(0, NP)
    return t * (2 * N) + n[None, :], t * N + n[None, :], (t < steps) & (n < N)[None, :], n


@jit
def _forward(
    qk, gates, bias, q, k, a, steps, scale, eps,
    N: tl.constexpr, NP: tl.constexpr, ROWS: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    at, to, real, n = _tile(steps, N, NP, ROWS)
    query = tl.load(qk + at, mask=real, other=0).to(tl.float32)
    key = tl.load(qk + at + N, mask=real, other=0).to(tl.float32)
    gate, log, _, _, temperature = _gates(gates, bias, at, to, real, n, N, TEMPERED)

    length = tl.maximum(tl.sqrt(tl.sum(key * key, 1)), eps)
    tl.store(q + to, query * scale, mask=real)
    power = tl.exp(temperature * log) if TEMPERED else gate
    tl.store(k + to, key / length[:, None] * power, mask=real)
    tl.store(a + to, -gate * temperature, mask=real)


@jit
def _backward(
    qk, gates, bias, dq, dk, da, dqk, dgates, parts, steps, scale, eps,
    N: tl.constexpr, NP: tl.constexpr, ROWS: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    at, to, real, n = _tile(steps, N, NP, ROWS)
    key = tl.load(qk + at + N, mask=real, other=0).to(tl.float32)
    gate, log, slope, selection, temperature = _gates(gates, bias, at, to, real, n, N, TEMPERED)
    dquery = tl.load(dq + to, mask=real, other=0).to(tl.float32)
    dkey = tl.load(dk + to, mask=real, other=0)
    ddecay = tl.load(da + to, mask=real, other=0)

    norm = tl.sqrt(tl.sum(key * key, 1))[:, None]
    length = tl.maximum(norm, eps)
    power = tl.exp(temperature * log) if TEMPERED else gate
    unit = key / length
    dunit = dkey * power
    along = tl.where(norm < eps, 0.0, tl.sum(dunit * unit, 1)[:, None])  # below eps the length is a constant
    tl.store(dqk + at, dquery * scale, mask=real)
    tl.store(dqk + at + N, (dunit - along * unit) / length, mask=real)

    part = parts + tl.program_id(0).to(tl.int64) * ((1 + TEMPERED) * N) + n
    if TEMPERED:
        dexponent = dkey * unit * power  # of the power's exponent, t ln g
        low = 1 - 0.5 * tl.exp(tl.minimum(selection, 0.0))
        relative = tl.where(selection < -15, low, slope / tl.maximum(gate, 1e-7))
        dselection = dexponent * temperature * relative - ddecay * temperature * slope
        dtemperature = (dexponent * log - ddecay * gate) * temperature * (1 - temperature)
        tl.store(dgates + at, dselection, mask=real)
        tl.store(dgates + at + N, dtemperature, mask=real)
        tl.store(part + N, tl.sum(tl.where(real, dtemperature, 0.0), 0), mask=n < N)
    else:
        dselection = (dkey * unit - ddecay) * slope
        tl.store(dgates + to, dselection, mask=real)
    tl.store(part, tl.sum(tl.where(real, dselection, 0.0), 0), mask=n < N)
