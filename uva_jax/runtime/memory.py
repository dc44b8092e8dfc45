"""Memory of this process and its accelerators."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def restart_peak() -> None:
    """Starts a new measurement of `resident()`, where the system can (Linux)."""
    try:
        _RESET.write_text("5")  # the peak of the resident memory becomes its current size
    except OSError:
        pass


def resident(field: str = "VmHWM") -> int:
    """Returns the bytes of memory that this process uses (VmRSS) or has used at most (VmHWM).

    Systems without /proc know only the most since the process started.
    """
    if _STATUS.exists():
        return 1024 * int(re.search(rf"{field}:\s+(\d+)", _STATUS.read_text())[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak(devices: Sequence) -> int:
    """Returns the most bytes of the fullest of some devices since the process started.

    Without accelerators it is the most that this process held since `restart_peak`.

    Args:
      devices: of jax, such as `jax.local_devices()`. This module does not import jax, so that a
        process of another framework can ask for its resident memory.
    """
    stats = [device.memory_stats() for device in devices]
    if any(stats):
        return max(found.get("peak_bytes_in_use", 0) for found in stats if found)
    return resident()
