"""The benchmark of torch.compile, tiny and without a C++ compiler."""

import pytest

from scrubjay.examples.benchmarks import benchmark_compile


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own compiler does
@pytest.mark.parametrize("work", benchmark_compile.WORKS)
def test_the_benchmark_counts_what_was_compiled(work, capsys):
    command = ["--smoke", "--backend", "aot_eager", "--model", "ssd", "--work", work]
    (record,) = benchmark_compile.main(command)
    assert (record["model"], record["work"]) == ("ssd", work)
    assert (record["breaks"], record["graphs while timed"]) == (0, 0)
    assert record["graphs"] == 2  # of one size, and of any
    assert 0 < record["error"] < 1e-5
    assert record["eager"] > 0 < record["compiled"]
    assert f"ssd {work}: 2 (0), 0," in capsys.readouterr().out


@pytest.mark.parametrize("name", benchmark_compile.MODELS)
def test_the_benchmark_builds_every_recurrent_model(name):
    model = benchmark_compile.build(name, benchmark_compile.SMOKE)
    assert model.config.hidden_size == benchmark_compile.SMOKE.hidden_size
    assert len(model.model.layers) == (1 if name == "rodimus_plus" else 2)
