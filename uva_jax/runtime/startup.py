"""What keeps the libraries of a command quiet; set before jax looks for devices."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from absl import logging

# Values that libtpu would ask a TPU machine's metadata server for. Without them and without a TPU
# it prints many warnings; with them it fails silently and jax uses the other devices.
_NO_TPU = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_MIN_LOG_LEVEL": "3",
}


def quiet_libraries() -> None:
    """Suppresses start-up messages of XLA and, on a machine without a TPU, of libtpu; and what
    orbax logs.

    Variables that the user has set stay as they are.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Orbax logs every file it opens, and errors that it raises as well, once for each thread.
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = _print_unless_late
    if importlib.util.find_spec("libtpu") is not None and not has_tpu():
        do_without_tpu()


def _print_unless_late(unraisable) -> None:
    """Python's unraisablehook, without reports of writes that end after another one has failed.

    Orbax closes its event loop at the first error; tensorstore then reports every write that was
    still under way.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def do_without_tpu() -> None:
    """Sets the variables with which libtpu does not look for a TPU."""
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)


def has_tpu(dev: Path = Path("/dev")) -> bool:
    """Whether `dev` has a TPU's device files: accel0, ... or, from v5e on, vfio/0, ..."""
    return any(dev.glob("accel[0-9]*")) or any(dev.glob("vfio/[0-9]*"))
