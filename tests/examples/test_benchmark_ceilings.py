"""What the benchmark holds models against: rates of the machine, products alone, weights read; and the processor."""

import pytest
import torch

from scrubjay import SSDConfig, SSDForCausalLM
from scrubjay.examples.benchmarks import ceilings, comparison
from scrubjay.examples.benchmarks.benchmark_rows import SMOKE, Row
from scrubjay.examples.benchmarks.ceilings import (
    Alone,
    Product,
    bandwidth,
    gemm_rates,
    libraries,
    products_of,
    weight_bytes,
)
from scrubjay.examples.benchmarks.comparison import beside_weights, in_turn, summarized
from scrubjay.examples.benchmarks.model_work import model_pass, prefill, products, tokens
from scrubjay.examples.measuring import processor
from scrubjay.examples.measuring.processor import cpu_flags, described, slug


def tiny(**options):
    torch.manual_seed(0)
    return SSDForCausalLM(SSDConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, head_dim=16, **options)).eval()


def expected(model, rows, head_rows):
    layers = [(layer.mixer.in_proj, layer.mixer.out_proj) for layer in model.model.layers]
    found = [(part.weight.data_ptr(), rows) for pair in layers for part in pair]
    return [*found, (model.lm_head.weight.data_ptr(), head_rows)]


def places(found):
    return [(p.weight.data_ptr(), p.rows) for p in found]


