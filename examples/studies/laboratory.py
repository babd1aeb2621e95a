"""A queue of cells that resumes: many small trainings, their records in one JSON file, and figures with error bars.

A cell is one training: a study, a model, a seed, a learning rate and settings, all that decides its result. A study is
a list of cells and a function `work(cell) -> dict` that does one of them:

    cells = [Cell("recall", model, seed, 3e-3, {"pairs": 32}) for model in ("ssd", "mine") for seed in range(3)]
    Laboratory(Path("recall.json"), command).run(cells, work)

Every finished cell is on disk at once and is not run again; Ctrl-C loses the cell at work alone, and the same command
goes on. A cell that fails is recorded with its error, stops no other, and is tried again by the next command. Where
rates are tuned, `Tuning` lists the cells: first the grid on seeds of its own, then the reported seeds at the best rate.

A study's command line has, from `add_arguments`:

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import connection
from pathlib import Path

import torch
from torch import nn

from scrubjay.examples.measuring.run_report import FULL, GRAY, OURS, commit, machine, versions, write_whole

# One colour and one name for a model in every study.
COLORS = {
    "ssd": OURS,
    "ssd_mlp": "#5fb0d3",
    "ssd_hybrid": "#0a3d62",
    "rodimus": FULL,
    "rodimus_plus": "#6a4c93",
    "taipan": "#1b7f5c",
    "llama": "#d4a017",
    "mamba1": "#b5838d",
    "mamba2": GRAY,
}
NAMES = {
    "ssd": "SSD",
    "ssd_mlp": "SSD with MLP",
    "ssd_hybrid": "SSD hybrid",
    "rodimus": "Rodimus",
    "rodimus_plus": "Rodimus+",
    "taipan": "Taipan",
    "llama": "Llama",
    "mamba1": "Mamba-1",
    "mamba2": "Mamba-2 of Transformers",
}
# Student's t, 0.975, by degrees of freedom; a series in 1 / df is within 0.002 of it above.
T975 = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}


@dataclass(frozen=True, eq=False)
class Cell:
    """One training. Two cells are the same if all that decides their result is.

    Args:
        study: name of the study.
        model: name of the model, also its row in tables and its colour in figures.
        seed: of the weights and the data.
        rate: learning rate.
        settings: the rest, as JSON can hold it: sizes, steps, switches.
    """

    study: str
    model: str
    seed: int
    rate: float
    settings: Mapping = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "rate", float(self.rate))
        object.__setattr__(self, "settings", json.loads(json.dumps(dict(self.settings), sort_keys=True)))

    @property
    def key(self) -> str:
        """All that decides the result, as one string."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def name(self) -> str:
        """As people read it and as `--only` searches it: `recall ssd pairs=32 state_size=16 rate=0.003 seed=1`."""
        settings = (f"{name}={value}" for name, value in self.settings.items())
        return " ".join([self.study, self.model, *settings, f"rate={self.rate:g}", f"seed={self.seed}"])

    def __eq__(self, other):
        return isinstance(other, Cell) and self.key == other.key

    def __hash__(self):
        return hash(self.key)


def cell_of(record: dict) -> Cell:
    """The cell that a record on disk is of."""
    return Cell(**record["cell"])


def said(line: str) -> None:
    """A line at once, also into a file."""
    print(line, flush=True)


Work = Callable[[Cell], dict]
Cells = Sequence[Cell] | Callable[[list[dict]], Sequence[Cell]]


