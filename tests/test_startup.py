"""The environment of commands before jax starts: libtpu without a TPU prints no warnings."""

import importlib.util
import os
import subprocess
import sys

import pytest
from conftest import REPO

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
