"""The scripts for a GPU, as far as they go without one."""

import json

import pytest

from scrubjay.examples.benchmarks import benchmark_gpu, gpu_peers
from scrubjay.examples.benchmarks.gpu_work import LARGE, SMALL, works


def test_the_benchmark_runs_at_tiny_sizes_and_names_every_missing_peer(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(gpu_peers.PEERS, "norm", {"broken": lambda work, device: 1 / 0})
    result = benchmark_gpu.main(["--smoke", "--only", "norm", "--out", str(tmp_path / "gpu.json")])
    assert [line["name"].split()[:2] for line in result["lines"]] == [["gated", "norm"]] * 2
    assert all("ZeroDivisionError" in line["notes"]["broken"] for line in result["lines"])
    assert "broken: ZeroDivisionError" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu.json").read_text())["lines"] == result["lines"]
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


def test_every_work_runs_at_tiny_sizes():
    for work in works(SMALL):
        work.ours(benchmark_gpu.torch.device("cpu"))()
        assert bool(work.flops) != bool(work.bytes), work.name


def test_the_shapes_are_the_published_ones():
    names = [work.name for work in works(LARGE)]
    assert "SSD forward B1 T65536 H80 P64 N128" in names
    assert "DDTS forward + backward B1 T16384 N64 M4096" in names
    assert any(name.startswith("SSD 1.3B training") for name in names)
    assert any(name.startswith("Rodimus+ 1.6B training") for name in names)


def test_without_a_gpu_the_benchmark_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark_gpu.main([])
    assert "--smoke" in capsys.readouterr().err


def test_what_became_worse_in_a_compiled_kernel_is_named():
    pytest.importorskip("triton")
    from scrubjay.examples.benchmarks.kernels_aot import worse

    row = {"case": "ssd", "kernel": "scan", "types": "*fp32", "constants": {"N": "64"}, "target": "sm_90"}
    row |= {"spill_bytes": 0, "HGMMA": 4, "HMMA": 0}
    assert worse([row], [row]) == []
    assert worse([row | {"spill_bytes": 8}], [row]) == ["ssd scan sm_90 spills 8 bytes, 0 before"]
    assert worse([row | {"HGMMA": 0, "HMMA": 9}], [row]) == ["ssd scan sm_90 lost its HGMMA"]
    assert "not in the kept table" in worse([row], [])[0]
    assert "compiled no more" in worse([], [row])[0]
