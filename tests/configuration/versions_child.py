"""What a newer transformers is told: python versions_child.py import|folders FOLDER

import: scrubjay first, then the folders of saved models; folders: these without scrubjay, which is imported after them.
Prints, as JSON, the warnings that came of each step: of the first and of the second.
"""

import json
import sys
import warnings
from pathlib import Path

import transformers
from isolated import Absent
from transformers import AutoModelForCausalLM

transformers.__version__ = "99.1.0.dev0"


def package() -> None:
    """What a user of the library does."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Absent)]
    import scrubjay  # noqa: F401


def folders() -> None:
    """What a stranger does, with every folder."""
    for folder in sorted(Path(sys.argv[2]).iterdir()):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules.")


def warned(step) -> list[str]:
    """The messages of all warnings that it raises."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    return [str(warning.message) for warning in caught]


if __name__ == "__main__":
    sys.meta_path.insert(0, Absent())
    steps = [package, folders] if sys.argv[1] == "import" else [folders, package]
    sys.stdout.write(json.dumps([warned(step) for step in steps]))
