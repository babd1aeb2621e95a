"""The command line: arguments, one-line errors, and the commands on a tiny model."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_helpers import ENVIRONMENT, error_of
from transformers import LlamaConfig, LlamaForCausalLM

import scrubjay_cli
from scrubjay.conversion.convert import FORMATS, convert
from scrubjay.examples import demo as demo_module
from scrubjay.examples.benchmarks import benchmark
from scrubjay.examples.data.corpus import train_tokenizer
from scrubjay.examples.generate import CACHES
from scrubjay.examples.learning.recipe import MODELS, QUICK, QUICK_MINUTES, Recipe

COMMANDS = ["demo", "generate", "convert", "export", "verify", "eval", "bench"]
TEXT = "def cache(acorn):\n    return hide(acorn)\n" * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved Llama of a few thousand parameters, with its tokenizer."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([TEXT], 300)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


# Prints what a command has imported by its end.
IMPORTS = """
import json, sys
import scrubjay_cli
try:
    scrubjay_cli.main()
except SystemExit as ending:
    print(json.dumps([ending.code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        *(([*command, "--help"], 0) for command in ([], *([name] for name in COMMANDS))),
        *(([], 2), (["sing"], 2), (["demo", "--model", "parrot"], 2), (["demo", "--loud"], 2), (["bench"], 2)),
        *((["export", "nowhere", "new"], 2), (["convert", "here", "there", "--set", "size"], 2)),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_help_and_errors_of_parsing_import_neither_torch_nor_the_package(argv, code):
    done = subprocess.run([sys.executable, "-c", IMPORTS, *argv], env=ENVIRONMENT, capture_output=True, text=True)
    ended, imported = json.loads(done.stdout.splitlines()[-1])
    assert ended == code
    assert done.stderr.count("\n") == (code > 0)
    assert "argparse" in imported
    assert not {"torch", "transformers", "scrubjay", "numpy"} & set(imported)


def test_names_and_defaults_in_the_help_are_the_packages():
    parse = scrubjay_cli.make_parser().parse_args
    assert tuple(MODELS) == tuple(QUICK) == scrubjay_cli.MODELS
    assert set(CACHES) == set(scrubjay_cli.CACHES)
    for argv, function in ((["demo"], demo_module.demo), (["convert", "here", "there"], convert)):
        parsed = vars(parse(argv))
        parameters = inspect.signature(function).parameters.values()
        stated = {p.name: p.default for p in parameters if p.default is not p.empty and p.name != "command"}
        shared = stated.keys() & parsed.keys()
        assert len(shared) >= 4
        assert {name: parsed[name] for name in shared} == {name: stated[name] for name in shared}
    assert scrubjay_cli.QUICK_MINUTES == QUICK_MINUTES
    assert {Recipe.within(name, minutes).length for name in MODELS for minutes in (2, 30)} == {128}
    own = vars(benchmark.make_parser().parse_args(["--cpu"]))
    assert own.items() <= vars(parse(["bench", "--cpu"])).items()


def test_help_of_convert_names_every_layout(capsys):
    with pytest.raises(SystemExit):
        scrubjay_cli.main(["convert", "--help"])
    text = capsys.readouterr().out
    assert all(layout.name in text for layout in FORMATS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_argument(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        scrubjay_cli.main([command, "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    expected = {
        "demo": ("--model", "--text", "--minutes", "--output", "--seed", "--batch-size", "--length", "--smoke"),
        "generate": (
            "--prompt",
            "--prompt-file",
            "--chat",
            "--cache",
            "--budget",
            "--stride",
            "--max-new-tokens",
            "--temperature",
            "--top-p",
            "--seed",
            "--trust-remote-code",
        ),
        "convert": ("source", "destination", "--to", "--check", "--dtype", "--max-shard-size", "--set", "--quiet"),
        "export": ("source", "destination", "--trust-remote-code", "--push", "--private", "--revision"),
        "verify": ("source", "--revision"),
        "eval": ("--text", "--length", "--batch-size", "--trust-remote-code"),
        "bench": ("--cpu", "--threads", "--repetitions", "--only", "--smoke", "--out"),
    }
    assert all(name in text for name in expected[command])


def test_unknown_model_names_the_choices(capsys):
    error = error_of(capsys, "demo", "--model", "parrot")
    assert "parrot" in error
    assert all(name in error for name in MODELS)


@pytest.mark.parametrize("argv", [(), ("sing",), ("demo", "--loud"), ("generate", "somewhere")])
def test_wrong_arguments_are_one_line(argv, capsys):
    assert "--help" in error_of(capsys, *argv)


def test_demo_errors_are_one_line(tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "does not exist" in error_of(capsys, "demo", "--text", tmp_path / "no", "--output", tmp_path / "out")
    assert "holds 0 bytes" in error_of(capsys, "demo", "--text", empty, "--output", tmp_path / "out")
    assert "--minutes is 0.0" in error_of(capsys, "demo", "--minutes", "0", "--output", tmp_path / "out")


def test_demo_says_first_what_it_will_do(tmp_path):
    """Before the imports that take seconds: here the first of them fails."""
    script = "import sys; sys.modules['scrubjay'] = None; import scrubjay_cli; scrubjay_cli.main()"
    argv = ["demo", "--model", "ssd", "--minutes", "7", "--output", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", script, *argv], env=ENVIRONMENT, capture_output=True, text=True)
    for said in (
        "a 0.6M-parameter ssd",
        "Python's standard library",
        "7 minutes",
        "8 to 10 minutes in all on two idle cores",
        str(tmp_path / "out"),
    ):
        assert said in done.stdout
    assert done.stderr.startswith("scrubjay: error: ")
    assert done.stderr.count("\n") == 1


# A command line of another's: it says what it was given, and waits if it is to.
STANDIN = """
import sys, time
try:
    print(sys.argv[1:], flush=True)
    time.sleep(60 * ("--wait" in sys.argv))
except KeyboardInterrupt:
    raise SystemExit(130)
raise SystemExit(7)
"""
# What starts the tests may have all of them ignore signals.
HEARING = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(("argument", "code"), [("--smoke", 7), ("--wait", 130)])
def test_the_demos_file_is_the_same_command(argument, code, tmp_path):
    """Its exit code comes back, and an interrupt from a terminal, which both hear, ends both without a traceback."""
    (tmp_path / "scrubjay_cli.py").write_text(STANDIN)
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])}
    file = Path(demo_module.__file__).resolve()
    command = [sys.executable, "-c", HEARING, file, argument]
    with subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == f"{['demo', argument]}\n"
        if argument == "--wait":
            os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == code
        assert process.stderr.read() == ""


def test_bench_passes_its_arguments_on(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(benchmark, "run", lambda **arguments: seen.update(arguments) or {"rows": []})
    argv = ["bench", "--cpu", "--threads", "1", "--only", "SW", "--smoke", "--out", str(tmp_path / "x.json")]
    argv += ["--llama-cpp", str(tmp_path), "--causes", "--tables", "--fresh"]
    assert scrubjay_cli.main(argv) == 0
    expected = {"threads": 1, "repetitions": 5, "only": "SW", "smoke": True, "out": tmp_path / "x.json"}
    expected |= {"llama_cpp": tmp_path, "causes": True, "tables": True, "fresh": True}
    assert seen == expected | {"command": f"scrubjay {' '.join(argv)}"}


@pytest.mark.parametrize(("minutes", "recipe"), [(QUICK_MINUTES, Recipe.quick), (QUICK_MINUTES + 1, Recipe.of)])
def test_a_demo_of_more_minutes_trains_a_larger_model(minutes, recipe, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(demo_module, "demo", lambda model, **arguments: seen.update(arguments))
    assert scrubjay_cli.main(["demo", "--minutes", str(minutes)]) == 0
    assert seen["recipe"] == recipe("rodimus_plus")
    size = scrubjay_cli.SIZES[minutes > QUICK_MINUTES]
    assert f"a {size}-parameter rodimus_plus" in capsys.readouterr().out


def test_demo_passes_its_arguments_on(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(demo_module, "demo", lambda model, **arguments: seen.update(arguments, model=model))
    argv = ["demo", "--model", "llama", "--minutes", "0.5", "--seed", "3", "--batch-size", "2", "--length", "32"]
    assert scrubjay_cli.main([*argv, "--output", str(tmp_path)]) == 0
    assert seen["recipe"] == Recipe.quick("llama", batch_size=2, length=32)
    assert (seen["model"], seen["minutes"], seen["seed"], seen["output"]) == ("llama", 0.5, 3, tmp_path)
    assert seen["command"].startswith("scrubjay demo --model llama --minutes 0.5")


@pytest.mark.parametrize("command", ["generate", "export", "eval"])
def test_missing_model_folder_says_what_to_pass(command, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    rest = {"generate": ["--prompt", "x"], "export": [tmp_path / "new"], "eval": ["--text", text]}
    for source in (tmp_path, tmp_path / "no" / "such", "nowhere"):
        assert "Pass a folder that save_pretrained wrote" in error_of(capsys, command, source, *rest[command])


def test_generate_streams_the_prompt_and_more_and_repeats_itself(folder, capsys):
    argv = ["generate", str(folder), "--prompt", "def cache", "--max-new-tokens", "5"]
    outputs = []
    for extra in (["--seed", "1"], ["--seed", "1"], ["--temperature", "0"]):
        assert scrubjay_cli.main(argv + extra) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert all(output.startswith("def cache") for output in outputs)


@pytest.mark.parametrize("kind", CACHES)
def test_generate_with_a_cache_says_what_it_cost(kind, folder, tmp_path, capsys):
    """With a budget that holds all, the text is what full attention writes."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("def cache", encoding="utf-8")
    argv = ["generate", str(folder), "--max-new-tokens", "5", "--temperature", "0"]
    assert scrubjay_cli.main([*argv, "--prompt", "def cache"]) == 0
    plain = capsys.readouterr()
    assert "5 tokens: the first after" in plain.err
    assert "tokens a second" in plain.err
    extra = ["--prompt-file", str(prompt), "--cache", kind, "--budget", "300" if kind == "adore" else "64"]
    assert scrubjay_cli.main([*argv, *extra]) == 0
    found = capsys.readouterr()
    assert found.out == plain.out
    assert re.search(rf"tokens a second; {kind} cache, [\d,]+ bytes", found.err)


def test_generate_refuses_settings_without_their_cache(folder, capsys):
    argv = ("generate", folder, "--prompt", "x")
    assert "pass --cache too" in error_of(capsys, *argv, "--budget", "9")
    assert "--stride is of --cache recycled" in error_of(capsys, *argv, "--cache", "h2o", "--stride", "9")
    assert "no chat template" in error_of(capsys, *argv, "--chat")
    assert "must hold two of them" in error_of(capsys, *argv, "--cache", "quest", "--budget", "9")


def test_generate_leaves_a_last_space_to_the_first_new_token(folder, capsys):
    """The tokenizer of TEXT has "Ġcache" and "Ġhide": after "def " a word must come, never a space alone and a word."""
    for seed in "0123":
        argv = [
            "generate",
            str(folder),
            "--prompt",
            "def ",
            "--max-new-tokens",
            "1",
            "--temperature",
            "9",
            "--seed",
            seed,
        ]
        assert scrubjay_cli.main(argv) == 0
        output = capsys.readouterr().out
        assert output.startswith("def ")
        assert output.removesuffix("\n") != "def"


@pytest.mark.parametrize(
    "extra",
    [("--temperature", "-1"), ("--top-p", "0"), ("--max-new-tokens", "0"), ("--prompt", "")],
    ids=lambda x: x[0],
)
def test_generate_refuses_impossible_sampling(folder, extra, capsys):
    assert extra[0].strip("-") in error_of(capsys, "generate", folder, "--prompt", "x", *extra)


def test_export_writes_a_folder_that_loads(folder, tmp_path, capsys):
    new = tmp_path / "exported"
    assert scrubjay_cli.main(["export", str(folder), str(new)]) == 0
    assert "config.json" in capsys.readouterr().out
    copy, original = (LlamaForCausalLM.from_pretrained(path).state_dict() for path in (new, folder))
    assert copy.keys() == original.keys()
    assert all(torch.equal(copy[name], original[name]) for name in copy)
    assert (new / "tokenizer.json").is_file()
    assert "already exists" in error_of(capsys, "export", folder, new)


def test_export_works_without_a_tokenizer(folder, tmp_path):
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "bare")
    assert scrubjay_cli.main(["export", str(tmp_path / "bare"), str(tmp_path / "new")]) == 0
    assert json.loads((tmp_path / "new" / "config.json").read_text())["model_type"] == "llama"


def test_eval_prints_bits_per_byte(folder, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    assert scrubjay_cli.main(["eval", str(folder), "--text", str(file), "--length", "64"]) == 0
    value, rest = capsys.readouterr().out.split(maxsplit=1)
    assert rest.startswith(f"bits per byte ({len(TEXT):,} bytes")
    assert 0 < float(value) < 16
    file.write_text("")
    assert "is empty" in error_of(capsys, "eval", folder, "--text", file)
    assert "No such file" in error_of(capsys, "eval", folder, "--text", tmp_path / "no.txt")


def test_traceback_is_there_when_asked_for(tmp_path):
    with pytest.raises(ValueError, match="save_pretrained"):
        scrubjay_cli.main(["--traceback", "generate", str(tmp_path), "--prompt", "x"])


def test_module_runs_as_a_script():
    command = [sys.executable, "-m", "scrubjay_cli", "demo", "--model", "x"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("scrubjay: error: argument --model")
