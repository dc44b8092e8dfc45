"""The error of action samples on held-out windows, by which Stage 2 keeps its best state.

The diffusion loss cannot choose: it falls while samples get worse, because a head whose action
steps see each other denoises better than it samples. So actions are sampled as in a rollout, from
noise that is always the same, and compared with the demonstration.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from uva_jax.graft.energy import energy_scores
from uva_jax.models import diffusion
from uva_jax.models.layers import sub_key
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import steps_of
from uva_jax.runtime import parallel
from uva_jax.storage.sample_store import SampleStore

_AT_ONCE = 64  # windows in one call of the program
_STEPS = "10"  # diffusion steps of a sample
_DRAWS = 2  # samples of a window; the windows differ more than the samples of one


def cached_windows(folder: Path, count: int) -> dict[str, np.ndarray]:
    """Returns "z" and "actions" of windows that are spread evenly over a cache of activations."""
    found = SampleStore.open(folder).load(["z", "actions"])
    rows = np.linspace(0, len(found["z"]) - 1, count).round().astype(int)
    return {k: v[rows] for k, v in found.items()}


def sample_errors(policy: Policy, windows: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
    """Computes the energy scores (b,) of a policy's action samples, in normalised units.

    Samples are compared over the actions that a rollout executes.

    Args:
      policy: the policy.
      windows: "z" (b, tokens, c) and "actions" (b, n, a), or an observation and "action".
      key: of all noise.
    """
    if "z" in windows:
        z, truth = windows["z"].astype(jnp.float32), windows["actions"]
    else:
        cond, streams = policy.condition(windows, key=sub_key(key, 0))
        z, truth = policy.video_tokens(cond, streams), policy.normalize("action", windows["action"])
    head, steps = policy.action_head, steps_of(policy.config.action_head, _STEPS)
    loop = len(diffusion.make_schedule(steps)) + 1
    noise = jax.random.normal(sub_key(key, 1), (_DRAWS, loop, *truth.shape))
    condition = head.condition(z)
    samples = jax.vmap(
        lambda noise: head.sample_given(
            condition, noise=noise, temperature=policy.config.temperature, sampling_steps=steps
        )
    )(noise)
    executed = slice(policy.config.n_action_steps)
    return energy_scores(samples[:, :, executed], truth[:, executed])


def whole_batches(count: int, mesh: Mesh) -> int:
    """Returns a number of windows, at least `count`, that `errors_of` divides over the mesh."""
    batch = _batch(count, mesh)
    return -(-count // batch) * batch


def _batch(count: int, mesh: Mesh) -> int:
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-min(count, _AT_ONCE) // shares) * shares


def errors_of(
    build: Callable[..., Policy], windows: Mapping[str, np.ndarray], mesh: Mesh, seed: int
) -> Callable[..., np.ndarray]:
    """Returns a function from parameters to the `sample_errors` (n,) of windows.

    Args:
      build: from the parameters, which may be several trees, to the policy.
      windows: see `sample_errors`; as many as `whole_batches` returns, equal on every process.
      mesh: its data axes divide the windows.
      seed: of all noise.
    """
    count = len(next(iter(windows.values())))
    batch = _batch(count, mesh)
    keys = [jax.random.fold_in(jax.random.key(seed), start) for start in range(0, count, batch)]
    parts = [
        {k: v[start : start + batch] for k, v in windows.items()}
        for start in range(0, count, batch)
    ]
    rows = dict.fromkeys(windows, parallel.batch_sharding(mesh))

    # Every process needs all errors, to choose the same state.
    @functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
    def run(parameters, windows, key):
        return sample_errors(build(*parameters), windows, key)

    def errors(*parameters) -> np.ndarray:
        found = [
            run(parameters, parallel.on_mesh(part, rows), key)
            for part, key in zip(parts, keys, strict=True)
        ]
        return np.concatenate([np.asarray(x) for x in found])

    return errors
