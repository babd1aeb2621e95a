"""examples/pretrain.py, on one process and on two, and the configurations that launch it."""

import re
import shutil

import pytest
import torch
import transformers
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate_files import ACCELERATE, launched, plugin_of
from processes import run, torchrun
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from zoo import relative

from scrubjay import SSDConfig, TaipanConfig
from scrubjay.examples import pretrain

FILES = sorted(path.name for path in ACCELERATE.glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("model", pretrain.MODELS)
def test_pretrain_smoke(model, tmp_path, capsys):
    found = pretrain.main(["--smoke", "--model", model, "--checkpointing", "--out", str(tmp_path)])
    assert found["processes"] == 1
    assert found["tokens"] == 4 * 4 * 64
    assert 0 < found["heldout_bits_per_byte"] < 8
    assert "model (a folder to load)" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.config.vocab_size == len(tokenizer) == 512
    assert loaded.config.use_cache


@pytest.mark.slow
def test_pretrain_on_two_processes_and_again_from_a_checkpoint(tmp_path):
    out = tmp_path / "out"
    script = ACCELERATE.parent / "pretrain.py"
    command = [*torchrun(2), str(script), "--smoke", "--model", "taipan", "--checkpointing", "--out", str(out)]
    printed = run(command, 240, ACCELERATE_USE_CPU="true")
    assert printed.count("processes: 2\n") == 1
    assert f"tokens: {4 * 4 * 2 * 64}\n" in printed
    trained = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    early = AutoModelForCausalLM.from_pretrained(out / "checkpoint-2").state_dict()
    assert max(relative(early[name], trained[name]) for name in trained) > 1e-3
    written = (out / "checkpoint-2" / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoint-4")
    try:
        run(command, 240, ACCELERATE_USE_CPU="true")
    except RuntimeError as error:
        if "tagged with cpu:0" not in str(error):
            raise
        pytest.skip(f"the Trainer of transformers {transformers.__version__} cannot resume on several CPU processes")
    again = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    assert all(torch.equal(again[name], trained[name]) for name in trained)
    assert (out / "checkpoint-2" / "model.safetensors").stat().st_mtime_ns == written  # those steps were not repeated


@pytest.mark.slow
def test_a_finished_run_takes_no_further_step(tmp_path, capsys):
    command = ["--smoke", "--model", "ssd", "--out", str(tmp_path)]
    first = pretrain.main(command)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    shutil.rmtree(tmp_path / "model")
    capsys.readouterr()
    again = pretrain.main(command)
    assert "checkpoint-4 has all of the 4 steps that were asked for: nothing is trained." in capsys.readouterr().out
    assert again == {name: value for name, value in first.items() if name != "training_loss"}
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(written[name], trained[name]) for name in trained)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.slow
def test_a_folder_of_another_run_is_refused(tmp_path):
    pretrain.main(["--smoke", "--model", "ssd", "--out", str(tmp_path)])
    held = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    other = "checkpoint-4 is of a run with {}; asked for is one with {}"
    for changes, was, now in (
        (["--model", "taipan"], "model_type 'scrubjay_ssd'", "model_type 'scrubjay_taipan'"),
        (["--model", "ssd", "--hidden-size", "128"], "hidden_size 64, num_heads 2", "hidden_size 128, num_heads 4"),
    ):
        with pytest.raises(ValueError, match=re.escape(other.format(was, now)) + ".*Name another --out"):
            pretrain.main(["--smoke", *changes, "--out", str(tmp_path)])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == held


def test_a_folder_without_a_checkpoint_takes_any_run(tmp_path):
    for config in (SSDConfig(), TaipanConfig()):
        assert pretrain.checkpoint_of(config, tmp_path) is None
        assert AutoConfig.from_pretrained(tmp_path / "config").model_type == config.model_type


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    corpus = pretrain.load_corpus().limited(1 << 16, 1 << 12)
    pretrain.tokenizer_of(corpus, 300, tmp_path)
    assert len(pretrain.tokenizer_of(corpus, 300, tmp_path)) == 300
    with pytest.raises(ValueError, match=r"tokenizer of 300 tokens and 280 were asked for.*--vocab-size 300"):
        pretrain.tokenizer_of(corpus, 280, tmp_path)


SIZES = {"1_gpu": (1, 1), "8_gpus": (8, 1), "8_gpus_fsdp2": (8, 1), "64_gpus": (64, 8)}


@pytest.mark.parametrize("name", FILES)
def test_configurations_are_what_their_names_say(name):
    config = load_config_from_file(str(ACCELERATE / name))
    args, environment = launched(ACCELERATE / name)
    assert (args.num_processes, args.num_machines) == SIZES[name.removesuffix(".yaml")]
    assert environment["ACCELERATE_MIXED_PRECISION"] == config.mixed_precision == "bf16"
    assert not config.use_cpu
    sharded = "fsdp2" in name or name == "64_gpus.yaml"
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == args.use_fsdp == sharded
    assert args.multi_gpu == (name == "8_gpus.yaml")


def test_the_configurations_of_fsdp_say_the_same():
    one, other = (load_config_from_file(str(ACCELERATE / name)) for name in ("8_gpus_fsdp2.yaml", "64_gpus.yaml"))
    assert one.fsdp_config == other.fsdp_config


def test_the_configurations_of_fsdp_shard_each_block(entry):
    plugin, model = plugin_of(ACCELERATE / "64_gpus.yaml"), entry.build()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward
    assert not plugin.activation_checkpointing
    assert "SHARDED" in str(plugin.state_dict_type)
    is_block = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert [module for module in model.modules() if is_block(module)] == list(model.model.layers)


def test_precision_is_left_alone_where_nothing_is_sharded():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    pretrain.keep_precision(accelerator)
    assert not hasattr(accelerator.state, "fsdp_plugin") or accelerator.state.fsdp_plugin is None
