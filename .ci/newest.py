"""The model contract on the newest releases that pip finds: what is installed, and what a failure means.

    .venv-newest/bin/python .ci/newest.py test COMMAND ...   upgrade this environment, run COMMAND (pytest), judge
    .venv-newest/bin/python .ci/newest.py record             write down the releases of the last run, which passed

A failure on releases that passed before is the change's own and fails. Where one is newer than the last that passed,
the world has moved: that is said loudly and fails nothing; nor does a registry that cannot be reached. What passed
stands in NEWEST of configuration/tested_versions.py and, for other libraries of the contract, in constraints.txt.
The table is read as text: a release on which nothing can be imported has to be judged as well.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "configuration" / "tested_versions.py"
PINS = ROOT / "constraints.txt"
OTHERS = ("bitsandbytes", "datasets", "numpy", "pytest", "pytest-xdist", "safetensors", "tokenizers", "torch")
REPORT, PASSED = "newest.txt", "newest.json"  # in the environment's folder; .ci/run repeats the first
PATIENCE = 900  # seconds for pip
NO_TESTS = 5  # pytest's exit status
SHOWN = 20  # failing tests that are named


def recorded(table: str, pins: str) -> dict[str, str]:
    """{library: the last version that passed}, from the texts of both files."""
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", pins, re.MULTILINE))
    return {name: pinned[name] for name in OTHERS} | newest(table)


def newest(table: str) -> dict[str, str]:
    """NEWEST of tested_versions.py."""
    return ast.literal_eval(re.search(r"^NEWEST = (\{[^}]*\})", table, re.MULTILINE)[1])


def newer(found: Mapping[str, str], before: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """{library: (installed, last that passed)}, where newer; a local build counts as what it was built of."""
    return {name: (new, before[name]) for name, new in found.items() if _order(new) > _order(before[name])}


def _order(text):
    from packaging.version import Version  # pytest brings it: there where there is something to compare

    return Version(Version(text).public)


def judge(status: int, moved: Mapping) -> str:
    """ "passed", "loud" or "FAILED", from pytest's exit status and what is newer than the last that passed."""
    if status == 0:
        return "passed"
    return "loud" if moved and status != NO_TESTS else "FAILED"  # no release takes all tests away


def installed(names) -> dict[str, str]:
    """{library: version} in this environment, of those that are there."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def upgrade() -> str:
    """Bring all but torch, of which the machine's build stays, to the newest release. Returns: why pip could not."""
    torch = re.search(r"^torch==\S+$", PINS.read_text(encoding="utf-8"), re.MULTILINE)[0]
    command = [sys.executable, "-m", "pip", "install", "-qq", "--upgrade", "--upgrade-strategy", "eager"]
    try:
        done = subprocess.run([*command, "-e", ".[test]", torch], cwd=ROOT, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return f"pip had no end after {PATIENCE} s"
    return f"pip ended with status {done.returncode}" if done.returncode else ""


def run(command: Sequence[str]) -> tuple[int, list[str]]:
    """Exit status and lines of a command, which are shown as they come."""
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    return process.returncode, lines


def failing(lines: Sequence[str]) -> list[str]:
    """The tests that pytest names at its end; if there are none, its last words."""
    named = [line[:150] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    more = [f"and {len(named) - SHOWN} more"] if len(named) > SHOWN else []
    return [*named[:SHOWN], *more] or [line[:150] for line in lines if line.strip()][-10:]


def report(verdict: str, moved: Mapping, lines: Sequence[str], names) -> tuple[str, list[str]]:
    """How it went, in a line, and what more is to be said."""
    news = [f"{name} {new} (the last that passed: {old})" for name, (new, old) in moved.items()]
    if verdict == "loud":
        said = ["The model contract FAILS on releases that are newer than the last that passed:", *news, "Failing:"]
        said += [*failing(lines), "This fails no run. Users meet it today: see CONTRIBUTING.md, "]
        said[-1] += '"When a new release of transformers breaks something".'
        return "failed on newer releases, which fails no run", banner(said)
    if verdict == "passed" and set(moved) & set(names):
        return verdict, banner(
            ["The model contract passes on newer releases:", *news, "Record them: make record-newest"]
        )
    return verdict, []


def banner(lines: Sequence[str]) -> list[str]:
    """Set apart from what stands around it."""
    return ["#" * 100, *(f"# {line}" for line in lines), "#" * 100]


def test(command: Sequence[str], environment: Path) -> int:
    """Upgrade, run, judge; the report also goes into the environment's folder. Returns: the exit status."""
    for name in (REPORT, PASSED):
        (environment / name).unlink(missing_ok=True)
    print("Asking pip for the newest releases ...", flush=True)
    trouble = upgrade()
    before = recorded(TABLE.read_text(encoding="utf-8"), PINS.read_text(encoding="utf-8"))
    names = newest(TABLE.read_text(encoding="utf-8"))
    found = installed(before)
    if trouble and found.keys() != before.keys():
        outcome, verdict = "not run", f"not run: {trouble}, and nothing is installed yet"
        said = banner([f"The newest releases were {verdict}.", "This fails no run. Is there a network and a registry?"])
    else:
        here = ", ".join(f"{name} {found[name]}" for name in names)
        print(f"{trouble}: on what is installed already: {here}" if trouble else f"Installed: {here}", flush=True)
        status, lines = run(command)
        moved = newer(found, before)
        outcome = judge(status, moved)
        verdict, said = report(outcome, moved, lines, names)
        verdict += f" ({here}{'; ' * bool(trouble)}{trouble})"
        if outcome == "passed":
            (environment / PASSED).write_text(json.dumps({name: found[name] for name in names}))
    (environment / REPORT).write_text("\n".join([verdict, *said, ""]), encoding="utf-8")
    print(*said, f"test-newest: {verdict}", sep="\n", flush=True)
    return int(outcome == "FAILED")


def record(environment: Path, table: Path = TABLE) -> int:
    """Raise NEWEST to what passed last in this environment; nothing is lowered. Returns: the exit status."""
    if not (environment / PASSED).is_file():
        print("There is nothing to record: make test-newest has to pass first.")
        return 1
    text = table.read_text(encoding="utf-8")
    moved = newer(json.loads((environment / PASSED).read_text()), newest(text))
    for name, (new, old) in moved.items():
        text = text.replace(f'"{name}": "{old}"', f'"{name}": "{new}"')
        print(f"{name} {old} -> {new}")
    table.write_text(text, encoding="utf-8")
    print(f"{table.name} says what passed. Commit it." if moved else f"{table.name} said so already.")
    return 0


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    sys.exit(test(rest, Path(sys.prefix)) if kind == "test" else record(Path(sys.prefix)))
