"""`bench training`: measures a training step in PyTorch and here, with and without cached latents.

A step is forward, backward and AdamW in mode `policy_model`, with one noise draw per window as
upstream; one further row has four draws. From frames, the VAE encodes eight frames per window in
every step, as upstream does; from latents, it does not run. Every row runs in a separate process,
because the thread pools of two frameworks disturb each other.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from uva_jax.cli.bench_conversion import architecture
from uva_jax.cli.bench_models import random_actions, random_frames, random_policy
from uva_jax.cli.bench_turns import apart, fastest
from uva_jax.envs.workers import usable_cores
from uva_jax.models.policy_config import PolicyConfig

_REPEATS = 5  # timed calls; the fastest counts


class Row(NamedTuple):
    """One measurement: framework, content of a batch, precision of products, noise draws."""

    backend: str  # torch or uva_jax
    source: str  # frames or latents
    precision: str  # float32, bfloat16, or mixed: float32 with factors of products in bfloat16
    draws: int = 1


ROWS = (
    *(
        Row(backend, source, precision)
        for backend in ("torch", "uva_jax")
        for source in ("frames", "latents")
        for precision in ("float32", "bfloat16")
    ),
    Row("uva_jax", "latents", "mixed"),
    *(Row("uva_jax", "latents", precision, 4) for precision in ("float32", "bfloat16", "mixed")),
)


def _batch(config: PolicyConfig, row: Row, size: int) -> dict[str, np.ndarray]:
    n, side = 2 * config.mar.n_frames, config.image_size // config.vae.stride
    found = {"action": random_actions(config, size)}
    if row.source == "frames":
        return found | {"image": random_frames(size, n)}
    shape = (size, n, side, side, config.vae.z_channels)
    return found | {
        "mean": np.random.default_rng(0).standard_normal(shape, np.float32),
        "logvar": np.full(shape, -2, np.float32),
    }


def _jax_step(config: PolicyConfig, row: Row, size: int) -> Callable[[], object]:
    """Returns a function that runs one step of `size` windows to its end."""
    import jax
    import jax.numpy as jnp

    from uva_jax.models import losses, surgery
    from uva_jax.models.layers import sub_key
    from uva_jax.pretrain import latents
    from uva_jax.runtime import parallel
    from uva_jax.runtime.sections_training import PretrainOptions
    from uva_jax.train import loop

    dtype = jnp.bfloat16 if row.precision == "bfloat16" else None
    abstract = surgery.abstract_policy(config, dtype=dtype)
    arrays = surgery.flatten(random_policy(config))
    params = {k: v for k, v in arrays.items() if k.startswith(("mar/", "action_head/"))}
    frozen = {k: v for k, v in arrays.items() if k not in params}
    options = PretrainOptions(batch=size, steps_per_call=1)

    def loss(params, frozen, batch, key, step):
        model = surgery.replace(abstract, params | frozen)
        n = config.mar.n_frames
        if row.source == "frames":
            cond, target = (
                model.encode_observation(batch["image"][:, part], key=sub_key(key, i))
                for i, part in enumerate((slice(n), slice(n, None)))
            )
        else:
            found = latents.sample(model, batch, key)
            cond, target = found[:, :n], found[:, n:]
        # As the setting `pretrain.matmul_precision`.
        with jax.default_matmul_precision("bfloat16" if row.precision == "mixed" else "default"):
            total, _ = losses.latent_loss(
                model,
                jax.lax.stop_gradient(target),
                jax.lax.stop_gradient(cond),
                batch["action"],
                task_mode="policy_model",
                key=key,
                noise_draws=row.draws,
            )
        return total, {"loss": total}

    mesh = parallel.make_mesh()
    state = loop.start_state(params, options, mesh)
    run = loop.make_steps(loss, options, mesh, jax.tree.map(lambda x: x.sharding, state))
    batch = {k: v[None] for k, v in _batch(config, row, size).items()}
    batch = parallel.shard_batch(mesh, batch, axis=1)
    frozen = jax.device_put(frozen, parallel.replicated(mesh))

    def step():
        nonlocal state
        state, scalars, _ = run(state, frozen, batch, jnp.int32(0), jax.random.key(0))
        return jax.block_until_ready((state, scalars))

    return step


def _torch_step(config: PolicyConfig, row: Row, size: int) -> Callable[[], object]:
    """Returns the same function for torch."""
    from convert.torch.training_step import make_step

    dtype = "float32" if row.precision == "mixed" else row.precision
    return make_step(config, _batch(config, row, size), dtype).run


def measure(row: Row, size: str, batch: int) -> float:
    """Returns the seconds of one step of `batch` windows."""
    config = architecture(size)
    step = (_torch_step if row.backend == "torch" else _jax_step)(config, row, batch)
    return fastest(step, _REPEATS)


def bench_training(size: str, batch: int) -> dict:
    """Measures all rows.

    Args:
      size: of the policy, one of `bench_conversion.SIZES`.
      batch: windows of a step.

    Returns:
      {"size", "batch", "rows": [{"backend", "source", "precision", "draws", "seconds"}]}.

    Raises:
      UserError: a step failed.
    """
    environment = dict(os.environ)
    # As configs/pretrain_tiny.py advises: one device per core, and huge pages.
    environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    devices = f"--xla_force_host_platform_device_count={usable_cores()}"
    environment.setdefault("XLA_FLAGS", devices)
    found = []
    for row in ROWS:
        seconds = apart(
            "uva_jax.cli.bench_training",
            f"a step of {row.backend}",
            *(size, batch, json.dumps(row)),
            environment=environment,
        )
        found.append(row._asdict() | {"seconds": seconds})
    return {"size": size, "batch": batch, "rows": found}


def table(result: dict) -> str:
    """Formats the result of `bench_training`."""
    lines = [
        f"{result['size']}: a step of {result['batch']} windows",
        f"{'':<10}{'from':<9}{'dtype':<10}{'draws':>5}{'seconds':>9}{'steps/s':>9}{'windows/s':>11}",
    ]
    for row in result["rows"]:
        seconds = row["seconds"]
        lines.append(
            f"{row['backend']:<10}{row['source']:<9}{row['precision']:<10}{row['draws']:>5}"
            f"{seconds:>9.3f}{1 / seconds:>9.2f}{result['batch'] / seconds:>11.0f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    size_name, batch_size, row_text = sys.argv[1:]
    print(measure(Row(*json.loads(row_text)), size_name, int(batch_size)))
