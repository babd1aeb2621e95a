"""The peak of memory of this process, as far as the system tells it."""

import resource
import sys
from pathlib import Path


def high_water(*, reset: bool = False) -> int:
    """Highest resident memory of this process in bytes since the last reset. Only Linux can reset it (5 does that)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def memory_method() -> str:
    """How `high_water` can measure here, in words for the reader of a result."""
    if Path("/proc/self/status").exists():
        return "peak resident memory of one pass above the idle model, reset before the pass"
    return "peak resident memory since the process started (no /proc to reset it), so a pass below its start shows as 0"
