"""Fully sharded data parallelism (torch's FSDP2) with the precision that the models ask for.

`fully_shard` casts all parameters of a group to one dtype, and the inputs of every group with them. In 16 bits that
would round the few parameters that are kept in float32 (decays, gates), and the residual stream at every block. Here
such parameters have groups of their own, and inputs stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

if torch.distributed.is_available():  # some builds of torch are without
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    offload_policy: OffloadPolicy | None = None,
) -> nn.Module:
    """Shard a model of the zoo in place: each block, then what is left. Its parameters become DTensors.

    Call it on every process of an initialised process group, before the optimizer is made, and after gradient
    checkpointing was turned on. `save_pretrained` of a sharded model, called on every process, writes it whole; that of
    a model with an adapter needs `save_pretrained(folder, state_dict=whole_state(model))`.

    Args:
        model: with parameters in one dtype: that of the optimizer's weights and states, float32 as a rule.
        mesh: devices to shard over, 1-D; 2-D replicates over the first axis. None: all processes.
        dtype: compute in it, torch.bfloat16 as a rule; gradients are summed in float32. None: in that of the weights.
        reshard_after_forward: free a block's weights after its forward pass and gather them again for the backward
            pass, which saves memory and costs a third more communication.
        offload_policy: `CPUOffloadPolicy()` keeps the shards in the memory of the CPU.

    Raises:
        ValueError: no process group, a model that is sharded already or names no blocks, or parameters of several
            dtypes.
    """
    if mesh is None and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError(
            "shard_model needs a process group: start the script with torchrun or `accelerate launch` and call "
            "torch.distributed.init_process_group() first, or pass mesh=."
        )
    if isinstance(model, FSDPModule):
        raise ValueError("This model is sharded already. Call shard_model once, on a model that is whole.")
    kept = _kept(model)
    frozen = {p for p in kept if not p.requires_grad}  # small and never changed: every process has them whole
    dtypes = {p.dtype for p in model.parameters() if p not in frozen}
    if len(dtypes) > 1:
        raise ValueError(
            f"FSDP2 needs parameters of one dtype; got {sorted(map(str, dtypes))}. Load the model with "
            "dtype=torch.float32 and pass shard_model(model, dtype=torch.bfloat16) to compute in bfloat16."
        )
    names = getattr(model, "_no_split_modules", None) or []
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(f"{type(model).__name__} holds no block of the kinds {sorted(names)} to shard.")
    whole: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard_after_forward, "ignored_params": frozen}
    if offload_policy is not None:
        whole["offload_policy"] = offload_policy
    low = MixedPrecisionPolicy() if dtype is None else mixed_precision(dtype)
    for block in blocks:
        own = [list(module.parameters(recurse=False)) for module in block.modules()]
        exact = [m for m, ps in zip(block.modules(), own, strict=True) if any(p in kept for p in ps)]
        if dtype is not None and exact:
            rest = [m for m, ps in zip(block.modules(), own, strict=True) if ps and m not in exact]
            fully_shard(rest, mp_policy=low, **whole)
            for module in exact:
                fully_shard(module, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **whole)
        fully_shard(block, mp_policy=low, **whole)
    fully_shard(model, mp_policy=low, **whole)
    return model


def mixed_precision(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Weights in `dtype`, sums of gradients in float32, inputs as they are: the residual stream stays in float32."""
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _kept(model):
    """Parameters that the model keeps in float32 whatever its dtype is."""
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or [])
    return {parameter for name, parameter in model.named_parameters() if names & set(name.split("."))}


def is_sharded(model: Any) -> bool:
    """Whether `shard_model` or `fully_shard` was applied to the whole model, by other hands than transformers'."""
    if not torch.distributed.is_available() or getattr(model.config, "distributed_config", None) is not None:
        return False
    return isinstance(model, FSDPModule)


def whole_state(model: nn.Module) -> dict[str, Any]:
    """The state_dict of a sharded model on the CPU of the first process, nothing on the others. All have to call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
