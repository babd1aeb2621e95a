"""The numbers that the guides give are those of the runs recorded in examples/results."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median

import pytest

from scrubjay.examples.benchmarks import benchmark_tables as tables
from scrubjay.examples.measuring.processor import slug
from scrubjay.examples.measuring.run_report import size
from scrubjay.examples.studies import (
    ablations,
    demo_search,
    language,
    real,
    real_calibrate,
    real_speed,
    real_tables,
    recall,
    releasing,
    scan,
)
from scrubjay.examples.studies.language_runs import read_settings

ROOT = Path(__file__).parents[1]
FIRST, EXAMPLES, KERNELS, CONVERSION, MODELING = (
    (ROOT / folder / "README.md").read_text(encoding="utf-8")
    for folder in (".", "examples", "kernels", "conversion", "modeling")
)
RUNS = tables.recorded()
NAMED = {"benchmark_cpu_amd-epyc-avx512.json": "amd-epyc-avx512"}  # made before runs recorded what PyTorch may use


def recorded(name):
    return json.loads((ROOT / "examples" / "results" / name).read_text(encoding="utf-8"))


def section(title):
    """Text of a section of examples/README.md, up to the next of its rank."""
    return re.split(r"\n## ", EXAMPLES.split(f"\n## {title}\n")[1])[0]


def row(text, start):
    """Cells of the table row that begins so."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


STUDIES = {
    "recall": recall,
    "scan_cpu": scan,
    "language": language,
    "ablations": ablations,
    "demo_search": demo_search,
    "real": real,
    "real_calibrate": real_calibrate,
    "releasing": releasing,
}


@pytest.mark.parametrize(("name", "table"), [(name, study.table) for name, study in STUDIES.items()])
def test_tables_of_studies(name, table):
    guide = (ROOT / "examples" / "studies" / "README.md").read_text(encoding="utf-8")
    shown = guide.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0].strip()
    done = (ROOT / "examples" / "results" / f"{name}.json").is_file()
    assert shown == (table(recorded(f"{name}.json")) if done else "Not run yet.")


def test_answers_of_a_pretrained_model():
    """The first page's table, from the cells of eight questions in 1024 tokens."""
    column = real_tables.collected(recorded("real.json"), "policies")["questions", 1024, 128]
    lines = {
        "full attention": ["full"],
        '`policy="lowrank"`': ["Low rank, R = 16"],
        "Recycled Attention, S = 5 / S = 10": ["Recycled, S = 5", "Recycled, S = 10"],
        "SnapKV / H2O / TOVA / Quest / StreamingLLM": ["SnapKV", "H2O", "TOVA", "Quest", "StreamingLLM"],
    }
    text = FIRST.split("| 1024 tokens, 128 keys a step |")[1]
    for start, names in lines.items():
        assert row(text.split("\n\n")[0], start) == [" / ".join(f"{fmean(column[n]['scores']):.2f}" for n in names)]
    assert all(len(column[name]["scores"]) >= 24 for name in column)


def test_time_to_the_first_figure_of_a_pretrained_model():
    guide = (ROOT / "examples" / "studies" / "README.md").read_text(encoding="utf-8")
    minutes = round(sum(recorded("real_first_run.json")["seconds"].values()) / 60)
    assert f"download included, is {minutes} minutes on two idle cores of an AMD EPYC" in guide


def test_times_of_a_pretrained_model():
    guide = (ROOT / "examples" / "studies" / "README.md").read_text(encoding="utf-8")
    shown = guide.split("<!-- real_speed -->\n")[1].split("<!-- /real_speed -->")[0].strip()
    record = recorded("real_speed_amd-epyc-avx512.json")
    assert shown == real_speed.table(record)
    (took,) = (row["token"] for row in record["rows"] if (row["dtype"], row["length"]) == ("bfloat16", 8192))
    low, stock, full = (f"{took[name]:.0f}" for name in ("Low rank, R = 16", real_speed.STOCK, "full"))
    said = f'takes {low} ms in bfloat16, with transformers\' own cache {stock}, with `policy="full"`\n{full};'
    assert said in FIRST


