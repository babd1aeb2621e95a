"""examples/few_bits.py: its smoke run."""

import json
import math

import pytest

from scrubjay.examples import few_bits


@pytest.mark.slow
def test_few_bits_smoke(tmp_path, capfd):
    out = tmp_path / "few_bits.json"
    record = few_bits.main(["--smoke", "--output", str(tmp_path / "models"), "--out", str(out)])
    assert json.loads(out.read_text())["weighed"] == record["weighed"]
    widths = record["weighed"]["ssd"]
    assert list(widths) == [*few_bits.FLOATS, *few_bits.WIDTHS]
    nbytes = [held["bytes"] for held in widths.values()]
    assert nbytes == sorted(nbytes, reverse=True)
    assert nbytes[-1] < nbytes[0] / 5
    for held in widths.values():  # a model that has learned nothing yet
        assert 5 < held["loss"] < math.log(512) + 0.1
        assert abs(held["loss"] - widths["float32"]["loss"]) < 0.02
    for held in record["tokens_per_second"].values():
        assert len(held["decode"]) == len(record["run"]["batches"])
        assert min(*held["decode"], held["prefill"]) > 0
    assert "4 bits, embedding in 8" in capfd.readouterr().out
