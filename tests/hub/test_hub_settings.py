"""A folder's settings are those of the cache that its own code makes, where scrubjay cannot be imported.

For a folder's own code transformers makes one copy for the configuration and another for the model, so the class of the
configuration is not the one that the model's code knows.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from zoo import ZOO

ROOT = Path(__file__).parents[2]
PROMPT = [[5, 9, 3, 7, 11, 2, 8, 6] * 5]
FEW = {
    "snapkv": ("recycled", {"policy": "snapkv", "budget": 6, "window": 2}),
    "lowrank": ("recycled", {"policy": "lowrank", "budget": 6, "rank": 2, "choosing_layers": [1]}),
    "adore": ("adore", {"cache_size": 7, "rebuild": 2, "sinks": 1}),
}
CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
from isolated import Absent
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    out = model.generate(torch.tensor(json.loads(sys.argv[2])), max_new_tokens=6, do_sample=False, eos_token_id=None,
                         return_dict_in_generate=True, output_logits=True)
    cache = out.get("cache") or out.get("past_key_values")
    names = json.load(open(folder + "/asked.json"))
    told = {name: getattr(cache.settings, name) for name in names}
    print("FOUND", json.dumps([told, [row[0].tolist() for row in out.logits]]))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{name: (model, settings of the cache, logits)} of folders that another process has read."""
    folder, models = tmp_path_factory.mktemp("few"), {}
    for name, (kind, settings) in FEW.items():
        entry = next(entry for entry in ZOO if entry.name == kind)
        models[name] = entry.build(**settings).eval()
        models[name].save_pretrained(folder / name)
        (folder / name / "asked.json").write_text(json.dumps(list(settings)))
    arguments = [str(ROOT / "examples"), json.dumps(PROMPT), *(str(folder / name) for name in FEW)]
    home = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CHILD, *arguments]
    done = subprocess.run(command, env=os.environ | home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return {name: (models[name], *told) for name, told in zip(FEW, said, strict=True)}


@pytest.mark.parametrize("name", FEW)
def test_a_folders_settings_are_its_caches(found, name):
    model, settings, logits = found[name]
    assert settings == FEW[name][1]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    mine = torch.stack(model.generate(torch.tensor(PROMPT), **options).logits)[:, 0]
    torch.testing.assert_close(mine, torch.tensor(logits), atol=1e-5, rtol=0)  # measured: 4e-7
    full = model.generate(torch.tensor(PROMPT), **options, use_cache=False).logits
    assert not torch.allclose(mine, torch.stack(full)[:, 0], atol=1e-3)  # few keys are not all
