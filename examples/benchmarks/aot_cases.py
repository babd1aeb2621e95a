"""Calls whose kernels are compiled ahead of time: the published shapes, on meta tensors, forward and backward."""

import torch

from scrubjay.kernels.conv_triton import causal_conv_triton
from scrubjay.kernels.ddts_triton import ddts_step_triton, ddts_triton
from scrubjay.kernels.gate_triton import gate_logit_triton, norm_gate_triton
from scrubjay.kernels.norm_triton import gated_rms_norm_triton, rms_norm_triton
from scrubjay.kernels.recycle_triton import (
    decode_triton,
    decode_with_scores_triton,
    gather_pair_triton,
    order_triton,
    pooled_triton,
    put_triton,
    scores_of_triton,
)
from scrubjay.kernels.release_triton import ranking_triton, release_step_triton
from scrubjay.kernels.rodimus_gates_triton import rodimus_gates_triton
from scrubjay.kernels.select_attention import Packed
from scrubjay.kernels.select_attention_triton import select_attention_step_triton, select_attention_triton
from scrubjay.kernels.ssd_triton import ssd_step_triton, ssd_triton
from scrubjay.kernels.window_triton import window_step_triton, window_triton

META = torch.device("meta")


def drawn(*shape, dtype=torch.bfloat16, gradient=True):
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device=META, requires_grad=gradient)


def back(*outputs):
    """The backward pass through outputs."""
    wanted = [y for y in outputs if y is not None and y.requires_grad]
    torch.autograd.backward(wanted, [torch.empty_like(y) for y in wanted])


def window_attention(head_dim, dtype=torch.bfloat16, past=False, packed=False):
    """Rodimus+ 1.6B: 16 query and value heads on one key head, a window of 2048."""
    T, S, H = 16384, 2047 if past else 0, 16
    q, k, v = (drawn(1, T, heads, head_dim, dtype=dtype) for heads in (H, 1, H))
    before = (drawn(1, S, 1, head_dim, dtype=dtype), drawn(1, S, H, head_dim, dtype=dtype))
    before = (*before, drawn(1, S, dtype=torch.bool, gradient=False)) if past else None
    cu_seqlens = drawn(9, dtype=torch.int32, gradient=False) if packed else None
    back(window_triton(q, k, v, 2048, before, cu_seqlens, head_dim**-0.5))


def window_attention_step(head_dim, dtype=torch.bfloat16):
    """Rodimus+ 1.6B decoding: the ring is a cache's, so nothing wants a gradient."""
    q, keys, values = (drawn(8, *shape, head_dim, dtype=dtype) for shape in ((16,), (1, 2048), (16, 2048)))
    window_step_triton(q, keys, values, drawn(8, 2048, dtype=torch.bool, gradient=False), head_dim**-0.5)


def select_attention(head_dim, dtype=torch.bfloat16, limits=False, share=0.15):
    """Taipan 1.3B: 32 heads, a window of 2048, 15 % of the columns; with `limits` all that can narrow what is seen."""
    B, T, H = 4, 4096, 2048 // head_dim
    numbers = drawn(B, T, dtype=torch.int64, gradient=False)
    packed = Packed(drawn(int(B * T * share), dtype=torch.int64, gradient=False), (B, T), 256, False)
    q, *kv = drawn(len(packed.index), H, head_dim, dtype=dtype), *(drawn(B, T, H, head_dim, dtype=dtype) for _ in "kv")
    narrow = ([(numbers, 2048), (numbers, 300)], numbers > 0) if limits else ((), None)
    back(select_attention_triton(q, *kv, packed, numbers, 2048, *narrow, head_dim**-0.5))


