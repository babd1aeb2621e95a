"""Imports go one way between the rooms of CONTRIBUTING.md's table, in no circle, and to public names alone."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n## Rooms\n")[1].split("\n## ")[0]
ROOMS = re.findall(r"^\| `([\w./]+)` \|", TABLE, re.MULTILINE)
FILES = {
    path: room for room in ROOMS for path in ([ROOT / "__init__.py"] if room == "." else (ROOT / room).glob("*.py"))
}


def imported(path):
    """(file, names) of each import of a file from the library, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("scrubjay.")], path
        found = isinstance(node, ast.Import) and "scrubjay" in [alias.name for alias in node.names]
        if found or (isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "scrubjay"):
            names = [] if found else [alias.name for alias in node.names]
            place = ROOT.joinpath(*("scrubjay" if found else node.module).split(".")[1:])
            if place.with_suffix(".py").is_file():
                yield place.with_suffix(".py"), names
            elif place == ROOT:
                yield ROOT / "__init__.py", names
            else:  # from scrubjay.room import module
                yield from ((place / f"{name}.py", []) for name in names)


GRAPH = {path: list(imported(path)) for path in FILES}


def test_every_file_lives_in_a_room_of_the_table():
    found = {
        path for folder in {room.split("/")[0] for room in ROOMS} - {"."} for path in (ROOT / folder).rglob("*.py")
    }
    tasks = ROOT / "examples" / "lm_eval_tasks"  # read by lm-eval, not imported
    assert {path for path in found if path.parent != tasks} == set(FILES) - {ROOT / "__init__.py"}
    assert not [path for path in found if path.name == "__init__.py"]
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {"scrubjay" if room == "." else f"scrubjay.{room.replace('/', '.')}" for room in ROOMS}
    assert set(build["packages"]) == packages - {"scrubjay.command"}
    assert build["py-modules"] == [path.stem for path, room in FILES.items() if room == "command"]


def test_file_names_are_unique():
    names = [path.name for path in [*FILES, *(ROOT / "tests").rglob("*.py")] if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


def test_imports_go_up_the_table():
    assert sum(len(found) for found in GRAPH.values()) > 300
    for path, found in GRAPH.items():
        for target, _ in found:
            assert target in FILES, (path, target)
            assert ROOMS.index(FILES[target]) <= ROOMS.index(FILES[path]), f"{path} imports {target}"


def test_no_file_imports_in_a_circle():
    waiting = {path: {target for target, _ in found} for path, found in GRAPH.items()}
    while waiting:
        ready = {path for path, targets in waiting.items() if not targets & waiting.keys()}
        assert ready, f"these import each other: {sorted(path.name for path in waiting)}"
        waiting = {path: targets for path, targets in waiting.items() if path not in ready}


def test_private_names_stay_in_their_files():
    assert not [(path, names) for path, found in GRAPH.items() for _, names in found if any(n[0] == "_" for n in names)]
