"""Several processes for a test: one torchrun of a script of these folders; all tests of a session share its results."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from filelock import FileLock

HERE = Path(__file__).resolve().parent
FOLDERS = [HERE, *sorted(path for path in HERE.iterdir() if path.is_dir())]  # as pytest has them on its path
PATH = os.pathsep.join([*map(str, FOLDERS), *filter(None, [os.environ.get("PYTHONPATH")])])
ALONE = {
    "PYTHONPATH": PATH,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}


def run(command: list[str], timeout: float, **environment: str) -> str:
    """What a command prints, both streams. It and all processes that it started end with the time.

    Raises:
        RuntimeError: the command failed or took too long; the message ends with what it printed.
    """
    process = subprocess.Popen(
        command, env=os.environ | ALONE | environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=timeout)
        said = f"exit status {process.returncode}" if process.returncode else None
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        said = f"no end after {timeout} s"
    if said:
        raise RuntimeError(f"{' '.join(command)}: {said}\n{printed[-8000:]}")
    return printed


ABSENT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from isolated import Absent
sys.meta_path.insert(0, Absent())
"""


def without_scrubjay(code: str, cwd: Path, *arguments: str) -> list[str]:
    """The lines that `code` prints in a new process that cannot import scrubjay; its cache of modules is empty."""
    where = str(HERE.parent / "examples")
    child = subprocess.run(
        [sys.executable, "-c", ABSENT + code, where, *arguments],
        env={**os.environ, "HF_MODULES_CACHE": str(cwd / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=cwd, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]
    return child.stdout.splitlines()


def torchrun(processes: int) -> list[str]:
    """The start of a command for so many processes of this machine, on a port that is free."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={processes}"]
    return [*run, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


def results(folder: Path, script: str, processes: int = 2, timeout: float = 240, **environment: str) -> list[dict]:
    """What each process of `script` has put into `rank<r>.pt` of its folder, run once for all who ask.

    Of several pytest processes the first one runs it; if it failed, it fails for all.
    """
    out = folder / script.removesuffix(".py")
    with FileLock(f"{out}.lock"):
        failure = out / "failure.txt"
        if not out.exists():
            out.mkdir()
            try:
                run([*torchrun(processes), str(next(HERE.rglob(script))), str(out)], timeout, **environment)
            except RuntimeError as error:
                failure.write_text(str(error), encoding="utf-8")
        if failure.exists():
            raise RuntimeError(failure.read_text(encoding="utf-8"))
    return [torch.load(out / f"rank{rank}.pt") for rank in range(processes)]
