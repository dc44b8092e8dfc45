"""The action samples of a graft that Stage 3 learns from: drawn once for every window, and stored.

As in the capture, processes and devices divide the windows, and a resumed run keeps the chunks that
are complete. The noise of a window depends only on the seed and on the window's number.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from uva_jax.models import diffusion, surgery
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import steps_of
from uva_jax.runtime import parallel
from uva_jax.storage.sample_store import Rows
from uva_jax.storage.site import Site

_CHUNK = 256  # windows that a device samples in one call


def draw_samples(
    site: Site,
    policy: Policy,
    z: np.ndarray | Rows,
    *,
    samples: int,
    sampling_steps: str,
    seed: int,
) -> dict[str, np.ndarray]:
    """Draws samples of the policy's head, or reads them if the folder has them already.

    Args:
      site: the folder of the samples, metrics and processes.
      policy: a graft, in float32.
      z: (windows, tokens, c) its video tokens.
      samples: for each window.
      sampling_steps: diffusion steps of a sample; "": the policy's own.
      seed: of the noise.

    Returns:
      "condition" (windows, ...) bfloat16 and "samples" (windows, samples, n, c), normalised.

    Raises:
      UserError: the folder holds samples of another policy, other options or another seed.
    """
    head = policy.action_head
    steps = steps_of(head.config, sampling_steps)
    draws = len(diffusion.make_schedule(steps)) + 1
    shape = (draws, head.config.n_actions, head.config.channels)
    graph, state = nnx.split(head)
    mesh = parallel.make_mesh(devices=jax.local_devices())
    rows = P(mesh.axis_names)

    def per_device(state, z, windows, key):
        head = nnx.merge(graph, state)
        condition = head.condition(z.astype(jnp.float32))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(windows)

        def sample(number):
            noise = jax.vmap(
                lambda key: jax.random.normal(jax.random.fold_in(key, number), shape), out_axes=1
            )(keys)
            return head.sample_given(
                condition,
                noise=noise,
                temperature=policy.config.temperature,
                sampling_steps=steps,
            )

        found = jax.vmap(sample, out_axes=1)(jnp.arange(samples))  # they share the modulations
        return {"condition": condition.astype(jnp.bfloat16), "samples": found}

    run = parallel.sharded_map(per_device, mesh, in_specs=(P(), rows, rows, P()), out_specs=rows)
    state = jax.device_put(state, parallel.replicated(mesh))
    key, chunk = jax.random.key(seed), min(_CHUNK, len(z))
    size = chunk * mesh.size
    abstract = jax.ShapeDtypeStruct((size, *z.shape[1:]), z.dtype)
    shapes = jax.eval_shape(run, state, abstract, jax.ShapeDtypeStruct((size,), jnp.int32), key)
    store = site.open(
        {name: (x.shape[1:], x.dtype.name) for name, x in shapes.items()},
        len(z),
        chunk=chunk,
        meta={"policy": surgery.policy_hash(policy), "sampling_steps": steps, "seed": seed},
    )

    def compute(numbers: np.ndarray) -> dict[str, jax.Array]:
        numbers = np.minimum(numbers, len(z) - 1).astype(np.int32)
        return run(state, z[numbers], numbers, key)

    return site.fill(store, compute, chunks=mesh.size, unit="windows").load()
