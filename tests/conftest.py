import logging

import pytest
import torch
from zoo import ZOO


@pytest.fixture(params=ZOO, ids=lambda entry: entry.name)
def entry(request):
    """Each model of the zoo in turn."""
    return request.param


@pytest.fixture(params=[entry for entry in ZOO if entry.recurrent], ids=lambda entry: entry.name)
def recurrent(request):
    """Each model whose cache is a state, in turn."""
    return request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def uninitialised_memory_is_nan():
    """torch fills what `torch.empty` and its kin return with NaN, so that a result which is never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def transformers_log(caplog, monkeypatch):
    """caplog of what transformers logs, each record once: its logger hands them on to the root only where CI is set."""
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
