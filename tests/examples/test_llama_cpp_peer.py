"""llama.cpp as a peer of the benchmark, played by small programs: what it is asked, and when its text is not ours."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from scrubjay import SSDForCausalLM
from scrubjay.examples.benchmarks import benchmark, llama_cpp_peer
from scrubjay.examples.benchmarks.benchmark_rows import SMOKE, Row
from scrubjay.examples.benchmarks.llama_cpp_peer import LlamaCpp, compare, greedy, rows, run, served
from scrubjay.examples.benchmarks.model_work import tokens, write_checkpoint

CONVERT = """
import pathlib, shutil, sys
folder, _, outtype, _, out = sys.argv[1:]
assert (pathlib.Path(folder) / "config.json").read_text().count("mamba2")
pathlib.Path(out).write_text(outtype)
"""
BENCH = """
import json, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
open(options["-m"] + ".asked", "w").write(json.dumps(options))
print(json.dumps([{"samples_ns": [4e9] * int(options["-r"])}]))
"""
SERVER = """
import http.server, json, pathlib, sys

class Answers(http.server.BaseHTTPRequestHandler):
    def answer(self, data):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())

    def do_GET(self):
        self.answer({"status": "ok"})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        pathlib.Path(__file__).with_name("asked").write_text(json.dumps([self.path, asked]))
        self.answer({"tokens": json.loads(pathlib.Path(__file__).with_name("ids").read_text())})

    def log_message(self, *_):
        pass

http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answers).serve_forever()
"""


@pytest.fixture
def place(tmp_path):
    """A folder like llama.cpp's, built."""
    root = tmp_path / "llama.cpp"
    (root / "build" / "bin").mkdir(parents=True)
    (root / "convert_hf_to_gguf.py").write_text(CONVERT)
    for name, text in (("llama-bench", BENCH), ("llama-server", SERVER)):
        program = root / "build" / "bin" / name
        program.write_text(f"#!{sys.executable}\n{text}")
        program.chmod(0o755)
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    write_checkpoint(SMOKE, folder)
    return folder


@pytest.fixture(scope="module")
def ours(checkpoint):
    ids = tokens(SMOKE.vocab_size, llama_cpp_peer.PROMPT)[0].tolist()
    return greedy(SSDForCausalLM.from_pretrained(checkpoint).eval(), ids)[0]


def answer(place, ids):
    (place / "build" / "bin" / "ids").write_text(json.dumps(ids))


def test_a_folder_or_a_program_in_it_is_found(place):
    found = LlamaCpp.at(place)
    assert found == LlamaCpp.at(place / "build" / "bin" / "llama-bench")
    assert found.server == place / "build" / "bin" / "llama-server"


def test_what_a_folder_lacks_is_said_with_what_to_do(place):
    (place / "build" / "bin" / "llama-server").unlink()
    with pytest.raises(ValueError, match=r"lacks \S*llama-server\. .*llama-cpp-python.*cmake --build build"):
        LlamaCpp.at(place)


def test_the_same_text_goes_on_to_times_of_both(place, checkpoint, ours, tmp_path):
    answer(place, ours)
    records: list = []
    shape = replace(SMOKE, short=8, long=16)
    found = compare(place, checkpoint, shape, tmp_path, repetitions=2, only="llama.cpp", add=records.append)
    prompt = tokens(SMOKE.vocab_size, llama_cpp_peer.PROMPT)[0].tolist()
    path, asked = json.loads((place / "build" / "bin" / "asked").read_text())
    assert (path, asked["prompt"], asked["n_predict"], asked["temperature"]) == ("/completion", prompt, 64, 0)
    assert (found["tokens"], found["kinds"], found["ids"]) == (64, len(set(ours)), ours)
    assert [record["name"] for record in records] == [row.name for row in rows(shape)]
    assert [record["peer"] for record in records] == [4.0, 4.0, 4.0 / shape.decoded] * 2
    assert all(len(record["samples"]["scrubjay"]) == 2 for record in records)
    options = json.loads((tmp_path / "bfloat16.gguf.asked").read_text())
    assert [options[key] for key in ("-p", "-n", "-r")] == ["0", str(shape.decoded), "2"]
    assert not list(tmp_path.glob("*.gguf"))  # hundreds of megabytes each


def test_a_prefill_is_asked_for_without_decoding(place, tmp_path):
    model = tmp_path / "x.gguf"
    assert LlamaCpp.at(place).times(model, Row("", "prefill", 12), 3, 1) == [4.0]
    options = json.loads((tmp_path / "x.gguf.asked").read_text())
    assert [options[key] for key in ("-p", "-n", "-t")] == ["12", "0", "3"]


@pytest.mark.parametrize("at", [0, 40])
def test_another_text_is_refused(at, place, checkpoint, ours, tmp_path):
    answer(place, [*ours[:at], (ours[at] + 1) % SMOKE.vocab_size, *ours[at + 1 :]])
    with pytest.raises(RuntimeError, match=f"after {at} of 64"):
        compare(place, checkpoint, SMOKE, tmp_path, repetitions=2, only="prefill 32 float32", add=print)


def test_a_text_that_ends_early_is_refused(place, checkpoint, ours, tmp_path):
    answer(place, ours[:50])
    with pytest.raises(RuntimeError, match="after 50 of 64"):
        compare(place, checkpoint, SMOKE, tmp_path, repetitions=2, only="prefill 32 float32", add=print)


def test_nothing_is_converted_for_rows_that_nobody_asked_for(place, tmp_path):
    assert compare(place, "nowhere", SMOKE, tmp_path, repetitions=2, only="SW-SKA", add=print) == {}


def test_greedy_ids_are_the_best_logits(checkpoint, ours):
    model = SSDForCausalLM.from_pretrained(checkpoint).eval()
    ids = tokens(SMOKE.vocab_size, llama_cpp_peer.PROMPT)[0].tolist()
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *ours]])).logits[0, len(ids) - 1 : -1]
    assert logits.argmax(-1).tolist() == ours
    margin = greedy(model, ids)[1]
    best = logits.topk(2).values
    assert margin == pytest.approx(float((best[:, 0] - best[:, 1]).min()), abs=1e-5)


def test_a_program_that_fails_is_quoted(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import sys\nprint('what was wrong')\nsys.exit(3)\n")
    with pytest.raises(RuntimeError, match="ended with code 3:\nwhat was wrong"):
        run([sys.executable, script])


def test_a_server_that_ends_or_stays_silent_is_no_server(tmp_path, monkeypatch):
    ends, silent = tmp_path / "ends.py", tmp_path / "silent.py"
    ends.write_text("import sys\nsys.exit(5)\n")
    silent.write_text("import time\ntime.sleep(60)\n")
    with pytest.raises(RuntimeError, match="ended with code 5"), served([sys.executable, ends]):
        pass
    monkeypatch.setattr(llama_cpp_peer, "PATIENCE", 0.3)
    with pytest.raises(RuntimeError, match="did not answer within"), served([sys.executable, silent]):
        pass


def test_the_benchmark_takes_llama_cpp_along(place, ours, monkeypatch):
    answer(place, ours)
    argv = ["--cpu", "--smoke", "--threads", "1", "--only", "llama.cpp, decode float32", "--llama-cpp", str(place)]
    result = benchmark.main(argv)
    assert [row["name"] for row in result["rows"]] == ["llama.cpp, decode float32, per token"]
    assert result["agreement"]["llama.cpp"]["ids"] == ours
