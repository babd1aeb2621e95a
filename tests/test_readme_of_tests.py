"""The tables in tests/README.md name tests that exist; every kernel of Triton and every model stands in one."""

import fnmatch
import os
import re
import subprocess
import sys
from pathlib import Path

from zoo import ZOO

ROOT = Path(__file__).parent
ROWS = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `test_triton_")]


def test_every_named_test_exists():
    assert len(ROWS) == 9
    for row in ROWS:
        file, *names = re.findall(r"`(\w+(?:\.py)?)`", row)
        source = (ROOT / "interpreter" / file).read_text()
        assert len(names) >= 3
        assert [name for name in names if f"\ndef test_{name}(" not in source] == [], file


def test_every_kernel_file_has_tests_and_mutants_in_the_table():
    listed = {re.match(r"\| `test_triton_(\w+)\.py`", row)[1] for row in ROWS} - {"models"}
    found = {path.stem.removeprefix("test_triton_") for path in (ROOT / "interpreter").glob("test_triton_*.py")}
    found = {name for name in found if not name.endswith("_mutants")} - {"models"}
    assert listed == found
    assert all((ROOT / "interpreter" / f"test_triton_{name}_mutants.py").is_file() for name in listed)
    tested = "".join(path.read_text() for path in ROOT.rglob("*.py"))
    for path in (ROOT.parent / "kernels").glob("*_triton.py"):
        assert f"scrubjay.kernels.{path.stem}" in tested or path.stem in tested, path.name


def test_every_cell_of_the_table_of_models_is_a_test():
    head, _, *rows = (ROOT / "README.md").read_text().split("## What works with what")[1].strip().splitlines()[2:]
    names = re.findall(r"`(test_\w+\.py)`", head)
    files = [next(ROOT.rglob(name)).relative_to(ROOT.parent).as_posix() for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *sorted(set(files))],
        cwd=ROOT.parent, env=os.environ | {"PYTEST_ADDOPTS": ""}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    collected = done.stdout.splitlines()
    assert len(rows) == len(ZOO)
    for entry, row in zip(ZOO, rows, strict=True):
        cells = re.findall(r"`(\w+)\[([\w*-]+)\]`", row)
        assert len(cells) == len(files) == 12
        for file, (name, case) in zip(files, cells, strict=True):
            assert case.removesuffix("-*") == entry.name
            wanted = f"{file}::test_{name}[[]{case}]"
            assert fnmatch.filter(collected, wanted), wanted
