"""What a command sets before jax looks for devices: variables that keep its libraries quiet."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

# What libtpu would ask a TPU machine's metadata for. Without a TPU it prints screens of complaints
# while jax tries it; so told, it fails without a word, and jax goes on to other devices.
_NO_TPU = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_MIN_LOG_LEVEL": "3",
}


def quiet_libraries() -> None:
    """Keeps XLA's and libtpu's start-up messages away; what the user has set stays.

    On a machine with a TPU nothing about it is set: there jax finds out by itself.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if importlib.util.find_spec("libtpu") is not None and not has_tpu():
        do_without_tpu()


def do_without_tpu() -> None:
    """Tells libtpu that it need not look for a TPU."""
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)


def has_tpu(dev: Path = Path("/dev")) -> bool:
    """Whether this machine has a TPU's device files: accel0 ... or, from v5e on, vfio/0 ..."""
    return any(dev.glob("accel[0-9]*")) or any(dev.glob("vfio/[0-9]*"))
