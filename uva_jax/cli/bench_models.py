"""The policies of the benches, with random weights: teacher, graft, and shortened graft."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from configs import pusht, pusht_tiny
from uva_jax.cli.bench_conversion import architecture
from uva_jax.graft import assemble
from uva_jax.models import surgery
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import PolicyConfig
from uva_jax.runtime.sections_graft import HeadOptions
from uva_jax.runtime.settings import section

FRAME_SIZE = 96  # of recorded frames, which are resized to the policy's size
HEADS = ("teacher", "graft", "shortened graft")


def settings(size: str):
    """Returns the configuration with which policies of a size are grafted."""
    return {"tiny": pusht_tiny, "pusht": pusht}[size].get_config()


def policy_config(size: str, head: str) -> PolicyConfig:
    """Returns the architecture of a policy.

    Args:
      size: "tiny" (the embedded policy's) or "pusht" (the published one's).
      head: one of `HEADS`.
    """
    config = architecture(size)
    if head == "teacher":
        return config
    options = section(settings(size).head, HeadOptions)
    grafted = assemble.grafted_config(surgery.abstract_policy(config), options)
    if head == "shortened graft":
        grafted = dataclasses.replace(grafted, prediction="x0_from_eps", sampling_steps="1")
    return dataclasses.replace(config, action_head=grafted)


def random_frames(*shape: int) -> np.ndarray:
    """Returns random recorded frames (*shape, FRAME_SIZE, FRAME_SIZE, 3) uint8."""
    size = (*shape, FRAME_SIZE, FRAME_SIZE, 3)
    return np.random.default_rng(0).integers(0, 256, size, np.uint8)


def random_actions(config: PolicyConfig, *shape: int) -> np.ndarray:
    """Returns random normalised actions (*shape, n, a) float32 of a policy."""
    size = (*shape, config.action_head.n_actions, config.action_head.channels)
    return np.random.default_rng(0).uniform(-1, 1, size).astype(np.float32)


def random_policy(config: PolicyConfig, dtype: str = "float32") -> Policy:
    """Makes a policy with random weights, norms as at the start of training.

    Args:
      config: the architecture.
      dtype: of products, "float32" or "bfloat16".
    """
    policy = surgery.abstract_policy(config, dtype=jnp.bfloat16 if dtype == "bfloat16" else None)
    shapes = surgery.shapes(policy)
    rng = np.random.default_rng(0)
    # All arrays are slices of the same numbers, because drawing each takes minutes at full size.
    largest = max(math.prod(x.shape) for x in shapes.values())
    numbers, arrays = rng.standard_normal(2 * largest, np.float32) * np.float32(0.02), {}
    for path, x in shapes.items():
        if path.endswith("scale"):
            arrays[path] = jnp.ones(x.shape, x.dtype)
            continue
        start, length = rng.integers(largest), math.prod(x.shape)
        arrays[path] = jnp.asarray(numbers[start : start + length].reshape(x.shape))
    return surgery.replace(policy, arrays)
