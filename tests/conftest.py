"""Fixtures that tests share: a tiny policy as a checkpoint, three demonstrations, one whole run.

They are made once per session. The policy has every part of a real one, with random weights; its
outputs are exact, so tests can check equality.
"""

import atexit
import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# Before jax is imported. Test processes share the cores, so none may spin while it waits, and they
# share what they compile, also with the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import common
from convert.to_torch import export_policy
from uva_jax.data.pusht_demos import render_demos
from uva_jax.models import surgery
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import MARConfig, MLPHeadConfig, PolicyConfig, VAEConfig

REPO = Path(__file__).parent.parent
EPISODES = 3
HEAD = MLPHeadConfig(
    channels=2, z_channels=32, width=32, depth=2, aggregator="conv_fc", n_actions=16, grid=(4, 4)
)
CONFIG = PolicyConfig(
    image_size=32,
    patch_size=2,
    vae=VAEConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attn_levels=(), z_channels=4),
    mar=MARConfig(
        encoder_embed_dim=32,
        encoder_depth=1,
        encoder_num_heads=2,
        decoder_embed_dim=32,
        decoder_depth=1,
        decoder_num_heads=2,
        grid=(4, 4),
        token_dim=16,
        attn_dropout=0.0,
        proj_dropout=0.0,
    ),
    video_head=MLPHeadConfig(channels=16, z_channels=32, width=32, depth=1, grid=(4, 4)),
    action_head=HEAD,
    normalizer_fields=(("action", 2),),
)


def make_policy(config: PolicyConfig = CONFIG) -> Policy:
    """Returns a policy whose zero-initialised arrays are changed, so that every layer matters."""
    policy = Policy(config, rngs=nnx.Rngs(0))
    arrays = surgery.flatten(policy)
    for number, (path, x) in enumerate(sorted(arrays.items())):
        if not path.startswith("normalizer/"):
            noise = jax.random.normal(jax.random.key(number), x.shape)
            arrays[path] = x + 0.05 * noise
    for field, width in config.normalizer_fields:
        pixels = width == 2  # PushT's positions; other fields are about 1 in size
        arrays[f"normalizer/{field}/scale"] = jnp.full(width, 1 / 256 if pixels else 0.9)
        arrays[f"normalizer/{field}/offset"] = jnp.full(width, -1.0 if pixels else 0.1)
    return surgery.replace(policy, arrays)


def silently(function: Callable, *args, **kwargs):
    """Calls a function; returns its result and its output."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = function(*args, **kwargs)
    return result, printed.getvalue()


def python(code: str, *args: object, devices: int = 1) -> subprocess.Popen:
    """Starts a Python process that runs `code` with a number of simulated devices."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}",
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=REPO,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder for the whole session."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests that mostly compile: fewer optimisations."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def teacher() -> Policy:
    """The tiny policy."""
    return make_policy()


@pytest.fixture(scope="session")
def checkpoint(shared, teacher) -> Path:
    """The tiny policy as a PyTorch checkpoint."""
    export_policy(teacher, shared / "tiny.ckpt")
    return shared / "tiny.ckpt"


@pytest.fixture(scope="session")
def buffer(shared):
    """Three demonstrations as a replay buffer, in the cache folder `shared / "cache"`."""
    return render_demos(
        shared / "cache" / f"pusht_demos_{EPISODES}.zarr", max_episodes=EPISODES, workers=1
    )


@pytest.fixture(scope="session")
def make_config(shared, checkpoint, buffer) -> Callable[..., ConfigDict]:
    """A function of name=value that makes a configuration of seconds; "__" stands for "."."""

    def make(**settings) -> ConfigDict:
        config = common.get_config()
        config.teacher.checkpoint = str(checkpoint)
        config.data.max_episodes = EPISODES
        config.data.cache = str(shared / "cache")
        config.head.num_heads = config.head.self_attn_heads = 4
        config.capture.update(num_samples=36, held_out=8, strip=2, batch=2)
        config.distill.update(epochs=2, batch=8, lr=1e-3, warmup=2, log_every=4)
        config.distill.sampling_steps = "4"
        config.finetune.update(steps=4, batch=8, warmup=1, log_every=2, reuse_cache=True)
        config.finetune.update(check_windows=4, check_every=2)
        config.finetune.freeze = ("mar",)
        config.shorten.update(evaluations=1, epochs=2, noises=2, target_steps="4", batch=8, lr=1e-3)
        config.shorten.update(warmup=2, log_every=4)
        config.evaluate.update(num_seeds=2, max_steps=16, sampling_steps="4", videos=1, workers=1)
        config.evaluate.update(windows=6, draws=2)
        for name, value in settings.items():
            *parents, last = name.split("__")
            node = config
            for key in parents:
                node = node[key]
            with node.ignore_type():
                node[last] = value
        return config

    return make


class Run(NamedTuple):
    """A finished run of the whole pipeline."""

    workdir: Path
    metrics: dict
    printed: str


@pytest.fixture(scope="session")
def finished(shared, make_config) -> Run:
    """The pipeline, run from checkpoint to report and export. Tests must not change it."""
    from uva_jax.main import run

    workdir = shared / "run"
    metrics, printed = silently(run, make_config(), str(workdir), None)
    return Run(workdir, metrics, printed)
