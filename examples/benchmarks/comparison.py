"""A line of a benchmark: the same work done two ways.

Times are taken in turn (peer, scrubjay, peer, ...), so that whatever else runs on the machine slows both.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

SIDES = ("peer", "scrubjay")


@dataclass(frozen=True)
class Comparison:
    """Two ways to do one thing.

    Args:
        make: gives the work of each side, made only once the line is measured. A work returns how many units (tokens,
            passes) it did, and a sample is its seconds a unit; or, where `unit` is "bytes", what it weighs.
        floor: the ratio peer / scrubjay that the project promises, None where it promises none.
    """

    name: str
    make: Callable[[], Mapping[str, Callable[[], int]]]
    floor: float | None = None
    unit: str = "seconds"

    def measure(self, repetitions: int) -> dict:
        """A record of the line."""
        sides = self.make()
        if self.unit == "bytes":
            return summarized(self.name, {side: [sides[side]()] for side in SIDES}, self.floor, self.unit)
        return summarized(self.name, in_turn(sides, repetitions), self.floor)


def in_turn(sides: Mapping[str, Callable[[], int]], repetitions: int) -> dict[str, list[float]]:
    """Seconds a unit of each side, after one unmeasured pass of each."""
    for side in SIDES:
        sides[side]()
    samples: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(repetitions):
        for side in SIDES:
            started = time.perf_counter()
            units = sides[side]()
            samples[side].append((time.perf_counter() - started) / units)
    return samples


def summarized(name: str, samples: Mapping[str, list], floor: float | None, unit: str = "seconds") -> dict:
    """A record of a line: every sample, the medians and their ratio."""
    middle = {side: median(values) for side, values in samples.items()}
    ratio = middle["peer"] / max(middle["scrubjay"], 1e-9)  # memory can be 0 at tiny sizes
    return {"name": name, "unit": unit, **middle, "ratio": ratio, "floor": floor, "samples": samples}
