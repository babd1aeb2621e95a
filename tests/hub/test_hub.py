"""What travels with a checkpoint: self-contained, whole, and the same wherever it was saved from."""

import ast
import hashlib
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from scrubjay.conversion.export_hub import export
from scrubjay.modeling.hub.remote_code import code_files

ROOT = Path(__file__).parents[2]
FOLDERS = ("configuration", "kernels", "modeling", "conversion")


def test_flat_code_imports_its_siblings_and_public_packages_alone(entry):
    files = code_files(entry.model)
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, name
                assert f"{node.module}.py" in files, (name, node.module)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                assert "scrubjay" not in {n.partition(".")[0] for n in names}, name


def test_no_text_looks_like_a_relative_import(entry):
    """transformers finds relative imports by pattern, in docstrings too, and asks for a file of that name."""
    files = code_files(entry.model)
    for name, text in files.items():
        for found in re.findall(r"^\s*(?:import|from)\s+\.(\S+)", text, re.MULTILINE):
            assert f"{found}.py" in files, (name, found)


def test_own_imports_have_the_one_form_that_the_exporter_rewrites():
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            for line in re.findall(r"^.*\bscrubjay\.\w+.*$", text, re.MULTILINE):
                if re.match(r"\s*(from|import)\b", line):
                    assert re.match(r"\s*from scrubjay(\.\w+){2,} import \S", line), (path.name, line)


def test_saving_twice_writes_the_same_files(entry, tmp_path):
    entry.build().save_pretrained(tmp_path / "one")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two


def test_shards_load_too(entry, tmp_path):
    model = entry.build()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert all((a == b).all() for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_a_snapshot_of_the_hub_loads_offline(entry, tmp_path, monkeypatch):
    """The layout of a downloaded repository; there, every file's imports are checked."""
    model = entry.build()
    repository = tmp_path / "models--someone--model"
    # transformers copies a commit's code once: other code must be another commit
    commit = hashlib.sha1("".join(code_files(entry.model).values()).encode()).hexdigest()
    snapshot = repository / "snapshots" / commit
    model.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kind = json.loads((snapshot / "config.json").read_text()) | {"model_type": "not_registered_anywhere"}
    (snapshot / "config.json").write_text(json.dumps(kind))
    loaded = AutoModelForCausalLM.from_pretrained("someone/model", cache_dir=tmp_path, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules.")
    assert all((a == b).all() for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_a_file_in_the_way_is_refused(entry, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="needs a folder; got the file"):
        entry.build().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_export_writes_a_new_folder_or_nothing(entry, tmp_path):
    entry.build().save_pretrained(tmp_path / "source")
    files = export(tmp_path / "source", tmp_path / "new")
    assert {"config.json", "model.safetensors", "base.py"} <= set(files)
    with pytest.raises(ValueError, match="not an empty folder"):
        export(tmp_path / "source", tmp_path / "source")
