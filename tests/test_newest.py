"""What CI makes of the newest releases: .ci/newest.py judges, .ci/run sums up. Nothing is installed here."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("newest", ROOT / ".ci" / "newest.py")
newest = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(newest)

TABLE = 'NEWEST = {\n    "peft": "0.21.2",\n    "transformers": "5.24.0",\n}\n'
PINS = "".join(f"{name}==2.0\n" for name in newest.OTHERS)
BEFORE = dict.fromkeys(newest.OTHERS, "2.0") | {"peft": "0.21.2", "transformers": "5.24.0"}


@pytest.mark.parametrize(
    ("status", "changes", "verdict"),
    [
        (0, {}, "passed"),
        (0, {"transformers": "5.25.0"}, "passed"),
        (1, {}, "FAILED"),
        (1, {"transformers": "5.25.0"}, "loud"),
        (1, {"transformers": "5.25.0.dev0"}, "loud"),
        (1, {"peft": "0.22.0"}, "loud"),
        (1, {"numpy": "2.1"}, "loud"),
        (1, {"transformers": "5.23.0"}, "FAILED"),
        (1, {"transformers": "5.24.0+local", "torch": "2.0+cpu"}, "FAILED"),
        (2, {"transformers": "5.25.0"}, "loud"),
        (4, {"transformers": "5.25.0"}, "loud"),  # what pytest ends with where conftest.py cannot import the package
        (4, {}, "FAILED"),
        (5, {"transformers": "5.25.0"}, "FAILED"),
        (5, {}, "FAILED"),
        (-9, {}, "FAILED"),
    ],
)
def test_a_failure_is_the_changes_own_unless_a_release_is_newer(status, changes, verdict):
    assert newest.recorded(TABLE, PINS) == BEFORE
    moved = newest.newer(BEFORE | changes, BEFORE)
    assert newest.judge(status, moved) == verdict


def test_the_tables_of_the_project_are_read():
    from scrubjay.configuration.tested_versions import NEWEST

    before = newest.recorded(newest.TABLE.read_text(), newest.PINS.read_text())
    assert newest.newest(newest.TABLE.read_text()) == NEWEST
    assert before.keys() == NEWEST.keys() | set(newest.OTHERS)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Run `test` with these releases installed, this trouble with pip, and this end of pytest."""
    for name, text in (("TABLE", TABLE), ("PINS", PINS)):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(newest, name, tmp_path / name)

    def run(found, trouble="", status=0, output=()):
        monkeypatch.setattr(newest, "upgrade", lambda: trouble)
        monkeypatch.setattr(newest, "installed", lambda names: found)
        said = "\n".join(output)
        code = newest.test([sys.executable, "-c", f"print({said!r}); raise SystemExit({status})"], tmp_path)
        return code, (tmp_path / newest.REPORT).read_text().splitlines()

    return run


FAILING = ["FAILED tests/test_hub.py::test_x[a b] - boom", "ERROR tests/test_y.py - bang", "1 failed, 1 error in 0.10s"]


def test_a_newer_release_that_fails_is_loud_and_green(machine, capsys, tmp_path):
    code, (first, *banner) = machine(BEFORE | {"transformers": "5.25.0"}, status=1, output=FAILING)
    assert code == 0
    assert first == "failed on newer releases, which fails no run (peft 0.21.2, transformers 5.25.0)"
    assert banner[0] == banner[-1] == "#" * 100
    for line in ("# transformers 5.25.0 (the last that passed: 5.24.0)", *(f"# {line}" for line in FAILING[:2])):
        assert line in banner
    assert not any("peft" in line for line in banner)
    said = capsys.readouterr().out
    assert FAILING[2] in said
    assert "\n".join([*banner, f"test-newest: {first}"]) in said
    assert not (tmp_path / newest.PASSED).exists()


def test_many_failing_tests_are_counted_and_an_end_without_any_is_shown(machine):
    _, banner = machine(BEFORE | {"peft": "0.22"}, status=1, output=[f"FAILED t.py::test_{i}" for i in range(23)])
    assert "# FAILED t.py::test_19" in banner
    assert "# FAILED t.py::test_20" not in banner
    assert "# and 3 more" in banner
    _, banner = machine(BEFORE | {"peft": "0.22"}, status=4, output=["ImportError: no DynamicCache"])
    assert "# ImportError: no DynamicCache" in banner


def test_a_failure_on_releases_that_passed_fails(machine):
    assert machine(BEFORE, status=1, output=FAILING) == (1, ["FAILED (peft 0.21.2, transformers 5.24.0)"])


