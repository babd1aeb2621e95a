"""The benchmark on a CPU: its rows, what it measures, prints and records, and the causes that it switches."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from scrubjay import SSDCache, SSDConfig, SSDForCausalLM, quantize
from scrubjay.examples.benchmarks import (
    benchmark,
    benchmark_causes,
    benchmark_cpu,
    benchmark_rows,
    benchmark_width,
    model_work,
)
from scrubjay.examples.benchmarks.benchmark_causes import CAUSES, flushed, measure_cause, one_thread, without_onednn
from scrubjay.examples.benchmarks.benchmark_cpu import checked, lines_of, measure, time_row
from scrubjay.examples.benchmarks.benchmark_rows import SMOKE, Row, rows_of
from scrubjay.examples.benchmarks.benchmark_tables import group_of, section, shown, times
from scrubjay.examples.benchmarks.ceilings import weight_bytes
from scrubjay.examples.benchmarks.comparison import SIDES
from scrubjay.examples.benchmarks.model_work import fastest_chunk, load, tokens, window_pass, write_checkpoint
from scrubjay.kernels import linear, recurrence
from scrubjay.modeling import base


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    write_checkpoint(SMOKE, folder)
    return folder


@pytest.mark.slow
def test_benchmark_smoke(tmp_path, capsys):
    out = tmp_path / "results" / "benchmark_cpu.json"
    threads = torch.get_num_threads()
    result = benchmark.main(["--cpu", "--smoke", "--threads", "1", "--out", str(out)])
    assert torch.get_num_threads() == threads
    assert [row["name"] for row in result["rows"]] == [row.name for row in [*rows_of(SMOKE), *lines_of(SMOKE)]]
    printed = capsys.readouterr().out
    for row in result["rows"]:
        assert row["name"] in printed
        sides = set(row["samples"])
        assert sides >= {"scrubjay"}
        assert (row["ratio"] is None) == ("peer" not in sides)
        assert ("of_products" in row) == ("products" in sides)
        assert ("of_weights" in row) == ("tokens_per_second" in row and "decode" in row["name"])
        assert all(len(samples) == (1 if row["unit"] == "bytes" else 2) for samples in row["samples"].values())
    assert set(result["ceilings"]["operations_per_second"]) == {"float32", "bfloat16"}
    assert result["agreement"]["logits float32"] < 1e-5
    assert json.loads(out.read_text())["rows"][0]["samples"] == result["rows"][0]["samples"]
    assert out.with_suffix(".png").stat().st_size > 0


def test_benchmark_measures_only_what_is_asked(tmp_path):
    result = benchmark.main(["--cpu", "--smoke", "--threads", "1", "--only", "SW-SKA 256, window 32 float32"])
    assert [row["name"] for row in result["rows"]] == ["SW-SKA 256, window 32 float32"]
    assert list(result["agreement"]) == ["SW-SKA"]


def test_benchmark_takes_samples_in_turn(monkeypatch):
    seen = []
    monkeypatch.setattr(benchmark_cpu, "window_pass", lambda side, shape: lambda: seen.append(side))
    row = next(row for row in rows_of(SMOKE) if row.work == "window")
    time_row(row, SMOKE, {}, 3)
    assert seen == [*SIDES, *SIDES * 3]  # one of each before, unmeasured


@pytest.mark.parametrize("wrong", [1.1, math.nan])
def test_benchmark_refuses_two_different_functions(wrong):
    x = torch.ones(8)
    with pytest.raises(RuntimeError, match=r"logits: the two sides differ by .* relative"):
        checked("logits", wrong * x, x, 1e-4)


def test_benchmark_notices_one_key_too_many():
    one, other = window_pass("peer", SMOKE)(), window_pass("scrubjay", replace(SMOKE, window=SMOKE.window + 1))()
    with pytest.raises(RuntimeError, match="SW-SKA"):
        checked("SW-SKA", other, one, 1e-5)


def test_a_variant_is_measured_beside_the_model_that_it_was_made_of(monkeypatch):
    def halved(model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.div_(2)
        return model

    sums = []
    monkeypatch.setitem(benchmark_rows.VARIANTS, "halved", halved)
    inner = benchmark_cpu.model_pass

    def watched(model, row):
        sums.append(float(model.model.norm.weight.detach().sum()))
        return inner(model, row)

    monkeypatch.setattr(benchmark_cpu, "model_pass", watched)
    result = measure(SMOKE, repetitions=2, only="halved", log=lambda line: None)
    assert [row["name"] for row in result["rows"]] == ["prefill 32, halved", "decode after 32, halved, per token"]
    assert sums == [64, 32] * 2  # the peer stays as it was
    for row in result["rows"]:
        assert set(row["samples"]) == set(SIDES)
        assert group_of(row) == "variants"
    assert result["rows"][1]["weight_bytes"] > 0


def test_every_promise_stands_on_a_row_that_has_what_it_is_about():
    rows = {row.name: row for row in rows_of(benchmark_rows.Shape())}
    assert rows["prefill 2048 float32"].limit == 1.7
    assert (rows["decode after 512 bfloat16, per token"].floor, rows["decode after 512 bfloat16, per token"].limit) == (
        3.0,
        1.7,
    )
    batches = [
        row.batch for row in rows.values() if row.work == "decode" and row.dtype == "float32" and not row.variant
    ]
    assert batches == [1, 8, 32, 64]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"floor": 2.0, "ratio": 2.5}, ">= 2x met"),
        ({"floor": 2.0, "ratio": 1.5, "limit": 1.7, "of_products": 1.7}, ">= 2x MISSED, <= 1.7x met"),
        ({"floor": None, "ratio": None, "limit": 1.2, "of_products": 1.0, "of_weights": 1.3}, "<= 1.2x MISSED"),
        ({"floor": None, "ratio": 3.0}, ""),
    ],
)
def test_promises_are_judged(row, words):
    assert benchmark.promised(row) == words


def test_the_peers_chunk_is_its_fastest(checkpoint, monkeypatch):
    model, clock = load("peer", checkpoint, "float32"), [0.0]
    monkeypatch.setattr(model_work.time, "perf_counter", lambda: clock[0])
    seconds = {16: 3.0, 32: 1.0, 64: 2.0}

    def work():
        clock[0] += seconds[model.backbone.layers[0].mixer.chunk_size]

    monkeypatch.setattr(model_work, "model_pass", lambda model, row: work)
    row = Row("", "prefill", 64, chunks=(16, 32, 64))
    assert fastest_chunk(model, row) == (32, seconds)
    assert clock == [3.0 + 6.0]
    assert fastest_chunk(model, replace(row, chunks=(16,))) == (16, {})
    assert fastest_chunk(model, replace(row, chunks=(64, 16, 32))) == (32, seconds)
    for first, tried in ((12.0, (16,)), (7.0, (16, 32, 64)), (10.0, (16, 32))):
        seconds[16] = first  # so long that it stands for itself, and what is left of SEARCH is tried
        clock[0], before = 0.0, dict(seconds)
        if first == 10.0:
            before[32] = seconds[32] = 9.0
        assert fastest_chunk(model, row)[1] == {chunk: before[chunk] for chunk in tried}
        assert clock == [sum(before[chunk] for chunk in tried)]


@pytest.mark.parametrize("name", benchmark_width.MODELS)
def test_models_of_the_same_width_stand_beside_their_own_products(name):
    model = benchmark_width.MODELS[name](SMOKE)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (SMOKE.hidden_size, SMOKE.num_hidden_layers)
    lines = [line for line in benchmark_width.lines(SMOKE) if line.name.startswith(f"{name} of width 64, ")]
    first, second = (line.measure(2) for line in lines)
    assert [len(first["samples"][side]) for side in ("scrubjay", "products")] == [2, 2]
    assert (first["limit"], first["ratio"]) == (2.0, None)
    assert "weight_bytes" not in first
    assert second["weight_bytes"] <= sum(p.nbytes for p in model.parameters())


def test_taipan_of_this_width_selects_its_capacity():
    shape = replace(SMOKE, num_hidden_layers=7, long=100)
    model = benchmark_width.taipan(shape)
    ids = model_work.tokens(shape.vocab_size, shape.long)
    assert float(model(ids).selection[0, 0]) == pytest.approx(model.config.capacity, abs=0.01)


def test_subnormal_numbers_are_flushed_inside_and_kept_outside():
    tiny = torch.tensor([1e-30])
    with flushed():
        assert float(tiny * 1e-12) == 0
    assert float(tiny * 1e-12) > 0


def test_switches_are_set_inside_and_put_back():
    before, threads = torch.backends.mkldnn.enabled, torch.get_num_threads()
    with without_onednn(), one_thread():
        assert (torch.backends.mkldnn.enabled, torch.get_num_threads()) == (False, 1)
    assert (torch.backends.mkldnn.enabled, torch.get_num_threads()) == (before, threads)


def test_a_cause_is_timed_with_its_switch_beside_ours_as_it_is(checkpoint, monkeypatch):
    seen = []
    monkeypatch.setattr(benchmark_causes, "model_pass", lambda *_: lambda: seen.append(torch.backends.mkldnn.enabled))
    cause = next(cause for cause in CAUSES if cause.switch is without_onednn)
    record = measure_cause(cause, Row("a row", "decode", 4, passes=2), None, 2)
    assert seen == [False, True] * 3
    assert record["cause"] == "no oneDNN"


def test_causes_stand_instead_of_all_other_rows():
    argv = ["--cpu", "--smoke", "--threads", "1", "--causes", "--only", "prefill 64 float32"]
    names = [row["name"] for row in benchmark.main(argv)["rows"]]
    wanted = [cause.name for cause in CAUSES if "prefill" in cause.works and "float32" in cause.dtypes]
    assert len(wanted) == 7
    assert names == [f"prefill 64 float32: {name}" for name in wanted]


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.name)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_a_switch_changes_no_result_beyond_rounding_and_is_put_back(dtype, bound, cause, monkeypatch):
    monkeypatch.setattr(linear, "WORTH_IT", 1)  # such small products are chosen for as well
    model = SSDForCausalLM(SSDConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50, state_size=8)).to(dtype).eval()
    ids = tokens(50, 80)

    def passes():
        cache = SSDCache(model)
        return torch.cat([model(ids[:, at], cache=cache).logits for at in (slice(0, 79), slice(79, 80))], 1)

    settings = (vars(linear) | vars(recurrence) | vars(base)).copy()
    with torch.no_grad():
        plain = passes()
        with cause.switch():
            switched = passes()
    assert benchmark_cpu.relative_error(switched, plain.float()) < bound
    assert settings == vars(linear) | vars(recurrence) | vars(base)


def test_a_model_in_few_bits_reads_a_byte_of_each_weight():
    tied, own = (
        SSDForCausalLM(SSDConfig(hidden_size=64, num_hidden_layers=1, vocab_size=96, tie_word_embeddings=tie)).eval()
        for tie in (True, False)
    )
    for model in (tied, own):
        mixer = model.model.layers[0].mixer
        matrices = mixer.in_proj.weight.numel() + mixer.out_proj.weight.numel() + 96 * 64
        small = sum(p.numel() for p in model.parameters() if p.ndim != 2)
        for bits in (8, 4):
            assert weight_bytes(quantize(copy.deepcopy(model), bits=bits)) == matrices + 4 * small


ROWS = [
    {"name": "prefill 2 float32", "peer": 3.0, "scrubjay": 1.5, "ratio": 2.0, "products": 1.2e-2, "of_products": 125.0,
     "tokens_per_second": 1333.3},
    {"name": "decode after 2 float32, per token", "peer": 3e-5, "scrubjay": 1.5e-4, "ratio": 0.2, "weights_once": 1e-4,
     "of_weights": 1.5},
    {"name": "memory, ADORE's keys at 1 and 2", "unit": "bytes", "peer": 1.0, "scrubjay": 1.0, "ratio": 1.0,
     "floor": 1.0},
    {"name": "Taipan of width 8, prefill 2 float32", "scrubjay": 2e-3, "ratio": None, "products": 1e-3,
     "of_products": 2.0},
    {"name": "memory, ADORE row", "unit": "bytes", "peer": 2.0**21, "scrubjay": 2.0**11, "ratio": 1024.0},
]  # fmt: skip
RUN = {
    "command": "python examples/run.py --cpu --threads 1",
    "commit": "0123456789abcdef",
    "machine": {"cpu": "EPYC", "cpu_count": 2, "torch_threads": 1, "load_average_at_start": 0.1},
    "versions": {"torch": "2.13", "transformers": "5.24"},
    "ceilings": {
        "bytes_per_second": {"copy": 2e10, "read": 1e10},
        "operations_per_second": {"float32": {"a": {"one": 1e9, "other": 3e9}, "b": {"one": 2e9}}},
    },
    "rows": [{"unit": "seconds", "floor": None} | row for row in ROWS],
}
PAGE = """### EPYC; AVX9; 2 cores, 1 threads

