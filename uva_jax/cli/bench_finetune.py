"""`bench finetune`: times a step of Stage 2 here and in PyTorch.

Here a step starts from cached tokens if everything before the head is frozen, and from cached
latents if the transformer trains too. In PyTorch it starts from the same tokens, or, without a
cache, from frames: with everything before the head frozen, or with the transformer training too.
A step is the diffusion loss with one noise draw, its gradient, AdamW with clipping, and the moving
average of what trains.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from uva_jax.cli import bench_turns
from uva_jax.cli.bench_models import (
    policy_config,
    random_actions,
    random_frames,
    random_policy,
    settings,
)
from uva_jax.cli.bench_turns import COMPILED, OURS, ROUNDED, TORCH, Row, Work
from uva_jax.graft.finetune import FinetuneOptions
from uva_jax.models import surgery
from uva_jax.models.policy import moments_of
from uva_jax.models.policy_config import PolicyConfig
from uva_jax.runtime.settings import section

STEP = "step"
TOKENS, FROZEN, WHOLE = "from tokens", "from frames", "from frames, transformer trains"
LATENTS = "from latents, transformer trains"


def options_of(size: str, batch: int, source: str, products: str = "default") -> FinetuneOptions:
    """Returns the options of a size's configuration for a row: what trains, and the loss alone.

    `products` is the setting `finetune.matmul_precision`.
    """
    config, trains = settings(size), source in (WHOLE, LATENTS)
    freeze = tuple(p for p in config.finetune.freeze if not trains or p != "mar")
    freeze = freeze if trains else ("mar", *freeze)
    return dataclasses.replace(
        section(config.finetune, FinetuneOptions),
        batch=batch,
        accumulate=1,
        teacher_weight=0.0,
        freeze=tuple(dict.fromkeys(freeze)),
        freeze_encoder=not trains,
        reuse_cache=source == TOKENS,
        matmul_precision=products,
    )


def _batch(config: PolicyConfig, batch: int, source: str) -> dict[str, np.ndarray]:
    actions, mar = random_actions(config, batch), config.mar
    if source == TOKENS:
        shape = (batch, mar.n_tokens, mar.decoder_embed_dim)
        z = np.random.default_rng(0).standard_normal(shape, np.float32)
        return {"z": z, "actions": actions}
    if source == LATENTS:
        moments = np.random.default_rng(0).standard_normal(_moments_shape(config, batch))
        return {moments_of("image"): moments.astype(np.float16), "action": actions}
    return {"image": random_frames(batch, mar.n_frames), "action": actions}


def _moments_shape(config: PolicyConfig, batch: int) -> tuple[int, ...]:
    *rest, z = surgery.abstract_policy(config).latent_shape(batch)
    return (*rest, 2 * z)


def build(
    backend: str, *, size: str, dtype: str, batch: int, source: str, products: str = "default"
) -> dict[str, Work]:
    """Returns the step; see `bench_turns.measure`."""
    config, options = policy_config(size, "graft"), options_of(size, batch, source, products)
    data = _batch(config, batch, source)
    if backend == OURS:
        return {STEP: _ours(config, options, data, dtype)}
    from convert.torch import grafting

    step = grafting.finetune_step(config, options, data, dtype, backend == COMPILED)
    return {STEP: Work(*step)}


def _ours(config: PolicyConfig, options: FinetuneOptions, data: dict, dtype: str) -> Work:
    import jax
    import jax.numpy as jnp

    from uva_jax.cli.flops import flops
    from uva_jax.graft import fixed
    from uva_jax.graft.finetune import Trainer
    from uva_jax.runtime import parallel
    from uva_jax.train import loop

    mesh, policy = parallel.make_mesh(), random_policy(config, dtype)
    trainer = Trainer(policy, options, mesh, seed=0)
    if trainer.tokens:
        data = fixed.known(policy, None, trainer.phases, data)
    (params, frozen), steps = trainer.parts(trainer.phases[0]), options.steps_per_call
    state = loop.start_state(params, options, mesh)
    run = loop.make_steps(trainer.loss, options, mesh, jax.tree.map(lambda x: x.sharding, state))
    key, number = jax.random.key(0), 0
    stacked = {k: np.stack([v] * steps) for k, v in data.items()}

    def step():
        nonlocal state, number
        group = parallel.shard_batch(mesh, stacked, axis=1)
        state, scalars, _ = run(state, frozen, group, jnp.int32(number), key)
        number += steps
        return jax.block_until_ready((state, scalars))

    total = flops(run, state, frozen, stacked, jnp.int32(0), key)
    return Work(step, total / steps, steps)


def bench_finetune(size: str, dtype: str, batch: int, compiled: bool) -> dict:
    """Measures a step of Stage 2.

    Args:
      size: of the policy, "tiny" or "pusht".
      dtype: of products, "float32" or "bfloat16"; parameters are float32.
      batch: windows of a step.
      compiled: also measure `torch.compile`.

    Returns:
      the result of `bench_turns.measure`, and the arguments.

    Raises:
      UserError: a process failed.
    """
    given = {"size": size, "dtype": dtype, "batch": batch}
    backends = bench_turns.torch_backends(compiled)
    pairs = [(OURS, TOKENS), (OURS, LATENTS)]
    pairs += [(backend, source) for source in (TOKENS, FROZEN, WHOLE) for backend in backends]
    rows = [Row(source, backend, given | {"source": source}) for backend, source in pairs]
    for source in (TOKENS, LATENTS):
        how = {"source": source, "products": "bfloat16"}
        rows.append(Row(f"{source}{ROUNDED}", OURS, given | how))
    return given | bench_turns.measure(__name__, rows)


def table(result: dict) -> str:
    """Formats the result of `bench_finetune`; speeds are relative to PyTorch's from tokens."""
    torch = bench_turns.row_of(result, TORCH, TOKENS)
    return "\n".join(
        [
            f"{result['size']}: a step of Stage 2 for {result['batch']} windows in "
            f"{result['dtype']}",
            *bench_turns.lines(result, {STEP: bench_turns.seconds(torch, STEP)}),
            "speed: of PyTorch's step from tokens",
        ]
    )
