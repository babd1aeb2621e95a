"""Whether the installed transformers adds adapters to a model by itself (`model.add_adapter`)."""

from importlib.metadata import version

import pytest
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

INSTALLED = version("peft")
HAS_ADD_ADAPTER = Version(INSTALLED) >= Version(MIN_PEFT_VERSION)
needs_add_adapter = pytest.mark.skipif(
    not HAS_ADD_ADAPTER,
    reason=f"add_adapter of transformers {version('transformers')} needs peft {MIN_PEFT_VERSION}; {INSTALLED} is here",
)