def select_attention_step(head_dim, dtype=torch.bfloat16, groups=1, masked=True):
    q, rows = drawn(8, 2048 // head_dim, head_dim, dtype=dtype), drawn(8, dtype=torch.bool, gradient=False)
    ring = (drawn(8, 2048 // head_dim // groups, 2048, head_dim, dtype=dtype) for _ in "kv")
    seen = drawn(8, 2048, dtype=torch.bool, gradient=False)
    select_attention_step_triton(q, *ring, seen, rows if masked else None, head_dim**-0.5)


def conv(shape=(8, 2048, 4096), taps=4, dtype=torch.bfloat16, documents=0, state=False, padded=False):
    """Mamba-2's and Rodimus' convolutions; x is a slice of a projection twice as wide."""
    batch, length, channels = shape
    x = drawn(batch, length, 2 * channels, dtype=dtype)[..., :channels]
    weight, bias = drawn(channels, taps, dtype=dtype), drawn(channels, dtype=dtype)
    initial_state = drawn(documents or batch, taps - 1, channels, dtype=dtype) if state else None
    cu_seqlens = drawn(documents + 1, dtype=torch.int32, gradient=False) if documents else None
    lengths = drawn(batch, dtype=torch.int64, gradient=False) if padded else None
    y, final = causal_conv_triton(x, weight, bias, initial_state, cu_seqlens, lengths)
    back(*((y, final) if state else (y,)))


def gated_norm(channels, groups=1, skip=True, dtype=torch.bfloat16):
    y, z, x = (drawn(2, 64, channels, dtype=dtype) for _ in range(3))
    weight, scale = drawn(channels, dtype=dtype), drawn(channels, dtype=dtype)
    back(gated_rms_norm_triton(y, z, weight, 1e-5, groups, x if skip else None, scale if skip else None))


def norm(channels, dtype=torch.float32):
    """Of a float32 residual stream, out of which comes what the layer computes in."""
    back(rms_norm_triton(drawn(2, 64, channels, dtype=torch.float32), drawn(channels, dtype=dtype), 1e-5))


def ddts(batch, length, width=4096, size=64, dtype=torch.bfloat16, packed=False):
    """Rodimus+ 1.6B: keys and decays are float32 in every model."""
    q, v = drawn(batch, length, size, dtype=dtype), drawn(batch, length, width, dtype=dtype)
    k, a = (drawn(batch, length, size, dtype=torch.float32) for _ in "ka")
    cu_seqlens = drawn(9, dtype=torch.int32, gradient=False) if packed else None
    state = drawn(8 if packed else batch, size, width, dtype=torch.float32)
    back(*ddts_triton(q, k, v, a, state, cu_seqlens))


def ddts_step(batch, dtype=torch.bfloat16, width=4096, size=64):
    q, v = drawn(batch, size, dtype=dtype), drawn(batch, width, dtype=dtype)
    k, a = (drawn(batch, size, dtype=torch.float32) for _ in "ka")
    ddts_step_triton(q, k, v, a, drawn(batch, size, width, dtype=torch.float32))


def ssd(batch, length, heads, head_dim=64, size=128, groups=1, dtype=torch.bfloat16, packed=False):
    """Mamba-2: q and k are shared by a group's heads; decays and gains are float32 in every model."""
    q, k = (drawn(batch, length, groups, size, dtype=dtype) for _ in "qk")
    a, g = (drawn(batch, length, heads, dtype=torch.float32) for _ in "ag")
    cu_seqlens = drawn(9, dtype=torch.int32, gradient=False) if packed else None
    state = drawn(8, heads, size, head_dim, dtype=torch.float32) if packed else None
    back(*ssd_triton(q, k, drawn(batch, length, heads, head_dim, dtype=dtype), a, g, state, cu_seqlens))


def ssd_step(batch, dtype=torch.bfloat16, heads=64, head_dim=64, size=128):
    q, k = (drawn(batch, 1, size, dtype=dtype) for _ in "qk")
    a, g = (drawn(batch, heads, dtype=torch.float32) for _ in "ag")
    state = drawn(batch, heads, size, head_dim, dtype=torch.float32)
    ssd_step_triton(q, k, drawn(batch, heads, head_dim, dtype=dtype), a, g, state, state)


def rodimus_gates(size=64, dtype=torch.bfloat16, tempered=True):
    width = 2 * size if tempered else size
    qk, gates = drawn(2, 2048, 2 * size, dtype=dtype), drawn(2, 2048, width, dtype=dtype)
    back(*rodimus_gates_triton(qk, gates, drawn(width, dtype=torch.float32), 1e-5))


def unwanted(*shape, dtype):
    return drawn(*shape, dtype=dtype, gradient=False)


def decode(batch, keys=32768, dtype=torch.bfloat16, head_dim=128, heads=32, scored=False, padded=False):
    """Llama-3-8B: 8 key heads, slices of a larger buffer."""
    q = unwanted(batch, heads, head_dim, dtype=dtype)
    k, v = (unwanted(batch, 8, keys + 4096, head_dim, dtype=dtype)[:, :, :keys] for _ in "kv")
    real = unwanted(batch, keys, dtype=torch.bool) if padded else None
    if scored:
        decode_with_scores_triton(q, k, v, head_dim**-0.5, real)
        scores_of_triton(q, k, head_dim**-0.5, real)
    else:
        decode_triton(q, k, v, head_dim**-0.5, real)


def recycle(batch, reduce="max", padded=False, dtype=torch.bfloat16, n=32768):
    """From log-probabilities to the rows that stay, and one more row, for a budget of 2048."""
    real = unwanted(batch, n, dtype=torch.bool) if padded else None
    order_triton(pooled_triton(unwanted(batch, 32, n, dtype=torch.float32), 8, reduce, 7, real), 1, 4, real)
    k, v = (unwanted(batch, 8, n, 128, dtype=dtype) for _ in "kv")
    held = [unwanted(batch, 8, 2048, 128, dtype=dtype) for _ in "kv"]
    kinds = (torch.int64, torch.float64, torch.bool)[: 2 + padded]
    held += [unwanted(batch, 8, 2048, dtype=kind) for kind in kinds] + [None] * (not padded)
    gather_pair_triton(k, v, unwanted(batch, 8, 2048, dtype=torch.int64), held[:2])
    newest = [x[:, :, -1:] for x in (k, v)]
    for filled in (1000, 2048):
        new_real = None if real is None else real[:, -1]
        put_triton(held, *newest, 40000, unwanted(batch, dtype=torch.float64), new_real, filled)


def release(batch, slots=2048, rebuilt=8):
    """One decode step of ADORE."""
    kinds = (torch.float32, torch.int64, torch.bool, torch.int64)
    score, pos, real, columns = (unwanted(batch, slots + rebuilt + 1, dtype=kind) for kind in kinds)
    held, counts = unwanted(batch, slots, dtype=torch.int64), unwanted(batch, dtype=torch.int64)
    release_step_triton(score, pos, real, columns, held, slots, counts, 4, 64)
    ranking_triton(score, pos, real, pos > 4)
    ranking_triton(score, pos.int(), real)


def gate(width, stream=torch.float32, dtype=torch.bfloat16, gate_only=False):
    """Taipan 1.3B: a float32 residual stream, the layer in bfloat16, its gate in float32."""
    h, norm = drawn(8, 4096, width, dtype=stream), drawn(width, dtype=dtype)
    weight, bias = drawn(2, width, dtype=torch.float32), drawn(2, dtype=torch.float32)
    back(*((gate_logit_triton(h, weight, bias),) if gate_only else norm_gate_triton(h, norm, 1e-5, weight, bias, True)))


CASES = {
    "window: bf16 head 128": lambda: window_attention(128),
    "window: bf16 head 64": lambda: window_attention(64),
    "window: bf16 head 128 past": lambda: window_attention(128, past=True),
    "window: bf16 head 128 packed": lambda: window_attention(128, packed=True),
    "window: bf16 head 256": lambda: window_attention(256),
    "window: fp32 head 128": lambda: window_attention(128, torch.float32),
    "window: fp32 head 64": lambda: window_attention(64, torch.float32),
    "window: bf16 step": lambda: window_attention_step(128),
    "window: bf16 step head 64": lambda: window_attention_step(64),
    "window: fp32 step": lambda: window_attention_step(128, torch.float32),
    "select: bf16 head 64": lambda: select_attention(64),
    "select: bf16 head 64 limits": lambda: select_attention(64, limits=True),
    "select: bf16 head 128": lambda: select_attention(128),
    "select: bf16 head 256": lambda: select_attention(256),
    "select: fp32 head 64": lambda: select_attention(64, torch.float32),
    "select: fp32 head 128": lambda: select_attention(128, torch.float32),
    "select: bf16 step": lambda: select_attention_step(64),
    "select: bf16 step head 128 groups": lambda: select_attention_step(128, groups=4, masked=False),
    "select: fp32 step": lambda: select_attention_step(64, torch.float32),
    "ddts: bf16 batch 8": lambda: ddts(8, 2048),
    "ddts: bf16 one row": lambda: ddts(1, 16384),
    "ddts: bf16 two rows, 6144 channels": lambda: ddts(2, 2048, 6144),
    "ddts: bf16 packed": lambda: ddts(1, 16384, packed=True),
    "ddts: bf16 128 keys": lambda: ddts(8, 2048, size=128),
    "ddts: fp32": lambda: ddts(8, 2048, dtype=torch.float32),
    "ddts: bf16 step": lambda: ddts_step(1),
    "ddts: bf16 step batch 64": lambda: ddts_step(64),
    "ddts: fp32 step": lambda: ddts_step(1, torch.float32),
    "ssd: bf16 130m": lambda: ssd(8, 2048, 24),
    "ssd: bf16 1.3b": lambda: ssd(2, 16384, 64),
    "ssd: bf16 2.7b": lambda: ssd(1, 65536, 80),
    "ssd: bf16 8 groups": lambda: ssd(1, 16384, 128, groups=8),
    "ssd: bf16 packed": lambda: ssd(1, 16384, 64, packed=True),
    "ssd: bf16 head 128": lambda: ssd(2, 4096, 32, head_dim=128),
    "ssd: bf16 state 256, head 256": lambda: ssd(2, 4096, 16, head_dim=256, size=256),
    "ssd: fp32": lambda: ssd(8, 2048, 24, dtype=torch.float32),
    "ssd: fp32 state 256, head 256": lambda: ssd(2, 4096, 16, head_dim=256, size=256, dtype=torch.float32),
    "ssd: bf16 step": lambda: ssd_step(1),
    "ssd: bf16 step batch 64": lambda: ssd_step(64),
    "ssd: fp32 step": lambda: ssd_step(1, torch.float32),
    "gates: bf16": rodimus_gates,
    "gates: fp32": lambda: rodimus_gates(dtype=torch.float32),
    "gates: bf16 no temperature": lambda: rodimus_gates(tempered=False),
    "conv: bf16": lambda: conv(),
    "conv: bf16 short": lambda: conv((1, 500, 4352)),
    "conv: bf16 states": lambda: conv(state=True),
    "conv: bf16 padded": lambda: conv(state=True, padded=True),
    "conv: bf16 packed": lambda: conv((1, 16384, 4352), documents=9),
    "conv: bf16 packed states": lambda: conv((1, 16384, 4352), documents=9, state=True),
    "conv: bf16 one step": lambda: conv((8, 1, 4352), state=True),
    "conv: bf16 2 taps": lambda: conv(taps=2),
    "conv: bf16 8 taps": lambda: conv(taps=8),
    "conv: fp32": lambda: conv(dtype=torch.float32),
    "conv: fp32 packed states": lambda: conv((1, 16384, 4352), dtype=torch.float32, documents=9, state=True),
    "norm: bf16 gated 4096 channels": lambda: gated_norm(4096),
    "norm: bf16 gated 5120 channels": lambda: gated_norm(5120),
    "norm: bf16 gated 8 groups of 1024": lambda: gated_norm(8192, 8),
    "norm: bf16 gated 1536 channels": lambda: gated_norm(1536),
    "norm: bf16 gated no skip": lambda: gated_norm(4096, skip=False),
    "norm: fp32 gated 4096 channels": lambda: gated_norm(4096, dtype=torch.float32),
    "norm: fp32 gated 8192 channels": lambda: gated_norm(8192, dtype=torch.float32),
    "norm: bf16 plain 2560 channels": lambda: norm(2560, torch.bfloat16),
    "norm: bf16 plain 4096 channels": lambda: norm(4096, torch.bfloat16),
    "norm: fp32 plain 2048 channels": lambda: norm(2048),
    "recycled: bf16 decode 2048 keys": lambda: decode(1, 2048),
    "recycled: bf16 decode 32768 keys": lambda: decode(8),
    "recycled: bf16 decode padded": lambda: decode(8, 2048, padded=True),
    "recycled: bf16 decode head 64": lambda: decode(8, head_dim=64),
    "recycled: bf16 decode head 256": lambda: decode(8, head_dim=256),
    "recycled: bf16 decode one launch": lambda: decode(200, 2000, heads=56),
    "recycled: bf16 full step": lambda: decode(1, scored=True),
    "recycled: bf16 full step padded": lambda: decode(8, scored=True, padded=True),
    "recycled: fp32 decode 2048 keys": lambda: decode(1, 2048, torch.float32),
    "recycled: fp32 decode head 256": lambda: decode(1, 2048, torch.float32, 256),
    "recycled: fp32 full step": lambda: decode(8, dtype=torch.float32, scored=True, padded=True),
    "recycled: bf16 choice": lambda: recycle(1),
    "recycled: bf16 choice padded": lambda: recycle(8, "mean", padded=True),
    "recycled: fp32 choice": lambda: recycle(1, "first", dtype=torch.float32),
    "adore: release": lambda: release(8),
    "adore: release 8000 slots": lambda: release(1, 8000),
    "gate: fp32 stream": lambda: gate(2048),
    "gate: bf16 stream": lambda: gate(2048, torch.bfloat16),
    "gate: fp32 stream of 768": lambda: gate(768),
    "gate: fp32 alone": lambda: gate(2048, gate_only=True),
}
