"""Train on sequences that no process holds whole, and prefill one: each rank has a slice, and states pass between them.

    torchrun --nproc_per_node 4 examples/long_context.py --length 65536
    python examples/long_context.py --smoke        # one process, a few seconds

The text is Python's standard library, byte by byte: 256 tokens and no tokenizer. Memory of activations falls with the
number of ranks; what ranks send each other does not grow with the length. Prints the loss of each step, the peak
memory of each rank, and what the model writes after the last sequence. One process on two cores takes about eight
minutes (20 steps of 16384 bytes, 22 seconds each).
"""

import argparse
import os
import resource
import time

import numpy as np
import torch
import torch.distributed as dist

from scrubjay import average_gradients, shard_sequence
from scrubjay.examples.data.corpus import joined, load_corpus
from scrubjay.examples.learning.recipe import Recipe
from scrubjay.examples.learning.training import build_model

MODELS = ("ssd", "rodimus", "rodimus_plus", "taipan")
VOCABULARY = 256


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="ssd")
    parser.add_argument("--length", type=int, default=16384, help="bytes of a sequence, over all ranks")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--new", type=int, default=64, help="bytes to write after the last sequence")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that everything runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.length, args.steps, args.new = 500, 4, 8
    return args


def start() -> torch.device:
    """Join the processes that torchrun started, or make a group of this one alone; returns its device."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def peak_memory(device: torch.device) -> float:
    """MiB: the most that this rank has held on its GPU; on a CPU, of all that the process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def train(model, text: torch.Tensor, args: argparse.Namespace) -> list[float]:
    """Nats per byte of each step."""
    optimizer = torch.optim.AdamW(model.weight_decay_groups(0.1), lr=2e-3)
    losses = []
    for step in range(args.steps):
        begun = time.perf_counter()
        ids = text.roll(-step * args.length)[: args.length][None].to(model.device)
        loss = model(**shard_sequence({"input_ids": ids, "labels": ids}), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        average_gradients(model)
        optimizer.step()
        losses.append(loss.item())
        report(f"step {step + 1:3}  loss {losses[-1]:.4f}  {time.perf_counter() - begun:.2f} s")
    return losses


@torch.no_grad()
def continue_text(model, text: torch.Tensor, args: argparse.Namespace) -> str:
    """What the model writes after the last `length` bytes of the text, read by all ranks and written by each."""
    model.eval()
    ids = text[-args.length :][None].to(model.device)
    batch = shard_sequence({"input_ids": ids[:, :-1]})
    cache = model(**batch, use_cache=True, logits_to_keep=1).cache
    batch["shard"].broadcast(cache)
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": args.new}
    out = model.generate(ids, cache=cache, **settings)
    return bytes(out[0, args.length :].tolist()).decode("utf-8", "replace")


def report(line: str) -> None:
    """Print on the first rank."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def main(argv: list[str] | None = None) -> list[float]:
    """Train, then write; returns the losses."""
    args, device = parse(argv), start()
    try:
        raw = joined(load_corpus().limited(args.length * (args.steps + 1) + 2**16, 1).train)
        text = torch.from_numpy(np.frombuffer(raw, np.uint8).astype(np.int64))
        torch.manual_seed(0)  # the same weights on every rank
        recipe = Recipe.of(args.model)
        model = build_model(args.model, recipe.smoke() if args.smoke else recipe, VOCABULARY, 0).to(device).train()
        torch.manual_seed(dist.get_rank())  # its own noise
        losses = train(model, text, args)
        peaks: list[float] = [0.0] * dist.get_world_size()
        dist.all_gather_object(peaks, peak_memory(device))
        report(f"{args.length} bytes over {len(peaks)} ranks, peak MiB of each: {[round(peak) for peak in peaks]}")
        report(f"It goes on: {continue_text(model, text, args)!r}")
        return losses
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
