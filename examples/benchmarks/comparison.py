"""A line of a benchmark: the same work done in several ways.

Times are taken in turn (peer, scrubjay, peer, ...), so that whatever else runs on the machine slows all.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

SIDES = ("peer", "scrubjay")
ENOUGH = 20.0  # seconds of samples of one line, where two of each side do not take longer
LEAST = 2  # samples of each side, however long one is
WARM = 5.0  # seconds of a pass that starts cold and is slowed by nothing that shows


@dataclass(frozen=True)
class Comparison:
    """Ways to do one thing: "scrubjay", and "peer" or "products" (the line's matrix products and nothing else) or both.

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
    """Seconds a unit of each side, after one unmeasured pass of each; a pass of WARM seconds needs none before it.

    There are `repetitions` samples of each, fewer where those would take longer than ENOUGH, and always two.
    """
    samples: dict[str, list[float]] = {side: [] for side in sides}
    whole = 0.0
    for side, work in sides.items():
        seconds, units = timed(work)
        whole += seconds
        if seconds >= WARM:
            samples[side].append(seconds / units)
    count = min(repetitions, max(LEAST, int(ENOUGH / max(whole, 1e-9))))
    for turn in range(count):
        for side, work in sides.items():
            if len(samples[side]) <= turn:
                seconds, units = timed(work)
                samples[side].append(seconds / units)
    return samples


def timed(work: Callable[[], int]) -> tuple[float, int]:
    """Seconds of a pass, and how many units it did."""
    started = time.perf_counter()
    units = work()
    return time.perf_counter() - started, units


def summarized(name: str, samples: Mapping[str, list], floor: float | None, unit: str = "seconds") -> dict:
    """A record of a line: every sample, the medians, and peer / scrubjay, scrubjay / products where it has those."""
    middle = {side: median(values) for side, values in samples.items()}
    ours = max(middle["scrubjay"], 1e-9)  # memory can be 0 at tiny sizes
    ratio = middle["peer"] / ours if "peer" in middle else None
    record = {"name": name, "unit": unit, **middle, "ratio": ratio, "floor": floor, "samples": samples}
    return record | ({"of_products": middle["scrubjay"] / middle["products"]} if "products" in middle else {})


def beside_weights(record: dict, read_bandwidth: float) -> dict:
    """The record of a decode step with the seconds in which the weights are read once, at so many bytes a second."""
    if "weight_bytes" not in record:
        return record
    once = record["weight_bytes"] / read_bandwidth
    return record | {"weights_once": once, "of_weights": record["scrubjay"] / once}
