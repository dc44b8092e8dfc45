"""The peak memory of a stretch of a run, on the host and on its accelerators."""

from __future__ import annotations

from pathlib import Path

import jax

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def restart_peak() -> None:
    """Starts a new measurement, where the system can (Linux)."""
    try:
        _RESET.write_text("5")  # the peak of the resident memory becomes its current size
    except OSError:
        pass


def peak() -> int | None:
    """Returns the most bytes that this process held since `restart_peak`, or None if unknown.

    With accelerators it is the memory of the fullest one since the process started.
    """
    stats = [device.memory_stats() for device in jax.local_devices()]
    if any(stats):
        return max(found.get("peak_bytes_in_use", 0) for found in stats if found)
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(sizes[0]) if sizes else None
