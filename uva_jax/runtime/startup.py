"""What keeps the libraries of a command quiet; set before jax looks for devices."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
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
    sys.excepthook = _print_unless_late
    if importlib.util.find_spec("libtpu") is not None and not has_tpu():
        do_without_tpu()


def _print_unless_late(kind, error, trace) -> None:
    """Python's excepthook, without reports of writes that end after another one has failed.

    Orbax closes its event loop at the first error; tensorstore's threads then print a traceback
    for every write that was still under way.
    """
    late = kind is RuntimeError and str(error) == "Event loop is closed"
    if not late or threading.current_thread() is threading.main_thread():
        sys.__excepthook__(kind, error, trace)


def do_without_tpu() -> None:
    """Sets the variables with which libtpu does not look for a TPU."""
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)


def has_tpu(dev: Path = Path("/dev")) -> bool:
    """Whether `dev` has a TPU's device files: accel0, ... or, from v5e on, vfio/0, ..."""
    return any(dev.glob("accel[0-9]*")) or any(dev.glob("vfio/[0-9]*"))