def test_times_of_the_ways_in_which_adore_brings_tokens_back():
    guide = (ROOT / "modeling" / "decoder" / "README.md").read_text(encoding="utf-8")
    rows = recorded("adore_host_amd-epyc-avx512.json")["rows"]
    took = {row["name"]: f"{row['seconds'] * 1e3:.1f}" for row in rows if row["batch"] == 8}
    said = " ".join(guide.split("with full attention ")[1].split(".\n")[0].split())
    assert said == (
        f"{took['full attention']} ms a token, with no token brought back {took['R = 0']}, with eight run again "
        f"{took['R = 8 run again']}, with eight from the host {took['R = 8 from the host']}"
    )


def trained(name):
    """Records of a study in examples/results; none where it was not run yet."""
    return recorded(f"{name}.json") if (ROOT / "examples" / "results" / f"{name}.json").is_file() else []


@pytest.mark.parametrize("name", [name for name in STUDIES if trained(name)])
def test_records_of_studies_say_how_they_were_made(name):
    for record in trained(name):
        assert record["command"].startswith(f"python examples/studies/{name.removesuffix('_cpu')}.py")
        assert re.fullmatch("[0-9a-f]{40}", record["commit"]), "made by code that is in no commit"
        assert record["version"] == getattr(STUDIES.get(name), "VERSION", 1)
        assert record["machine"]
        assert record["versions"]["torch"]


def of_the_code(record):
    """Whether the sizes and the budget that a record names are those that its cell has in the code as it is."""
    sizes, budget = (json.loads(json.dumps(asdict(made))) for made in read_settings(record["cell"]["settings"]))
    result = record.get("result", {})
    return (result.get("sizes", sizes), result.get("budget", budget)) == (sizes, budget)


def test_sizes_and_budgets_of_records_are_those_of_the_code():
    """Cells do not say what is as `Sizes` and `Budget` have it: a changed default must not keep the old results."""
    cell = {"settings": {"tokens": 1024}}
    sizes, budget = map(asdict, read_settings(cell["settings"]))
    assert not of_the_code({"cell": cell, "result": {"sizes": sizes | {"window": 1}, "budget": budget}})
    assert all(of_the_code(record) for name in ("language", "ablations") for record in trained(name))


def test_retrieval():
    text, results = section("What they remember"), recorded("retrieval.json")["results"]
    rows = {
        "full attention": ["full"],
        "StreamingLLM / H2O / one choice": ["StreamingLLM", "H2O", "one choice"],
        "Recycled Attention, S = 5 / 7 / 10": [f"Recycled, S = {s}" for s in (5, 7, 10)],
        "Recycled Attention, dynamic": ["Recycled, dynamic"],
        "ADORE, recency": ["ADORE, recency"],
        "ADORE, trained controller": ["ADORE, R = 0", "ADORE, R = 8"],
    }
    assert sum(len(names) for names in rows.values()) == len(results)
    for start, names in rows.items():
        assert row(text, start) == [" / ".join(f"{results[name]['accuracy']:.3f}" for name in names)]


def test_bits_per_byte_of_the_long_demo():
    table = recorded("demo_30.json")["bits_per_byte"]
    assert row(FIRST, "**Rodimus+, 5.2M parameters**") == [f"**{table['rodimus_plus']:.2f}**"]
    assert row(FIRST, "lzma, after it has seen") == [f"{table['lzma after the training text']:.2f}"]
    for name in ("lzma", "trigram, interpolated", "bigram", "unigram"):
        assert row(FIRST, f"{name} |") == [f"{table[name.partition(',')[0]]:.2f}"]


def test_bits_per_byte_of_the_first_demo():
    record = recorded("demo_2.json")
    assert record["command"] == "scrubjay demo"
    assert f"it came to {record['bits_per_byte']['rodimus_plus']:.2f};" in FIRST
    assert f"(of the small model's: {record['bits_per_byte']['trigram']:.2f})" in FIRST
    assert f"a Rodimus+ of {record['parameters'] / 1e6:.1f}M parameters" in FIRST


def test_cache_of_the_long_demo():
    cache = recorded("demo_30.json")["cache"]
    for name, start in (("ours", "Rodimus+ |"), ("full", "full keys and values")):
        assert row(FIRST, start) == [size(cache[name][tokens]) for tokens in ("1000", "100000")]
    assert f"| cache after, in {cache['dtype']} |" in FIRST


