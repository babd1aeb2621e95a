"""Every Python block of every guide, those of a page run in order as one program, and every file that they name."""

import inspect
import re
from pathlib import Path

import pytest

from scrubjay.examples.demo import demo

ROOT = Path(__file__).parents[1]
TASKS = ROOT / "examples" / "lm_eval_tasks"
ROOMS = ("configuration", "kernels", "modeling", "conversion", "examples", "tests")
PAGES = [*ROOT.glob("*.md"), *(page for room in ROOMS for page in (ROOT / room).rglob("README.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for name, text in TEXTS.items()}
README = TEXTS["README.md"]


@pytest.mark.parametrize("name", [name for name, blocks in BLOCKS.items() if blocks])
def test_python_blocks_run_as_written(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    for number, block in enumerate(BLOCKS[name]):
        exec(compile(block, f"{name}, block {number}", "exec"), space)


def test_the_first_page_is_short_and_shows_five_tasks():
    assert README.count("\n") <= 200
    assert len(BLOCKS["README.md"]) == 5
    assert sum(map(len, BLOCKS.values())) >= 20


def anchors(text):
    """What the heads of a page are called in links."""
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_pictures_exist(name):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXTS[name]):
        path, _, anchor = target.partition("#")
        page = (ROOT / name).parent / path if path else ROOT / name
        assert page.exists(), target
        assert not anchor or anchor in anchors(page.read_text(encoding="utf-8")), target


def test_every_guide_can_be_reached_from_the_first_page():
    found, waiting = set(), ["README.md"]
    while waiting:
        name = waiting.pop()
        found.add(name)
        for target in re.findall(r"\]\((?!https?:)([^)#]+\.md)", TEXTS[name]):
            page = ((ROOT / name).parent / target).resolve().relative_to(ROOT).as_posix()
            waiting += [page] if page not in found else []
    assert found == set(TEXTS)


@pytest.mark.parametrize("name", TEXTS)
def test_commands_exist(name):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)", TEXTS[name]):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(
        r"(?<![\w/])((?:examples|tests|kernels|modeling|conversion|configuration)/(?!__init__)[\w/]+\.(?:py|md|json|yaml))",
        TEXTS[name],
    ):
        assert (ROOT / script).exists(), script
    for file in re.findall(r"[`/](\w+\.yaml)", TEXTS[name]):
        assert list((ROOT / "examples").rglob(file)), file


def test_the_command_of_lm_eval_names_the_tasks_and_the_demos_folder():
    text = TEXTS["examples/README.md"]
    assert f"pretrained={inspect.signature(demo).parameters['output'].default}," in text
    asked = {task for tasks in re.findall(r"--tasks (\S+)", text) for task in tasks.split(",")}
    files = (re.search(r"^task: (\S+)$", file.read_text(), re.MULTILINE) for file in TASKS.glob("*.yaml"))
    named = {found[1] for found in files if found}
    assert asked <= named
    assert set(re.findall(r"\bscrubjay_\w+", text)) == named