@dataclass(frozen=True)
class Tuning:
    """Rates are tried on seeds of their own; the best is run on the seeds that are reported.

    Args:
        rates: the grid, the same for every model.
        seeds: on which the grid is tried.
        reported: other seeds.
        score: what the mean over `seeds` is taken of, of a result; the rate with the highest is taken, and of equals
            the lower rate. A rate at which a cell failed is not taken.
    """

    rates: Sequence[float]
    seeds: Sequence[int]
    reported: Sequence[int]
    score: Callable[[dict], float]

    def __post_init__(self):
        if set(self.seeds) & set(self.reported):
            raise ValueError(f"Seeds for tuning must not be reported; got {self.seeds} and {self.reported}.")

    def trials(self, study: str, model: str, settings: Mapping) -> list[Cell]:
        """The grid."""
        return [Cell(study, model, seed, rate, settings) for seed in self.seeds for rate in self.rates]

    def best(self, study: str, model: str, settings: Mapping, records: Iterable[dict]) -> float | None:
        """The rate that is taken; None while the grid is not done, or where every rate failed."""
        known = {cell_of(record): record for record in records}
        trials = self.trials(study, model, settings)
        if not all(cell in known for cell in trials):
            return None
        scores = {}
        for rate in sorted(self.rates):
            results = [known[cell].get("result") for cell in trials if cell.rate == rate]
            if all(result is not None for result in results):
                scores[rate] = statistics.fmean(self.score(result) for result in results)
        return max(scores, key=lambda rate: scores[rate]) if scores else None

    def cells(
        self, study: str, model: str, settings: Mapping, records: Iterable[dict], *, guess: bool = False
    ) -> list[Cell]:
        """The grid, and once it is done the reported seeds at the best rate.

        Args:
            guess: until then, them at the middle of the grid: a plan has to count them.
        """
        rate = self.best(study, model, settings, records)
        if rate is None and guess:
            rate = sorted(self.rates)[len(self.rates) // 2]
        reported = [] if rate is None else [Cell(study, model, seed, rate, settings) for seed in self.reported]
        return self.trials(study, model, settings) + reported

    def results(self, study: str, model: str, settings: Mapping, records: Iterable[dict]) -> list[dict]:
        """Results of the reported seeds, as far as they are there."""
        records = list(records)
        rate = self.best(study, model, settings, records)
        known = {cell_of(record): record for record in records if "result" in record}
        cells = [] if rate is None else [Cell(study, model, seed, rate, settings) for seed in self.reported]
        return [known[cell]["result"] for cell in cells if cell in known]


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
        record = {"cell": asdict(cell)} | outcome | self.origin
        self.found[cell.key] = json.loads(json.dumps(record))
        if self.out is None:
            return
        lines = ",\n".join(json.dumps(record) for record in self.stored().values())
        write_whole(self.out, f"[\n{lines}\n]\n")

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


def add_arguments(parser: argparse.ArgumentParser, out: Path) -> None:
    """The flags that all studies have."""
    parser.set_defaults(results=out)
    parser.add_argument("--out", type=Path, default=out, help="JSON of the records, continued where it is there")
    parser.add_argument("--minutes", type=float, help="begin no cell after that time")
    parser.add_argument("--workers", type=int, default=1, help="processes that work side by side")
    parser.add_argument("--threads", type=int, help="torch threads of each; default: cpu_count / workers")
    parser.add_argument("--only", metavar="PATTERN", help="cells whose name has this regular expression")
    parser.add_argument("--plan", action="store_true", help="run nothing: list what is missing and its time")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and few steps, to check that everything runs")


def opened(args: argparse.Namespace, command: str, version: int = 1) -> Laboratory:
    """The laboratory that the flags of `add_arguments` describe; a smoke run keeps nothing unless --out is given."""
    out = None if args.smoke and args.out == args.results else args.out
    return Laboratory(out, command, version=version, workers=args.workers, threads=args.threads, only=args.only)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for an optimizer: matrices decay; a model of the zoo says itself which of them are spared.

    Of others spared are vectors and decay rates (`A_log`, a matrix in Mamba-1).
    """
    if hasattr(model, "weight_decay_groups"):
        return model.weight_decay_groups(weight_decay)
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        (kept if parameter.ndim < 2 or name.endswith("A_log") else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def command_line(script: str, argv: Sequence[str]) -> str:
    """What was typed, without the folders of this machine: records go on elsewhere."""
    return shlex.join(["python", script, *(Path(word).name if Path(word).is_absolute() else word for word in argv)])


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, lowest, highest): what an error bar over seeds shows."""
    return statistics.fmean(values), min(values), max(values)


def confidence(values: Sequence[float]) -> tuple[float, float] | None:
    """Interval of the mean at 95 %, by Student's t; None of fewer than three values."""
    if len(values) < 3:
        return None
    df = len(values) - 1
    t = T975.get(df, 1.96 + 2.37 / df + 2.9 / df**2)
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def write_between(guide: Path, name: str, text: str) -> None:
    """Put `text` between the lines <!-- name --> and <!-- /name --> of a guide.

    Raises:
        ValueError: the guide has no such lines.
    """
    before, opening, rest = guide.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, closing, after = rest.partition(f"<!-- /{name} -->")
    if not closing:
        raise ValueError(f"{guide.name} has no lines <!-- {name} --> and <!-- /{name} --> to write between.")
    write_whole(guide, f"{before}{opening}\n{text}\n\n{closing}{after}")


def panels(count: int, *, width: float = 5.5, height: float = 4.4):
    """(figure, list of axes) side by side, without a window or global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_line(axes, model: str, points: Mapping[float, Sequence[float]], **style) -> None:
    """Mean over seeds against x, with bars from the lowest to the highest.

    Args:
        points: {x: values, one a seed}.
        style: as matplotlib's `errorbar` takes; label and colour are the model's own unless given.
    """
    xs = sorted(x for x, values in points.items() if values)
    if not xs:
        return
    means, lows, highs = zip(*(spread(points[x]) for x in xs), strict=True)
    bars = [[m - low for m, low in zip(means, lows, strict=True)], [h - m for m, h in zip(means, highs, strict=True)]]
    look = {"color": COLORS.get(model), "label": NAMES.get(model, model), "marker": "o", "markersize": 4, "capsize": 3}
    axes.errorbar(xs, means, yerr=bars, **(look | style))


def draw_bars(axes, columns: Sequence[str], rows: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """A bar of the mean over seeds for each model in each column, with its error bar and every seed as a point.

    Args:
        columns: names below the groups of bars.
        rows: {model: values of each column, one a seed, empty where there are none}.
    """
    width = 0.8 / max(len(rows), 1)
    for place, (model, cells) in enumerate(rows.items()):
        shift, label = width * (place - (len(rows) - 1) / 2), NAMES.get(model, model)
        for column, values in enumerate(cells):
            if not values:
                continue
            mean, low, high = spread(values)
            at, color = column + shift, COLORS.get(model)
            axes.bar(at, mean, width * 0.9, color=color, alpha=0.75, label=label)
            axes.errorbar(at, mean, yerr=[[mean - low], [high - mean]], color="black", capsize=2, linewidth=0.8)
            axes.plot([at] * len(values), values, ".", color="black", markersize=3)
    axes.set(xticks=range(len(columns)), xticklabels=columns)
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # one entry a model, not a bar
    if named:
        axes.legend(named.values(), named.keys(), frameon=False, fontsize=8)
