"""Deliberate errors in Triton kernels: a line of a kernel's file is replaced, and everything that used the file's
functions uses those of the changed copy."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from kernel_cases import OutOfBoundError


def plant(monkeypatch, folder, module, old, new):
    """Replace the one place in `module`'s source that reads `old` by `new`, until the test ends."""
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}, not once"
    path = folder / f"planted_{Path(module.__file__).name}"
    path.write_text(source.replace(old, new))
    spec = spec_from_file_location(path.stem, path)
    changed = module_from_spec(spec)
    spec.loader.exec_module(changed)
    users = [user for name, user in sys.modules.items() if name.startswith("scrubjay.kernels.")]
    for name, value in list(vars(module).items()):
        if getattr(value, "__module__", None) == module.__name__ and hasattr(changed, name):
            for user in users:
                if vars(user).get(name) is value:
                    monkeypatch.setattr(user, name, getattr(changed, name))


def must_be_found(monkeypatch, folder, module, old, new, comparison):
    """`comparison()` passes as the kernel is, and raises OutOfBoundError with the error planted."""
    comparison()
    plant(monkeypatch, folder, module, old, new)
    with pytest.raises(OutOfBoundError):
        comparison()
