"""Convert full-width cuts of published models as `scrubjay convert --check` does, and record what that took.

Each cut is a folder of the published layout with random values: names, shapes, file format and configuration are those
of the model, only the number of layers is not: two, or three with an attention layer in the middle. The conversion runs
in a process of its own, whose peak memory is read, and so does the way back, which must give the same bits.

    python examples/benchmarks/conversion_check.py                 all cuts, 1 to 3 GB each; some minutes on a CPU
    python examples/benchmarks/conversion_check.py --smoke         narrow cuts, seconds
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from scrubjay.conversion.checkpoint import Checkpoint
from scrubjay.examples.benchmarks.published_layouts import (
    CODESTRAL,
    MAMBA2_2B7,
    MAMBA2ATTN_2B7,
    write_codestral,
    write_mamba_ssm,
)
from scrubjay.examples.benchmarks.published_rodimus import PUBLISHED, write_rodimus
from scrubjay.examples.measuring.run_report import commit, machine, size, table, versions

RESULT = Path("examples/results/conversion.json")
BOUND = 1e-4  # largest difference of logits, in float32
# Peak memory of the imports, of a conversion, and of one with a check; then that one goes back, with a check too.
CHILD = """
import json, sys
from transformers.utils import logging
from scrubjay.conversion.convert import convert
from scrubjay.examples.measuring.memory import high_water
logging.disable_progress_bar()
logging.set_verbosity_error()
source, plain, checked, back = sys.argv[1:]
peaks = [high_water(reset=True)]
for destination in (plain, checked):
    report = convert(source, destination, check=destination == checked)
    peaks.append(high_water())
    high_water(reset=True)
convert(checked, back, to=report.layouts[0], check=True)
print(json.dumps(peaks))
"""
NARROW = dict(d=128, L=2, V=512)
MIDDLE = dict(L=3, A=[1])  # the hybrid's one attention layer
NARROW_ATTENTION = MAMBA2ATTN_2B7["attention"] | {"num_heads": 3, "head_dim": 64, "rotary_emb_dim": 32}


@dataclass(frozen=True)
class Cut:
    """How to write one into a folder, at full width and narrow."""

    write: Callable[[Path], object]
    smoke: Callable[[Path], object]


def _rodimus(**changes):
    return PUBLISHED["Rodimus-Plus-Coder-1.6B-Base"][0] | {"n_layer": 2} | changes


def _narrow_rodimus():
    config = _rodimus(d_model=256, vocab_size=512, bos_token_id=0, eos_token_id=0)
    return config | {"attn_cfg": config["attn_cfg"] | {"num_heads": 2, "num_heads_v": 2}}


CUTS = {
    "Mamba-2 2.7B": Cut(
        lambda folder: write_mamba_ssm(folder, MAMBA2_2B7 | {"L": 2}, unpadded=50277),
        lambda folder: write_mamba_ssm(folder, MAMBA2_2B7 | NARROW),
    ),
    "Mamba-2 with attention 2.7B": Cut(
        lambda folder: write_mamba_ssm(folder, MAMBA2ATTN_2B7 | MIDDLE, unpadded=50277),
        lambda folder: write_mamba_ssm(folder, MAMBA2ATTN_2B7 | NARROW | MIDDLE | {"attention": NARROW_ATTENTION}),
    ),
    "Mamba-Codestral 7B": Cut(
        lambda folder: write_codestral(folder, CODESTRAL | {"L": 2}),
        lambda folder: write_codestral(folder, CODESTRAL | NARROW | {"G": 2}),
    ),
    "Rodimus+ Coder 1.6B": Cut(
        lambda folder: write_rodimus(folder, _rodimus()),
        lambda folder: write_rodimus(folder, _narrow_rodimus()),
    ),
}


def check_cut(name: str, smoke: bool) -> dict:
    """Write a cut, convert it, convert it with a check, and convert that back.

    Returns: the report of the conversion, the peak bytes and seconds of the process that made it, and how many tensors
        came back with the same bits.

    Raises:
        RuntimeError: a conversion that failed, with what it said, logits that differ by more than `BOUND`, or tensors
            that did not come back as they were.
    """
    cut = CUTS[name]
    with tempfile.TemporaryDirectory() as folder:
        parts = source, _, checked, back = [Path(folder) / part for part in ("source", "plain", "checked", "back")]
        (cut.smoke if smoke else cut.write)(source)
        files = {file.name: file.stat().st_size for file in sorted(source.iterdir())}
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", CHILD, *parts], capture_output=True, text=True)
        seconds = round(time.perf_counter() - start, 1)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr or done.stdout}")
        report = json.loads((checked / "conversion.json").read_text(encoding="utf-8"))
        same = same_bits(source, back)
    peaks = json.loads(done.stdout.splitlines()[-1])
    worst = max(report["check"]["max_logit_difference"].values())
    if not worst <= BOUND:
        raise RuntimeError(f"{name}: logits differ by {worst:.3g}; at most {BOUND:g} is rounding.")
    named = dict(zip(("imports", "conversion", "with_check"), peaks, strict=True))
    taken = {"seconds": seconds, "peak_bytes": named, "same_bits_back": same}
    return {"name": name, "source_files": files} | taken | report | {"source": "SOURCE"}


def same_bits(first: Path, second: Path) -> int:
    """How many tensors two folders have, which must have the same.

    Raises:
        RuntimeError: names, dtypes or bits that differ, by name.
    """
    a, b = Checkpoint(first), Checkpoint(second)
    different = set(a.shapes) ^ set(b.shapes)
    different |= {name for name in set(a.shapes) - different if a.dtypes[name] != b.dtypes[name]}
    different |= {name for name in set(a.shapes) - different if not torch.equal(a.read(name), b.read(name))}
    if different:
        raise RuntimeError(f"{first.name} and {second.name} differ in {', '.join(sorted(different))}.")
    return len(a.shapes)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Run the cuts; returns their records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="narrow cuts; writes no file unless --out is given")
    parser.add_argument("--only", choices=list(CUTS), help="one cut alone")
    parser.add_argument("--out", type=Path, help=f"JSON to write (default: {RESULT}, none with --smoke)")
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    command = shlex.join(["python", "examples/benchmarks/conversion_check.py", *argv])
    where = {"command": command, "commit": commit(), "machine": machine(), "versions": versions()}
    records = [check_cut(name, arguments.smoke) for name in CUTS if arguments.only in (None, name)]
    rows = [
        [
            record["name"],
            size(record["bytes_read"]),
            f"{max(record['check']['max_logit_difference'].values()):.1e}",
            *(size(peak) for peak in record["peak_bytes"].values()),
            f"{record['seconds']} s",
        ]
        for record in records
    ]
    header = ["source", "logits differ by", "imports", "peak memory", "with --check", "there and back took"]
    print(table("cut", header, rows))
    out = arguments.out or (None if arguments.smoke else RESULT)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        result = {"bound": BOUND} | where | {"cuts": records}
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return records


if __name__ == "__main__":
    main()
