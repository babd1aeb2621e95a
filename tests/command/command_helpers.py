"""What failing commands say, and an environment in which another process finds the command line."""

import os
from pathlib import Path

import pytest

import scrubjay_cli

_PATHS = (str(Path(scrubjay_cli.__file__).parent), os.environ.get("PYTHONPATH", ""))
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, _PATHS))}


def error_of(capsys, *argv) -> str:
    """What a failing command says; it must be one line and exit with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        scrubjay_cli.main([str(argument) for argument in argv])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("scrubjay: error: ")
    assert error.count("\n") == 1
    return error
