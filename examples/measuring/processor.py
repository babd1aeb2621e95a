"""Which processor a run was on: its name, and what PyTorch may use of it."""

import os
import re
from pathlib import Path

import torch

from scrubjay.examples.measuring.run_report import cpu_name

CPUINFO = Path("/proc/cpuinfo")
WORDS = r"\(R\)|\(TM\)|\bCPU\b|\bProcessor\b|\b\d+-Core\b|@.*"  # that name no processor
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # Linux's names of instructions that multiply it; the last is Arm's


def processor() -> dict:
    """Name, cores, threads, the widest vectors that PyTorch uses, and whether there are instructions for matrices (AMX)
    and for bfloat16, as far as Linux says."""
    flags = cpu_flags()
    return {
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx": "amx_tile" in flags,
        "bfloat16": any(name in flags for name in BFLOAT16),
    }


def cpu_flags() -> set[str]:
    """Instructions that the first core has, by Linux's names; empty where no Linux tells them."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    found = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    return set(found[0]) if found else set()


def slug(where: dict) -> str:
    """A processor's part of a file name: "AMD EPYC" with AVX512 gives "amd-epyc-avx512"; AMX stands for AVX512."""
    name = re.sub(WORDS, " ", where["cpu"])
    parts = f"{name} {'amx' if where['amx'] else where['capability']}"
    return re.sub(r"[^a-z0-9]+", "-", parts.lower()).strip("-")


def described(where: dict) -> str:
    """A line for a reader, of as much as the record has."""
    vectors = [where["capability"]] if "capability" in where else []
    vectors += ["AMX"] if where.get("amx") else []
    if "bfloat16" in where:
        vectors.append(f"{'with' if where['bfloat16'] else 'no'} bfloat16 instructions")
    counts = f"{where['cpu_count']} cores, {where['torch_threads']} threads"
    return "; ".join([where["cpu"], *([", ".join(vectors)] if vectors else []), counts])
