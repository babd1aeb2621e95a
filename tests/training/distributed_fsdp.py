"""Fully sharded training (FSDP2), checkpoints and generation, on the processes of a torchrun."""

from types import SimpleNamespace

import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from accelerate_files import ACCELERATE, plugin_of
from distributed_steps import (
    STEPS,
    adamw,
    alone,
    batch,
    finish,
    gradients,
    same_choices,
    spread,
    start,
    steps,
    weights,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from zoo import ZOO, tokens

from scrubjay.examples.pretrain import keep_precision
from scrubjay.modeling.training.sharding import shard_model

NEW = 12
# cache settings under which keys are released, read in part, or rebuilt within a test's few tokens
TIGHT = {"adore": dict(cache_size=12, label_k=8, rebuild=2), "recycled": dict(budget=8, stride=3)}
PADDED = dict(pad_token_id=3)  # Rodimus has a row of zeros for it


def trained(entry, rank, processes, before_sharding=lambda model: None, **how):
    """A model sharded and trained, and what it is afterwards."""
    model = entry.build().train()
    before_sharding(model)
    shard_model(model, **how)
    found = {"spread": spread(model), "plain": [n for n, p in model.named_parameters() if not isinstance(p, DTensor)]}
    steps(model, adamw(model), rank=rank, processes=processes)
    return model, found | {"weights": weights(model), "gradients": gradients(model)}


def wrapped(model):
    """torch's own way to checkpoint activations."""
    names = model._no_split_modules
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ in names)


