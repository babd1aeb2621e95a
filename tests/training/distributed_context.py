"""One rank of a sequence over several: torchrun distributed_context.py FOLDER.

Each comparison is with one process's pass over the whole sequence, which every rank runs by itself, alone. Leaves
{comparison: {what: error}}.
"""

import importlib
import json
import os
import warnings
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from distributed_steps import finish, start
from peft_cases import adapted
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from zoo import ZOO, relative, tokens

from scrubjay import average_gradients, shard_sequence
from scrubjay.modeling import selective_layer as selective
from scrubjay.modeling.training import context_parallel
from scrubjay.modeling.training.context_parallel import SequenceShard

RECURRENT = {entry.name: entry for entry in ZOO if entry.recurrent}
LENGTH = 41  # divides by no number of ranks that is tried
SELECTED = dict(kv_scope="selected")
BY_RANK = SELECTED | dict(window_axis="rank")
COMPACT = dict(train_attention="compact")
ABLATED = dict(temperature_gate=False, input_gate="none", short_conv=False, two_hop=False)
# name: (model, fields, columns for each rank (None: LENGTH in all), whether in training mode)
CASES = {
    **{name: (name, {}, None, True) for name in RECURRENT},
    **{f"{name} in eval mode": (name, {}, None, False) for name in RECURRENT},
    **{f"{name} in slices of one or two columns": (name, {}, 1.5, True) for name in RECURRENT},
    "rodimus_plus with a window over several ranks": ("rodimus_plus", dict(sliding_window=9), 3, True),
    "rodimus_plus with a window of one": ("rodimus_plus", dict(sliding_window=1), None, True),
    "rodimus_plus without its parts": ("rodimus_plus", ABLATED, 1.5, True),
    "taipan with a window over several ranks": ("taipan", dict(sliding_window=9), 3, True),
    "taipan with positions": ("taipan", dict(sal_pos="rope", budget_reduction="batch"), None, True),
    "taipan attending for selected alone": ("taipan", COMPACT | dict(mamba_mlp=True), None, True),
    "taipan with selected keys": ("taipan", SELECTED | dict(sal_pos="rope"), None, True),
    "taipan with selected keys by rank": ("taipan", BY_RANK, 3, True),
    "taipan with selected keys, attending for selected alone": ("taipan", SELECTED | COMPACT, None, True),
    "taipan with selected keys by rank, over several ranks": ("taipan", BY_RANK | COMPACT, 1.5, True),
    "taipan with selected keys, in eval mode": ("taipan", SELECTED, 3, False),
    "taipan with nothing selected": ("taipan", SELECTED | dict(eval_threshold=1 - 1e-9), None, False),
    "ssd_hybrid that begins with attention": ("ssd_hybrid", dict(attn_layer_idx=[0]), 1.5, True),
    "taipan with equation 3 as printed": ("taipan", dict(st_surrogate="chosen"), None, True),
}
DECAYS = ("A_log", "mem_gate_bias")


def build(name, dtype=torch.float64, **fields):
    return RECURRENT[name].build(dtype=dtype, **fields)


def columns(world, each=None):
    return LENGTH if each is None else int(each * world)


@contextmanager
def noise_of_the_sequence(length):
    """Taipan's noise, which comes from each rank's generator, is that of the column instead. Yields how to say at which
    column a rank starts."""
    noise = torch.randn(2, length, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    at = [0]

    def drawn(like):
        return noise[:, at[0] : at[0] + like.shape[1]].to(like)

    with mock.patch.object(selective, "gumbel_difference", drawn):
        yield lambda start: at.__setitem__(0, start)


def backward(model, batch):
    """(output, {name: gradient}) of one forward and backward pass."""
    model.zero_grad()
    out = model(**batch, use_cache=False)
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def single(model, length, start_at, seed=1, **more):
    """What one process computes from the whole sequence: (batch, logits, loss, gradients)."""
    ids = tokens(2, length, seed)
    labels = ids.masked_fill(tokens(2, length, seed=5) < 30, -100)
    batch = dict(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids), **more)
    start_at(0)
    out, gradients = backward(model, batch)
    return batch, out.logits.detach(), out.loss.detach(), {name: g.clone() for name, g in gradients.items()}


