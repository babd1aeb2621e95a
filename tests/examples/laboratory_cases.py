"""Cells that cost nothing, in a module that processes can import; as a command, a laboratory that is killed."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from scrubjay.examples.studies.cells import Cell
from scrubjay.examples.studies.laboratory import Laboratory

FAILS, DIES, WAITS = "fails", "dies", "waits"


def drawn(cell):
    """A result that the seed, and nothing that ran before, decides; some models do not get there."""
    if cell.model == FAILS:
        raise RuntimeError(f"nothing of {cell.seed}")
    if cell.model == DIES:
        os._exit(7)
    if cell.model == WAITS:
        time.sleep(cell.settings["seconds"])
    return {"drawn": torch.rand(2).tolist(), "score": cell.rate - 10 * (cell.rate - 0.03) ** 2}


def cells(model="draws", seeds=4, **settings):
    return [Cell("test", model, seed, 0.1, settings) for seed in range(seeds)]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    listed = [*cells(seeds=2), *cells(WAITS, seeds=1, seconds=60)]
    Laboratory(Path(sys.argv[1]), "python killed.py", workers=int(sys.argv[2])).run(listed, drawn)
