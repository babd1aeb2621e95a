"""Taipan in the examples: of equal size, and measured where its gate was set."""

import pytest

from scrubjay.examples.benchmarks import benchmark_taipan
from scrubjay.examples.benchmarks.comparison import SIDES
from scrubjay.examples.studies import mqar
from scrubjay.examples.studies.mqar import Run


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


def test_taipan_benchmark_selects_the_share_it_names():
    sizes = benchmark_taipan.SMALL
    model, _ = benchmark_taipan.unit(sizes)
    ids = benchmark_taipan.prompt(sizes, sizes.length)
    shares = []
    work = benchmark_taipan.all_and_few(sizes, lambda: shares.append(float(model(ids).selection[0, 0])), 7)
    assert [work[side]() for side in SIDES] == [7, 7]
    every, few = shares
    assert every == 1
    assert abs(few - sizes.capacity) < 1 / sizes.length + 1e-6


def test_taipan_benchmark_decodes_after_the_contexts_it_names():
    sizes = benchmark_taipan.SMALL
    model, _ = benchmark_taipan.unit(sizes)
    caches = benchmark_taipan.read(model, sizes, sizes.contexts)
    assert tuple(cache.get_seq_length() for cache in caches) == sizes.contexts
    (line,) = (line for line in benchmark_taipan.lines(sizes) if line.unit == "bytes")
    assert line.measure(2)["ratio"] == 1
    assert [work() for work in benchmark_taipan.decode(sizes).values()] == [sizes.decoded] * 2
