import pytest
import torch
from zoo import ZOO


@pytest.fixture(params=ZOO, ids=lambda entry: entry.name)
def entry(request):
    """Each model of the zoo in turn."""
    return request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
