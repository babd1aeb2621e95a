"""What a stranger does with a Hub, where scrubjay cannot be imported: python hub_load_child.py FOLDER TOKEN

HF_HOME is empty and there is no token but the one in the arguments. Outcomes go to FOLDER/loaded.json.
"""

import contextlib
import io
import json
import os
import pickle
import re
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

from isolated import Absent

sys.meta_path.insert(0, Absent())

import torch  # noqa: E402
from huggingface_hub import HfApi, hf_hub_download  # noqa: E402
from huggingface_hub.constants import HF_HOME  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

OUT, TOKEN = Path(sys.argv[1]), sys.argv[2]
NAMES = ("ssd", "rodimus", "rodimus_plus", "taipan", "ssd_hybrid", "adore", "recycled")
IDS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))


def load(name: str, **options):
    """A model by its name on the Hub, with its code."""
    return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **options).eval()


def difference(model, label: str) -> float:
    """The largest between the logits of a model and those that its author kept under a label."""
    with torch.no_grad():
        return float((model(IDS).logits - torch.load(OUT / f"{label}.pt")).abs().max())


def error_of(call) -> str:
    """What a call that must fail says."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def faults(**wanted) -> None:
    """Make the server have these, and only these."""
    urlopen(Request(f"{os.environ['HF_ENDPOINT']}/faults", json.dumps(wanted).encode(), method="PUT")).close()


def blocks(name: str, **options) -> list[str]:
    """The Python blocks of a card."""
    text = Path(hf_hub_download(name, "README.md", **options)).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(block: str) -> str:
    """What it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(block, "card", "exec"), {})
    return output.getvalue()


def code_here() -> list[Path]:
    """Code that transformers has copied to run it."""
    return list((Path(HF_HOME) / "modules").rglob("modeling_*.py"))


def every_architecture() -> dict:
    found = {}
    for name in NAMES:
        refused = error_of(lambda at=f"jay/{name}": AutoModelForCausalLM.from_pretrained(at, trust_remote_code=False))
        before = [file for file in code_here() if name in file.parts]
        model = load(f"jay/{name}")
        generated = model.generate(IDS, max_new_tokens=5, do_sample=False)
        found[name] = {
            "refused": refused,
            "code_before": len(before),
            "code_after": len([file for file in code_here() if name in file.parts]),
            "difference": difference(model, name),
            "pickled": difference(pickle.loads(pickle.dumps(model)), name),
            "class": f"{type(model).__module__}.{type(model).__name__}",
            "generated": list(generated.shape),
            "headless": type(AutoModel.from_pretrained(f"jay/{name}", trust_remote_code=True)).__name__,
            "blocks": [run(block) for block in blocks(f"jay/{name}")],
        }
    return found


def marks() -> dict:
    """Whether code that leaves a mark ran, without and then with leave."""
    refused = error_of(lambda: AutoModelForCausalLM.from_pretrained("jay/marked", trust_remote_code=False))
    check = run(blocks("jay/marked")[-1])
    before = (OUT / "mark").exists()
    load("jay/marked")
    return {"refused": refused, "before": before, "after": (OUT / "mark").exists(), "check": check}


def revisions() -> dict:
    loaded = {"v2": "v2", "refs/pr/1": "proposed", "v1.0": "ssd", "main": "ssd"}
    found = {name: difference(load("jay/ssd", revision=name), label) for name, label in loaded.items()}
    commit = HfApi().model_info("jay/ssd", revision="v2").sha
    found["commit"] = difference(load("jay/ssd", revision=commit), "v2")
    found["blocks"] = [run(block) for block in blocks("jay/ssd", revision="v2")]
    found["none"] = error_of(lambda: load("jay/ssd", revision="v3"))
    return found


def access() -> dict:
    return {
        "without": error_of(lambda: load("jay/secret")),
        "with": difference(load("jay/secret", token=TOKEN), "secret"),
        "wrong": error_of(lambda: load("jay/secret", token="hf_of_a_crow", cache_dir=OUT / "crow")),
        "exported": difference(load("jay/exported", revision="next", token=TOKEN), "exported"),
    }


def after_faults() -> dict:
    found = {
        "jay/grown": difference(load("jay/grown"), "grown"),
        "jay/broken": difference(load("jay/broken"), "broken"),
        "jay/once": difference(load("jay/once"), "once"),
        "jay/trained": difference(load("jay/trained"), "trained"),
        "jay/averaged": difference(load("jay/averaged"), "averaged"),
        "jay/never": error_of(lambda: load("jay/never")),
    }
    for kind in ("cut", "shrink"):
        options = {"cache_dir": OUT / kind}
        faults(**{kind: "model.safetensors"})
        found[kind] = error_of(lambda options=options: load("jay/rodimus", **options))
        faults()
        found[f"{kind}, then whole"] = difference(load("jay/rodimus", **options), "rodimus")
    return found


def tokenizers() -> dict:
    found = {}
    for name, options in (("ssd", {}), ("exported", {"revision": "next", "token": TOKEN})):
        tokenizer = AutoTokenizer.from_pretrained(f"jay/{name}", trust_remote_code=True, **options)
        ids = tokenizer("w5 w7 w96")["input_ids"]
        found[name] = {"ids": ids, "text": tokenizer.decode(ids), "eos": tokenizer.eos_token}
    return found


def push_again() -> dict:
    """What was loaded from the Hub goes there again, from code that came from there."""
    model = load("jay/rodimus_plus")
    model.push_to_hub("jay/second", token=TOKEN, tokenizer=AutoTokenizer.from_pretrained("jay/rodimus_plus"))
    model.push_to_hub("jay/rodimus_plus", token=TOKEN, commit_message="Again")
    return {"difference": difference(load("jay/second"), "rodimus_plus")}


def main() -> None:
    logging.disable_progress_bar()
    time.sleep = lambda seconds: None  # the client waits between its attempts
    found = {"architectures": every_architecture(), "marks": marks(), "revisions": revisions(), "access": access()}
    found |= {"after": after_faults(), "tokenizers": tokenizers(), "again": push_again()}
    found["scrubjay"] = "scrubjay" in sys.modules
    (OUT / "loaded.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
