"""A folder that one version of transformers saved, loaded under another, by its own code:

    python tests/hub/across_versions.py save FOLDER     every model of the zoo, and what it generates
    python tests/hub/across_versions.py check FOLDER    in another environment: the same tokens, without scrubjay

`make test-oldest` does it with the oldest version and the pinned one, both ways.
"""

import json
import sys
from pathlib import Path

import torch

LENGTH, NEW = 20, 12


def transformers_is_quiet() -> None:
    """No progress bars and no advice."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def prompt() -> dict[str, torch.Tensor]:
    """Two rows, one of them padded on the left."""
    ids = torch.randint(0, 97, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, **options) -> list[list[int]]:
    """Greedy tokens, in float64: a tie within float32's rounding would be a coin toss."""
    options |= dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return model.generate(**prompt(), **options).tolist()


def save(folder: Path) -> None:
    """Write each model beside its tokens."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    transformers_is_quiet()
    import transformers
    from zoo import ZOO

    for entry in ZOO:
        model = entry.build(torch.float64)
        model.save_pretrained(folder / entry.name)
        (folder / f"{entry.name}.json").write_text(json.dumps(generated(model)))
    print(f"saved {len(ZOO)} models with transformers {transformers.__version__}")


def check(folder: Path) -> None:
    """Load each model where scrubjay is absent; with and without a cache it gives the tokens that were kept."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from isolated import Absent

    sys.meta_path.insert(0, Absent())
    transformers_is_quiet()
    import transformers

    names = sorted(path.stem for path in folder.glob("*.json"))
    wrong = []
    for name in names:
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(folder / name, trust_remote_code=True, dtype=torch.float64).eval()
        assert type(model).__module__.startswith("transformers_modules."), "the folder's own code was to be tested"
        want = json.loads((folder / f"{name}.json").read_text())
        wrong += [f"{name}, use_cache={use}" for use in (True, False) if generated(model, use_cache=use) != want]
    if wrong or not names:
        sys.exit(f"other tokens with transformers {transformers.__version__}: {wrong or 'nothing was saved'}")
    print(f"{len(names)} models give the same tokens with transformers {transformers.__version__}: {', '.join(names)}")


if __name__ == "__main__":
    {"save": save, "check": check}[sys.argv[1]](Path(sys.argv[2]))
