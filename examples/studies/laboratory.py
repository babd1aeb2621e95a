"""A queue of cells that resumes: many small trainings, their records in one JSON file.

A study is a list of cells (cells.py) and a function `work(cell) -> dict` that does one of them:

    cells = [Cell("recall", model, seed, 3e-3, {"pairs": 32}) for model in ("ssd", "mine") for seed in range(3)]
    Laboratory(Path("recall.json"), command).run(cells, work)

Every finished cell is on disk at once and is not run again; Ctrl-C loses the cell at work alone, and the same command
goes on. A cell that fails is recorded with its error, stops no other, and is tried again by the next command. Where
rates are tuned, `Tuning` lists the cells: first the grid on seeds of its own, then the reported seeds at the best rate.

A study's command line has, from `study_parser`:

    --plan               what is missing, with the time that it will take by the cells that are there
    --only PATTERN       cells whose name has the regular expression: --only 'rodimus .*pairs=32'
    --workers N          processes, each with cpu_count / N threads: tiny models use two cores better as two processes
    --minutes M          begin no cell after that time
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from multiprocessing import connection
from pathlib import Path

import torch

from scrubjay.examples.measuring.run_report import commit, machine, versions, write_whole
from scrubjay.examples.studies.cells import Cell, cell_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def said(line: str) -> None:
    """A line at once, also into a file."""
    print(line, flush=True)


Work = Callable[[Cell], dict]
Cells = Sequence[Cell] | Callable[[list[dict]], Sequence[Cell]]


class Laboratory:
    """Runs cells that are not done yet, and keeps every one in a file as soon as it is.

    Args:
        out: JSON file, a record a line; it may hold other studies' cells too. None keeps nothing.
        command: the command line, kept with each record.
        version: of the study's code: raise it when a change makes old results worthless. Records of another version
            count as missing, and stay until they are replaced.
        workers: processes. One works in this process, where `work` may be any function; for more it must be
            importable.
        threads: of torch in each; None divides the processors among the workers.
        only: regular expression that a cell's name must have.
        log: takes a line for every cell.
    """

    def __init__(
        self,
        out: Path | None,
        command: str,
        *,
        version: int = 1,
        workers: int = 1,
        threads: int | None = None,
        only: str | None = None,
        log: Callable[[str], None] = said,
    ):
        if workers < 1 or (threads is not None and threads < 1):
            raise ValueError(f"workers and threads must be at least 1; got {workers} and {threads}.")
        self.out, self.version, self.workers, self.only, self.log = out, version, workers, only, log
        self.threads = threads or max((os.cpu_count() or 1) // workers, 1)
        self.origin = {"command": command, "commit": commit(), "versions": versions(), "version": version}
        self.found: dict[str, dict] = {}

    def stored(self) -> dict[str, dict]:
        """Records by their cells' keys: those on disk, which another process may have added to, and our own."""
        disk = json.loads(self.out.read_text(encoding="utf-8")) if self.out and self.out.is_file() else []
        if not isinstance(disk, list) or not all("cell" in record for record in disk):
            raise ValueError(f"{self.out} holds something else than a laboratory's records. Take another --out.")
        return {cell_of(record).key: record for record in disk} | self.found

    def records(self) -> list[dict]:
        """Of this version of the study, those of cells that failed among them."""
        return [record for record in self.stored().values() if record["version"] == self.version]

    def run(self, cells: Cells, work: Work, minutes: float | None = None) -> list[dict]:
        """Do every cell that is not done, in their order.

        Args:
            cells: a list, or a function that makes it from the records so far: what comes next may depend on them.
            work: does a cell, with torch's generator seeded; returns what JSON can hold, without NaN.
            minutes: after which no further cell is begun; None: all are done.

        Returns: the records of all these cells that are done, failed ones included, in their order.
        """
        end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        queue = _Queue(self, cells, end)
        try:
            if self.workers == 1:
                before = torch.get_num_threads()
                torch.set_num_threads(self.threads)
                try:
                    while cell := queue.take():
                        queue.done(cell, attempt(cell, work))
                finally:
                    torch.set_num_threads(before)
            else:
                self._in_processes(queue, work)
        except KeyboardInterrupt:
            kept = f"are in {self.out.name}; the same command goes on" if self.out else "are lost"
            self.log(f"Stopped. {len(self.found)} cells of this run {kept}.")
            raise
        known = self.stored()
        return [known[cell.key] for cell in queue.listed() if cell.key in known]

    def _in_processes(self, queue: "_Queue", work: Work) -> None:
        """Hand cells to processes, one each at a time; a process that dies is a cell that failed, and is replaced."""
        idle: list[_Worker] = []
        busy: dict[connection.Connection, tuple[_Worker, Cell]] = {}
        try:
            while True:
                while len(busy) < self.workers and (cell := queue.take()):
                    worker = idle.pop() if idle and idle[-1].process.is_alive() else _Worker(work, self.threads)
                    worker.pipe.send(cell)
                    busy[worker.pipe] = worker, cell
                if not busy:
                    return
                for pipe in connection.wait(list(busy)):
                    worker, cell = busy.pop(pipe)
                    try:
                        outcome = worker.pipe.recv()
                        idle.append(worker)
                    except (EOFError, ConnectionResetError):
                        outcome = {"error": f"Its process ended with exit code {worker.end()}."}
                    queue.done(cell, outcome)
        finally:
            for worker in [*idle, *(worker for worker, _ in busy.values())]:
                worker.end()

    def keep(self, cell: Cell, outcome: dict) -> None:
        """A cell's outcome, on disk: the whole file or none of it."""
        record = json.loads(json.dumps({"cell": asdict(cell)} | outcome | self.origin))
        with self._alone():
            there = self.stored().get(cell.key, {})
            if "result" in there and "error" in record and there["version"] == self.version:
                self.found.pop(cell.key, None)  # another process did it meanwhile
                return
            self.found[cell.key] = record
            if self.out is not None:
                lines = ",\n".join(json.dumps(record) for record in self.stored().values())
                write_whole(self.out, f"[\n{lines}\n]\n")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process reads the file to write it back meanwhile, where the system has such locks."""
        if self.out is None or fcntl is None:
            yield
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        place = os.open(self.out.parent, os.O_RDONLY)  # the folder's: the file itself is replaced
        try:
            with suppress(OSError):  # some network folders have none
                fcntl.flock(place, fcntl.LOCK_EX)
            yield
        finally:
            os.close(place)

    def plan(self, cells: Sequence[Cell], cost: Callable[[Cell], float] = lambda cell: 1.0) -> str:
        """What is missing, a line for what differs in seeds and rates alone with its time by what like it took, and the
        whole.

        Args:
            cost: a number that a cell's time is proportional to within its model; carries times over to other sizes.
        """
        done = {cell_of(record): record for record in self.records() if "result" in record}
        missing = [cell for cell in self.wanted(cells) if cell not in done]
        seconds = [self._expected(cell, done, cost) for cell in missing]
        alike: dict[str, list[float | None]] = {}
        for cell, expected in zip(missing, seconds, strict=True):
            alike.setdefault(cell.name.partition(" rate=")[0], []).append(expected)
        lines = [
            f"{len(times):3d} x {'?' if times[0] is None else f'{times[0] / 60:.1f} m':>8}  {name}"
            for name, times in alike.items()
        ]
        known, unknown = [each for each in seconds if each is not None], seconds.count(None)
        hours = sum(known) / 3600 / self.workers
        more = f", and {unknown} of which nothing like them is done" if unknown else ""
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        return "\n".join([*lines, f"{len(missing)} cells are missing: {hours:.1f} h with {workers}{more}"])

    @staticmethod
    def _expected(cell: Cell, done: dict[Cell, dict], cost: Callable[[Cell], float]) -> float | None:
        """Median seconds of cells that differ in seed or rate alone, else of its model by cost, else of the study."""
        for alike in (
            lambda other: (other.study, other.model, other.settings) == (cell.study, cell.model, cell.settings),
            lambda other: (other.study, other.model) == (cell.study, cell.model),
            lambda other: other.study == cell.study,
        ):
            times = [record["seconds"] / cost(other) for other, record in done.items() if alike(other)]
            if times:
                return cost(cell) * statistics.median(times)
        return None

    def wanted(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those that `only` lets through, each once."""
        return [cell for cell in dict.fromkeys(cells) if self.only is None or re.search(self.only, cell.name)]


