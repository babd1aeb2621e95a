"""The command line: arguments, one-line errors, and the commands on a tiny model."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scrubjay import cli
from scrubjay.examples.data.corpus import train_tokenizer
from scrubjay.examples.learning.recipe import MODELS, Recipe

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


def error_of(capsys, *argv) -> str:
    """What a failing command says; it must be one line and exit with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        cli.main([str(argument) for argument in argv])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("scrubjay: error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("command", ["demo", "generate", "convert", "export", "verify", "eval"])
def test_help_names_every_argument(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([command, "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    expected = {
        "demo": ("--model", "--text", "--minutes", "--output", "--seed", "--batch-size", "--length", "--smoke"),
        "generate": ("--prompt", "--max-new-tokens", "--temperature", "--top-p", "--seed", "--trust-remote-code"),
        "convert": ("source", "destination", "--to", "--check", "--dtype", "--max-shard-size", "--set", "--quiet"),
        "export": ("source", "destination", "--trust-remote-code", "--push", "--private", "--revision"),
        "verify": ("source", "--revision"),
        "eval": ("--text", "--length", "--batch-size", "--trust-remote-code"),
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


def test_demo_passes_its_arguments_on(monkeypatch, tmp_path):
    import scrubjay.examples.demo as module

    seen = {}
    monkeypatch.setattr(module, "demo", lambda model, **arguments: seen.update(arguments, model=model))
    argv = ["demo", "--model", "llama", "--minutes", "0.5", "--seed", "3", "--batch-size", "2", "--length", "32"]
    assert cli.main([*argv, "--output", str(tmp_path)]) == 0
    assert seen["recipe"] == Recipe.of("llama", batch_size=2, length=32)
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
        assert cli.main(argv + extra) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert all(output.startswith("def cache") for output in outputs)


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
        assert cli.main(argv) == 0
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
    assert cli.main(["export", str(folder), str(new)]) == 0
    assert "config.json" in capsys.readouterr().out
    copy, original = (LlamaForCausalLM.from_pretrained(path).state_dict() for path in (new, folder))
    assert copy.keys() == original.keys()
    assert all(torch.equal(copy[name], original[name]) for name in copy)
    assert (new / "tokenizer.json").is_file()
    assert "already exists" in error_of(capsys, "export", folder, new)


def test_export_works_without_a_tokenizer(folder, tmp_path):
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "bare")
    assert cli.main(["export", str(tmp_path / "bare"), str(tmp_path / "new")]) == 0
    assert json.loads((tmp_path / "new" / "config.json").read_text())["model_type"] == "llama"


def test_eval_prints_bits_per_byte(folder, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    assert cli.main(["eval", str(folder), "--text", str(file), "--length", "64"]) == 0
    value, rest = capsys.readouterr().out.split(maxsplit=1)
    assert rest.startswith(f"bits per byte ({len(TEXT):,} bytes")
    assert 0 < float(value) < 16
    file.write_text("")
    assert "is empty" in error_of(capsys, "eval", folder, "--text", file)
    assert "No such file" in error_of(capsys, "eval", folder, "--text", tmp_path / "no.txt")


def test_traceback_is_there_when_asked_for(tmp_path):
    with pytest.raises(ValueError, match="save_pretrained"):
        cli.main(["--traceback", "generate", str(tmp_path), "--prompt", "x"])


def test_module_runs_as_a_script():
    done = subprocess.run(
        [sys.executable, "-m", "scrubjay.cli", "demo", "--model", "x"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("scrubjay: error: argument --model")
