"""Real text with no network: the source of Python's own standard library, or the user's text.

A corpus is a list of documents (files) in two parts, training and held-out. Every model and every baseline reads the
same stream of token ids made from them: `eos doc eos doc eos ...`. The first eos is context only, so the stream of T
scored tokens has T + 1 ids, and the bits of all T tokens (the eos after each document among them) are divided by the
UTF-8 bytes of the documents.
"""

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOS = "<|endoftext|>"
HELDOUT_SHARE = 10  # one file in ten
MIN_BYTES = 1 << 16  # less text than this trains neither a tokenizer nor a model
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Documents of both parts, in an order that says nothing about their names (by hash), and what they are."""

    name: str
    train: list[str]
    heldout: list[str]

    def limited(self, train_bytes: int, heldout_bytes: int) -> "Corpus":
        """The same corpus cut to about so many bytes in each part."""
        return replace(self, train=cut(self.train, train_bytes), heldout=cut(self.heldout, heldout_bytes))


def load_corpus(text: str | Path | None = None) -> Corpus:
    """The standard library of the running Python, or the file or folder `text`, split in training and held-out."""
    if text is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        name = f"Python {sysconfig.get_python_version()} standard library"
        documents = read_documents(root, stdlib_files(root))
    else:
        root, name = Path(text), Path(text).name
        documents = read_documents(root, text_files(root))
    size = num_bytes(documents.values())
    if size < MIN_BYTES:
        raise ValueError(
            f"{root} holds {size:,} bytes of UTF-8 text, at least {MIN_BYTES:,} are needed to train a tokenizer and a "
            "model. Pass a larger file or folder, or leave out --text to use Python's standard library."
        )
    return Corpus(name, *split(documents))


def stdlib_files(root: Path) -> list[Path]:
    """Python files below `root` that are neither tests nor installed packages."""
    files = (path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1]))
    return sorted(files)


def text_files(path: Path) -> list[Path]:
    """The file itself, or every file below the folder whose path has no hidden part."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"--text {path} does not exist. Pass a file or folder of UTF-8 text, or leave out --text.")
    hidden = (any(part.startswith(".") for part in file.relative_to(path).parts) for file in path.rglob("*"))
    return sorted(file for file, skip in zip(path.rglob("*"), hidden, strict=True) if file.is_file() and not skip)


def read_documents(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """Text by path relative to `root`. Files that are empty or are not UTF-8 text are left out."""
    documents = {}
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and "\0" not in text:
            documents[file.relative_to(root).as_posix()] = text
    return documents


def split(documents: dict[str, str]) -> tuple[list[str], list[str]]:
    """Training and held-out documents: a tenth of the files by a hash of their names, else the last tenth of the text.

    The second rule is for a folder of few files (or one): by file, a part could be empty or far from a tenth.
    """
    names = sorted(documents, key=_digest)
    train = [documents[name] for name in names if _digest(name) % HELDOUT_SHARE]
    heldout = [documents[name] for name in names if not _digest(name) % HELDOUT_SHARE]
    share = num_bytes(heldout) / num_bytes(documents.values())
    if 0.05 < share < 0.2:
        return train, heldout
    text = "\n".join(documents[name] for name in sorted(documents))
    at = text.find("\n", len(text) - len(text) // HELDOUT_SHARE) + 1 or len(text) - len(text) // HELDOUT_SHARE
    return [text[:at]], [text[at:]]


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def cut(documents: list[str], limit: int) -> list[str]:
    """The first documents, at most `limit` bytes of them; the last one is cut at a line end where it has one."""
    kept = []
    for text in documents:
        raw = text.encode()
        if len(raw) > limit:
            head = raw[:limit]
            head = head[: head.rfind(b"\n") + 1] or head
            kept += [head.decode(errors="ignore")] if head else []
            break
        kept.append(text)
        limit -= len(raw)
    return [text for text in kept if text]


def num_bytes(documents: Iterable[str]) -> int:
    """UTF-8 bytes of all documents."""
    return sum(len(text.encode()) for text in documents)


def joined(documents: list[str]) -> bytes:
    """The bytes a general compressor sees: documents with a NUL after each, where the models see an eos."""
    return b"".join(text.encode() + b"\0" for text in documents)


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so every text has tokens and decoding gives the text back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """The stream `eos doc eos doc eos ...`: (T + 1,) int64 ids."""
    eos = tokenizer.eos_token_id
    parts = [np.array([eos])]
    for start in range(0, len(documents), 64):  # a batch at a time: an encoding is far larger than its ids
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(
            documents[start : start + 64], add_special_tokens=False
        ):
            parts.append(np.array([*encoding.ids, eos]))
    return np.concatenate(parts)
