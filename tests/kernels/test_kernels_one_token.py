"""The short way of one token equals the laws, in the state's own memory; and who may not take it."""

import pytest
import torch
from kernel_cases import BF16, F16, F32, error
from torch.autograd import forward_ad

from scrubjay.kernels import one_token as module
from scrubjay.kernels.conv import causal_conv_reference
from scrubjay.kernels.ddts import ddts_reference
from scrubjay.kernels.dispatch import one_token
from scrubjay.kernels.norm import gated_rms_norm_reference, rms_norm
from scrubjay.kernels.rodimus_gates import rodimus_gates
from scrubjay.kernels.ssd import log_decay, ssd_reference

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")
BATCHES = pytest.mark.parametrize("batch", [1, 2, 5])
DTYPES = pytest.mark.parametrize(("dtype", "bound"), [(F32, 1e-6), (BF16, 8e-3), (F16, 1e-3)], ids=str)


@pytest.fixture(autouse=True)
def _no_gradient():
    with torch.no_grad():
        yield


def within(got, want, bound):
    assert got.shape == want.shape
    assert error(got, want.double()) <= bound


@BATCHES
@DTYPES
def test_rms_norm(batch, dtype, bound):
    x, weight = torch.randn(batch, 1, 33), torch.rand(33, dtype=dtype)
    got = module.rms_norm_token(x, weight, 1e-3)
    within(got, rms_norm(x[:, 0].double(), weight.double(), 1e-3)[:, None], bound)
    assert got.dtype == dtype


def test_a_norm_knows_no_default_dtype():
    before, row = torch.get_default_dtype(), torch.zeros(1, 1, 4)
    torch.set_default_dtype(torch.float16)  # in which this epsilon is zero
    try:
        norm = module.rms_norm_token(row, torch.ones(4, dtype=F32), 1.25e-8)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(norm, row)


@BATCHES
@DTYPES
@pytest.mark.parametrize("groups", [1, 3])
def test_gated_rms_norm(batch, dtype, bound, groups):
    y, x, skip = torch.randn(batch, 1, 36), torch.randn(batch, 1, 36), torch.randn(36)
    z, weight = torch.randn(batch, 1, 40).to(dtype)[..., 2:38], torch.rand(36, dtype=dtype)
    got = module.gated_rms_norm_token(torch.addcmul(y, x, skip), z, weight, 1e-3, groups)
    wide = (t.double() for t in (y, z, weight))
    within(got, gated_rms_norm_reference(*wide, 1e-3, groups, x.double(), skip.double()), bound)
    assert got.dtype == dtype


@BATCHES
@DTYPES
@pytest.mark.parametrize("activate", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_causal_conv(batch, dtype, bound, bias, taps, activate):
    x, state = torch.randn(batch, 1, 20).to(dtype)[..., 3:14], torch.randn(batch, taps - 1, 11).to(dtype)
    weight, bias = torch.randn(11, taps).to(dtype), torch.randn(11).to(dtype) if bias else None
    wide = (None if t is None else t.double() for t in (x, weight, bias, state))
    y, new = module.causal_conv_token(x, weight, bias, state, activate)
    want, after = causal_conv_reference(*wide, activate=activate)
    within(y, want, 4 * bound)  # a sum of several rounded terms
    assert torch.equal(new.double(), after)


@pytest.mark.parametrize("log_rate", [-20.0, 0.0, 3.0, 44.0, 88.0, 130.0])
@pytest.mark.parametrize("step", [0.0, 1e-45, 1e-30, 1e-3, 0.1, 20.0])
def test_decay(step, log_rate):
    """Zero steps keep all, whatever the rate: exp(89) is inf in float32, and 0 * inf is no number."""
    step, log_rate = torch.full((1, 1, 3), step), torch.full((3,), log_rate)
    keep = log_decay(step.double(), log_rate.double()).exp()
    assert (module.decay_token(step, log_rate) - keep).abs().max() <= 5e-7


def keeps_its_memory(token, state):
    """`token` of a state: the new state is in its memory, or where that may not be written, in new memory."""
    before = state.clone()
    y, new = token(state)
    assert new.data_ptr() == state.data_ptr()
    assert not torch.equal(state, before)
    with torch.inference_mode():
        made_there = before.clone()
    for locked in (made_there, before.clone().requires_grad_()):
        again, other = token(locked)
        assert torch.equal(again, y)
        assert torch.equal(other, new)
        assert torch.equal(locked, before)
    return y, new


@pytest.fixture(params=[2**21, 1], ids=["one tile", "a tile a row"])
def _tiles(request, monkeypatch):
    monkeypatch.setattr(module, "TILE", request.param)


@BATCHES
@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_ssd(batch, groups):
    q, k = torch.randn(2, batch, groups, 5)
    v, state = torch.randn(batch, 6, 7), torch.randn(batch, 6, 5, 7)
    keep, gain = torch.rand(2, batch, 1, 6)
    want, after = ssd_reference(*(t[:, None].double() for t in (q, k, v)), keep.double().log(), gain.double(), state)
    y, new = keeps_its_memory(lambda s: module.ssd_token(q, k, v, keep, gain, s), state)
    within(y, want[:, 0], 1e-6)
    within(new, after, 1e-6)


@BATCHES
@pytest.mark.usefixtures("_tiles")
def test_ddts(batch):
    q, k, keep = torch.rand(3, batch, 1, 5)
    v, state = torch.randn(batch, 1, 7), torch.randn(batch, 5, 7)
    want, after = ddts_reference(*(t.double() for t in (q, k, v)), keep.double().log(), state)
    y, new = keeps_its_memory(lambda s: module.ddts_token(q, k, v, keep, s), state)
    within(y, want, 1e-6)
    within(new, after, 1e-6)


@BATCHES
@DTYPES
@pytest.mark.parametrize("spread", [1, 30, 120])
def test_rodimus_gates(batch, dtype, bound, spread):
    """Far below zero softplus is no number but zero, and its power t is still one."""
    qk, gates = torch.randn(batch, 1, 12).to(dtype), (spread * torch.randn(batch, 1, 12)).to(dtype)
    bias = spread * torch.randn(12)
    q, k, keep = module.rodimus_gates_token(qk, gates, bias, 1e-12)
    want = rodimus_gates(qk.double(), gates.double(), bias.double(), 1e-12)
    for got, law in zip((q, k, keep), (*want[:2], want[2].exp()), strict=True):
        within(got, law, 1e-6 * spread)  # an exponent of that size is rounded


def test_one_token_of_each_row_takes_the_short_way():
    x = torch.randn(3, 1, 4)
    assert one_token(x)
    assert one_token(x.bfloat16())
    assert not one_token(x.double())
    assert not one_token(torch.randn(3, 2, 4))
    assert not one_token(x.to("meta"))
    assert not one_token(torch.nn.Parameter(x))
    with torch.enable_grad():
        assert not one_token(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not one_token(x)
    with forward_ad.dual_level():
        assert not one_token(x)
    torch.func.vmap(lambda row: assert_long(row[None]))(x)


def assert_long(x):
    assert not one_token(x)
    return x
