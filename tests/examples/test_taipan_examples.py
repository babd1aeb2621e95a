"""Taipan in the examples: measured where its gate was set."""

from scrubjay.examples.benchmarks import benchmark_taipan
from scrubjay.examples.benchmarks.comparison import SIDES


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
