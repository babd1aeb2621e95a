"""The laboratory: what is done stays done, whatever stops it; error bars; rates tuned apart from what is reported."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from laboratory_cases import DIES, FAILS, WAITS, cells, drawn

from scrubjay.examples.learning.optimizer import decay_groups
from scrubjay.examples.studies.cells import Cell, Tuning, cell_of
from scrubjay.examples.studies.drawing import confidence, draw_bars, draw_line, panels, ranged, spread
from scrubjay.examples.studies.laboratory import Laboratory, command_line, effort


@pytest.fixture
def out(tmp_path):
    return tmp_path / "results" / "cells.json"


def opened(out, **options):
    said = []
    return Laboratory(out, "python test.py", threads=1, log=said.append, **options), said


def on_disk(out):
    return json.loads(out.read_text())


def test_a_cell_is_known_by_all_that_decides_its_result():
    one = Cell("recall", "ssd", 0, 1, {"pairs": 8, "sizes": (1, 2)})
    assert one == Cell("recall", "ssd", 0, 1.0, {"sizes": [1, 2], "pairs": 8})
    assert cell_of(json.loads(json.dumps({"cell": one.__dict__}))) == one
    others = [
        Cell("language", "ssd", 0, 1, one.settings),
        Cell("recall", "rodimus", 0, 1, one.settings),
        Cell("recall", "ssd", 1, 1, one.settings),
        Cell("recall", "ssd", 0, 2, one.settings),
        Cell("recall", "ssd", 0, 1, {"pairs": 16, "sizes": [1, 2]}),
    ]
    assert len({one, *others}) == 6
    assert one.name == "recall ssd pairs=8 sizes=[1, 2] rate=1 seed=0"


def test_every_record_says_where_it_comes_from(out):
    records = opened(out)[0].run(cells(seeds=1, pairs=8), drawn)
    assert records == on_disk(out)
    (record,) = records
    assert record["cell"] == {"study": "test", "model": "draws", "seed": 0, "rate": 0.1, "settings": {"pairs": 8}}
    assert record["command"] == "python test.py"
    assert record["machine"]["torch_threads"] == 1
    assert record["seconds"] >= 0
    assert {"result", "cpu_seconds", "commit", "versions", "version"} < record.keys()
    assert len(out.read_text().splitlines()) == 3  # a record a line


def test_ctrl_c_loses_only_the_cell_at_work(out):
    seen = []

    def interrupted(cell):
        if cell.seed == 2:
            raise KeyboardInterrupt
        seen.append(cell.seed)
        return drawn(cell)

    lab, said = opened(out)
    with pytest.raises(KeyboardInterrupt):
        lab.run(cells(), interrupted)
    assert said[-1] == "Stopped. 2 cells of this run are in cells.json; the same command goes on."
    before = on_disk(out)
    records = opened(out)[0].run(cells(), lambda cell: seen.append(cell.seed) or drawn(cell))
    assert seen == [0, 1, 2, 3]
    assert records == on_disk(out)
    assert records[:2] == before
    assert [record["cell"]["seed"] for record in records] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "how"), [(1, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGINT)], ids=["one", "two", "ctrl-c"]
)
def test_a_laboratory_that_is_stopped_leaves_whole_records_and_no_process(out, workers, how):
    script = Path(__file__).with_name("laboratory_cases.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, str(script), str(out), str(workers)], env=environment)
    try:
        end = time.monotonic() + 120
        while not (out.is_file() and len(on_disk(out)) == 2):
            assert time.monotonic() < end
            assert child.poll() is None
            time.sleep(0.05)
        time.sleep(0.2)  # into the cell that waits
        below = Path(f"/proc/{child.pid}/task/{child.pid}/children")
        workers_of_it = below.read_text().split() if below.exists() else []
    finally:
        child.send_signal(how)
        try:
            child.wait(20)
        finally:
            child.kill()
            child.wait()
    assert sorted(record["cell"]["seed"] for record in on_disk(out)) == [0, 1]
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers_of_it):
        assert time.monotonic() < end
        time.sleep(0.05)
    seen = []
    listed = [*cells(seeds=2), *cells(WAITS, seeds=1, seconds=60)]
    opened(out)[0].run(listed, lambda cell: seen.append(cell.model) or {})
    assert seen == [WAITS]


def test_a_cell_that_fails_stops_no_other_and_is_tried_again(out):
    listed = [*cells(seeds=1), *cells(FAILS, seeds=1), *cells(seeds=2)]
    records = opened(out)[0].run(listed, drawn)
    assert ["result" in record for record in records] == [True, False, True]
    assert records[1]["error"].startswith("RuntimeError: nothing of 0 (laboratory_cases.py:")
    seen = []
    records = opened(out)[0].run(listed, lambda cell: seen.append(cell.model) or {"now": "done"})
    assert seen == [FAILS]
    assert records[1]["result"] == {"now": "done"}
    assert "error" not in records[1]
    assert len(on_disk(out)) == 3


def test_what_json_cannot_hold_is_a_cell_that_failed(out):
    (record,) = opened(out)[0].run(cells(seeds=1), lambda cell: {"loss": float("nan")})
    assert "JSON" in record["error"]


def told(record):
    """What two runs of a cell must have in common."""
    return {key: record.get(key) for key in ("cell", "result", "error", "command", "version")}


@pytest.mark.slow
def test_two_workers_give_the_records_of_one(out):
    listed = [*cells(seeds=2), *cells(FAILS, seeds=1), *cells(seeds=5)]
    one = opened(out.with_name("one.json"))[0].run(listed, drawn)
    two = opened(out, workers=2)[0].run(listed, drawn)
    assert [told(record) for record in one] == [told(record) for record in two]
    assert {record["machine"]["torch_threads"] for record in two} == {1}


@pytest.mark.slow
def test_a_worker_that_dies_is_a_cell_that_failed(out):
    records = opened(out, workers=2)[0].run([*cells(DIES, seeds=1), *cells(seeds=3)], drawn)
    assert records[0]["error"] == "Its process ended with exit code 7."
    assert all("result" in record for record in records[1:])


def test_minutes_end_between_cells(out):
    seen = []
    lab, _ = opened(out)
    assert len(lab.run(cells(), lambda cell: seen.append(time.sleep(0.2)) or {}, minutes=0.1 / 60)) == len(seen) == 1
    assert lab.run(cells(seeds=1), drawn, minutes=0)[0]["result"] == {}


def test_only_names_the_cells_that_run(out):
    listed = [*cells(seeds=2, pairs=8), *cells(seeds=2, pairs=32)]
    records = opened(out, only=r"pairs=32 .*seed=1")[0].run(listed, drawn)
    assert [record["cell"]["settings"] for record in records] == [{"pairs": 32}]
    assert len(opened(out)[0].run(listed, drawn)) == 4


def test_another_version_of_the_study_counts_as_missing(out):
    opened(out)[0].run(cells(seeds=2), drawn)
    lab, _ = opened(out, version=2)
    assert lab.records() == []
    lab.run(cells(seeds=1), drawn)
    assert sorted(record["version"] for record in on_disk(out)) == [1, 2]


def test_another_process_may_add_to_the_file_meanwhile(out):
    def work(cell):
        if cell.seed == 0:
            opened(out)[0].run(cells("other", seeds=1), drawn)
        return drawn(cell)

    opened(out)[0].run(cells(seeds=2), work)
    assert [record["cell"]["model"] for record in on_disk(out)] == ["other", "draws", "draws"]


def test_processes_that_finish_at_once_lose_no_record(out):
    def keeps(part):
        laboratory = opened(out)[0]
        for cell in part:
            laboratory.keep(cell, {"result": {}, "seconds": 0.0})

    parts = [cells(f"model{i}", seeds=15) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:  # each with a laboratory of its own, as processes have
        list(pool.map(keeps, parts))
    assert {cell_of(record) for record in on_disk(out)} == {cell for part in parts for cell in part}


def test_a_cell_that_fails_here_and_was_done_elsewhere_stays_done(out):
    here, elsewhere = opened(out)[0], opened(out)[0]
    (cell,) = cells(seeds=1)
    elsewhere.keep(cell, {"result": {"score": 1.0}, "seconds": 0.0})
    here.keep(cell, {"error": "no memory left", "seconds": 0.0})
    assert [record.get("result") for record in on_disk(out)] == [{"score": 1.0}]
    assert [record.get("result") for record in here.records()] == [{"score": 1.0}]


def test_a_file_of_something_else_is_left_alone(out):
    out.parent.mkdir()
    out.write_text('[{"settings": {}}]')
    with pytest.raises(ValueError, match=r"cells.json holds something else .* --out"):
        opened(out)[0].run(cells(), drawn)
    assert on_disk(out) == [{"settings": {}}]


def test_torchs_generator_is_the_cells_and_threads_are_put_back(out):
    before = torch.get_num_threads()
    one, again, other = (
        opened(out.with_name(f"{i}.json"))[0].run([Cell("test", "draws", seed, 1)], drawn)[0]["result"]
        for i, seed in enumerate((3, 3, 4))
    )
    assert one == again != other
    assert torch.get_num_threads() == before


def test_a_plan_takes_times_from_what_is_most_alike(out):
    lab, _ = opened(out)
    lab.run([*cells(seeds=2, pairs=8), *cells("slow", seeds=1, pairs=8), *cells(FAILS, seeds=1, pairs=8)], drawn)
    seconds = {"draws": 60, "slow": 600}
    lab.found = {}
    records = [record | {"seconds": seconds.get(record["cell"]["model"], 1)} for record in on_disk(out)]
    out.write_text(json.dumps(records))
    listed = [
        *cells(seeds=4, pairs=8),  # two as those that are done
        *cells("slow", seeds=1, pairs=16),  # of its model, twice as large
        *cells("new", seeds=1, pairs=8),  # of the study: the median
        *cells(FAILS, seeds=1, pairs=8),
    ]
    lines = lab.plan(listed, cost=lambda cell: cell.settings["pairs"]).splitlines()
    assert [line.split(" m ")[0].split() for line in lines[:-1]] == [
        ["2", "x", "1.0"],
        *([["1", "x", "20.0"]] + [["1", "x", "1.0"]] * 2),
    ]
    assert lines[-1] == "5 cells are missing: 0.4 h with 1 worker"
    assert opened(out.with_name("none.json"))[0].plan(listed).endswith("nothing like them is done")


def tuning(**changes):
    options = dict(rates=(0.3, 0.01, 0.1), seeds=(100, 101), reported=(0, 1, 2), score=lambda result: result["score"])
    return Tuning(**(options | changes))


def test_rates_are_tuned_on_seeds_of_their_own(out):
    plan = tuning()
    line = ("test", "draws", {"pairs": 8})
    assert len(plan.cells(*line, [])) == 6
    assert len(plan.cells(*line, [], guess=True)) == 9
    records = opened(out)[0].run(lambda records: plan.cells(*line, records), drawn)
    assert [record["cell"]["seed"] for record in records] == [100] * 3 + [101] * 3 + [0, 1, 2]
    assert {record["cell"]["rate"] for record in records[6:]} == {plan.best(*line, records)} == {0.1}
    assert plan.results(*line, records) == [record["result"] for record in records[6:]]
    assert plan.best(*line, records[:5]) is None
    assert plan.results(*line, records[:5]) == []


def test_of_rates_as_good_the_lower_is_taken_and_none_that_failed():
    plan, line = tuning(score=lambda result: result), ("test", "draws", {})
    records = [{"cell": cell.__dict__, "result": 1.0} for cell in plan.trials(*line)]
    assert plan.best(*line, records) == 0.01
    failed = [{"cell": cell.__dict__, "error": ""} for cell in plan.trials(*line)]
    some = [bad if good["cell"]["rate"] == 0.01 else good for good, bad in zip(records, failed, strict=True)]
    assert plan.best(*line, [*records[:-3], *some[-3:]]) == 0.1
    assert plan.best(*line, failed) is None


def test_seeds_of_the_tuning_are_not_reported():
    with pytest.raises(ValueError, match="must not be reported"):
        tuning(seeds=(2, 3))


def test_values_of_too_few_seeds_say_so():
    assert ranged([1.0, 2.0, 3.0], 3) == "2.000 (1.000 to 3.000)"
    assert ranged([1.0, 2.0], 3) == "1.500 (1.000 to 2.000, 2 of 3 seeds)"
    assert ranged([1.0], 3) == "1.000 (1 of 3 seeds)"
    assert ranged([1.0]) == "1.000"


def test_spread_and_confidence():
    assert spread([1.0, 2.0, 6.0]) == (3.0, 1.0, 6.0)
    assert confidence([1.0, 2.0]) is None
    low, high = confidence([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    low, high = confidence([0.0, 2.0] * 10)  # 19 degrees of freedom: 2.093
    assert high - 1 == pytest.approx(2.093 * (20 / 19 / 20) ** 0.5, rel=1e-3)


def test_commands_do_not_name_the_folders_of_this_machine():
    told = command_line("examples/studies/recall.py", ["--out", "/tmp/x y/recall.json", "--only", "rate=0.1"])
    assert told == "python examples/studies/recall.py --out recall.json --only rate=0.1"


def test_tables_end_with_what_they_took():
    records = [{"cpu_seconds": 1800.0, "machine": {"cpu": name}} for name in ("B", "A", "B")]
    assert effort(records) == "3 runs, 1.5 processor hours (A, B)."


def test_figures_have_error_bars_in_the_house_colours():
    figure, (left, right) = panels(2)
    draw_line(left, "ssd", {16: [0.1, 0.3], 64: [0.5], 128: []})
    draw_bars(right, ["8 pairs", "32 pairs"], {"ssd": [[0.1, 0.3], []], "rodimus": [[0.5], [0.7, 0.8]]})
    (line,) = left.containers
    assert list(line.lines[0].get_ydata()) == pytest.approx([0.2, 0.5])
    segments = line.lines[2][0].get_segments()
    assert [list(segment[:, 1]) for segment in segments] == [pytest.approx([0.1, 0.3]), pytest.approx([0.5, 0.5])]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["SSD", "Rodimus"]
    figure.savefig(os.devnull, format="png")


def test_decay_rates_of_other_libraries_do_not_decay():
    model = torch.nn.ModuleDict({"proj": torch.nn.Linear(3, 2)})
    model.A_log = torch.nn.Parameter(torch.ones(3, 2))
    decayed, kept = decay_groups(model, 0.1)
    assert [parameter.shape for parameter in decayed["params"]] == [(2, 3)]
    assert [parameter.shape for parameter in kept["params"]] == [(3, 2), (2,)]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
