"""Every Python block of the README, run in order as one program, and every file that it names."""

import inspect
import re
from pathlib import Path

from scrubjay.examples.demo import demo

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "examples" / "lm_eval_tasks"
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
    heads = {f"#{re.sub(r'[^a-z0-9]+', '-', head.lower())}" for head in re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)}
    assert not [target for target in targets if target not in heads and not (ROOT / target).exists()]


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make (\w+)", TEXT):
        assert target in ("makes",) or re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"python (examples/\w+\.py)", TEXT):
        assert (ROOT / script).exists()
    assert f"pretrained={inspect.signature(demo).parameters['output'].default}," in TEXT
    (tasks,) = re.findall(r"--tasks (\S+)", TEXT)
    named = {re.search(r"^task: (\S+)$", file.read_text(), re.MULTILINE)[1] for file in TASKS.glob("*.yaml")}
    assert set(tasks.split(",")) == named
    for file in re.findall(r"[`/](\w+\.yaml)", TEXT):
        assert (ROOT / "examples" / "accelerate" / file).exists()
