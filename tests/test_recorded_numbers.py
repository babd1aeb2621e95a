"""The numbers that the guides give are those of the runs recorded in examples/results."""

import json
import re
from pathlib import Path

import pytest

from scrubjay.examples.measuring.run_report import size

ROOT = Path(__file__).parents[1]
FIRST, EXAMPLES, KERNELS, CONVERSION = (
    (ROOT / folder / "README.md").read_text(encoding="utf-8") for folder in (".", "examples", "kernels", "conversion")
)


def recorded(name):
    return json.loads((ROOT / "examples" / "results" / name).read_text(encoding="utf-8"))


def section(title):
    """Text of a section of examples/README.md, up to the next of its rank."""
    return re.split(r"\n## ", EXAMPLES.split(f"\n## {title}\n")[1])[0]


def row(text, start):
    """Cells of the table row that begins so."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_recall():
    cells, text = [(8, 16), (8, 64), (32, 16), (32, 64), (64, 16), (64, 64)], section("What they remember")
    rows = {"ssd": "SSD", "rodimus": "Rodimus |", "rodimus_plus": "Rodimus+", "taipan": "Taipan"}
    found = {name: row(text, start) for name, start in rows.items()}
    for record in recorded("mqar.json"):
        run = record["settings"]
        cell = found[run["model"]][cells.index((run["pairs"], run["state_size"]))]
        assert cell == f"{record['test_accuracy']:.3f}", run
    assert sum(cell != "" for row in found.values() for cell in row) == len(recorded("mqar.json"))


def test_retrieval():
    text, results = section("What they remember"), recorded("retrieval.json")["results"]
    rows = {
        "full attention": ["full"],
        "StreamingLLM / H2O / SnapKV": ["StreamingLLM", "H2O", "SnapKV"],
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


def test_cache_of_the_long_demo():
    cache = recorded("demo_30.json")["cache"]
    for name, start in (("ours", "Rodimus+ |"), ("full", "full keys and values")):
        assert row(FIRST, start) == [size(cache[name][tokens]) for tokens in ("1000", "100000")]
    assert f"| cache after, in {cache['dtype']} |" in FIRST


RATIOS = {
    "prefill 2048 tokens, float32": "prefill 2048 float32",
    "prefill 512 tokens, bfloat16": "prefill 512 bfloat16",
    "prompt of one token": "prompt of 1 token float32",
    "decode, float32": "decode after 512 float32, per token",
    "decode, bfloat16": "decode after 512 bfloat16, per token",
    "forward and backward, 512 tokens, float32": "forward + backward 512 float32",
    "forward and backward, 512 tokens, bfloat16": "forward + backward 512 bfloat16",
    "prefill 8192 tokens, float32": "prefill 8192 float32",
    "prefill 8192 tokens, bfloat16": "prefill 8192 bfloat16",
    "the same, peak memory": "memory, forward + backward 512 float32",
    "prefill 2048 tokens, peak memory": "memory, prefill 2048 float32",
    "Rodimus+ attention": "SW-SKA 8192, window 512 float32",
    "Recycled Attention at 32K": "Recycled decode at 32768, K = 2048, S = 10 float32",
    "the same, bfloat16": "Recycled decode at 32768, K = 2048, S = 10 bfloat16",
    "ADORE at 8K": "ADORE decode, 7B width bfloat16, R = 8, batch 8",
    "the same, R = 8 in every": "ADORE decode, 7B width bfloat16, R = 8 every 4th step, batch 8",
    "the same, R = 0": "ADORE decode, 7B width bfloat16, R = 0, batch 8",
    "the same in equal memory": "ADORE decode, 7B width bfloat16, R = 8, equal memory",
    "ADORE in float32": "ADORE decode, 7B width float32, R = 8, batch 8",
    "Taipan's selective layer": "Taipan's selective layer, prefill 8192, 15%",
    "seven layers of Taipan": "Taipan's unit, prefill 8192, 15%",
}


@pytest.mark.parametrize("start", RATIOS)
def test_ratios(start):
    *_, shown = row(KERNELS, start)
    ratio = next(line["ratio"] for line in recorded("benchmark_cpu.json")["rows"] if line["name"] == RATIOS[start])
    assert shown.removesuffix(" less") == (f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x")


@pytest.mark.parametrize("line", recorded("benchmark_cpu.json")["rows"], ids=lambda line: line["name"])
def test_benchmark_rows_are_what_their_samples_say(line):
    ratio = line["peer"] / line["scrubjay"]
    assert line["ratio"] == pytest.approx(ratio)
    for side in ("peer", "scrubjay"):
        samples = sorted(line["samples"][side])
        assert line[side] == pytest.approx((samples[(len(samples) - 1) // 2] + samples[len(samples) // 2]) / 2)


def test_conversions():
    cuts = recorded("conversion.json")["cuts"]
    assert len(cuts) == 3
    for cut in cuts:
        files, peaks = cut["source_files"], cut["peak_bytes"]
        weights = max(files.values())
        (difference,) = cut["check"]["max_logit_difference"].values()
        above = peaks["conversion"] - peaks["imports"]
        assert row(CONVERSION, cut["name"]) == [f"{weights / 1e6:.0f} MB", f"{difference:.1e}", f"{above / 1e6:.0f} MB"]
        assert difference < 1e-4
        assert above < 1.3 * weights


def test_qlora():
    record = recorded("qlora.json")
    for name, loss in record["loss"].items():
        if name != "merged into 4 bits":
            assert row(EXAMPLES, name) == [f"{loss:.3f}"]
    assert f"adapter on 4 bits, {record['adapter']['bytes'] / 1e6:.2f} MB" in EXAMPLES
    assert record["command"].startswith("python examples/qlora.py --minutes 5")
    assert record["loss"]["adapter on 4 bits"] < record["loss"]["base in 4 bits"]
