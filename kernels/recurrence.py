"""What linear recurrences share: cutting a sequence into packed documents and those into chunks, and carrying a state.

`cu_seqlens` (D + 1,) int: document d of a single row is the slice [cu_seqlens[d], cu_seqlens[d + 1]); it may be empty.
Without it every batch row is one document and states have one row per batch row; with it, one per document.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from scrubjay.kernels.dispatch import exported, traced, without_autocast

LOG2_E = 1 / math.log(2)  # exp(x) = exp2(x LOG2_E)
# From here down a log-decay forgets everything: its exp is 0 in that dtype. Whole numbers, which 16 bits hold too.
FORGETS = {torch.float32: -112.0, torch.float64: -760.0}
NOTHING = {torch.float32: -60, torch.float64: -900}  # log2 of what a decay must exceed to count
BLOCK = 2**21  # numbers in the states of a block: they stay in the processor's cache, and calls cost little beside them
OUTER_BLOCK = 2048  # steps that `OuterSum` takes at a time, which bounds its temporaries
_read = WeakIdKeyDictionary()  # offsets that were read, by the tensor that holds them: (its version, the numbers)


def documents(cu_seqlens: torch.Tensor | None, batch: int, length: int) -> list[tuple[slice, int, int]]:
    """The documents of a (batch, length) call as (state rows, start, stop): all rows at once, or one after the other.

    Raises:
        ValueError: offsets that do not cover exactly one row of `length` steps.
    """
    if cu_seqlens is None:
        return [(slice(0, batch), 0, length)]
    if exported():
        raise ValueError(
            "torch.export cannot write down packed documents: where they end is a value of cu_seqlens. Export a call "
            "of one document a row."
        )
    offsets = _numbers(cu_seqlens)
    if batch != 1:
        raise ValueError(f"cu_seqlens describes documents packed into one row; got a batch of {batch} rows.")
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != length or sorted(offsets) != offsets:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the sequence length {length}; got {offsets[:8]}"
            f"{', ...' if len(offsets) > 8 else ''} (last {offsets[-1] if offsets else None})."
        )
    return [(slice(d, d + 1), offsets[d], offsets[d + 1]) for d in range(len(offsets) - 1)]


def _numbers(cu_seqlens: torch.Tensor) -> list[int]:
    """`cu_seqlens.tolist()`, of a GPU's tensor once for all layers of a model: reading it waits for all that it has to
    do. A CPU's may share its memory with an array that others write, of which its version does not tell."""
    if cu_seqlens.device.type == "cpu" or cu_seqlens.is_inference():  # that has no version
        return cu_seqlens.tolist()
    version, numbers = _read.get(cu_seqlens, (None, []))
    if version != cu_seqlens._version:
        numbers = cu_seqlens.tolist()
        _read[cu_seqlens] = (cu_seqlens._version, numbers)
    return numbers


def num_states(cu_seqlens: torch.Tensor | None, batch: int, length: int) -> int:
    """Rows that an initial or final state has: one a batch row, or one a document."""
    if cu_seqlens is None:
        return batch
    if exported() or not traced():  # the operators that torch.compile calls look at values
        documents(cu_seqlens, batch, length)  # refuses offsets that name no documents
    return cu_seqlens.numel() - 1


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward pass may come: a single step then takes the chunked form too, whose backward is exact."""
    if not torch.is_grad_enabled() or exported():
        return False
    return any(x is not None and x.requires_grad for x in tensors)


def chunks(start: int, stop: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` steps that cover [start, stop)."""
    for t in range(start, stop, size):
        yield slice(t, min(t + size, stop))


def initial_or_zeros(
    state: torch.Tensor | None, shape: tuple[int, ...], like: torch.Tensor, op: str, *, read: bool = False
) -> torch.Tensor:
    """`state`, or zeros, in the state's dtype: float32, or float64 where `like` is.

    Args:
        read: whether it will not be written to: zeros are then one number, which a backward pass keeps at no cost.

    Raises:
        ValueError: a state of another shape.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    if state is None and read and not traced():
        return torch.zeros((), dtype=dtype, device=like.device).expand(shape)
    if state is None:
        return torch.zeros(shape, dtype=dtype, device=like.device)
    if tuple(state.shape) != shape:
        raise ValueError(f"{op}: initial_state must have shape {shape}; got {tuple(state.shape)}.")
    return state.to(dtype)


def decayed(state: torch.Tensor, factor: torch.Tensor, overwrite: bool) -> torch.Tensor:
    """state * factor for one step outside autograd: in the state's memory where it may be overwritten, else in new."""
    return state.mul_(factor) if overwrite and not locked(state) else state * factor