class _Queue:
    """What of a laboratory's cells is to do next."""

    def __init__(self, laboratory: Laboratory, cells: Cells, end: float):
        self.laboratory, self.cells, self.end = laboratory, cells, end
        self.taken: set[Cell] = set()

    def listed(self) -> list[Cell]:
        laboratory = self.laboratory
        return laboratory.wanted(self.cells(laboratory.records()) if callable(self.cells) else self.cells)

    def take(self) -> Cell | None:
        """The first that is neither done nor taken; None where there is none (now), or the time is over."""
        if time.monotonic() >= self.end:
            return None
        done = {cell_of(record) for record in self.laboratory.records() if "result" in record}
        cell = next((cell for cell in self.listed() if cell not in done and cell not in self.taken), None)
        if cell:
            self.taken.add(cell)
            self.laboratory.log(cell.name)
        return cell

    def done(self, cell: Cell, outcome: dict) -> None:
        self.laboratory.keep(cell, outcome)
        how = f"FAILED: {outcome['error']}" if "error" in outcome else f"done in {outcome['seconds']:.0f} s"
        self.laboratory.log(f"{cell.name}: {how}")


def attempt(cell: Cell, work: Work) -> dict:
    """{"result", "seconds", "cpu_seconds", "machine"} of a cell, or {"error", ...} in place of the result."""
    torch.manual_seed(cell.seed)
    wall, processor = time.perf_counter(), time.process_time()
    try:
        result = json.loads(json.dumps(work(cell), allow_nan=False))
        outcome = {"result": result}
    except Exception as error:  # whatever it is: the other cells go on
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"  # without the folders of this machine
        outcome = {"error": f"{type(error).__name__}: {error} ({place})"}
    return outcome | {
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - processor, 1),
        "machine": machine(),
    }


