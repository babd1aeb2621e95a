"""Fully sharded data parallelism (torch's FSDP2) with the precision that the models ask for.

`fully_shard` casts all parameters of a group to one dtype, and the inputs of every group with them. In 16 bits that
would round the few parameters that are kept in float32 (decays, gates), and the residual stream at every block, and
break what is packed in 4 bits. Here such parameters have groups of their own, and inputs stay as they are.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import nn

if torch.distributed.is_available():  # some builds of torch are without
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    offload_policy: OffloadPolicy | None = None,
) -> nn.Module:
    """Shard a model of the zoo in place: each block, then what is left. Its parameters become DTensors.

    Call it on every process of an initialised process group, before the optimizer is made, and after gradient
    checkpointing was turned on and adapters were added. `save_pretrained` of a sharded model, called on every process,
    writes it whole. Of a `PeftModel` the model inside is sharded; `save_adapter` writes the adapter.

    A model that no process can hold whole is made without memory, and filled when it is sharded:

        with torch.device("meta"):
            model = RodimusForCausalLM(config)
        shard_model(model).to_empty(device="cuda").init_weights()

    Seed all processes alike for it. ADORE's controller, which every process has whole, is to be loaded afterwards.

    Args:
        model: whose trained parameters are in one dtype: that of the optimizer's weights and states, float32 as a rule.
            Weights in 4 bits (bitsandbytes) are sharded as they are, and cannot be saved whole afterwards.
        mesh: devices to shard over, 1-D; 2-D replicates over the first axis. None: all processes.
        dtype: compute in it, torch.bfloat16 as a rule; gradients are summed in float32. None: in that of the weights.
        reshard_after_forward: free a block's weights after its forward pass and gather them again for the backward
            pass, which saves memory and costs a third more communication.
        offload_policy: `CPUOffloadPolicy()` keeps the shards in the memory of the CPU.

    Raises:
        ValueError: no process group, a model that is sharded already or names no blocks, trained parameters of several
            dtypes, weights in integers that are not 4 bits of bitsandbytes, parameters outside of the model that a
            `PeftModel` is around (learned prompts).
    """
    if mesh is None and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError(
            "shard_model needs a process group: start the script with torchrun or `accelerate launch` and call "
            "torch.distributed.init_process_group() first, or pass mesh=."
        )
    inner = _inside(model)
    kept = _kept(inner)
    frozen = {p for p in kept if not p.requires_grad}  # small and never changed: every process has them whole
    _check_dtypes(inner)
    names = getattr(inner, "_no_split_modules", None) or []
    blocks = [module for module in inner.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(f"{type(inner).__name__} holds no block of the kinds {sorted(names)} to shard.")
    whole: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard_after_forward, "ignored_params": frozen}
    if offload_policy is not None:
        whole["offload_policy"] = offload_policy
    low = MixedPrecisionPolicy() if dtype is None else mixed_precision(dtype)
    for block in blocks:
        if dtype is not None:
            _shard_apart(block, kept, low, whole)
        fully_shard(block, mp_policy=low, **whole)
    fully_shard(inner, mp_policy=low, **whole)
    return model


def _inside(model):
    """The model that a `PeftModel` is around: its `generate` calls that one, and the outermost group is to be entered.

    Raises:
        ValueError: see `shard_model`.
    """
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError("This model is sharded already. Call shard_model once, on a model that is whole.")
    if not hasattr(model, "get_base_model"):
        return model
    inner = model.get_base_model()
    own = set(inner.parameters())
    outside = [name for name, parameter in model.named_parameters() if parameter not in own]
    if outside:
        raise ValueError(
            f"shard_model shards the model inside a {type(model).__name__}, and this one has parameters outside of it: "
            f"{', '.join(outside)}. Train a learned prompt with DDP, or use an adapter inside the model, as LoRA is."
        )
    return inner


def _check_dtypes(model):
    integers = [p.dtype for p in model.parameters() if not (p.dtype.is_floating_point or _in_4_bits(p))]
    if integers:
        raise ValueError(
            f"Of weights in integers shard_model takes those of bitsandbytes' 4 bits; got {integers[0]}. Load the "
            "model with BitsAndBytesConfig(load_in_4bit=True), or without a quantization_config."
        )
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        raise ValueError(
            f"FSDP2 needs trained parameters of one dtype; got {sorted(map(str, dtypes))}. Load the model with "
            "dtype=torch.float32 and pass shard_model(model, dtype=torch.bfloat16) to compute in bfloat16."
        )


def _shard_apart(block, kept, low, whole):
    """Groups of their own for what is not to be cast, so that the block's own group has nothing of it."""
    own = {module: list(module.parameters(recurse=False)) for module in block.modules()}
    packed = [m for m, ps in own.items() if any(_in_4_bits(p) for p in ps)]
    exact = [m for m, ps in own.items() if any(p in kept for p in ps)]
    rest = [m for m, ps in own.items() if ps and m not in packed and m not in exact]
    as_it_is = MixedPrecisionPolicy(cast_forward_inputs=False)
    if packed:
        fully_shard(packed, mp_policy=as_it_is, **whole)
    if exact:
        fully_shard(rest, mp_policy=low, **whole)
        for module in exact:
            fully_shard(module, mp_policy=as_it_is, **whole)


def mixed_precision(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Weights in `dtype`, sums of gradients in float32, inputs as they are: the residual stream stays in float32."""
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _kept(model):
    """Parameters that the model keeps in float32 whatever its dtype is."""
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or [])
    return {parameter for name, parameter in model.named_parameters() if names & set(name.split("."))}


def _in_4_bits(parameter):
    """Whether these are bitsandbytes' pairs of 4-bit numbers, whatever dtype they are stored as."""
    return hasattr(parameter, "quant_state")


def spread(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A value for a parameter, as the parameter is: whole, or this process's part of the first process's value."""
    if not torch.distributed.is_available() or not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def is_sharded(model: Any) -> bool:
    """Whether `shard_model` or `fully_shard` was applied to the whole model, by other hands than transformers'."""
    if not torch.distributed.is_available() or getattr(model.config, "distributed_config", None) is not None:
        return False
    return isinstance(model, FSDPModule)


def whole_state(model: nn.Module) -> dict[str, Any]:
    """The state_dict of a sharded model on the CPU of the first process, an empty one on the others.

    All have to call it, and only the first one may write what it gives: see `save_adapter` for that of an adapter.
    """
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_adapter(model: Any, folder: str | PathLike, **kwargs) -> None:
    """Write the adapter of a sharded `PeftModel`, whole. Call it on every process: the first one writes, all wait.

    Args:
        model: a PeftModel that `shard_model` has been given. Its own `save_pretrained` writes on every process, also
            on those that have nothing, into the same files.
        folder: where the adapter goes.
        kwargs: those of PeftModel.save_pretrained.
    """
    state = whole_state(model)
    try:
        if torch.distributed.get_rank() == 0:
            model.save_pretrained(folder, state_dict=state, **kwargs)
    finally:
        torch.distributed.barrier()
