"""Tensor parallel inference and training as transformers does it, on the processes of a torchrun."""

import logging

import torch
import torch.distributed as dist
from distributed_steps import (
    EVEN,
    ROWS,
    adamw,
    batch,
    finish,
    gradients,
    spread,
    start,
    steps,
    weights,
)
from transformers.distributed.configuration_utils import DistributedConfig
from zoo import ZOO, tokens

from scrubjay.configuration.configuration_recycled import POLICIES

PROMPT, NEW = 30, 12
DYNAMIC = dict(budget=8, schedule="dynamic", qc=2, threshold=0.1)
# Caches that choose among keys, whose choice must not depend on which heads a device has.
CHOOSING = [
    *(("adore", dict(cache_size=12, label_k=8, rebuild=2, position_mode=mode)) for mode in ("original", "compact")),
    *(("recycled", dict(budget=8, stride=3, page=4, policy=name)) for name in POLICIES),
    *(("recycled", DYNAMIC | dict(qsim_space=space)) for space in ("pre", "post")),
]


class Warnings(logging.Handler):
    """What transformers says about plans and layers, while it is open."""

    def __enter__(self):
        self.said = []
        logging.getLogger("transformers").addHandler(self)
        return self

    def __exit__(self, *error):
        logging.getLogger("transformers").removeHandler(self)

    def emit(self, record):
        if "plan" in record.getMessage() or "TP rules" in record.getMessage():
            self.said.append(record.getMessage())


def pair(entry, folder, **changes):
    """A model on one device, and the same on all of them."""
    model = entry.build(vocab_size=EVEN, **changes)
    model.save_pretrained(folder)
    dist.barrier()
    return model, entry.model.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto")).eval()


@torch.no_grad()
def stepwise(model):
    """(NEW + 1, ROWS, V) logits of a prompt's last token and of single tokens after it, from the model's cache."""
    wrapper = hasattr(model.model, "decoder")  # its cache attaches itself to a model, the others are of a configuration
    cache = model.cache_class(model if wrapper else model.config)
    ids, found = tokens(ROWS, PROMPT + NEW, seed=2), []
    for a, b in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, PROMPT + NEW))]:
        found.append(model(ids[:, a:b], cache=cache, use_cache=True).logits[:, -1])
    return torch.stack(found), getattr(cache, "full_steps", None)


UNEVEN = {"heads": dict(num_attention_heads=3), "key heads": dict(num_key_value_heads=1)}


def refused(entry, folder):
    """What is said of heads that two devices cannot share, when the model is loaded."""
    said = {}
    for name, changes in UNEVEN.items():
        try:
            pair(entry, folder / name.replace(" ", "_"), **changes)
        except ValueError as error:
            said[name] = str(error)
    return said


def compared(entry, rank, out):
    """What one device and all of them find: logits, steps, generated tokens, gradients, weights after a step."""
    found, folder = {}, out / f"{entry.name}_saved"
    with Warnings(logging.WARNING) as said:
        models = pair(entry, out / entry.name)
    for name, model in zip(("alone", "parallel"), models, strict=True):
        with torch.no_grad():
            mine = found[name] = {"logits": model(batch(0), use_cache=False).logits, "steps": stepwise(model)[0]}
            mine["generated"] = model.generate(
                batch(0),
                attention_mask=torch.ones(batch(0).shape),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
            )
        mine["spread"], mine["before"] = spread(model), weights(model)
        steps(model.train(), adamw(model), last=1)
        mine |= {"gradients": gradients(model), "weights": weights(model)}
    model.save_pretrained(folder)
    return found | {"warnings": said.said}


def main():
    rank, processes, out = start()
    found = {"processes": processes}
    for entry in ZOO:
        found[entry.name] = compared(entry, rank, out)
    by_name = {entry.name: entry for entry in ZOO}
    found["refused"] = {e.name: refused(e, out / f"{e.name}_refused") for e in ZOO if not e.recurrent}
    found["choosing"] = []
    for i, (name, settings) in enumerate(CHOOSING):
        found["choosing"].append([stepwise(model) for model in pair(by_name[name], out / f"choosing{i}", **settings)])
    found["short name"] = spread(ZOO[0].model.from_pretrained(out / ZOO[0].name, tp_plan="auto"))
    finish(found, rank, out)


if __name__ == "__main__":
    main()
