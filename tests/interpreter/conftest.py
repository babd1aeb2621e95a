"""Tests of Triton's kernels against their references, in one of two ways:

in its interpreter, on any CPU. It has to be chosen before Triton is imported, so in a process of their own:
    TRITON_INTERPRET=1 python -m pytest tests/interpreter     (a part of `make test` and `make test-kernels`)
on a GPU, the same tests:
    python -m pytest -m gpu                                   (a part of `make gpu`)
"""

import os
from importlib.util import find_spec

import pytest
import torch

TRITON = find_spec("triton") is not None
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = TRITON and not INTERPRETED and torch.cuda.is_available()
collect_ignore_glob = [] if INTERPRETED or ON_GPU else ["test_*.py"]


def pytest_collection_modifyitems(items):
    if ON_GPU:
        for item in items:
            if "interpreter" in item.path.parts:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _poisoned(uninitialised_memory_is_nan):
    """What a kernel forgets to write, or reads beyond its end, shows."""


@pytest.fixture(autouse=True)
def _where_the_kernels_run():
    """New tensors are on the GPU where the kernels run there."""
    before = torch.get_default_device()
    torch.set_default_device("cuda" if ON_GPU else before)
    yield
    torch.set_default_device(before)
