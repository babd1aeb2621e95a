"""`scrubjay convert`: its arguments arrive, its report and errors are readable, its bar is for terminals."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading

import pytest
import torch
from command_helpers import ENVIRONMENT, error_of
from conversion_cases import assert_same, mamba_ssm, stored
from hybrid_cases import hybrid
from recycled_cases import decoder
from transformers.utils import logging

import scrubjay_cli
from scrubjay import SSDConfig
from scrubjay.conversion import parity
from scrubjay.examples.benchmarks import conversion_check


@pytest.fixture(autouse=True)
def _as_before():
    """The command silences transformers, for the length of a process."""
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


def test_a_report_is_printed_and_nothing_else(tmp_path, capsys):
    tensors = mamba_ssm(tmp_path / "source")
    assert scrubjay_cli.main(["convert", str(tmp_path / "source"), str(tmp_path / "new"), "--check"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"{tmp_path / 'source'}: mamba_ssm -> scrubjay (ssd)\n")
    del tensors["lm_head.weight"]
    assert f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} parameters" in out
    assert "- left out: lm_head.weight (repeats backbone.embedding.weight)" in out
    assert "this library's model on the result: logits differ by at most" in out
    assert out.rstrip("\n") in (tmp_path / "new" / "conversion.md").read_text()


def test_arguments_arrive(tmp_path):
    mamba_ssm(tmp_path / "source")
    argv = ["convert", str(tmp_path / "source"), str(tmp_path / "new"), "--max-shard-size", "20KB", "--quiet"]
    argv += ["--dtype", "bfloat16", "--set", "chunk_size=16", "--set", "hidden_act=swish"]
    assert scrubjay_cli.main(argv) == 0
    config = SSDConfig.from_pretrained(tmp_path / "new")
    assert (config.chunk_size, config.hidden_act, config.dtype) == (16, "swish", torch.bfloat16)
    assert (tmp_path / "new" / "model.safetensors.index.json").is_file()
    back = ["convert", str(tmp_path / "new"), str(tmp_path / "back"), "--to", "mamba_ssm"]
    assert scrubjay_cli.main(back) == 0
    assert stored(tmp_path / "back")["lm_head.weight"].dtype == torch.bfloat16


def test_a_hybrid_goes_there_and_back(tmp_path, capsys):
    tensors = hybrid("attention and MLP", tmp_path / "source")
    for source, destination, to in (("source", "ours", []), ("ours", "back", ["--to", "mamba_ssm"])):
        assert scrubjay_cli.main(["convert", str(tmp_path / source), str(tmp_path / destination), "--check", *to]) == 0
        assert "this library's model on the result: logits differ by at most" in capsys.readouterr().out
    assert_same(stored(tmp_path / "back"), tensors)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--to", "gguf"), "a ssd model cannot be written as 'gguf'. choose one of scrubjay, transformers, fla"),
        (("--set", "chunk_size"), "--set takes name=value; got 'chunk_size'"),
        (("--set", "size=3"), "size: no such field in ssdconfig"),
        (("--max-shard-size", "big"), "max_shard_size must be a positive number"),
        (("--dtype", "int4"), "invalid choice: 'int4'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else None,
)
def test_errors_are_one_line(tmp_path, capsys, argv, said):
    mamba_ssm(tmp_path / "source")
    assert said in error_of(capsys, "convert", tmp_path / "source", tmp_path / "new", *argv).lower()
    assert not (tmp_path / "new").exists()


def test_a_check_that_fails_is_an_error_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    mamba_ssm(tmp_path / "source")
    monkeypatch.setattr(parity, "BOUND", 1e-9)
    error = error_of(capsys, "convert", tmp_path / "source", tmp_path / "new", "--check")
    assert "The check failed: logits differ from the source's by this library's model on the result: " in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# Says when the twelfth tensor is read, and waits there. What starts the tests may have all of them ignore signals.
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
import scrubjay_cli
from scrubjay.conversion.checkpoint import Checkpoint
read, calls = Checkpoint.read, []
def slow(self, name):
    calls.append(name)
    if len(calls) == 12:
        print("writing", flush=True)
        time.sleep(100)
    return read(self, name)
Checkpoint.read = slow
raise SystemExit(scrubjay_cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_that_ends_the_process_leaves_nothing(tmp_path, number):
    mamba_ssm(tmp_path / "source")
    command = [sys.executable, "-c", SLOW, "convert", tmp_path / "source", tmp_path / "deep" / "new", "--quiet"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        (written,) = (tmp_path / "deep").iterdir()
        assert (written / "model.safetensors").stat().st_size > 0
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        said = process.stderr.read()
    assert said == f"scrubjay: {'interrupted' if number == signal.SIGINT else f'ended by {number.name}'}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_signals_are_heard_once_and_only_where_nobody_else_hears_them():
    """A terminal that closes sends SIGHUP twice; under nohup it is ignored; another thread cannot hear any."""
    terminated, hung_up = signal.SIGTERM, signal.SIGHUP
    before = signal.getsignal(hung_up)
    signal.signal(hung_up, signal.SIG_IGN)
    try:
        with scrubjay_cli.ended_cleanly():
            assert signal.getsignal(hung_up) is signal.SIG_IGN
            hear = signal.getsignal(terminated)
            assert callable(hear)
            with pytest.raises(scrubjay_cli.Ended):
                hear(terminated, None)
            assert signal.getsignal(terminated) is signal.SIG_IGN
        assert signal.getsignal(terminated) is signal.SIG_DFL
        assert signal.getsignal(hung_up) is signal.SIG_IGN
    finally:
        signal.signal(hung_up, before)
    found = []

    def elsewhere():
        with scrubjay_cli.ended_cleanly():
            found.append(signal.getsignal(terminated))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


def test_an_export_that_is_ended_leaves_nothing(tmp_path, monkeypatch):
    """The tokenizer's files or some of the weights may be written by then."""
    model = decoder()
    model.save_pretrained(tmp_path / "source")

    def ended(self, folder):
        (folder / "some.safetensors").touch()
        assert callable(signal.getsignal(signal.SIGTERM))  # or this would end the tests
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(type(model), "save_pretrained", ended)
    with pytest.raises(SystemExit) as ending:
        scrubjay_cli.main(["export", str(tmp_path / "source"), str(tmp_path / "deep" / "new")])
    assert ending.value.code == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_bar_is_drawn_on_a_terminal(tmp_path):
    mamba_ssm(tmp_path / "source")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, "-m", "scrubjay_cli", "convert", tmp_path / "source", tmp_path / "new"]
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.write(theirs, b"end")  # or else a command that draws nothing would be waited for
    drawn = os.read(ours, 10_000).decode()
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0
    assert "writing: 100%" in drawn
    assert done.stdout.count("\n") == len(done.stdout.splitlines()) > 4


def test_the_example_of_cuts_smoke(tmp_path):
    argv = ["--smoke", "--only", "Mamba-2 with attention 2.7B", "--out", str(tmp_path / "out.json")]
    (record,) = conversion_check.main(argv)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["cuts"] == [record]
    assert record["layouts"] == ["mamba_ssm", "scrubjay"]
    assert 0 < max(record["check"]["max_logit_difference"].values()) < written["bound"] == 1e-4
    assert record["same_bits_back"] == record["tensors"] + 1  # and the head, which repeats the embedding
    assert set(record["peak_bytes"]) == {"imports", "conversion", "with_check"}
    assert min(record["peak_bytes"].values()) > 10**8
    assert set(record["source_files"]) == {"config.json", "pytorch_model.bin"}
    assert str(tmp_path) not in json.dumps(written["cuts"])
    assert written["command"].startswith("python examples/benchmarks/conversion_check.py --smoke --only 'Mamba-2 with")