def locked(state: torch.Tensor | None) -> bool:
    """Whether a state's memory may not be written: autograd's leaf, made in inference mode and used outside, or the
    input of a program, of which a compiler does not see where it was made."""
    return (
        state is None
        or traced()
        or state.requires_grad
        or (state.is_inference() and not torch.is_inference_mode_enabled())
    )


def by_steps(step, state, cu_seqlens, *sequences):
    """The law of a recurrence: `step(*inputs, state) -> (y, state)` for each step of (B, T, ...) sequences in turn."""
    ys, states = [], []
    for rows, start, stop in documents(cu_seqlens, *sequences[0].shape[:2]):
        s = state[rows]
        for t in range(start, stop):
            y, s = step(*(x[:, t] for x in sequences), s)
            ys.append(y)
        states.append(s)
    return torch.stack(ys, 1), torch.cat(states)


def reuse(memory: dict, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, name: str = ""):
    """A tensor that the blocks of one call write in turn. Fresh pages cost more time than the arithmetic on them.

    None where torch is to make one: in an exported program an `out` would stand in the way of autograd.
    """
    if exported():
        return None
    if (name, shape, dtype) not in memory:
        memory[name, shape, dtype] = torch.empty(shape, dtype=dtype, device=device)
    return memory[name, shape, dtype]