def effort(records: Iterable[dict]) -> str:
    """What the records took, as tables end: `28 runs, 1.6 processor hours (AMD EPYC).`"""
    records = list(records)
    hours = sum(record["cpu_seconds"] for record in records) / 3600
    processors = sorted({record["machine"]["cpu"] for record in records})
    return f"{len(records)} runs, {hours:.1f} processor hours ({', '.join(processors)})."


class _Worker:
    """A process that does one cell after the other, and ends when its parent does."""

    def __init__(self, work: Work, threads: int):
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in any state
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=_serve, args=(far, work, threads), daemon=True)
        self.process.start()
        far.close()  # so that the end of the process is the end of the pipe

    def end(self) -> int | None:
        """End the process if it has not; returns its exit code."""
        self.pipe.close()
        self.process.join(1)  # it ends by itself where it is dead, or waits for a cell
        self.process.terminate()
        self.process.join()
        return self.process.exitcode


def _serve(pipe, work: Work, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which decides
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    while True:
        try:
            cell = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(cell, work))


def study_parser(script: str, about: str | None, out: Path) -> argparse.ArgumentParser:
    """The flags that all studies have. script: its file name; about: its docstring; out: where its records belong."""
    parser = argparse.ArgumentParser(
        prog=script, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(results=out)
    parser.add_argument("--out", type=Path, default=out, help="JSON of the records, continued where it is there")
    parser.add_argument("--minutes", type=float, help="begin no cell after that time")
    parser.add_argument("--workers", type=int, default=1, help="processes that work side by side")
    parser.add_argument("--threads", type=int, help="torch threads of each; default: cpu_count / workers")
    parser.add_argument("--only", metavar="PATTERN", help="cells whose name has this regular expression")
    parser.add_argument("--plan", action="store_true", help="run nothing: list what is missing and its time")
    parser.add_argument("--table", action="store_true", help="run nothing: tables and figures of what is there")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and few steps, to check that everything runs")
    return parser


def opened(args: argparse.Namespace, command: str, version: int = 1) -> Laboratory:
    """The laboratory that the flags of `study_parser` describe; a smoke run keeps nothing unless --out is given."""
    out = None if args.smoke and args.out == args.results else args.out
    return Laboratory(out, command, version=version, workers=args.workers, threads=args.threads, only=args.only)


def command_line(script: str, argv: Sequence[str]) -> str:
    """What was typed, without the folders of this machine: records go on elsewhere."""
    return shlex.join(["python", script, *(Path(word).name if Path(word).is_absolute() else word for word in argv)])
