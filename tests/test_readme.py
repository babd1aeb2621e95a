"""Every Python block of the README, run in order as one program, and every file that it names."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 5
    space: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, block {number}", "exec"), space)


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", TEXT)
    assert targets
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make (\w+)", TEXT):
        assert target in ("makes",) or re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"python (examples/\w+\.py)", TEXT):
        assert (ROOT / script).exists()
