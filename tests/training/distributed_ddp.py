"""Data parallel training with accelerate and with transformers' Trainer, on the processes of a torchrun."""

import torch
from accelerate import Accelerator
from distributed_steps import (
    EPS,
    RATE,
    ROWS,
    STEPS,
    adamw,
    alone,
    batch,
    finish,
    gradients,
    share_of_noise,
    start,
    steps,
    weights,
)
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from zoo import ZOO

from scrubjay.modeling import selective_layer as selective


def with_accelerate(entry, rank, processes, folder):
    """Steps, and the third of them once more from a saved state."""
    accelerator = Accelerator(cpu=True)
    model = entry.build().train()
    model, optimizer = accelerator.prepare(model, adamw(model))
    how = {"rank": rank, "processes": processes, "backward": accelerator.backward}
    steps(model, optimizer, 0, STEPS - 1, **how)
    accelerator.save_state(folder)
    steps(model, optimizer, STEPS - 1, STEPS, **how)
    found = {"type": str(accelerator.distributed_type), "processes": accelerator.num_processes}
    found |= {"wrapped": type(model).__name__, "weights": weights(model), "gradients": gradients(model)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer.state.clear()
    accelerator.load_state(folder)
    steps(model, optimizer, STEPS - 1, STEPS, **how)
    return found | {"resumed": weights(model)}


class Seeds(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(state.global_step)


class InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def with_trainer(entry, rank, processes, folder):
    """The same steps by transformers' Trainer."""
    rows = torch.cat([batch(step) for step in range(STEPS)])
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=ROWS // processes, max_steps=STEPS, learning_rate=RATE,
        lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, save_strategy="no", report_to="none",
        disable_tqdm=True, adam_epsilon=EPS, logging_strategy="no",
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = InOrder(model=entry.build(), args=args, train_dataset=data, callbacks=[Seeds()])
    with share_of_noise(rank, processes):
        trainer.train()
    return {"processes": args.world_size, "wrapped": type(trainer.model_wrapped).__name__} | {
        "weights": weights(trainer.model)
    }


def without_sync(entry, rank, processes):
    """What would be found if gradients were not summed."""
    model = nn.parallel.DistributedDataParallel(entry.build().train())
    with model.no_sync():
        steps(model, adamw(model), rank=rank, processes=processes)
    return weights(model)


def nothing_selected(entry, rank, processes, **changes):
    """Gradients when no token of this process's rows, and some of the others', are selected."""
    model = nn.parallel.DistributedDataParallel(entry.build(**changes).train())
    chosen = selective.select
    if rank == 1:
        selective.select = lambda delta, *rest: torch.zeros_like(chosen(delta, *rest))
    try:
        steps(model, adamw(model), rank=rank, processes=processes)
    finally:
        selective.select = chosen
    return {"gradients": gradients(model), "weights": weights(model)}


def main():
    rank, processes, out = start()
    found = {}
    for entry in ZOO:
        found[entry.name] = {"alone": alone(entry)}
        found[entry.name]["accelerate"] = with_accelerate(entry, rank, processes, out / f"{entry.name}_state")
        found[entry.name]["trainer"] = with_trainer(entry, rank, processes, out / f"{entry.name}_trainer")
    by_name = {entry.name: entry for entry in ZOO}
    found["unsynced"] = without_sync(by_name["ssd"], rank, processes)
    found["unselected"] = {
        (scope, attention): nothing_selected(
            by_name["taipan"], rank, processes, kv_scope=scope, train_attention=attention
        )
        for scope in ("all", "selected")
        for attention in ("compact", "dense")
    }
    finish(found, rank, out)


if __name__ == "__main__":
    main()