def test_newer_releases_that_pass_are_recorded_on_demand(machine, tmp_path):
    assert newest.record(tmp_path) == 1
    code, (first, *banner) = machine(BEFORE | {"transformers": "5.25.0", "peft": "0.20.0"}, output=["1 passed in 0.1s"])
    assert (code, first) == (0, "passed (peft 0.20.0, transformers 5.25.0)")
    assert "# Record them: make record-newest" in banner
    table = tmp_path / "TABLE"
    assert newest.record(tmp_path, table) == 0
    assert newest.newest(table.read_text()) == {"peft": "0.21.2", "transformers": "5.25.0"}  # nothing is lowered
    assert newest.record(tmp_path, table) == 0
    machine(BEFORE | {"peft": "0.30"}, status=1)
    assert newest.record(tmp_path, table) == 1
    assert newest.newest(table.read_text())["peft"] == "0.21.2"


def test_the_same_releases_that_pass_say_nothing_more(machine):
    assert machine(BEFORE | {"numpy": "2.1"}) == (0, ["passed (peft 0.21.2, transformers 5.24.0)"])


def test_without_a_registry_what_is_installed_is_tested_or_nothing(machine):
    code, (first, *banner) = machine({}, trouble="pip ended with status 1", status=1)
    assert code == 0
    assert first == "not run: pip ended with status 1, and nothing is installed yet"
    assert any("Is there a network and a registry?" in line for line in banner)
    code, (first, *_) = machine(BEFORE, trouble="pip ended with status 1", status=1)
    assert code == 1
    assert first == "FAILED (peft 0.21.2, transformers 5.24.0; pip ended with status 1)"


MAKE = """#!/usr/bin/env bash
. "$0.$1"
"""
LINES = {"test": "30 passed, 2 skipped in 9.00s (0:00:09)\n7 passed in 1.00s", "quality": "All checks passed!"}
LINES |= {"test-oldest": "= 20 passed in 5.00s =", "test-newest": "3 failed, 17 passed in 6.00s"}
SUMMED = "make quality: passed\nmake test-newest: passed\n3 failed, 17 passed in 6.00s\nmake test-oldest: passed\n"
SUMMED += "= 20 passed in 5.00s =\nmake test: passed\n30 passed, 2 skipped in 9.00s (0:00:09)\n7 passed in 1.00s\n"


def ci_run(folder, failing=(), report="passed\n", lines=LINES):
    """`.ci/run` in a folder of its own, with a make that prints these lines."""
    (folder / ".ci").mkdir()
    (folder / ".venv-newest").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    (folder / "make").write_text(MAKE)
    (folder / "make").chmod(0o755)
    (folder / "report").write_text(report)
    for part, text in lines.items():
        body = f"printf '%s\\n' '{text}'\nexit {2 * (part in failing)}\n"
        copy = f"cp '{folder}/report' .venv-newest/newest.txt\n" if part == "test-newest" else ""
        (folder / f"make.{part}").write_text(copy + body)
    return repeat(folder)


def repeat(folder):
    """`.ci/run` where `ci_run` has laid it."""
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(folder / ".ci" / "run")]
    return subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False)


def test_the_run_closes_with_how_each_part_went(tmp_path):
    done = ci_run(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n\n" + SUMMED)


@pytest.mark.parametrize("part", LINES)
def test_a_part_that_fails_fails_the_run_and_the_others_still_run(part, tmp_path):
    done = ci_run(tmp_path, failing=[part], report="FAILED (peft 1)\n")
    assert done.returncode == 1
    assert f"\nmake {part}: FAILED\n" in done.stdout
    assert all(f"\nmake {other}: " in done.stdout for other in LINES)


def test_what_is_loud_and_green_is_seen_at_the_end(tmp_path):
    first = "failed on newer releases, which fails no run (peft 9)"
    done = ci_run(tmp_path, report=f"{first}\n####\n# peft 9\n####\n")
    assert done.returncode == 0
    loud = SUMMED.replace("make test-newest: passed", f"make test-newest: {first}")
    assert done.stdout.endswith(f"\n\n####\n# peft 9\n####\n{loud}")


def test_no_test_at_all_fails_the_run_and_a_summary_that_is_missing_is_said(tmp_path):
    done = ci_run(tmp_path, failing=["test"], lines=LINES | {"test": "no tests ran in 0.01s"})
    assert done.returncode == 1
    assert done.stdout.endswith("make test: FAILED\nno tests ran in 0.01s\n")


def test_a_part_without_pytests_summary_says_so(tmp_path):
    done = ci_run(tmp_path, failing=["test-oldest"], lines=LINES | {"test-oldest": "No space left on device"})
    assert "\nmake test-oldest: FAILED\npytest printed no summary\n" in done.stdout


def test_a_report_of_an_earlier_run_is_not_repeated(tmp_path):
    ci_run(tmp_path, report="passed\n#### of yesterday\n")
    (tmp_path / "make.test-newest").write_text("exit 2\n")  # before it came to a report
    done = repeat(tmp_path)
    assert done.returncode == 1
    assert "of yesterday" not in done.stdout
    assert "make test-newest: FAILED\npytest printed no summary" in done.stdout
