"""What the scripts that run on several processes share: the same few training steps, whole or a share of each batch."""

import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from zoo import VOCAB, tokens, trainable

from scrubjay.modeling import selective_layer as selective

ROWS, LENGTH, STEPS, RATE, EPS = 4, 24, 3, 1e-3, 1e-5
EVEN = VOCAB + 1  # a vocabulary that two devices can halve


def start() -> tuple[int, int, Path]:
    """Join the process group, which gives up on who does not answer. Returns rank, processes and the folder."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    return dist.get_rank(), dist.get_world_size(), Path(sys.argv[1])


def finish(found: dict, rank: int, out: Path) -> None:
    """Leave what was found for the tests."""
    torch.save(found, out / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def batch(step: int) -> torch.Tensor:
    """(ROWS, LENGTH) ids of a step."""
    return tokens(ROWS, LENGTH, seed=10 + step)


@contextmanager
def share_of_noise(rank: int, processes: int):
    """In it Taipan's gate draws for the whole batch and keeps the rows of this process: as one process draws."""
    drawn = selective.gumbel_difference

    def draw(like):
        rows = len(like)
        whole = drawn(like.new_empty(processes * rows, *like.shape[1:]))
        return whole[rank * rows : (rank + 1) * rows]

    selective.gumbel_difference = draw
    try:
        yield
    finally:
        selective.gumbel_difference = drawn


@contextmanager
def same_choices(made: list[torch.Tensor]):
    """In it Taipan's gate chooses as it did before, by `made`, which is filled where it is empty.

    A score that two precisions round to either side of the threshold selects a token in one and not in the other: a
    difference of the whole token, and of all after it.
    """
    chosen, again = selective.select, iter(list(made))

    def choose(*args):
        if (before := next(again, None)) is None:
            made.append(before := chosen(*args))
        return before

    selective.select = choose
    try:
        yield
    finally:
        selective.select = chosen


def adamw(model) -> torch.optim.Optimizer:
    """With an eps above the rounding of gradients: near zero their signs, which AdamW follows, are rounding's own."""
    return torch.optim.AdamW(trainable(model), lr=RATE, weight_decay=0.0, eps=EPS)


def steps(model, optimizer, first=0, last=STEPS, rank=0, processes=1, backward=torch.Tensor.backward) -> None:
    """Training steps on this process's rows of each batch. The last step's gradients stay."""
    with share_of_noise(rank, processes):
        for step in range(first, last):
            torch.manual_seed(step)
            rows = batch(step).chunk(processes)[rank]
            optimizer.zero_grad()
            backward(model(input_ids=rows, labels=rows, use_cache=False).loss)
            optimizer.step()


def whole(x: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, which other processes may hold parts of."""
    x = x.full_tensor() if isinstance(x, DTensor) else x
    return x.detach().clone()


def weights(model) -> dict[str, torch.Tensor]:
    """Every parameter, whole."""
    return {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}


def gradients(model) -> dict[str, torch.Tensor]:
    """Every gradient, whole."""
    return {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def spread(model) -> dict[str, float]:
    """Of each parameter that is a DTensor, the share of it that this process holds."""
    pairs = ((name, p) for name, p in model.named_parameters() if isinstance(p, DTensor))
    return {name: p.to_local().numel() / p.numel() for name, p in pairs}


def alone(entry, **changes) -> dict:
    """Weights before and after the steps in one process, and the last gradients."""
    model = entry.build(**changes).train()
    before = weights(model)
    steps(model, adamw(model))
    return {"before": before, "weights": weights(model), "gradients": gradients(model)}
