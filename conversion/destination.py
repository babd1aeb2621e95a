"""The folder that a command makes: all of it is there at the end, or nothing."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scrubjay.conversion.checkpoint import CONFIGS


def check_destination(destination: Path) -> None:
    """Refuse a destination that already holds something.

    Raises:
        ValueError: names the destination and what it holds.
    """
    if not destination.exists():
        return
    if not destination.is_dir():
        raise ValueError(f"{destination} is a file. Name a new folder.")
    held = sorted(path.name for path in destination.iterdir())
    if held:
        more = ", ..." if len(held) > 3 else ""
        raise ValueError(
            f"{destination} already exists and is not an empty folder: it holds {', '.join(held[:3])}{more}. Name a "
            "new folder."
        )


@contextmanager
def whole_or_nothing(destination: Path) -> Iterator[Path]:
    """A hidden folder to write files in, which are those of the destination at the end; gone on any error or interrupt.

    A new destination takes its place at once. One that is an empty folder stays the folder that it is, which may be a
    mount point, shared by a group, or of a parent that nobody may write: the files are moved into it.

    Raises:
        OSError: a place that cannot be written.
        ValueError: a folder into which another process wrote meanwhile.
    """
    exists = destination.is_dir()
    parents = [parent for parent in destination.parents if not parent.exists()]  # the deepest first
    folder = (destination if exists else destination.parent) / f".{destination.name}-{secrets.token_hex(4)}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        if exists:
            _check_alone(folder)
        yield folder
        if exists:
            _move(folder, destination)
        else:
            os.rename(folder, destination)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in parents:
            with suppress(OSError):  # another process uses it
                parent.rmdir()
        raise


def _check_alone(folder):
    """Of two processes in one destination at least one sees the other: both have made their folders by then."""
    others = sorted(path.name for path in folder.parent.iterdir() if path != folder)
    if others:
        raise ValueError(f"Another process writes into {folder.parent}: {', '.join(others[:3])}. Name a new folder.")


def _move(folder, destination):
    """The configuration comes last: without it nothing loads from there."""
    moved: list[Path] = []
    _check_alone(folder)
    try:
        for path in sorted(folder.iterdir(), key=lambda path: (path.name in CONFIGS, path.name)):
            if (destination / path.name).exists():
                raise ValueError(
                    f"{destination / path.name} was written meanwhile by another process. Name a new folder."
                )
            os.rename(path, destination / path.name)
            moved.append(destination / path.name)
        folder.rmdir()
    except BaseException:
        for path in moved:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        raise
