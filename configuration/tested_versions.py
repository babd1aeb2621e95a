"""The releases that the models are tested on, in one place, and what users of another transformers are told.

`make record-newest` writes NEWEST, after `make test-newest` has passed on it.
"""

import sys
import warnings

from packaging.version import Version

OLDEST = "5.17"  # of transformers
NEWEST = {
    "accelerate": "1.15.0",
    "huggingface-hub": "2.4.0",
    "peft": "0.21.2",
    "transformers": "5.24.0",
    "trl": "1.16.0",
}

told = False


def tell_of_untested() -> None:
    """Warn, once in a process, if the installed transformers is none that the models are tested on.

    Each configuration calls this when it is imported: before any module that a new release may break. The folder of a
    saved model brings a copy of this file, and all copies of a process share the one warning.
    """
    from transformers import __version__ as installed  # of the module that is there at the call

    global told
    copies = [module for name, module in tuple(sys.modules.items()) if name.rpartition(".")[2] == "tested_versions"]
    message = untested(installed)
    if message and not any(getattr(copy, "told", False) for copy in copies):
        told = True
        warnings.warn(message, UserWarning, stacklevel=2)


def untested(version: str) -> str | None:
    """What is said of a version of transformers; None: it lies within what is tested.

    What precedes a newer release (5.25.0.dev0) is newer too; a local build (5.24.0+abc) counts as what it was built of.
    """
    found, newest = Version(Version(version).public), NEWEST["transformers"]
    if Version(OLDEST) <= found <= Version(newest):
        return None
    kind, need = ("newer", f"=={newest}") if found > Version(newest) else ("older", f">={OLDEST}")
    return (
        f"scrubjay is tested on transformers {OLDEST} to {newest}; the installed {version} is {kind}, and may not do "
        f"what the models need. If something fails: pip install 'transformers{need}'. To silence this, before the "
        'import or from_pretrained: warnings.filterwarnings("ignore", message="scrubjay is tested on")'
    )
