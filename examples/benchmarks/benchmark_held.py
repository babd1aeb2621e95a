"""Recycled Attention with all keys on the device, on the host, in few bits and in both: time, memory, agreement.

    python examples/benchmarks/benchmark_held.py --out held.json                       a random Llama of given sizes
    python examples/benchmarks/benchmark_held.py --model FOLDER --text FILE --out held.json

Every way reads the same prompt and is then given the same tokens, one by one; the ways take turns, and the median is
over the turns. `agreement`: of those steps, how many predict the token that hold="device" does; `loss`: the mean loss
of the tokens given, in nats, which says something of a trained model alone. On a machine without CUDA host and device
are one memory: what "host" costs there is the paging, not the way over the bus.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from scrubjay import RecycledCache
from scrubjay.examples.measuring.processor import processor
from scrubjay.examples.measuring.run_report import commit, versions, write_whole
from scrubjay.modeling.inputs.cache_argument import named

WAYS: dict[str, dict] = {
    "device": {},
    "host": {"hold": "host"},
    "8 bits": {"hold_bits": 8},
    "4 bits": {"hold_bits": 4},
    "host + 4 bits": {"hold": "host", "hold_bits": 4},
}


def model_of(options):
    """A model, and ids (1, length + tokens)."""
    columns = options.length + options.tokens
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
        text = Path(options.text).read_text()
        ids = AutoTokenizer.from_pretrained(options.model)(text, return_tensors="pt").input_ids[:, :columns]
        if ids.shape[1] < columns:
            raise SystemExit(f"{options.text} has {ids.shape[1]} tokens; {columns} are needed: give more text.")
    else:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=4096,
            hidden_size=options.hidden,
            intermediate_size=3 * options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.kv_heads,
            max_position_embeddings=columns,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
        ids = torch.randint(4096, (1, columns))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), ids.to(device)


@torch.no_grad()
def decode(model, ids, length, cache) -> tuple[float, torch.Tensor]:
    """Seconds a token, and logits (tokens, V) of the steps."""
    model(ids[:, :length], **named(cache), logits_to_keep=1)
    if ids.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    logits = [model(ids[:, at : at + 1], **named(cache)).logits[0, -1] for at in range(length, ids.shape[1])]
    if ids.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / len(logits), torch.stack(logits).float()


def measure(model, ids, options) -> dict[str, dict]:
    """A record of each way."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    records: dict[str, dict] = {}
    first = torch.empty(0)
    for turn in range(options.turns):
        for way, settings in WAYS.items():
            settings = settings | {"policy": options.policy, "budget": options.budget, "stride": options.stride}
            with RecycledCache(model, **settings) as cache:
                once, logits = decode(model, ids, options.length, cache)
                seconds[way].append(once)
                if turn:
                    continue
                chosen = logits.argmax(-1)
                if way == "device":
                    first = chosen
                records[way] = {
                    "bytes": cache.nbytes_by_place,
                    "agreement": float((chosen == first).float().mean()),
                    "loss": float(F.cross_entropy(logits[:-1], ids[0, options.length + 1 :])),
                }
    return {way: {"seconds_a_token": median(seconds[way]), "samples": seconds[way]} | records[way] for way in WAYS}


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder of a decoder; without it a random Llama of the sizes below")
    parser.add_argument("--text", help="a file whose tokens are read, with --model")
    sizes = dict(hidden=1024, layers=8, heads=16, kv_heads=4, length=8192, tokens=40, budget=1024, stride=10, turns=3)
    for name, size in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    parser.add_argument("--policy", default="recycled", choices=("recycled", "lowrank", "full"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args(given)
    if bool(options.model) != bool(options.text):
        parser.error("--model and --text go together")
    return options


def main(given: list[str] | None = None) -> None:
    """Print a line of each way, and write the record."""
    options = arguments(given)
    ways = measure(*model_of(options), options)
    for way, record in ways.items():
        places = ", ".join(f"{count / 2**20:.1f} MiB {place}" for place, count in record["bytes"].items())
        rest = f"agreement {record['agreement']:.3f}, loss {record['loss']:.4f}"
        print(f"{way:14} {record['seconds_a_token'] * 1e3:8.2f} ms a token, {places}, {rest}")
    if options.out:
        settings = {name: value for name, value in vars(options).items() if name != "out"}
        settings |= {name: Path(settings[name]).name for name in ("model", "text") if settings[name]}
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        about = {"settings": settings, "processor": processor(), "gpu": gpu, "versions": versions(), "commit": commit()}
        write_whole(options.out, json.dumps(about | {"ways": ways}, indent=1) + "\n")


if __name__ == "__main__":
    main()