def test_products_are_those_of_each_projection_at_its_rows():
    model = tiny()
    assert places(products_of(model, lambda: prefill(model, tokens(64, 7, batch=3)))) == expected(model, 21, 3)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("row", "rows", "head_rows", "times"),
    [
        (Row("", "prefill", 9), 9, 1, 1),
        (Row("", "train", 9), 9, 9, 1),
        (Row("", "decode", 5, passes=3), 1, 1, 3),
        (Row("", "decode", 5, passes=2, batch=4), 4, 4, 2),
    ],
)
def test_products_of_a_row_are_those_of_its_work(row, rows, head_rows, times):
    model = tiny()
    alone = products(model, row)
    assert places(alone.products) == expected(model, rows, head_rows) * times
    assert alone.gradients == (row.work == "train")
    assert alone() == row.passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_library_gives_the_product_and_its_gradients(dtype):
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(size, generator=generator).to(dtype) for size in ((6, 5), (4, 5), (6, 4)))
    x64, w64, dy64 = (t.double() for t in (x, w, dy))
    pairs = [((x, w), x64 @ w64.t()), ((dy, w.t()), dy64 @ w64), ((dy.t(), x.t()), dy64.t() @ x64)]
    assert set(libraries(dtype)) == {"F.linear", "scrubjay", "float32 copies" if dtype == torch.bfloat16 else "oneDNN"}
    for library in libraries(dtype).values():
        for operands, exact in pairs:
            torch.testing.assert_close(library(*operands).double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_products_alone_go_through_the_weights_in_order_by_the_library_chosen(monkeypatch):
    seen = []
    monkeypatch.setattr(ceilings, "least", lambda work, *count: work() or 1.0)
    monkeypatch.setattr(ceilings, "libraries", lambda dtype: {"only": lambda x, w: seen.append((x.shape, w.shape))})
    alone = Alone([Product(torch.ones(3, 2), 5), Product(torch.ones(4, 2), 1)], gradients=True, units=7)
    seen.clear()
    assert alone() == 7
    first = [((5, 2), (3, 2)), ((5, 3), (2, 3)), ((3, 5), (2, 5))]
    assert seen == [*first, ((1, 2), (4, 2)), ((1, 4), (2, 4)), ((4, 1), (2, 1))]


def test_products_alone_take_the_library_that_was_fastest_for_the_shape(monkeypatch):
    called = []
    seconds = iter([2.0, 1.0, 1.0, 2.0])  # of both libraries on the first shape, then on the second
    monkeypatch.setattr(ceilings, "least", lambda work, *count: next(seconds))
    found = {name: lambda x, w, name=name: called.append(name) for name in ("one", "other")}
    monkeypatch.setattr(ceilings, "libraries", lambda dtype: found)
    Alone([Product(torch.ones(3, 2), 5), Product(torch.ones(4, 2), 5)])()
    assert called == ["other", "one"]


def test_rates_are_work_over_seconds(monkeypatch):
    monkeypatch.setattr(ceilings, "least", lambda work, *count: 0.5)
    assert bandwidth(2**14) == {"copy": 2**16, "read": 2**15}
    assert gemm_rates([(2, 3, 5)], torch.float32) == {"2 x 3 x 5": dict.fromkeys(libraries(torch.float32), 120.0)}


def test_weights_read_in_a_step_are_all_but_an_embedding_that_is_no_head():
    tied, untied = tiny(), tiny(tie_word_embeddings=False)
    every = sum(p.nbytes for p in tied.parameters())
    assert weight_bytes(tied) == every
    assert weight_bytes(untied) == every + untied.get_input_embeddings().weight[0].nbytes


def test_a_record_has_the_ratios_of_the_sides_it_has():
    record = summarized("x", {"peer": [4.0, 6.0, 5.0], "scrubjay": [2.0], "products": [1.0]}, 2.0)
    assert (record["ratio"], record["of_products"], record["floor"]) == (2.5, 2.0, 2.0)
    alone = summarized("x", {"scrubjay": [2.0]}, None)
    assert alone["ratio"] is None
    assert "of_products" not in alone
    assert beside_weights(alone, 8.0) == alone
    assert beside_weights(alone | {"weight_bytes": 4}, 8.0).items() >= {"weights_once": 0.5, "of_weights": 4.0}.items()


@pytest.mark.parametrize(("seconds", "count"), [(0.1, 5), (3.0, 3), (4.0, 2), (10.0, 2), (100.0, 2)])
def test_long_passes_are_sampled_less(seconds, count, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(comparison.time, "perf_counter", lambda: clock[0])

    def work():
        clock[0] += seconds
        return 2

    samples = in_turn({"peer": work, "scrubjay": work}, 5)
    assert samples == {side: [pytest.approx(seconds / 2)] * count for side in ("peer", "scrubjay")}
    assert clock[0] == pytest.approx(2 * seconds * (count + (seconds < comparison.WARM)))


def test_a_long_first_pass_of_one_side_counts_and_a_short_one_does_not(monkeypatch):
    clock, takes = [0.0], {"peer": iter((30.0, 25.0)), "scrubjay": iter((3.0, 1.0, 2.0))}
    monkeypatch.setattr(comparison.time, "perf_counter", lambda: clock[0])

    def work(side):
        clock[0] += next(takes[side])
        return 1

    samples = in_turn({side: lambda side=side: work(side) for side in takes}, 5)
    assert samples == {"peer": [30.0, 25.0], "scrubjay": [1.0, 2.0]}


def test_tokens_of_a_row():
    assert Row("", "prefill", 9, batch=2).tokens == 18
    assert Row("", "decode", 9, batch=2).tokens == 2


def test_decoding_many_texts_goes_on_from_their_prompts():
    model, seen = tiny(), []
    work = model_pass(model, Row("", "decode", SMOKE.begun, passes=SMOKE.steps, batch=3))
    model.register_forward_hook(
        lambda module, arguments, options, out: seen.append(
            (options["input_ids"].shape, out.past_key_values.get_seq_length())
        ),
        with_kwargs=True,
    )
    work()
    assert seen == [((3, 1), SMOKE.begun + 1 + step) for step in range(SMOKE.steps)]


def where(cpu, capability="AVX2", amx=False, **rest):
    return {
        "cpu": cpu,
        "capability": capability,
        "amx": amx,
        "bfloat16": amx,
        "cpu_count": 2,
        "torch_threads": 2,
    } | rest


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        (where("AMD EPYC"), "amd-epyc-avx2"),
        (where("AMD EPYC 7763 64-Core Processor", "AVX512"), "amd-epyc-7763-avx512"),
        (where("Intel(R) Xeon(R) Platinum 8480C CPU @ 2.00GHz", "AVX512", amx=True), "intel-xeon-platinum-8480c-amx"),
        (where("unknown", "DEFAULT"), "unknown-default"),
    ],
)
def test_a_results_file_is_named_by_its_processor(machine, name):
    assert slug(machine) == name


def test_a_processor_is_described_as_far_as_the_record_goes():
    old = {"cpu": "AMD EPYC", "cpu_count": 2, "torch_threads": 2}
    assert described(old) == "AMD EPYC; 2 cores, 2 threads"
    assert described(where("Xeon", "AVX512", amx=True)) == (
        "Xeon; AVX512, AMX, with bfloat16 instructions; 2 cores, 2 threads"
    )
    assert described(where("EPYC")) == "EPYC; AVX2, no bfloat16 instructions; 2 cores, 2 threads"


def test_instructions_are_those_linux_names(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu avx2 amx_tile amx_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    monkeypatch.setattr(processor, "CPUINFO", info)
    assert cpu_flags() == {"fpu", "avx2", "amx_tile", "amx_bf16"}
    found = processor.processor()
    assert (found["amx"], found["bfloat16"]) == (True, True)
    assert found["capability"] == torch.backends.cpu.get_cpu_capability()
    info.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert (processor.processor()["amx"], processor.processor()["bfloat16"]) == (False, True)
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    assert cpu_flags() == set()
