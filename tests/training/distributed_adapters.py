"""Adapters on models that FSDP2 shards, on whole and on 4-bit bases, on the processes of a torchrun."""

import time
from unittest import mock

import torch
import torch.distributed as dist
from distributed_steps import adamw, batch, finish, gradients, spread, start, steps, weights
from peft import LoraConfig, PeftModel, get_peft_model
from test_peft_quantized import build, four_bits
from torch.distributed.tensor import DTensor
from transformers.utils import logging
from zoo import ZOO, tokens

from scrubjay import save_adapter, shard_model, whole_state

NEW = 12


def adapted(model):
    """With a weak adapter on every projection: a strong one would enlarge the rounding of sums in another order."""
    torch.manual_seed(1)
    config = LoraConfig(target_modules="all-linear", r=4, lora_alpha=1, init_lora_weights=False)
    return get_peft_model(model, config).eval()


def trained(model, rank=0, processes=1):
    """What training leaves of an adapter, and the greedy tokens after it."""
    before = adapter(weights(model))
    steps(model.train(), adamw(model), rank=rank, processes=processes)
    found = {"before": before, "weights": adapter(weights(model)), "gradients": gradients(model)}
    return found | {"generated": generated(model.eval())}


def adapter(tensors):
    """Those of the adapter, by the names that its file has."""
    return {name.replace(".default", ""): tensor for name, tensor in tensors.items() if "lora_" in name}


@torch.no_grad()
def generated(model):
    ids = tokens(2, 30)
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return model.generate(input_ids=ids, **settings)


def saved(model, folder, rank):
    """Save the adapter where whoever writes does so late, the second process last; whether the file is there then."""
    write = PeftModel.save_pretrained

    def late(*args, **kwargs):
        time.sleep(0.2 + rank * 0.4)
        write(*args, **kwargs)

    with mock.patch.object(PeftModel, "save_pretrained", late):
        save_adapter(model, folder)
    return (folder / "adapter_model.safetensors").is_file()


def compared(make, rank, processes, folder):
    """An adapter trained in one process, and on all of them on a sharded base."""
    found = {"alone": trained(make())}
    model = make()
    assert shard_model(model) is model
    mine = found["sharded"] = {"spread": spread(model)}
    mine["plain"] = [name for name, p in model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    mine |= trained(model, rank, processes)
    mine["there"] = saved(model, folder, rank)
    mine["state"] = {name: type(value).__name__ for name, value in whole_state(model).items()}
    return found


def in_bfloat16(make):
    """Logits and adapter gradients of a base in 4 bits, computed in bfloat16 and in float32."""
    found = {}
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        model = shard_model(make(), dtype=dtype)
        out = model(input_ids=batch(0), labels=batch(0), use_cache=False)
        out.loss.backward()
        found[name] = {"logits": out.logits.detach(), "gradients": gradients(model)}
    return found


def main():
    rank, processes, out = start()
    logging.disable_progress_bar()
    found = {"processes": processes}
    for entry in ZOO:
        base = out / f"{entry.name}_base"
        if rank == 0:
            build(entry, 64).save_pretrained(base)
        dist.barrier()

        def packed(storage=torch.uint8, entry=entry, base=base):
            config = four_bits(bnb_4bit_quant_storage=storage)
            return adapted(entry.model.from_pretrained(base, quantization_config=config))

        def plain(entry=entry):
            return adapted(entry.build())

        found[entry.name] = {
            "LoRA": compared(plain, rank, processes, out / f"{entry.name}_lora"),
            "QLoRA": compared(packed, rank, processes, out / f"{entry.name}_qlora"),
            "uint8": in_bfloat16(packed),
            "floats": in_bfloat16(lambda packed=packed: packed(torch.float32)),
        }
    finish(found, rank, out)


if __name__ == "__main__":
    main()
