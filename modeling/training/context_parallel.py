"""Context parallelism: one long sequence over the ranks of a process group, for the models whose memory is a state.

Each rank has a contiguous slice of the columns. A block needs some things of what lies before its slice, and gets them
from the ranks that have it, once a layer:
    convolution    the K - 1 inputs before the slice
    recurrence     the state S that enters it. Rank r changes a state as S' = exp(A_r) S + Z_r; all ranks gather (A, Z),
                   whose size does not depend on T, and each composes those before it
    window         the W - 1 keys and values before the slice, from as many ranks as they lie on
    attention      of a hybrid: all keys and values before the slice, which grow with T, from all ranks before it

        batch = shard_sequence(batch, group)     # of the whole batch, on every rank: this rank's part
        loss = model(**batch).loss               # that of the whole batch, the same number on every rank
        loss.backward()
        average_gradients(model, group)          # unless DDP or FSDP do so: the gradients of one process

Every rank calls forward and backward the same number of times, as for any collective. What is drawn at random (dropout,
Taipan's noise) comes from each rank's own generator: seed ranks apart.

B batch, T columns of the whole sequence, R ranks, S columns of the past.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from scrubjay.modeling.inputs.cache_argument import pop_cache
from scrubjay.modeling.inputs.columns import Marks, read_columns

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "max_length_q", "max_length_k")


@dataclass(frozen=True)
class SequenceShard:
    """Which columns of a sequence this rank has, and the way to what other ranks know.

    group: the process group (None: all processes). lengths: columns of each of its ranks, in order.
    """

    group: Any
    lengths: tuple[int, ...]

    @property
    def rank(self) -> int:
        """This process's place in the group: the sequence's slices lie in this order."""
        return dist.get_rank(self.group)

    @property
    def start(self) -> int:
        """Columns before this rank's."""
        return sum(self.lengths[: self.rank])

    def check(self, shape: torch.Size, layout, seen: int) -> None:
        """Refuse a call that is not this rank's slice of plain rows.

        Raises:
            ValueError: what came, what was needed, what to do.
        """
        if shape[1] != self.lengths[self.rank]:
            raise ValueError(
                f"Rank {self.rank} has {self.lengths[self.rank]} columns of the sequence ({self.lengths}); the input "
                f"has {shape[1]}. Pass what shard_sequence returned."
            )
        if layout.lengths is not None or layout.cu_seqlens is not None:
            what = "a padding mask" if layout.cu_seqlens is None else "packed documents"
            raise ValueError(f"A sequence over several ranks cannot have {what}: pass rows that are full.")
        if seen:
            raise ValueError(
                f"A sequence over several ranks starts from nothing; this cache holds {seen} columns. Pass none, and "
                "continue from the one that comes back."
            )

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x over the ranks, on each of them."""
        return _Sum.apply(x, self.group)

    def loss(self, loss_function, *, labels, shift_labels=None, num_items_in_batch=None, **kwargs) -> torch.Tensor:
        """The loss of all ranks' columns, on each of them; arguments are those of `loss_function`.

        Raises:
            ValueError: labels that are still to be shifted, which a slice of them cannot be.
        """
        if labels is not None or shift_labels is None:
            raise ValueError(
                "A slice of the labels cannot be shifted: its last column's next token is another rank's. Pass "
                "shift_labels, as shard_sequence returns them, and no labels."
            )
        if num_items_in_batch is None:
            num_items_in_batch = self.sum((shift_labels != -100).sum())
        part = loss_function(labels=None, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch, **kwargs)
        return self.sum(part)

    def entering(self, log_decay: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """The state that enters this rank's slice.

        Args:
            log_decay: (B, ...) A, what the slice decays a state by.
            change: (B, ..., more) Z, what it adds; each A decays all of its `more`.

        Returns: as `change`; zeros on the first rank.
        """
        return _Entering.apply(log_decay, change, self.group)

    def halo(self, x: torch.Tensor, steps: int) -> torch.Tensor:
        """(B, n, C) -> (B, steps, C): the columns of x before this rank's slice, zeros before the sequence."""
        (past,), _ = self.past(steps, [x])
        return F.pad(past, (0, 0, steps - past.shape[1], 0))

    def past(
        self, steps: int, tensors: Sequence[torch.Tensor], written: torch.Tensor | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The last `steps` columns before this rank's slice, from whichever ranks have them.

        Args:
            tensors: (B, n, ...) each, of one dtype.
            written: (R, B) on the CPU, how many first columns of each rank's rows count; None: all.

        Returns:
            (B, S, ...) for each tensor, S <= steps the most that a row has, and which are real, (B, S): the last ones.
        """
        batch, rank = len(tensors[0]), self.rank
        if written is None:
            written = torch.tensor(self.lengths)[:, None].expand(-1, batch)
        size = min(steps, int(written[:rank].sum(0).max())) if rank else 0
        give, take, sent, received = [], [], [], []
        for other in range(len(self.lengths)):
            rows, columns = _wanted(written, steps, rank, other)
            give.append(rows * tensors[0].shape[1] + columns + written[rank][rows])
            sent.append(len(rows))
            rows, columns = _wanted(written, steps, other, rank)
            nearer = written[other + 1 : rank].sum(0)
            take.append(rows * size + columns + size - nearer[rows])
            received.append(len(rows))
        device = tensors[0].device
        index, places = torch.cat(give).to(device), torch.cat(take).to(device)
        widths = [prod(x.shape[2:]) for x in tensors]
        mine = [
            x.flatten(0, 1).index_select(0, index).view(len(index), n) for x, n in zip(tensors, widths, strict=True)
        ]
        packed = _Exchange.apply(torch.cat(mine, 1), sent, received, self.group)
        parts = packed.new_zeros(batch * size, sum(widths)).index_copy(0, places, packed).split(widths, 1)
        real = torch.arange(size) >= size - written[:rank].sum(0)[:, None]
        return [p.view(batch, size, *x.shape[2:]) for p, x in zip(parts, tensors, strict=True)], real.to(device)

    def gather(self, counts: torch.Tensor) -> torch.Tensor:
        """(B,) integers of each rank -> (R, B), on the CPU."""
        return _gather(counts, self.group).cpu()

    def broadcast(self, cache) -> None:
        """Give every rank the last rank's cache, that of the whole sequence: any of them can then decode.

        Raises:
            ValueError: no cache, which is what a forward pass in training mode or without use_cache gives.
        """
        if cache is None:
            raise ValueError("broadcast needs a cache, got None: call model.eval()(**batch, use_cache=True) for one.")
        group: Any = dist.group.WORLD if self.group is None else self.group
        last = dist.get_global_rank(group, len(self.lengths) - 1)
        for layer in cache.layers:
            whole = {}
            for name, tensor in layer.tensors().items():
                shape, axis = list(tensor.shape), layer.grows.get(name)
                if axis is not None:  # an earlier rank's has its own columns and those before them
                    shape[axis] = sum(self.lengths)
                if shape == list(tensor.shape):
                    whole[name] = tensor.clone(memory_format=torch.contiguous_format)
                else:
                    whole[name] = tensor.new_empty(shape)
                dist.broadcast(whole[name], last, self.group)
            layer.fill(whole, sum(self.lengths))


def shard_sequence(batch: dict, group: Any = None) -> dict:
    """This rank's part of a batch that every rank of the group has whole.

    Args:
        batch: input_ids (B, T) or inputs_embeds (B, T, D), and labels (B, T), which are shifted here, or shift_labels,
            which are not. What else it holds is handed on.
        group: process group of torch.distributed (of a DeviceMesh: `mesh["name"].get_group()`); None: all processes.

    Returns: a batch to call a recurrent model of the zoo with. Rank r has columns r T / R to (r + 1) T / R; `shard`
        tells the model so.

    Raises:
        ValueError: no rows of tokens, padding, packed documents, a filled cache, fewer columns than ranks, a tensor of
            another length.
        RuntimeError: without an initialised process group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("shard_sequence needs a process group: call torch.distributed.init_process_group first.")
    if dist.get_rank(group) < 0:
        raise ValueError("This process is not in the group that the sequence is to be sharded over.")
    batch, ranks = dict(batch), dist.get_world_size(group)
    x = batch.get("input_ids") if batch.get("inputs_embeds") is None else batch["inputs_embeds"]
    if x is None or x.ndim < 2:
        got = f"got {sorted(batch)}" if x is None else f"got shape {tuple(x.shape)}"
        raise ValueError(f"shard_sequence needs input_ids (B, T) or inputs_embeds (B, T, D); {got}.")
    length = x.shape[1]
    if length < ranks:
        raise ValueError(f"A sequence of {length} columns cannot be split over {ranks} ranks: each needs one at least.")
    _check_plain(batch, x)
    labels = batch.pop("labels", None)
    if labels is not None and batch.get("shift_labels") is None:
        batch["shift_labels"] = F.pad(labels, (0, 1), value=-100)[..., 1:]
    cuts = [r * length // ranks for r in range(ranks + 1)]
    shard = SequenceShard(group, tuple(b - a for a, b in pairwise(cuts)))
    for name in ("input_ids", "inputs_embeds", "shift_labels"):
        value = batch.get(name)
        if value is not None and value.shape[1] != length:
            raise ValueError(f"{name} must have {length} columns as the input has; got shape {tuple(value.shape)}.")
        if value is not None:
            batch[name] = value[:, shard.start : shard.start + shard.lengths[shard.rank]].contiguous()
    return batch | {"shard": shard}


@torch.no_grad()
def average_gradients(model: nn.Module, group: Any = None) -> None:
    """Replace each parameter's gradient by its mean over the group's ranks: the gradient that one process would have.

    DDP and FSDP do so themselves. Over more ranks than the sequence's, groups that have other texts among them, they
    give the mean over the texts, as without context parallelism.
    """
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad /= dist.get_world_size(group)


def _check_plain(batch, x):
    """Refuse padding, packed documents and caches, and take out what says that there are none."""
    mask, positions, length = batch.pop("attention_mask", None), batch.pop("position_ids", None), x.shape[1]
    if positions is not None and positions.shape[-1:] != (length,):
        got = tuple(positions.shape)
        raise ValueError(f"position_ids must have {length} columns as the input has; got shape {got}.")
    marks = [name for name in PACKED if batch.get(name) is not None]
    positions = None if positions is None else positions.view(-1, length)
    said = Marks.of({"attention_mask": mask, "position_ids": positions})
    columns = read_columns(x.shape[:2], x.device, said)
    if columns.real is not None:
        raise ValueError(
            "shard_sequence cannot split a padded batch. Pass rows that are full: cut them to one length, or put "
            "padding after the text and -100 into its labels, without an attention_mask."
        )
    marks += [f"{name} that {'restart' if name == 'position_ids' else 'numbers them'}" for name in columns.marks]
    if marks:
        raise ValueError(f"shard_sequence cannot split packed documents ({', '.join(marks)}): pass one a row.")
    if pop_cache(batch) is not None:
        raise ValueError("shard_sequence cannot continue a cache: pass the whole text without one.")


def _wanted(written, steps, holder, reader):
    """What `reader` wants of `holder`: rows (n,), and columns (n,) counted from the end of what the holder has, < 0."""
    if holder >= reader:
        return torch.empty(2, 0, dtype=torch.int64).unbind()
    nearer = written[holder + 1 : reader].sum(0)
    counts = (steps - nearer).clamp(min=0).minimum(written[holder])
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    columns = torch.arange(len(rows)) - torch.repeat_interleave(counts.cumsum(0), counts)
    return rows, columns


def _gather(x, group):
    """(B, ...) of each rank -> (R, B, ...)."""
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(out), x.contiguous(), group=group)
    return out


class _Sum(torch.autograd.Function):
    """The sum over ranks. As every rank has it, its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, dx):
        return _Sum.apply(dx, ctx.group), None


class _Exchange(torch.autograd.Function):
    """Rows of x (n, C), the first sent[0] for rank 0 and so on -> rows (m, C), the first received[0] from rank 0."""

    @staticmethod
    def forward(ctx, x, sent, received, group):
        ctx.splits = sent, received, group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, dout):
        sent, received, group = ctx.splits
        return _Exchange.apply(dout, received, sent, group), None, None, None


class _Entering(torch.autograd.Function):
    """S_r = Z_(r-1) + exp(A_(r-1)) S_(r-1), S_0 = 0, on rank r.

    Its gradient runs the other way, and gathers no more: with G_r that of S_r, what rank r's change is owed is
    D_r = G_(r+1) + exp(A_(r+1)) D_(r+1).
    """

    @staticmethod
    def forward(ctx, log_decay, change, group):
        rank, lead = dist.get_rank(group), log_decay.ndim
        packed = torch.cat([log_decay[..., None], change.flatten(lead)], -1)
        decays, changes = _gather(packed, group).split([1, packed.shape[-1] - 1], -1)
        decays, state = decays.exp(), torch.zeros_like(packed[..., 1:])
        for decay, new in zip(decays[:rank], changes[:rank], strict=True):
            state = torch.addcmul(new, state, decay)
        ctx.group, ctx.rank = group, rank
        ctx.save_for_backward(decays, state)
        return state.view_as(change)

    @staticmethod
    @once_differentiable
    def backward(ctx, dstate):
        decays, state = ctx.saved_tensors
        rank, owed = ctx.rank, torch.zeros_like(state)
        gradients = _gather(dstate.reshape(state.shape), ctx.group)
        for later in range(len(decays) - 1, rank, -1):
            owed = torch.addcmul(gradients[later], owed, decays[later])
        return (owed * state).sum(-1) * decays[rank][..., 0], owed.view_as(dstate), None