With `--cpu --threads 1` at commit 012345678, PyTorch 2.13, transformers 5.24; load 0.10 at the \
start. Products 3 GF/s in float32; copy 20.0 GB/s, read 10.0 GB/s.

| SSD | transformers' Mamba2 | scrubjay | ratio | its products alone | scrubjay / that | its weights read once | \
scrubjay / reading | tokens a second |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| prefill 2 float32 | 3.00 s | 1.50 s | 2.0x | 12.0 ms | 125x |  |  | 1,333 |
| decode after 2 float32, per token | 30.0 us | 150 us | 0.2x |  |  | 100 us | 1.50x |  |

| Models of the same width and depth | scrubjay | its products alone | scrubjay / that |
| --- | --- | --- | --- |
| Taipan of width 8, prefill 2 float32 | 2.00 ms | 1.00 ms | 2.00x |

| Attention and caches | all of it | scrubjay | ratio |
| --- | --- | --- | --- |
| memory, ADORE row | 2 MiB | 2 KiB | 1024x |

Every sample: [run-avx9.json](../examples/results/run-avx9.json)

![Benchmark](../examples/results/run-avx9.png)"""


def test_a_run_is_shown_as_tables():
    assert section(RUN, "run-avx9.json") == PAGE
    assert "Products" not in section({key: value for key, value in RUN.items() if key != "ceilings"}, "run-avx9.json")


def test_recorded_runs_are_printed(capsys):
    found = benchmark.main(["--cpu", "--tables"])
    printed = capsys.readouterr().out
    assert found
    for name, result in found.items():
        assert section(result, name) in printed


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("memory, SW-SKA 8192, window 512", "caches"),
        ("Taipan decode after 4096 and 65536, per token", "caches"),
        ("Taipan of width 768, decode after 512 float32, per token", "width"),
        ("Rodimus+ of width 768, prefill 2048 float32", "width"),
        ("llama.cpp, prefill 512 float32", "llama.cpp"),
        ("memory, prefill 2048 float32", "ssd"),
    ],
)
def test_rows_are_grouped_by_what_they_compare(name, group):
    assert group_of({"name": name}) == group


def test_numbers_have_three_figures():
    assert [shown(x, "seconds") for x in (12.345, 1.2345, 0.12345, 0.012345, 0.0012345, 12e-6, 1e-9)] == [
        "12.3 s", "1.23 s", "123 ms", "12.3 ms", "1.23 ms", "12.0 us", "0.00 us"]  # fmt: skip
    assert [times(x) for x in (None, 0.73, 9.96, 10.2)] == ["", "0.7x", "10.0x", "10x"]