def decay(log2: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """exp2 of sums of log-decays; 0 below `NOTHING`.

    What is smaller changes no sum that it is part of. But its products with other small numbers are subnormal, with
    which some processors take a hundred times as long.
    """
    least = NOTHING[dtype]
    return F.threshold(log2.to(dtype, copy=True).clamp_(min=least).exp2_(), 2.0**least, 0.0, inplace=True)


def crossing(pairs: torch.Tensor, dim: int, memory: dict) -> torch.Tensor:
    """sum of pairs[i, j] over i >= t > j, those that a_t decays: axes i = `dim` and j = `dim` + 1 become the axis t.

    A pair decayed by a_1 .. a_i less one decayed by a_1 .. a_j: large numbers cancel exactly, for both sums are taken
    over the same pairs, in float64.
    """
    wide = reuse(memory, tuple(pairs.shape), torch.float64, pairs.device).copy_(pairs)
    difference = wide.sum(dim + 1) - wide.sum(dim)
    return difference.flip(dim).cumsum(dim).flip(dim).to(pairs.dtype)


@without_autocast
def chunked(piece, size, state, cu_seqlens, q, k, v, a, *more):
    """y and the final state of a linear recurrence over (B, T, ...) sequences; `piece`: see `ChunkedRecurrence`.

    A log-decay that forgets everything counts as `FORGETS`. No result changes, for each factor that it is part of is 0
    as before; but a difference of sums then is a number, beside -inf, and loses nothing of weak decays, as beside 1e14.
    Such a decay has no gradient, not even a rounding error, which what it is made of might multiply by 1e30.
    """
    sequences = q, k, v, a.clamp(min=FORGETS[state.dtype]), *more
    if exported():
        return _at_once(piece, size, state, *sequences)
    if traced():
        return piece.operator([state, cu_seqlens, *sequences], [size])
    if wants_gradient(state, *sequences):
        return ChunkedRecurrence.apply(piece, size, state, cu_seqlens, *sequences)
    return _in_blocks(piece, size, state, cu_seqlens, *sequences)


def _in_blocks(piece, size, state, cu_seqlens, *sequences):
    """`chunked`, one block of chunks after the other."""
    memory: dict = {}
    state = state.clone(memory_format=torch.contiguous_format)
    y = torch.empty_like(sequences[2], memory_format=torch.contiguous_format)
    for rows, start, stop in documents(cu_seqlens, *y.shape[:2]):
        s = state[rows]
        for cut, C in _blocks(start, stop, size, s):
            part = piece(memory, *_rows(sequences, cut, C))
            states = _carried(part, s, reuse(memory, (C + 1, *s.shape), s.dtype, s.device, "states"))
            before, written = states[:-1].flatten(0, 1), _row(y, cut, C)
            if 1 in written.shape[:2]:
                part.outputs(before, written.flatten(0, 1))
            else:  # several rows of several chunks each are no one axis of y
                written.copy_(part.outputs(before).unflatten(0, (C, -1)))
            s.copy_(states[-1])
    return y, state


def _blocks(start, stop, size, state):
    """Blocks that cover [start, stop), as (slice, number of chunks in it): of as many whole chunks as fit, then what is
    left as one short chunk."""
    most = max(1, BLOCK // max(1, state.numel()))
    while start < stop:
        count = min(most, (stop - start) // size)
        end = start + count * size if count else stop
        yield slice(start, end), max(1, count)
        start = end


def _rows(sequences, cut, count):
    """That slice of (B, T, ...) sequences, its chunks as rows of a batch: (C B, Q, ...)."""
    return [_row(x, cut, count).flatten(0, 1) for x in sequences]


def _row(x, cut, count):
    """That slice of a (B, T, ...) sequence as a view of its chunks: (C, B, Q, ...)."""
    return x[:, cut].unflatten(1, (count, -1)).transpose(0, 1)


def _carried(part, state, states):
    """`states` (C + 1, B, ...), filled with the state before each chunk and after the last."""
    states[0] = state
    part.added(states[1:].flatten(0, 1))
    kept = part.kept().unflatten(0, (len(states) - 1, -1))
    for c in range(len(kept)):
        states[c + 1].addcmul_(states[c], kept[c])
    return states


def _returned(part, dy, dstate, dstates):
    """`dstates` (C + 1, B, ...), filled with the gradients of the states of `_carried`, from that of the last."""
    dstates[-1] = dstate
    part.returned(dy, dstates[:-1].flatten(0, 1))
    kept = part.kept().unflatten(0, (len(dstates) - 1, -1))
    for c in reversed(range(len(kept))):
        dstates[c].addcmul_(dstates[c + 1], kept[c])
    return dstates


def _at_once(piece, size, state, *sequences):
    """`chunked` without a loop, for any number of chunks C: each is a row of a batch, and the state that enters one is
    a decayed sum over what the earlier ones added, one product of a (C, C) matrix for each decay. The last chunk is
    empty: what enters it is the final state, and torch.export need not ask whether C is 1."""
    (B, T), inner = sequences[0].shape[:2], state.shape[1:]
    C = (T + size - 1) // size + 1
    # steps after the end add nothing and forget nothing
    padded = (F.pad(x, (0, 0) * (x.ndim - 2) + (0, C * size - T)) for x in sequences)
    part = piece({}, *(_shaped(x, B * C, size, *x.shape[2:]) for x in padded))
    added = part.added()
    total = _shaped(part.total(), B, C, -1).transpose(1, 2)  # (B, decays, C)
    sums = total.cumsum(2) - total  # before each chunk
    weights = (sums[..., :, None] - sums[..., None, :]).to(state.dtype).clamp(max=0).exp2().tril()
    added = _first(torch.cat([state[:, None], _shaped(added, B, C, *inner)], 1), C)
    states = part.summed(weights, added)
    y = part.outputs(_shaped(states, B * C, *inner)).to(sequences[2].dtype)
    return _first(_shaped(y, B, C * size, *y.shape[2:]), T), states[:, -1]


def _shaped(x, *shape):
    """x.reshape(shape) by way of one axis: torch.export would ask of axes that are merged or cut whether one is 1."""
    return x.reshape(-1).reshape(shape)


def _first(x, count):
    """x[:, :count], a copy: torch.export would ask whether that is all of x."""
    return x.index_select(1, torch.arange(count, device=x.device))


class ChunkedRecurrence(torch.autograd.Function):
    """y and the final state of a linear recurrence, one block of chunks after the other.

    `piece(memory, q, k, v, ...)`, sequences (R, Q, ...), solves R = C B chunks at a time as products, chunks outside.
    `added(out)` is what each adds to the state before it, of which it leaves `kept()`, a factor. `outputs(s, out)` are
    its y, shaped as v, from the states (R, ...) before each. `returned(dy, out)` is what its outputs add to the
    gradient of the state before it. `gradients(dy, s, ds)` are those of the sequences, from the states before and the
    gradients of the states after each. `total()` is log2 of what a chunk leaves, (R, decays) in float64;
    `summed(weights, states)` sums states (B, C, ...) with weights (B, decays, C, C). What goes from chunk to chunk is a
    short loop. The working set is one block; the backward pass recomputes it, so that nothing of size T x Q is kept.
    `memory` is a dict for `reuse`.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, piece, size, state, cu_seqlens, *sequences):
        ctx.save_for_backward(state, cu_seqlens, *sequences)
        ctx.piece, ctx.size = piece, size
        return _in_blocks(piece, size, state, cu_seqlens, *sequences)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy, dstate):
        state, cu_seqlens, *sequences = ctx.saved_tensors
        memory: dict = {}
        dstate = dstate.clone(memory_format=torch.contiguous_format)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in sequences]
        for rows, start, stop in documents(cu_seqlens, *dy.shape[:2]):
            s, ds, entered = state[rows], dstate[rows], []
            blocks = list(_blocks(start, stop, ctx.size, s))
            for cut, C in blocks:
                part = ctx.piece(memory, *_rows(sequences, cut, C))
                entered.append(_carried(part, s, s.new_empty(C + 1, *s.shape)))
                s = entered[-1][-1]
            for cut, C in reversed(blocks):
                part, states = ctx.piece(memory, *_rows(sequences, cut, C)), entered.pop()
                (given,) = _rows([dy], cut, C)
                dstates = _returned(part, given, ds, reuse(memory, tuple(states.shape), ds.dtype, ds.device, "dstates"))
                new = part.gradients(given, states[:-1].flatten(0, 1), dstates[1:].flatten(0, 1))
                for whole, x in zip(grads, new, strict=True):
                    _row(whole, cut, C).copy_(x.unflatten(0, (C, -1)))
                ds.copy_(dstates[0])
        return None, None, dstate, None, *grads


def decay_to_end(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-decays (B, T, C) -> their sum over all steps, (B, C), and at each step over the later ones, (B, T, C).

    Summed from the end in float64, not as differences: a decay of minus infinity stays one. Results are float32, or
    float64 where `a` is.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    sums = a.double().flip(1).cumsum(1).flip(1)
    return sums[:, 0].to(wide), F.pad(sums[:, 1:], (0, 0, 0, 1)).to(wide)


class OuterSum(torch.autograd.Function):
    """sum_j w_jh k_jg v_jh^T, head h of group g: k (B, T, G, N), v (B, T, H, P), w (B, T, H) or None -> (B, H, N, P).

    In float32, or float64 where v is. Keeps its inputs alone; nothing wide of size T outlives a block.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, k, v, w=None):
        ctx.save_for_backward(k, v, w)
        wide = torch.promote_types(v.dtype, torch.float32)
        (B, T, H, P), (G, N) = v.shape, k.shape[2:]
        total = torch.zeros(B, G, N, H // G * P, dtype=wide, device=v.device)
        for c in chunks(0, T, OUTER_BLOCK):
            total += torch.matmul(k[:, c].permute(0, 2, 3, 1).to(wide), _by_group(_weighted(v, w, c, wide), G))
        return total.view(B, G, N, H // G, P).transpose(2, 3).reshape(B, H, N, P)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dtotal):
        k, v, w = ctx.saved_tensors
        (B, T, H, P), (G, N), wide = v.shape, k.shape[2:], dtotal.dtype
        dtotal = dtotal.view(B, G, H // G, N, P).transpose(2, 3).reshape(B, G, N, H // G * P)
        dk, dv, dw = torch.empty_like(k), torch.empty_like(v), None if w is None else torch.empty_like(w)
        for c in chunks(0, T, OUTER_BLOCK):
            returned = torch.matmul(k[:, c].transpose(1, 2).to(wide), dtotal)  # (B, G, Q, R * P): of w v
            returned = returned.transpose(1, 2).reshape(B, returned.shape[2], H, P)
            dk[:, c] = torch.matmul(_by_group(_weighted(v, w, c, wide), G), dtotal.mT).transpose(1, 2)
            if dw is not None:
                dw[:, c] = (v[:, c] * returned).sum(-1)
                returned *= w[:, c, :, None]
            dv[:, c] = returned
        return dk, dv, dw


def _weighted(v, w, c, wide):
    return v[:, c].to(wide) if w is None else v[:, c] * w[:, c, :, None].to(wide)


def _by_group(v, groups):
    """(B, Q, H, P) -> (B, G, Q, R * P)."""
    B, Q, H, P = v.shape
    return v.reshape(B, Q, groups, H // groups * P).transpose(1, 2)
