"""The environment of commands before jax starts: libtpu without a TPU prints no warnings."""

import importlib.util
import os
import subprocess
import sys

import pytest
from conftest import REPO, python

from uva_jax.runtime import startup


@pytest.mark.parametrize("device", ["accel0", "vfio/0"])
def test_a_tpu_is_known_by_its_device_files(tmp_path, device):
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()  # the driver itself, on any machine
    assert not startup.has_tpu(tmp_path)
    (tmp_path / device).touch()
    assert startup.has_tpu(tmp_path)


@pytest.mark.parametrize(
    "installed, present, told", [(True, False, True), (True, True, False), (False, False, False)]
)
def test_libtpu_is_told_to_do_without_a_tpu_only_where_there_is_none(
    monkeypatch, installed, present, told
):
    monkeypatch.setattr(os, "environ", {"TPU_WORKER_HOSTNAMES": "mine"})
    monkeypatch.setattr(startup.importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(startup, "has_tpu", lambda: present)
    startup.quiet_libraries()
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine"  # what the user has set stays
    assert ("TPU_ACCELERATOR_TYPE" in os.environ) == told


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None or startup.has_tpu(), reason="needs libtpu, no TPU"
)
def test_a_command_starts_without_complaints_of_libtpu():
    code = (
        "from uva_jax.runtime import startup; startup.quiet_libraries(); import jax; jax.devices()"
    )
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


_WRITES = """
import resource, sys
from pathlib import Path
import numpy as np
from uva_jax.runtime.errors import exit_status
from uva_jax.runtime.guards import full_disk_as_user_error
from uva_jax.runtime.startup import quiet_libraries
from uva_jax.storage import policy_arrays
from uva_jax.storage.checkpoint import Checkpoints
from uva_jax.storage.lazy_array import LazyArray

quiet_libraries()
folder, arrays = Path(sys.argv[1]), {f"a{i}": np.random.rand(100, 1000) for i in range(9)}

def states():
    with full_disk_as_user_error(folder), Checkpoints(folder / "states") as checkpoints:
        checkpoints.save(1, arrays)

def policy():
    lazy = {k: LazyArray(x.shape, x.dtype, lambda x=x: x) for k, x in arrays.items()}
    with full_disk_as_user_error(folder):
        policy_arrays.write(folder / "policy", lazy)

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(exit_status(states) + exit_status(policy))
"""


def test_a_failed_write_of_orbax_is_one_line_of_stderr(tmp_path):
    done = python(_WRITES, tmp_path)
    _, said = done.communicate(timeout=120)
    assert done.returncode == 4
    assert [line[:24] for line in said.splitlines()] == ["error: no file may grow "] * 2
