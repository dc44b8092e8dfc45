"""Two processes, as on two hosts: the whole graft, and training from random weights."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import EPISODES, REPO

from convert.from_torch import convert_checkpoint
from uva_jax.models import policy_folder, surgery
from uva_jax.runtime.metrics import read_metrics
from uva_jax.runtime.settings import leaves

# Every setting that differs from the defaults, as flags.
_CONFIG = """
from configs import common

def get_config():
    config = common.get_config()
    for name, value in {changes!r}.items():
        *parents, last = name.split(".")
        node = config
        for key in parents:
            node = node[key]
        with node.ignore_type():
            node[last] = value
    return config
"""
_PRETRAIN = """
    p = config.pretrain
    p.from_scratch, p.modes = True, {"policy_model": 1.0}
    p.model.update(image_size=16, vae_width=32, vae_multipliers=(1, 1, 1), width=32, depth=1)
    p.model.update(heads=2, dropout=0.0, video_head=(32, 1), action_head=(32, 1))
    p.vae_training.update(steps=2, batch=8, warmup=1, frames=64, decode_every=2)
    p.update(steps=4, batch=8, warmup=1, readout="state", readout_angles=(4,), judge_windows=8)
    p.update(steps_per_call=2, log_every=2)
    return config
"""


def start(workdir: Path, config: Path, devices: int, *more: str) -> subprocess.Popen:
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(REPO),
    }
    command = [sys.executable, "-m", "uva_jax.main", "--config", config, "--workdir", workdir]
    return subprocess.Popen(
        [*map(str, command), *more],
        cwd=REPO,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_two(workdir: Path, config: Path, *more: str) -> str:
    """Runs a command in two processes; returns the output of the first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = [f"--config.distributed.coordinator_address=127.0.0.1:{port}"]
    where.append("--config.distributed.num_processes=2")
    processes = [
        start(workdir, config, 1, *more, *where, f"--config.distributed.process_id={i}")
        for i in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert "starting" in said[0] and "starting" not in said[1]
    return said[0]


def run_one_and_two(parent: Path, config: Path, *more: str) -> list[Path]:
    """Runs a command in one process with two devices and in two with one; returns both folders.

    The compiler settings are the same, so that only the processes differ.
    """
    folders = [parent / name for name in ("one", "two")]
    one = start(folders[0], config, 2, *more)
    out = one.communicate(timeout=400)[0]
    assert one.returncode == 0, out
    run_two(folders[1], config, *more)
    return folders


@pytest.fixture(scope="module")
def config(shared, make_config) -> Path:
    """The configuration file of `finished`."""
    from configs import common

    default = leaves(common.get_config())
    changes = {k: v for k, v in leaves(make_config()).items() if default[k] != v}
    path = shared / "graft_processes.py"
    path.write_text(_CONFIG.format(changes=changes))
    return path


def losses(workdir: Path, stage: str, name: str) -> list[float]:
    return [line[name] for line in read_metrics(workdir, stage) if name in line]


def assert_same_parameters(found, wanted) -> None:
    """Checks equality up to rounding, which Adam magnifies for tiny gradients.

    A run changes its parameters by at least 4e-3, so another run's would fail.
    """
    wanted = surgery.flatten(wanted)
    for path, x in surgery.flatten(found).items():
        assert np.sqrt(np.mean((np.asarray(x) - wanted[path]) ** 2)) < 3e-4, path


def test_two_processes_graft_what_one_does(tmp_path, config):
    folders = run_one_and_two(tmp_path, config)
    grafts = [convert_checkpoint(folder / "export" / "grafted.ckpt")[0] for folder in folders]
    assert_same_parameters(*grafts)
    for stage, name in (("distill", "cross_attn/loss"), ("finetune", "loss")):
        np.testing.assert_allclose(*(losses(folder, stage, name) for folder in folders), rtol=1e-2)
    assert (folders[1] / "eval" / "report.html").exists()


def test_two_processes_train_what_one_does(tmp_path, shared, buffer):
    config = shared / "pretrain_processes.py"
    changes = {"data.max_episodes": EPISODES, "data.cache": str(shared / "cache")}
    text = _CONFIG.format(changes=changes | {"data.mirror": "pusht"})
    config.write_text(text.replace("    return config\n", _PRETRAIN.lstrip("\n")))
    folders = run_one_and_two(tmp_path, config, "--stage", "pretrain")
    np.testing.assert_allclose(
        *(losses(folder, "pretrain", "policy/loss") for folder in folders), rtol=1e-4
    )
    found, _ = convert_checkpoint(folders[1] / "pretrain" / "policy.ckpt")
    wanted = policy_folder.load_policy(folders[0] / "pretrain" / "policy")
    assert_same_parameters(found, wanted)