@pytest.mark.parametrize("name", RUNS)
def test_speed_on_each_processor(name):
    assert tables.section(RUNS[name], name) in KERNELS
    assert name == f"benchmark_cpu_{NAMED.get(name) or slug(RUNS[name]['machine'])}.json"


@pytest.mark.parametrize("name", RUNS)
def test_rows_that_lose_are_shown_too(name):
    lost = [row["name"] for row in RUNS[name]["rows"] if row["ratio"] is not None and row["ratio"] < 1]
    assert lost
    missing = [line for line in lost if f"| {line} |" not in tables.section(RUNS[name], name)]
    assert all(" and " in line for line in missing), missing  # a thing beside itself at another length


def test_speed_on_the_first_page():
    ratios = [{line["name"]: line["ratio"] for line in RUNS[name]["rows"]} for name in sorted(RUNS)]
    names = {
        "a prompt of 2,048 tokens": "prefill 2048 float32",
        "a new token": "decode after 512 float32, per token",
        "forward and backward of 512": "forward + backward 512 float32",
    }
    for start, name in names.items():
        assert [cell.split(",")[0] for cell in row(FIRST, start)] == [f"{found[name]:.1f}" for found in ratios]
    less = [found["memory, forward + backward 512 float32"] for found in ratios]
    shown = [cell.split("with ")[1] for cell in row(FIRST, "forward and backward of 512")]
    assert shown == [{4: "a quarter of the memory", 3: "a third"}[round(factor)] for factor in less]


def test_few_bits():
    record = recorded("few_bits.json")
    for name, speed in record["tokens_per_second"].items():
        ssd, rodimus = (record["weighed"][kind][name] for kind in ("ssd", "rodimus"))
        assert row(MODELING, f"{name} |") == [
            f"{ssd['loss']:.4f}",
            f"{rodimus['loss']:.4f}",
            f"{ssd['bytes'] / 1e6:.1f} MB",
            " / ".join(f"{tokens:.0f}" for tokens in speed["decode"]),
        ]


def test_no_other_speeds_are_shown():
    shown = re.findall(r"^### .*$", KERNELS, re.MULTILINE)
    assert shown == [tables.section(result, name).splitlines()[0] for name, result in RUNS.items()]


@pytest.mark.parametrize(
    "line", [line for result in RUNS.values() for line in result["rows"]], ids=lambda line: line["name"]
)
def test_benchmark_rows_are_what_their_samples_say(line):
    middle = {side: median(samples) for side, samples in line["samples"].items()}
    assert {side: line[side] for side in middle} == pytest.approx(middle)
    ours = middle["scrubjay"]
    assert line["ratio"] == (pytest.approx(middle["peer"] / ours) if "peer" in middle else None)
    for side, multiple in (("products", "of_products"), ("weights_once", "of_weights")):
        assert (side in line) == (multiple in line)
        assert side not in line or line[multiple] == pytest.approx(ours / line[side])


def test_weights_are_read_at_the_bandwidth_of_the_run():
    for result in RUNS.values():
        for line in result["rows"]:
            if "weights_once" in line:
                read = result["ceilings"]["bytes_per_second"]["read"]
                assert line["weights_once"] == pytest.approx(line["weight_bytes"] / read)


def test_conversions():
    cuts = recorded("conversion.json")["cuts"]
    assert len(cuts) == 4
    for cut in cuts:
        files, peaks = cut["source_files"], cut["peak_bytes"]
        weights = max(files.values())
        (difference,) = cut["check"]["max_logit_difference"].values()
        above = peaks["conversion"] - peaks["imports"]
        assert row(CONVERSION, cut["name"]) == [f"{weights / 1e6:.0f} MB", f"{difference:.1e}", f"{above / 1e6:.0f} MB"]
        assert difference < 1e-4
        assert above < 1.3 * weights
        assert cut["same_bits_back"] == cut["tensors"] + len(cut["left_out"])


def test_qlora():
    record = recorded("qlora.json")
    for name, loss in record["loss"].items():
        if name != "merged into 4 bits":
            assert row(EXAMPLES, name) == [f"{loss:.3f}"]
    assert f"adapter on 4 bits, {record['adapter']['bytes'] / 1e6:.2f} MB" in EXAMPLES
    assert record["command"].startswith("python examples/qlora.py --minutes 5")
    assert record["loss"]["adapter on 4 bits"] < record["loss"]["base in 4 bits"]
