"""The table in tests/README.md names tests that exist, and every kernel of Triton stands in it."""

import re
from pathlib import Path

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
    tested = "".join(path.read_text() for path in (ROOT / "interpreter").glob("*.py"))
    tested += "".join(path.read_text() for path in ROOT.glob("*.py"))
    for path in (ROOT.parent / "kernels").glob("*_triton.py"):
        assert f"scrubjay.kernels.{path.stem}" in tested or path.stem in tested, path.name
