"""Compile every Triton kernel ahead of time, on a machine without a GPU, and keep what the compiler says of each.

    python examples/benchmarks/kernels_aot.py                writes examples/results/kernels_aot.json
    python examples/benchmarks/kernels_aot.py --check        exit 1 on a spill or a lost tensor-core instruction
    python examples/benchmarks/kernels_aot.py --only ssd     prints the kernels of the cases whose name contains "ssd"

The calls of aot_cases.py are made on meta tensors; each launch becomes a compilation for the types, the constants and
the divisibility of its arguments. This tells whether a kernel compiles and what it occupies, nothing of its speed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from scrubjay.examples.benchmarks.aot_cases import CASES
from scrubjay.kernels import triton_tools

RESULT = Path(__file__).resolve().parents[1] / "results" / "kernels_aot.json"
TARGETS = (80, 90)
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.float64: "fp64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def launches(case):
    """{(kernel's name, signature, constants, divisible arguments, options): kernel} of all launches of a case."""
    found = {}

    def record(kernel, grid, args, meta):
        values = dict(zip(kernel.arg_names, args, strict=False)) | meta
        options = {name: values.pop(name) for name in OPTIONS if name in values}
        signature, constants, divisible = {}, {}, []
        for at, parameter in enumerate(kernel.params):
            value = values.get(parameter.name, parameter.default)
            name = parameter.name
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                divisible.append(at)
            elif parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif type(value) is int:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                divisible += [at] if value % 16 == 0 else []
            else:
                signature[name] = "fp32"
        key = (kernel.fn.__module__, kernel.fn.__name__, *(repr(x) for x in (signature, constants, divisible, options)))
        found[key] = (kernel, signature, constants, divisible, options)

    original, triton_tools._run = triton_tools._run, record
    try:
        case()
    finally:
        triton_tools._run = original
    return found


def compiled(kernel, signature, constants, divisible, options, target):
    """What the compiler says of one kernel on one target."""
    names = [parameter.name for parameter in kernel.params]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(at,): [["tt.divisibility", 16]] for at in divisible},
    )
    built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(built.asm["ptx"])
        arch = f"sm_{target}" + ("a" if target >= 90 else "")
        said = _tool(get_ptxas(target).path, "-v", "--gpu-name", arch, ptx, "-o", cubin)
        machine = _tool(Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm", "-c", cubin)
    return {
        "target": f"sm_{target}",
        "registers": _number(r"Used (\d+) registers", said),
        "spill_bytes": _number(r"(\d+) bytes spill stores", said),
        "shared_bytes": built.metadata.shared,
        "warps": built.metadata.num_warps,
        "HGMMA": len(re.findall(r"\bHGMMA\b", machine)),
        "HMMA": len(re.findall(r"\bHMMA\b", machine)),
    }


def _tool(*command):
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def _number(pattern, text):
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


@cache
def launches_of(case):
    """The launches of a case by its name."""
    return launches(CASES[case])


def rows_of(case, key):
    """A row for each target of one launch of a case."""
    kernel, *rest = launches_of(case)[key]
    constants = {name: str(value) for name, value in rest[1].items() if value is not None}
    types = " ".join(type_ for type_ in rest[0].values() if type_ != "constexpr")
    row = {"case": case, "kernel": kernel.fn.__name__, "types": types, "constants": constants}
    return [row | compiled(kernel, *rest, target) for target in TARGETS]


def table(only=""):
    """The rows of all cases whose name contains `only`, printed as they come. What several cases launch is compiled
    once, for the first; two at a time on two cores."""
    first = {}
    for case in CASES:
        for key in launches_of(case) if only in case else ():
            first.setdefault(key, case)
    rows = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for found in pool.map(rows_of, first.values(), first):
            rows += found
            print("\n".join(map(line, found)), flush=True)
    return rows


def line(row):
    """One row of the table, for reading."""
    tensor_cores = f"{row['HGMMA']} HGMMA" if row["HGMMA"] else f"{row['HMMA']} HMMA" if row["HMMA"] else "-"
    return (
        f"{row['case']:<34} {row['kernel']:<28} {row['target']}  {row['registers']:>3} registers "
        f"{row['spill_bytes']:>5} B spilled {row['shared_bytes']:>7} B shared  {tensor_cores}"
    )


def worse(rows, kept):
    """What became worse than the kept table: sentences, none if nothing did."""
    before, found = {_key(row): row for row in kept}, []
    for row in rows:
        name, old = f"{row['case']} {row['kernel']} {row['target']}", before.pop(_key(row), None)
        if old is None:
            found.append(f"{name} is not in the kept table: write it anew")
            continue
        if row["spill_bytes"] > old["spill_bytes"]:
            found.append(f"{name} spills {row['spill_bytes']} bytes, {old['spill_bytes']} before")
        found += [f"{name} lost its {op}" for op in ("HGMMA", "HMMA") if old[op] and not row[op]]
    return found + [f"{row['case']} {row['kernel']} {row['target']} is compiled no more" for row in before.values()]


def _key(row):
    return row["case"], row["kernel"], row["types"], json.dumps(row["constants"], sort_keys=True), row["target"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the kept table instead of writing it")
    parser.add_argument("--only", default="", help="cases whose name contains this; nothing is written")
    chosen = parser.parse_args()
    if triton_tools.interpreted():
        sys.exit("TRITON_INTERPRET is set: the interpreter has nothing to compile. Unset it.")
    rows = table(chosen.only)
    if chosen.check:
        kept = [row for row in json.loads(RESULT.read_text())["kernels"] if chosen.only in row["case"]]
        found = worse(rows, kept)
        sys.exit("\n".join(found) or 0)
    if not chosen.only:
        RESULT.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
