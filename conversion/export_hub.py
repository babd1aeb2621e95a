"""From a folder or Hub name that a model of the zoo loads from, to a folder or repository that needs no zoo."""

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import has_file

from scrubjay.conversion.destination import check_destination, whole_or_nothing
from scrubjay.modeling.hub.publishing import TOKENIZER_FILES
from scrubjay.modeling.hub.remote_code import HEADS


def export(
    source: str,
    destination: str | Path,
    *,
    trust_remote_code: bool = False,
    push: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> list[str]:
    """Write a model, its code and its tokenizer, if it has one, into a new folder, and push them where asked.

    Args:
        source: folder or Hub name.
        destination: folder to make. It is there when all is in it, and not at all after an error or an interrupt.
        trust_remote_code: run code that comes with `source`.
        push: owner/name on the Hub that gets the same in one commit.
        private, revision: of that repository: whether to make it private; the branch to commit to.

    Returns: the names of the files written, sorted.

    Raises:
        ValueError: a destination that already holds something, a push of a model that is not the zoo's, options of a
            push without one, or a tokenizer that cannot be read; nothing is written then.
    """
    destination = Path(destination).resolve()  # a link to an empty folder stays, and is filled
    check_destination(destination)
    if push is None and (private or revision):
        raise ValueError("private and revision belong to a push: say to which owner/name.")
    model: Any = _auto_class(source, trust_remote_code).from_pretrained(source, trust_remote_code=trust_remote_code)
    if push is not None and not hasattr(model, "describe"):  # of the zoo, or loaded from code of the zoo
        raise ValueError(f"push writes models of scrubjay; {source} is a {type(model).__name__}. Call its push_to_hub.")
    tokenizer = _tokenizer(source, trust_remote_code)
    with whole_or_nothing(destination) as folder:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)  # first: the card says whether there is one
        model.save_pretrained(folder)
    if push is not None:
        model.push_to_hub(push, tokenizer=tokenizer, private=private, revision=revision)
    return sorted(path.name for path in destination.iterdir())


def _auto_class(source, trust_remote_code):
    """That of the head that the source has weights of; a language model's where it does not say."""
    saved = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code).architectures or [""]
    return getattr(transformers, f"AutoModel{next((kind for kind in HEADS if saved[0].endswith(kind)), HEADS[0])}")


def _tokenizer(source, trust_remote_code):
    """The source's; None of a model saved without one."""
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # of the tokenizer's parser too, which is of no kind of its own
        if not any(has_file(source, name) for name in TOKENIZER_FILES):
            return None
        raise ValueError(
            f"The tokenizer of {source} cannot be read, and the model would go without it. Repair its files, remove "
            f"them, or trust its code. {error}"
        ) from error
