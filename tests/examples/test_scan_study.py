"""Mamba-1's scan against SSD: what is timed is the recurrence that is named; the table says what the records say."""

import pytest
import torch

from scrubjay.examples.studies import scan
from scrubjay.kernels.ssd import ssd_reference

LENGTH, STATE, VALUES, HEADS = 70, 4, 128, 2


@pytest.fixture
def sides():
    torch.manual_seed(0)
    return scan.sides(LENGTH, STATE, VALUES, HEADS)


def test_both_scans_are_the_same_one(sides):
    expected, got = (function(*inputs) for function, inputs in (sides["transformers"], sides["selective_scan"]))
    assert expected.shape == got.shape == (1, VALUES, LENGTH)
    assert (got - expected).abs().max() < 1e-6 * expected.abs().max()


def test_ssd_reads_the_same_keys_queries_and_values(sides):
    ssd, inputs = sides["ssd"]
    x, _, _, b, c = sides["transformers"][1]
    q, k, v, _, _ = inputs
    assert torch.equal(q[0, :, 0].T, c[0])
    assert torch.equal(k[0, :, 0].T, b[0])
    assert torch.equal(v.flatten(2).mT, x)
    expected, state = ssd_reference(*inputs)
    assert state.numel() == VALUES * STATE
    assert (ssd(*inputs) - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("mode", scan.MODES)
def test_sides_are_timed_with_the_gradients_of_every_input(sides, mode):
    for function, inputs in sides.values():
        seen = []
        seconds = scan.timed(
            lambda *given, function=function, seen=seen: seen.append(given) or function(*given), inputs, mode
        )
        assert seconds > 0
        assert all((each.grad is not None) == (mode == "training") for each in seen[0])


def test_what_would_not_end_is_not_timed_and_says_why():
    assert scan.refused("transformers", "forward", 1024, 256, 1536) is None
    assert scan.refused("transformers", "forward", 4096, 256, 1536) == "it keeps 19 GB"
    assert scan.refused("selective_scan", "forward", 4096, 256, 1536) is None
    assert scan.refused("selective_scan", "training", 4096, 256, 1536) == "it keeps 19 GB"
    assert (
        scan.refused("transformers", "training", 4096, 64, 1536) == "the gradients of its slices are 13,194 GB of zeros"
    )
    assert not any(scan.refused("ssd", mode, 4096, 256, 1536) for mode in scan.MODES)


def test_the_command_runs_and_tells(tmp_path, monkeypatch):
    out, guide = tmp_path / "scan_cpu.json", tmp_path / "guide.md"
    monkeypatch.setattr(scan, "GUIDE", guide)
    guide.write_text(f"<!-- {scan.NAME} -->\n<!-- /{scan.NAME} -->\n")
    records = scan.main(["--smoke", "--threads", "1", "--out", str(out)])
    assert [record["cell"]["settings"]["mode"] for record in records] == list(scan.MODES)
    assert set(records[0]["result"]["samples"]) == set(scan.SIDES)
    assert len(records[0]["result"]["samples"]["ssd"]) == 2
    scan.main(["--out", str(out), "--table"])
    assert "forward" not in guide.read_text()  # which shows what lies where results belong
    monkeypatch.setattr(scan, "RESULTS", out)
    scan.main(["--table"])
    text = guide.read_text()
    times = records[0]["result"]["microseconds_per_token"]
    shown = " | ".join(f"{times[side]:.1f}" for side in scan.SIDES)
    assert f"| forward | 20 | 4 | {shown} | {times['selective_scan'] / times['ssd']:.1f} |" in text
    assert out.with_suffix(".png").stat().st_size > 0


def test_a_side_that_is_not_timed_is_named_in_the_table():
    settings = {"mode": "forward", "length": 4096, "state_size": 256, "values": 1536}
    times = {"selective_scan": 30.0, "ssd": 10.0}
    record = {"cell": {"model": "cpu", "settings": settings}, "result": {"microseconds_per_token": times}}
    record |= {"cpu_seconds": 1.0, "machine": {"cpu": "a processor"}}
    assert scan.table([record]).splitlines()[2] == "| forward | 4,096 | 256 | not timed | 30.0 | 10.0 | 3.0 |"


def test_workers_would_time_each_other(capsys):
    with pytest.raises(SystemExit):
        scan.main(["--workers", "2"])
    assert "would time each other" in capsys.readouterr().err