def resumed(entry, rank, processes, folder):
    """The last step twice: at once, and from a checkpoint that is read into a model and optimizer of zeros."""
    model = shard_model(entry.build().train())
    optimizer = adamw(model)
    how = {"rank": rank, "processes": processes}
    steps(model, optimizer, 0, STEPS - 1, **how)
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=folder)
    steps(model, optimizer, STEPS - 1, STEPS, **how)
    found = {"weights": weights(model)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer = adamw(model)
    optimizer.zero_grad()  # torch makes no room for the optimizer's states where there are gradients
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    steps(model, optimizer, STEPS - 1, STEPS, **how)
    return found | {"resumed": weights(model)}


def by_accelerate(entry, rank, processes):
    """Weights after steps of a model that accelerate's FSDP2 has wrapped, with the settings of a file of examples/.

    accelerate takes that path on an accelerator only, so what it would make there is made by hand.
    """
    plugin = plugin_of(ACCELERATE / "64_gpus.yaml")
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(state=state, mixed_precision="bf16", is_main_process=rank == 0)
    accelerator.device = torch.device("cpu")
    keep_precision(accelerator)
    model = entry.build().train()
    model.gradient_checkpointing_enable()
    model = fsdp2_prepare_model(accelerator, model)
    found = {"spread": spread(model)}
    found["groups"] = sorted(name for name, module in model.named_modules() if isinstance(module, FSDPModule))
    seen = seen_dtypes(model)
    with torch.autocast("cpu", torch.bfloat16):
        steps(model, adamw(model), rank=rank, processes=processes)
    return found | {"weights": weights(model), "dtypes": dict(seen)}


def seen_dtypes(model):
    """What weights and inputs are in the forward pass: {name: dtype}, noted by hooks on `model`'s modules."""
    seen = {}

    def note(module, args, name):
        for own, parameter in module.named_parameters(recurse=False):
            seen[f"{name}.{own}"] = parameter.dtype
        if args and isinstance(args[0], torch.Tensor):
            seen[f"{name} <-"] = args[0].dtype

    for name, module in model.named_modules():
        if name.startswith("model.layers."):
            module.register_forward_pre_hook(lambda module, args, name=name: note(module, args, name))
    return seen


def in_bfloat16(entry, rank, processes):
    """Logits in float32, computed in bfloat16, and so with `fully_shard` alone; dtypes met; weights after steps."""
    ids, found, chosen = batch(0), {}, []
    with torch.no_grad(), same_choices(chosen):
        found["float32"] = entry.build()(ids, use_cache=False).logits
    model = shard_model(entry.build(), dtype=torch.bfloat16)
    seen = seen_dtypes(model)
    with torch.no_grad(), same_choices(chosen):
        found["bfloat16"] = model(ids, use_cache=False).logits
    found["dtypes"] = dict(seen)
    steps(model.train(), adamw(model), rank=rank, processes=processes)
    found |= {"weights": weights(model), "kept in": {p.dtype for p in model.parameters()}}
    plain, policy = entry.build(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in plain.model.layers:
        fully_shard(block, mp_policy=policy)
    fully_shard(plain, mp_policy=policy)
    with torch.no_grad(), same_choices(chosen):
        found["fully_shard alone"] = plain(ids, use_cache=False).logits
    return found


def generated(entry, **changes):
    """Greedy tokens of the sharded model, in single steps from its own cache, and of the whole one."""
    found = {}
    for name, model in (("alone", entry.build(**changes)), ("sharded", shard_model(entry.build(**changes)))):
        with torch.no_grad():
            found[name] = model.generate(
                tokens(2, 30), attention_mask=torch.ones(2, 30), max_new_tokens=NEW, do_sample=False, eos_token_id=None
            )
    return found


def from_nothing(entry, rank):
    """Parameters and buffers of a model made without memory, sharded, and then filled; the loss that it computes.

    Processes seed apart: on a CPU each draws its own part of a parameter, and parts drawn alike would be alike.
    """
    changes = PADDED if entry.name.startswith("rodimus") else {}
    with torch.device("meta"):
        model = entry.model(entry.config(**changes))
    torch.manual_seed(rank)
    shard_model(model).to_empty(device="cpu").init_weights()
    found = {"weights": weights(model), "buffers": dict(model.named_buffers()), "spread": spread(model)}
    found["tied"] = model.lm_head.weight is model.get_input_embeddings().weight
    torch.manual_seed(0)
    found["loss"] = model(batch(0), labels=batch(0)).loss.detach()
    return found


def refusals(by_name):
    """What `shard_model` says of what it does not take."""
    said = {}
    cases = {"mixed": by_name["ssd"].build(dtype=torch.bfloat16), "no blocks": torch.nn.Linear(2, 2)}
    cases["mixed"].model.layers[0].mixer.A_log.data = cases["mixed"].model.layers[0].mixer.A_log.data.float()
    for name, model in cases.items():
        try:
            shard_model(model)
        except ValueError as error:
            said[name] = str(error)
    return said


def main():
    rank, processes, out = start()
    found = {}
    replicas = init_device_mesh("cpu", (processes, 1), mesh_dim_names=("replicate", "shard"))
    for entry in ZOO:
        mine = found[entry.name] = {"alone": alone(entry), "processes": processes}
        model, mine["sharded"] = trained(entry, rank, processes)
        model.save_pretrained(out / f"{entry.name}_saved")
        mine["checkpointed"] = trained(entry, rank, processes, lambda model: model.gradient_checkpointing_enable())[1]
        mine["wrapped"] = trained(entry, rank, processes, wrapped)[1]
        mine["replicated"] = trained(entry, rank, processes, mesh=replicas)[1]
        mine["offloaded"] = trained(entry, rank, processes, offload_policy=CPUOffloadPolicy(pin_memory=False))[1]
        mine["dcp"] = resumed(entry, rank, processes, out / f"{entry.name}_dcp")
        mine["bfloat16"] = in_bfloat16(entry, rank, processes)
        mine["accelerate"] = by_accelerate(entry, rank, processes)
        mine["generated"] = generated(entry, **TIGHT.get(entry.name, {}))
        mine["from nothing"] = from_nothing(entry, rank)
    found["refused"] = refusals({entry.name: entry for entry in ZOO})
    finish(found, rank, out)


if __name__ == "__main__":
    main()