def differences(out, gradients, shard, want):
    """Errors of a rank's output, loss and averaged gradients."""
    _, logits, loss, expected = want
    assert gradients.keys() == expected.keys()
    ends = shard.start, shard.start + shard.lengths[shard.rank]
    largest = max(g.abs().max() for g in expected.values())
    used = [name for name, g in expected.items() if g.abs().max() > 1e-12 * largest]  # others: rounding about zero
    errors = [relative(gradients[name], expected[name]) for name in used]
    errors += [float(gradients[name].abs().max() / largest) for name in expected.keys() - set(used)]
    return {
        "logits": relative(out.logits, logits[:, slice(*ends)]),
        "loss": relative(out.loss, loss),
        "gradients": max(errors),
        "parameters": len(used),
    }


def compare(model, length, patch=None, **more):
    """Errors of a pass over ranks; `patch`: a context in which it runs; `more`: arguments of the model."""
    with noise_of_the_sequence(length) as start_at:
        want = single(model, length, start_at, **more)
        batch = shard_sequence(want[0])
        start_at(batch["shard"].start)
        with patch() if patch else mock.patch.dict({}):
            out, gradients = backward(model, batch)
        average_gradients(model)
        return differences(out, gradients, batch["shard"], want)


@contextmanager
def of_any_transformers():
    """Names that 5.17 alone has and 5.23 deprecates may be used, by peft too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def with_lora(name):
    with of_any_transformers():
        model = adapted(build(name), "all-linear").train()
        return compare(model, LENGTH)


def checkpointed(name):
    model = build(name).train()
    with of_any_transformers():
        model.gradient_checkpointing_enable()
        return compare(model, LENGTH)


def wrapped(name, wrap, read):
    """Errors where a wrapper averages the gradients."""
    with noise_of_the_sequence(LENGTH) as start_at:
        want = single(build(name).train(), LENGTH, start_at)
        batch = shard_sequence(want[0])
        start_at(batch["shard"].start)
        model = wrap(build(name).train())
        out, gradients = backward(model, batch)
        return differences(
            out, {n.removeprefix("module."): read(g) for n, g in gradients.items()}, batch["shard"], want
        )


def two_texts(name, groups):
    """Errors where each of two groups has a text of its own, and DDP averages over all ranks."""
    mine = dist.get_rank() // 2
    with noise_of_the_sequence(LENGTH) as start_at:
        both = [single(build(name).train(), LENGTH, start_at, seed) for seed in (1, 2)]
        mean = {n: (g + both[1][3][n]) / 2 for n, g in both[0][3].items()}
        batch = shard_sequence(both[mine][0], groups[mine])
        start_at(batch["shard"].start)
        out, gradients = backward(DistributedDataParallel(build(name).train()), batch)
        gradients = {n.removeprefix("module."): g for n, g in gradients.items()}
        return differences(out, gradients, batch["shard"], (*both[mine][:3], mean))


def fully_sharded(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def trained(name, steps=3):
    """Largest difference of a parameter after some steps of AdamW, and how far parameters moved."""
    models = build(name).train(), build(name).train()
    start = [p.detach().clone() for p in models[0].parameters()]
    optimizers = [torch.optim.AdamW(m.weight_decay_groups(0.1), lr=1e-3) for m in models]
    with noise_of_the_sequence(LENGTH) as start_at:
        for _ in range(steps):
            batch = shard_sequence(single(models[0], LENGTH, start_at)[0])
            start_at(batch["shard"].start)
            backward(models[1], batch)
            average_gradients(models[1])
            for optimizer in optimizers:
                optimizer.step()
    one, many = (list(m.parameters()) for m in models)
    return {
        "parameters": max(relative(b, a) for a, b in zip(one, many, strict=True)),
        "moved": min((a - b).abs().max().item() for a, b in zip(one, start, strict=True)),
    }


@torch.no_grad()
def prefilled(name, each=None, group=None, **fields):
    """Errors of a cache that a prefill over ranks makes, and of what is decoded from it."""
    model, length = build(name, **fields), columns(dist.get_world_size(group), each)
    ids, more = tokens(2, length), tokens(2, 3, seed=9)
    want = model(input_ids=ids).cache
    batch = shard_sequence({"input_ids": ids}, group)
    cache = model(**batch).cache
    own = model(input_ids=ids[:, : batch["shard"].start + batch["input_ids"].shape[1]]).cache
    found = {"cache of the columns so far": cache_error(cache, own)}
    batch["shard"].broadcast(cache)
    found["cache"] = cache_error(cache, want)
    prompt = torch.cat([ids, more], 1)
    found["next"] = relative(model(input_ids=more, cache=cache).logits, model(input_ids=more, cache=want).logits)
    settings = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    batch["shard"].broadcast(cache := model(**batch).cache)
    text = model.generate(prompt, cache=cache, **settings)
    return found | {
        "generated": int((text != model.generate(prompt, **settings)).sum()),
        "seen": cache.get_seq_length(),
    }


def cache_error(got, want):
    """Largest error of a layer's tensor. Counts must be equal."""
    worst = 0.0
    for mine, theirs in zip(got.layers, want.layers, strict=True):
        assert mine.seen == theirs.seen
        for name, tensor in theirs.tensors().items():
            assert mine.tensors()[name].dtype == tensor.dtype
            worst = max(worst, relative(mine.tensors()[name], tensor) if tensor.abs().max() > 0 else 0.0)
    return worst


