"""Which releases are tested stands in one place, and a transformers beyond it is told so once."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

from scrubjay.configuration import tested_versions
from scrubjay.configuration.tested_versions import NEWEST, OLDEST, tell_of_untested, untested

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def pins(name):
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / name).read_text(), re.MULTILINE))


def test_what_is_pinned_is_within_what_is_recorded():
    pinned = {name.lower().replace("_", "-"): version for name, version in pins("constraints.txt").items()}
    assert set(NEWEST) == {"accelerate", "huggingface-hub", "peft", "transformers", "trl"}
    assert [name for name, newest in NEWEST.items() if Version(pinned[name]) > Version(newest)] == []
    assert Version(pins("constraints-oldest.txt")["transformers"]) == Version(OLDEST)


@pytest.mark.parametrize("version", [OLDEST, "5.20.1", NEWEST["transformers"], f"{NEWEST['transformers']}+abc"])
def test_nothing_is_said_within_the_range(version):
    assert untested(version) is None


@pytest.mark.parametrize(
    ("version", "kind"),
    [("99.0.0", "newer"), ("99.0.0.dev0", "newer"), (f"{NEWEST['transformers']}.1", "newer"), ("5.16.1", "older")],
)
def test_the_message_names_the_range_what_came_and_the_way_to_silence_it(version, kind, monkeypatch):
    said = untested(version)
    assert f"transformers {OLDEST} to {NEWEST['transformers']}; the installed {version} is {kind}" in said
    assert f"pip install 'transformers{'==' + NEWEST['transformers'] if kind == 'newer' else '>=' + OLDEST}'" in said
    way = re.search(r"warnings\.filterwarnings\(.*\)$", said)[0]
    monkeypatch.setattr(transformers, "__version__", version)
    monkeypatch.setattr(tested_versions, "told", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(way, {"warnings": warnings})
        tell_of_untested()
    assert caught == []
    monkeypatch.setattr(tested_versions, "told", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tell_of_untested()
        tell_of_untested()
    assert [(str(w.message), w.category) for w in caught] == [(said, UserWarning)]


def test_each_saved_model_says_it_once_and_not_after_the_package(entry, tmp_path, monkeypatch):
    """The folder's code runs beside the installed package, as for a model_type that is not registered."""
    monkeypatch.setattr(transformers, "__version__", "99.0.0")
    for told in (False, True):
        folder = tmp_path / f"{entry.name}_{told}"
        save_unregistered(entry, folder)
        for name in [name for name in sys.modules if name.endswith(".tested_versions")]:
            monkeypatch.setattr(sys.modules[name], "told", False)
        monkeypatch.setattr(tested_versions, "told", told)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules.")
        assert [str(warning.message) for warning in caught] == [untested("99.0.0")] * (not told)


def save_unregistered(entry, folder):
    entry.build().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": f"not_registered_{entry.name}"}))


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import", "folders"])
def test_one_process_is_told_once(first, tmp_path):
    """By the import of the package or by the folders of all six models, whichever comes first."""
    from zoo import ZOO

    for entry in ZOO:
        save_unregistered(entry, tmp_path / "models" / entry.name)
    own = {
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT / "examples"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(HERE / "versions_child.py"), first, str(tmp_path / "models")]
    run = subprocess.run(command, cwd=tmp_path, env=os.environ | own, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    at_first, then = json.loads(run.stdout)
    assert at_first == [untested("99.1.0.dev0")]
    assert then == []
