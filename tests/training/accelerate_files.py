"""The ready-made configurations of examples/accelerate, as accelerate's own launcher reads them."""

import os
from pathlib import Path
from unittest import mock

from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

ACCELERATE = Path(__file__).resolve().parents[2] / "examples" / "accelerate"


def launched(path: Path) -> tuple[object, dict[str, str]]:
    """The launcher's arguments, and the environment in which it would start each process."""
    parser = launch_command_parser()
    args, _, _ = _validate_launch_command(parser.parse_args(["--config_file", str(path), "train.py"]))
    with mock.patch.dict(os.environ):
        return args, prepare_multi_gpu_env(args)


def plugin_of(path: Path) -> FullyShardedDataParallelPlugin:
    """What accelerate makes of the settings for FSDP, and of the precision."""
    args, environment = launched(path)
    with mock.patch.dict(os.environ, {k: v for k, v in environment.items() if k.startswith("FSDP_")}):
        plugin = FullyShardedDataParallelPlugin()
    plugin.set_mixed_precision(args.mixed_precision)
    return plugin
