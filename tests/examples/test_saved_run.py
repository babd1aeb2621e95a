"""A run of the benchmark that is stopped: what it leaves, what of it the next run keeps, and what it never replaces."""

import json
import os

import pytest

from scrubjay.examples.benchmarks import benchmark, benchmark_cpu, benchmark_tables, saved_run
from scrubjay.examples.benchmarks.benchmark_rows import Row
from scrubjay.examples.benchmarks.comparison import Comparison, summarized

NAMES = ["first", "second", "memory, third"]
OLD = {"complete": True, "rows": ["what was there"]}


class Bench:
    """A benchmark of three rows that costs nothing; `stop` is the row at which the user ends it."""

    def __init__(self, out, monkeypatch):
        self.out, self.partial = out, out.with_name(f"{out.stem}.partial.json")
        self.measured, self.stop, self.commit, self.read = [], None, "c0ffee", 8.0
        rates = {"operations_per_second": {"float32": {"1 x 1 x 1": {"F.linear": 1.0}}}}
        monkeypatch.setattr(benchmark_cpu, "rows_of", lambda shape: [Row("first", "window", 1)])
        monkeypatch.setattr(benchmark_cpu, "time_row", lambda row, *rest: self.record(row.name) | {"limit": None})
        monkeypatch.setattr(benchmark_cpu, "lines_of", lambda shape: [self.line(name) for name in NAMES[1:]])
        monkeypatch.setattr(
            benchmark_cpu, "ceilings", lambda shape: {"bytes_per_second": {"copy": 1.0, "read": self.read}} | rates
        )
        monkeypatch.setattr(benchmark, "commit", lambda: self.commit)
        monkeypatch.setattr(benchmark, "plot", lambda result, path: None)

    def line(self, name):
        line = Comparison(name, dict)
        object.__setattr__(line, "measure", lambda repetitions: self.record(name) | {"limit": None})
        return line

    def record(self, name):
        if name == self.stop:
            raise KeyboardInterrupt
        self.measured.append(name)
        return summarized(name, {"peer": [4.0, 2.0], "scrubjay": [1.0, 2.0]}, None) | {"weight_bytes": 4}

    def run(self, *more):
        self.measured.clear()
        return benchmark.main(["--cpu", "--smoke", "--threads", "1", "--out", str(self.out), *more])

    def stopped_at(self, name, *more):
        self.stop = name
        with pytest.raises(KeyboardInterrupt):
            self.run(*more)
        self.stop = None


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return Bench(tmp_path / "results" / "benchmark_cpu_x.json", monkeypatch)


def names(path):
    return [row["name"] for row in json.loads(path.read_text())["rows"]]


def test_every_row_is_on_disk_before_the_next(bench, capsys):
    bench.stopped_at("memory, third")
    assert names(bench.partial) == NAMES[:2]
    assert json.loads(bench.partial.read_text())["complete"] is False
    assert not bench.out.exists()
    printed = capsys.readouterr().out
    assert "first: 2.00x, 3.00x of reading its weights (0 s)" in printed
    assert "the same command goes on" in printed


def test_a_stopped_run_goes_on_with_what_is_missing(bench, capsys):
    bench.stopped_at("second")
    first = json.loads(bench.partial.read_text())["rows"][0]
    bench.read = 99.0  # of a machine that has become faster: all rows are held against one bandwidth
    bench.stopped_at("memory, third")
    assert bench.measured == ["second"]
    capsys.readouterr()
    result = bench.run()
    assert bench.measured == ["memory, third"]
    assert "2 rows are kept from benchmark_cpu_x.partial.json; --fresh measures all anew." in capsys.readouterr().out
    written = json.loads(bench.out.read_text())
    assert [row["name"] for row in result["rows"]] == names(bench.out) == NAMES
    assert written["rows"][0] == first
    assert {row["weights_once"] for row in written["rows"]} == {0.5}
    assert written["complete"] is True
    assert os.listdir(bench.out.parent) == [bench.out.name]
    bench.run()
    assert bench.measured == NAMES  # what has ended is not gone on with


def test_rows_that_are_kept_outlive_a_second_stop(bench):
    bench.stopped_at("memory, third")
    bench.stopped_at("second", "--fresh")
    assert names(bench.partial) == ["first"]
    bench.stopped_at("memory, third")
    kept = json.loads(bench.partial.read_text())
    bench.partial.write_text(json.dumps(kept | {"rows": kept["rows"][1:]}))
    bench.stopped_at("memory, third")  # measures the first anew, and has not come to the second yet when it is written
    assert bench.measured == ["first"]
    assert names(bench.partial) == ["first", "second"]


def test_fresh_keeps_nothing(bench):
    bench.stopped_at("memory, third")
    bench.run("--fresh")
    assert bench.measured == NAMES


@pytest.mark.parametrize(
    "what", ["commit", "changes", "no history", "repetitions", "threads", "versions", "shape", "older format"]
)
def test_rows_of_another_run_are_not_kept(what, bench, capsys, monkeypatch):
    bench.stopped_at("second")
    found = json.loads(bench.partial.read_text())
    if what == "commit":
        bench.commit = "decaf"
    elif what == "changes":
        bench.commit = "c0ffee+"
    elif what == "no history":
        bench.commit = found["commit"] = None
    elif what == "older format":
        del found["shape"]
    elif what == "threads":
        found["machine"]["torch_threads"] = 3
    else:
        found[what] = found[what] + 1 if what == "repetitions" else {**found[what], "scrubjay": "0", "long": 1}
    bench.partial.write_text(json.dumps(found))
    bench.run()
    assert bench.measured == NAMES
    reasons = {"threads": "another machine", "older format": "another shape", "no history": "or no history"}
    reason = reasons.get(what, "changes that are not committed" if what == "changes" else f"another {what}")
    assert reason in capsys.readouterr().out


def test_another_load_keeps_the_rows_and_the_higher_is_told(bench):
    bench.stopped_at("second")
    found = json.loads(bench.partial.read_text())
    found["machine"]["load_average_at_start"] = 1e3
    bench.partial.write_text(json.dumps(found))
    assert bench.run()["machine"]["load_average_at_start"] == 1e3
    assert bench.measured == NAMES[1:]


def test_a_run_that_has_not_ended_replaces_none_that_has(bench):
    saved_run.write(bench.out, OLD)
    bench.stopped_at("memory, third")
    assert json.loads(bench.out.read_text()) == OLD
    bench.run()
    assert names(bench.out) == NAMES


def test_a_run_that_has_not_ended_is_not_shown(bench, monkeypatch):
    bench.stopped_at("memory, third")
    monkeypatch.setattr(benchmark_tables, "RESULTS", bench.out.parent)
    assert benchmark_tables.recorded() == {}
    bench.partial.rename(bench.out)  # by hand
    assert benchmark_tables.recorded() == {}
    bench.run()
    assert list(benchmark_tables.recorded()) == [bench.out.name]


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    saved_run.write(path, OLD)
    with pytest.raises(TypeError):
        saved_run.write(path, {"rows": [object()]})

    def full(new, old):
        raise OSError("no space left")

    monkeypatch.setattr(saved_run.os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        saved_run.write(path, {})
    assert json.loads(path.read_text()) == OLD
