"""A training that goes on after a stop: all that it needs, in one file that is written whole now and then."""

import os
from pathlib import Path

import numpy as np
import torch


class Resuming:
    """The parameters that an optimizer holds, it, its schedule, the generators of chance, and lists of what was found.

    Args:
        path: of the file; `done` removes it.
        lists: by name; they are filled again in place.
    """

    def __init__(self, path: Path, optimizer, schedule, rng: np.random.Generator, lists: dict[str, list[float]]):
        self.path, self.optimizer, self.schedule, self.rng, self.lists = path, optimizer, schedule, rng, lists

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self) -> int:
        """Steps that are done: those of the file, whose state is taken, or none."""
        if not self.path.is_file():
            return 0
        held = torch.load(self.path, weights_only=True)
        with torch.no_grad():
            for parameter, saved in zip(self._parameters(), held["parameters"], strict=True):
                parameter.copy_(saved)
        self.optimizer.load_state_dict(held["optimizer"])
        self.schedule.load_state_dict(held["schedule"])
        self.rng.bit_generator.state = held["rng"]
        torch.set_rng_state(held["torch"])
        for name, values in held["lists"].items():
            self.lists[name][:] = values
        return held["step"]

    def keep(self, step: int) -> None:
        """Write the state after `step` steps."""
        held = {"step": step, "parameters": [p.detach() for p in self._parameters()], "lists": self.lists}
        held |= {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        held |= {"rng": self.rng.bit_generator.state, "torch": torch.get_rng_state()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        torch.save(held, new)
        os.replace(new, self.path)

    def done(self) -> None:
        """Nothing is left to do."""
        self.path.unlink(missing_ok=True)
