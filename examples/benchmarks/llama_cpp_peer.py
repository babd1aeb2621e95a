"""llama.cpp beside scrubjay on a CPU: the same model, the same text, times of both.

The SSD model goes through `scrubjay convert --to transformers` and llama.cpp's own convert_hf_to_gguf.py. Where the
folder has no tokenizer, that takes GPT-NeoX's, which comes with it; no text is read here, only ids. Greedy ids come
from llama-server, times from llama-bench, each in a process of its own, before ours are taken.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from scrubjay import SSDForCausalLM
from scrubjay.conversion.convert import convert
from scrubjay.examples.benchmarks.benchmark_rows import Row, Shape
from scrubjay.examples.benchmarks.comparison import in_turn, summarized
from scrubjay.examples.benchmarks.model_work import counted, model_pass, tokens

BUILD = "cmake -B build && cmake --build build --config Release --target llama-bench llama-server"
OUTTYPES = {"float32": "f32", "bfloat16": "bf16"}
GREEDY = 64  # tokens that have to be equal
PROMPT = 16  # tokens before them
PATIENCE = 120.0  # seconds until the server has to have loaded the model


@dataclass(frozen=True)
class LlamaCpp:
    """A llama.cpp that was built: its converter and two of its programs."""

    convert: Path
    bench: Path
    server: Path

    @classmethod
    def at(cls, place: Path) -> "LlamaCpp":
        """Of a folder of llama.cpp, or of a program in its build/bin.

        Raises:
            ValueError: a folder that lacks one of the three.
        """
        root = place.resolve().parents[2] if place.is_file() else place.resolve()
        found = cls(
            root / "convert_hf_to_gguf.py", *(root / "build" / "bin" / f"llama-{x}" for x in ("bench", "server"))
        )
        missing = [str(path) for path in (found.convert, found.bench, found.server) if not path.is_file()]
        if missing:
            raise ValueError(
                f"--llama-cpp needs the folder of a llama.cpp that was built; {place} lacks {', '.join(missing)}. Its "
                "source is also the folder vendor/llama.cpp of the source distribution of llama-cpp-python. Run there: "
                f"{BUILD}"
            )
        return found

    def gguf(self, folder: Path, out: Path, dtype: str) -> None:
        """Convert a folder in the layout of transformers."""
        run([sys.executable, self.convert, folder, "--outtype", OUTTYPES[dtype], "--outfile", out])

    def times(self, model: Path, row: Row, threads: int, repetitions: int) -> list[float]:
        """Seconds of a prefill of T tokens, or of one decoded token, a sample each; a first pass is not counted."""
        prompt, generated = (row.length, 0) if row.work == "prefill" else (0, row.passes)
        sizes = ["-p", prompt, "-n", generated, "-t", threads, "-r", repetitions]
        (test,) = json.loads(run([self.bench, "-m", model, *sizes, "-o", "json"]))
        return [nanoseconds / 1e9 / row.passes for nanoseconds in test["samples_ns"]]

    def greedy(self, model: Path, ids: list[int], threads: int) -> list[int]:
        """The ids that it generates after `ids`."""
        asked = {"prompt": ids, "n_predict": GREEDY, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        with served([self.server, "-m", model, "-t", threads, "-c", PROMPT + GREEDY + 16, "-np", 1]) as ask:
            return ask("/completion", asked)["tokens"]


def run(command: list) -> str:
    """Output of a program; RuntimeError with the end of what it said where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-8:])
        raise RuntimeError(f"{Path(command[0]).name} ended with code {done.returncode}:\n{said}")
    return done.stdout


@contextmanager
def served(command: list) -> Iterator[Callable[[str, dict], dict]]:
    """A server's answers, on a port of this machine that was free; it ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*command, "--host", "127.0.0.1", "--port", port]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy stands before this machine

    def ask(path: str, data: dict | None = None) -> dict:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"})
        with opener.open(request, timeout=PATIENCE) as answer:
            return json.load(answer)

    server = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: ask("/health"), server)
        yield ask
    finally:
        server.terminate()
        server.wait()


def wait_for(ready: Callable[[], object], server: subprocess.Popen) -> None:
    """Until the server answers; RuntimeError where it ends or stays silent."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"llama-server ended with code {server.returncode} before it answered.")
        try:
            ready()
        except (urllib.error.URLError, ConnectionError):  # not listening yet, or still loading
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"llama-server did not answer within {PATIENCE:.0f} seconds.")


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: list[int]) -> tuple[list[int], float]:
    """Our ids after `ids`, and by how much at least the best logit was above the next."""
    out = model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=GREEDY, output_logits=True, return_dict_in_generate=True
    )
    first, second = torch.cat(out.logits).topk(2).values.unbind(-1)
    return out.sequences[0, len(ids) :].tolist(), float((first - second).min())


def agreement(llama: LlamaCpp, gguf: Path, model: PreTrainedModel, threads: int) -> dict:
    """Greedy ids of both. Equality of a text that repeats one token would say little, so the kinds are counted.

    Raises:
        RuntimeError: ids that differ, with the first place.
    """
    ids = tokens(model.config.vocab_size, PROMPT)[0].tolist()
    theirs, (ours, margin) = llama.greedy(gguf, ids, threads), greedy(model, ids)
    if theirs != ours:
        at = next(
            (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
        )
        raise RuntimeError(
            f"greedy ids differ from llama.cpp's after {at} of {GREEDY}: {theirs[at : at + 4]}, ours "
            f"{ours[at : at + 4]}; the best logit was at least {margin:.1e} above the next."
        )
    return {"tokens": len(ours), "kinds": len(set(ours)), "least_margin": margin, "prompt": ids, "ids": ours}


def rows(shape: Shape) -> list[Row]:
    """What is timed of both; decode counts as many tokens as the other rows do."""
    return [
        row
        for dtype in OUTTYPES
        for row in (
            *(Row(f"llama.cpp, prefill {T} {dtype}", "prefill", T, dtype) for T in (shape.short, shape.long)),
            Row(f"llama.cpp, decode {dtype}, per token", "decode", 1, dtype, floor=0.85, passes=shape.decoded),
        )
    ]


def compare(
    place: Path,
    checkpoint: str,
    shape: Shape,
    folder: Path,
    *,
    repetitions: int,
    only: str,
    add: Callable[[dict], None],
) -> dict:
    """Convert the checkpoint, hold the greedy text of both against each other, and add a record for each row.

    Args:
        checkpoint: a folder that SSDForCausalLM reads.
        folder: an empty one, for what is written on the way.
    """
    llama, threads = LlamaCpp.at(place), torch.get_num_threads()
    chosen = [row for row in rows(shape) if only in row.name]
    if not chosen:
        return {}
    SSDForCausalLM.from_pretrained(checkpoint).save_pretrained(folder / "ssd")
    convert(str(folder / "ssd"), str(folder / "transformers"), to="transformers", progress=False)
    result: dict = {}
    for dtype in dict.fromkeys(["float32", *(row.dtype for row in chosen)]):
        gguf = folder / f"{dtype}.gguf"
        llama.gguf(folder / "transformers", gguf, dtype)
        model = SSDForCausalLM.from_pretrained(folder / "ssd", dtype=getattr(torch, dtype)).eval()
        if dtype == "float32":
            result = agreement(llama, gguf, model, threads)
        for row in chosen:
            if row.dtype == dtype:
                samples = {"peer": llama.times(gguf, row, threads, repetitions)}
                samples |= in_turn({"scrubjay": counted(model_pass(model, row), row.passes)}, repetitions)
                add(summarized(row.name, samples, row.floor))
        os.remove(gguf)
    return result
