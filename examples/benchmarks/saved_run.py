"""A run of `benchmark.py --cpu` as it grows: on disk after every row, so that one that was stopped goes on.

It stands beside the file of its result, named by PARTIAL, and takes that file's place only once all is measured.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from scrubjay.examples.benchmarks.benchmark_tables import PARTIAL
from scrubjay.examples.benchmarks.comparison import beside_weights
from scrubjay.examples.measuring.run_report import write_whole

ALIKE = ("commit", "machine", "versions", "shape", "repetitions")  # what two runs share whose rows may stand together
LOAD = "load_average_at_start"


def alike(run: dict) -> dict:
    """What must be the same, as a file holds it."""
    machine = {k: v for k, v in run.get("machine", {}).items() if k != LOAD}
    same = {key: run.get(key) for key in ALIKE} | {"machine": machine}
    return json.loads(json.dumps(same))


def write(path: Path, result: dict) -> None:
    """The whole file or none of it."""
    write_whole(path, json.dumps(result, indent=1) + "\n")


class SavedRun:
    """Where a run is on disk, and what an earlier one like it has measured.

    Args:
        out: the result's file; None keeps nothing.
        run: its command, commit, machine (with its load), versions, shape, repetitions.
        fresh: take nothing from an earlier run.
        log: takes a line that says what is kept, or why nothing is.
    """

    def __init__(self, out: Path | None, run: dict, *, fresh: bool = False, log: Callable[[str], None] = print):
        self.out, self.run = out, run
        self.path = out and out.with_name(out.stem + PARTIAL)
        self.found = {"ceilings": {}, "agreement": {}, "rows": []}
        if not (self.path and self.path.is_file() and not fresh):
            return
        earlier = json.loads(self.path.read_text(encoding="utf-8"))
        if reason := self._unlike(earlier):
            log(f"{self.path.name} is not continued: {reason}. All is measured anew.")
            return
        self.found = {key: earlier[key] for key in self.found}
        loads = (each["machine"][LOAD] for each in (earlier, run))
        self.run = run | {"machine": run["machine"] | {LOAD: max(loads)}}
        log(f"{len(self.found['rows'])} rows are kept from {self.path.name}; --fresh measures all anew.")

    def _unlike(self, earlier: dict) -> str:
        """Why the rows of another run may not stand beside this one's; "" where they may."""
        if str(self.run["commit"] or "+").endswith("+"):
            return "the code has changes that are not committed, or no history: nothing says that it is the same"
        mine, theirs = alike(self.run), alike(earlier)
        changed = [key for key in ALIKE if mine[key] != theirs[key]]
        return f"it has another {', '.join(changed)}" if changed else ""

    def save(self, measured: dict) -> None:
        """What is measured so far."""
        if self.path:
            write(self.path, self.run | {"complete": False} | measured)

    def finish(self, measured: dict) -> dict:
        """The result, in its place, from which what was before is gone."""
        result = self.run | {"complete": True} | measured
        if self.out and self.path:
            write(self.path, result)
            os.replace(self.path, self.out)
        return result


class Rows:
    """The records of a run in their order, each measured or kept from an earlier run.

    Args:
        measured: ceilings, agreement and rows found so far; changed in place.
        earlier: records that may be kept.
        save: takes what is measured after every record; None keeps nothing.
        log: takes a line for every record.
    """

    def __init__(
        self, measured: dict, earlier: list[dict], save: Callable[[dict], None] | None, log: Callable[[str], None]
    ):
        self.measured, self.save, self.log = measured, save, log
        self.earlier = {record["name"]: record for record in earlier}
        self.started = time.perf_counter()

    def missing(self, names: list[str]) -> bool:
        """Whether the earlier run lacks one of these."""
        return not self.earlier.keys() >= set(names)

    def keep(self, name: str) -> dict | None:
        """The earlier run's record of this name, which is this run's too; None where it has none."""
        record = self.earlier.get(name)
        if record:
            self.measured["rows"].append(record)
            self.log(f"  {said(record)} (kept)")
        return record

    def add(self, record: dict) -> dict:
        """A record just measured, with the seconds since the one before it: its models, its warm-up, its samples."""
        now = time.perf_counter()
        record = beside_weights(record, self.measured["ceilings"]["bytes_per_second"]["read"])
        record |= {"elapsed": now - self.started}
        self.started = now
        self.measured["rows"].append(record)
        self.log(f"  {said(record)} ({record['elapsed']:.0f} s)")
        if self.save:
            here = {each["name"] for each in self.measured["rows"]}
            later = [each for name, each in self.earlier.items() if name not in here]  # this run may be stopped too
            self.save(self.measured | {"rows": [*self.measured["rows"], *later]})
        return record


def said(record: dict) -> str:
    """A record in a line, as it comes."""
    ratios = {"ratio": "", "of_products": " of its products", "of_weights": " of reading its weights"}
    found = [f"{record[key]:.2f}x{what}" for key, what in ratios.items() if record.get(key) is not None]
    return f"{record['name']}: {', '.join(found)}"
