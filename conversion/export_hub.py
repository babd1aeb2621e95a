"""From a folder or Hub name that a model of the zoo loads from, to a folder that loads where the zoo is absent."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer


def export(source: str, destination: str | Path, *, trust_remote_code: bool = False) -> list[str]:
    """Write a model, its code and its tokenizer, if it has one, into a new folder.

    Args:
        source: folder or Hub name.
        destination: folder to make.
        trust_remote_code: run code that comes with `source`.

    Returns: the names of the files written, sorted.

    Raises:
        ValueError: a destination that already holds something; it is left as it is.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} already exists and is not an empty folder. Name a new folder.")
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):  # a model saved without one
        tokenizer = None
    model.save_pretrained(destination)
    if tokenizer is not None:
        tokenizer.save_pretrained(destination)
    return sorted(path.name for path in destination.iterdir())
