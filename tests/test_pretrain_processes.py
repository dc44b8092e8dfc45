"""Training over two processes: the whole stage, as the command line runs it on two hosts."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import EPISODES, REPO

from convert.from_torch import convert_checkpoint
from uva_jax import policy_io
from uva_jax.metrics import read_metrics

_CONFIG = """
from configs import common

def get_config():
    config = common.get_config()
    config.data.max_episodes, config.data.cache = {episodes}, {cache!r}
    config.data.mirror = "pusht"
    p = config.pretrain
    p.from_scratch, p.modes = True, {{"policy_model": 1.0}}
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
        [*map(str, command), "--stage", "pretrain", *more],
        cwd=REPO,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def config(shared, buffer) -> Path:
    path = shared / "processes.py"
    path.write_text(_CONFIG.format(episodes=EPISODES, cache=str(shared / "cache")))
    return path


def test_two_processes_train_what_one_does(tmp_path, config):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    one = start(tmp_path / "one", config, 2)
    out = one.communicate(timeout=240)[0]
    assert one.returncode == 0, out
    where = (
        f"--config.distributed.coordinator_address=127.0.0.1:{port}",
        "--config.distributed.num_processes=2",
    )
    two = [
        start(tmp_path / "two", config, 1, *where, f"--config.distributed.process_id={i}")
        for i in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in two]
    finally:
        for process in two:
            process.kill()
    assert [process.returncode for process in two] == [0, 0], said
    assert "policy: 4/4 steps" in said[0] and "pretrain:" not in said[1]
    losses = [
        [
            line["policy/loss"]
            for line in read_metrics(tmp_path / name, "pretrain")
            if "policy/loss" in line
        ]
        for name in ("one", "two")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    found, _ = convert_checkpoint(tmp_path / "two" / "pretrain" / "policy.ckpt")
    wanted = policy_io.flatten(policy_io.load_policy(tmp_path / "one" / "pretrain" / "policy"))
    for path, x in policy_io.flatten(found).items():
        scale = np.abs(wanted[path]).max() + 1e-6
        np.testing.assert_allclose(x, wanted[path], atol=2e-3 * scale, err_msg=path)
