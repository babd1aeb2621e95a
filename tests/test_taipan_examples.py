"""Taipan in the examples: of equal size, and measured where its gate was set."""

import json

import pytest
import torch

from scrubjay.examples import benchmark_taipan, mqar
from scrubjay.examples.mqar import Run


@pytest.mark.parametrize(("pairs", "length"), [(8, 64), (32, 128)])
@pytest.mark.parametrize("state_size", [16, 64])
def test_taipan_mqar_has_as_many_parameters_as_ssd(pairs, length, state_size):
    ssd, taipan = (
        sum(p.numel() for p in mqar.build_model(Run(model, pairs, length, state_size)).parameters())
        for model in ("ssd", "taipan")
    )
    assert abs(taipan / ssd - 1) < 0.015


def test_taipan_mqar_records_the_share_that_is_selected():
    (record,) = mqar.main(["--smoke", "--model", "taipan"])
    (share,) = record["selected"]
    assert 0 <= share <= 1
    assert "selected" not in mqar.main(["--smoke", "--model", "ssd"])[0]


def test_taipan_benchmark_smoke(tmp_path, capsys):
    out, threads = tmp_path / "results" / "taipan.json", torch.get_num_threads()
    result = benchmark_taipan.main(["--smoke", "--threads", "1", "--out", str(out)])
    assert torch.get_num_threads() == threads
    shape = benchmark_taipan.SMOKE
    few, every = result["selected"].values()
    assert abs(few - shape.capacity) < 1 / shape.length + 1e-6
    assert every == 1
    assert len(set(result["nbytes"].values())) == 1
    assert set(result["nbytes"]) == set(result["decode"]) == set(shape.contexts)
    samples = [*result["prefill"].values(), *result["decode"].values()]
    assert all(len(times) == 2 and min(times) > 0 for sides in samples for times in sides.values())
    assert json.loads(out.read_text())["prefill"] == result["prefill"]
    assert "selective layer" in capsys.readouterr().out