def communicated(name, length):
    """(collectives, numbers that this rank handed to them) in one forward and backward pass."""
    handed = []

    def counted(collective, at):
        def call(*args, **kwargs):
            handed.append(args[at].numel())
            return collective(*args, **kwargs)

        return call

    ids = tokens(2, length)
    batch = shard_sequence(dict(input_ids=ids, labels=ids))
    with mock.patch.multiple(
        dist,
        all_gather=counted(dist.all_gather, 1),
        all_to_all_single=counted(dist.all_to_all_single, 1),
        all_reduce=counted(dist.all_reduce, 0),
    ):
        backward(build(name).train(), batch)
    return {"collectives": len(handed), "numbers": sum(handed)}


def of_remote_code(name, folder):
    """Errors of a model whose code was loaded from its own folder, with its own `shard_sequence`."""
    folder = folder / name
    build(name).save_pretrained(folder, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    for turn in range(dist.get_world_size()):  # the code is copied to a folder that the ranks share
        if turn == dist.get_rank():
            loaded = get_class_from_dynamic_module(auto_map["AutoModelForCausalLM"], folder)
        dist.barrier()
    model = loaded.from_pretrained(folder).eval()
    own = importlib.import_module(type(model).__module__.rsplit(".", 1)[0] + ".context_parallel")
    assert own.shard_sequence is not shard_sequence
    with noise_of_the_sequence(LENGTH) as start_at:
        want = single(model, LENGTH, start_at)
        batch = own.shard_sequence(want[0])
        out, gradients = backward(model, batch)
        own.average_gradients(model)
        return differences(out, gradients, batch["shard"], want)


def replaced(name, new, target=SequenceShard):
    return lambda: mock.patch.object(target, name, new)


def first_ranks_swapped(x, group):
    every = gather(x, group)
    rank = dist.get_rank(group)
    return torch.cat([every[:rank].flip(0), every[rank:]])


def seen_in_window(share):
    """A past of which the window, keys and values together, gets a share."""

    def patched(self, steps, xs, written=None):
        return past(self, int(steps * share) if len(xs) == 2 else steps, xs, written)

    return patched


gather, past, total = context_parallel._gather, SequenceShard.past, SequenceShard.sum
Entering = context_parallel._Entering
# name: (models, the deliberate error)
MUTANTS = {
    "no state is passed": (tuple(RECURRENT), replaced("entering", lambda self, a, z: torch.zeros_like(z))),
    "the state's gradient is not passed back": (
        tuple(RECURRENT),
        replaced(
            "backward",
            staticmethod(lambda ctx, d: (d.flatten(ctx.saved_tensors[0].ndim - 2).sum(-1) * 0, d * 0, None)),
            Entering,
        ),
    ),
    "states are composed in the wrong order": (
        tuple(RECURRENT),
        replaced("_gather", first_ranks_swapped, context_parallel),
    ),
    "the convolution sees nothing before a slice": (
        tuple(RECURRENT),
        replaced("halo", lambda self, x, steps: x.new_zeros(len(x), steps, x.shape[2])),
    ),
    "the window sees nothing before a slice": (
        ("rodimus_plus", "taipan", "ssd_hybrid"),
        replaced("past", seen_in_window(0)),
    ),
    "the window sees half of what it should": (
        ("rodimus_plus", "taipan", "ssd_hybrid"),
        replaced("past", seen_in_window(0.5)),
    ),
    "positions start at 0 on every rank": (("rodimus_plus", "ssd_hybrid"), replaced("start", 0)),
    "each rank's loss is its own": (tuple(RECURRENT), replaced("sum", lambda self, x: x)),
    "each rank's budget is its own": (("taipan",), replaced("sum", lambda self, x: x if x.ndim else total(self, x))),
}


def results(folder):
    """{comparison: errors}."""
    world = dist.get_world_size()
    found = {"group": {"world": world, "rank": dist.get_rank(), "process": os.getpid()}}
    for case, (name, fields, each, training) in CASES.items():
        found[case] = compare(build(name, **fields).train(training), columns(world, each))
    for name in RECURRENT:
        found[f"{name} in float32"] = compare(build(name, torch.float32).train(), LENGTH)
        for strength in (-4.0, 4.0):  # of log rates and gates' biases
            model = build(name).train()
            with torch.no_grad():
                for parameter in (p for n, p in model.named_parameters() if n.endswith(DECAYS)):
                    parameter += strength
            found[f"{name} with {'weak' if strength < 0 else 'strong'} decays"] = compare(model, LENGTH)
        found[f"{name} as a part of 500 labels"] = compare(build(name).train(), LENGTH, num_items_in_batch=500)
        found[f"{name} checkpointed"] = checkpointed(name)
        found[f"{name} with LoRA"] = with_lora(name)
        found[f"{name} in bfloat16"] = compare(build(name, torch.bfloat16).train(), LENGTH)
        found[f"{name} in DDP"] = wrapped(name, DistributedDataParallel, lambda g: g)
        found[f"{name} in FSDP2"] = wrapped(name, fully_sharded, lambda g: g.full_tensor())
        found[f"{name} trained"] = trained(name)
        for length in (60, 600):
            found[f"{name} communicates over {length}"] = communicated(name, length)
        found[f"{name} prefilled"] = prefilled(name)
        found[f"{name} prefilled in short slices"] = prefilled(name, 1.5)
        found[f"{name} of remote code"] = of_remote_code(name, folder)
    found["taipan with selected keys prefilled"] = prefilled("taipan", **SELECTED)
    found["taipan with selected keys prefilled in short slices"] = prefilled("taipan", 3, **BY_RANK)
    found["taipan with nothing selected prefilled"] = prefilled("taipan", **SELECTED, eval_threshold=1 - 1e-9)
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])] if world == 4 else []
    for name in RECURRENT if groups else ():
        found[f"{name} of two texts"] = two_texts(name, groups)
        found[f"{name} prefilled by a group"] = prefilled(name, group=groups[dist.get_rank() // 2])
        try:
            shard_sequence({"input_ids": tokens(2, LENGTH)}, groups[1 - dist.get_rank() // 2])
        except ValueError as error:
            found[f"{name} in another's group"] = str(error)
    for mutant, (names, patch) in MUTANTS.items():
        for name in names:
            found[f"{name}: {mutant}"] = compare(build(name).train(), columns(world, 5), patch)
    return found


if __name__ == "__main__":
    rank, _, folder = start()
    finish(results(folder), rank, folder)
