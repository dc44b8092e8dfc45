"""Stage 1 of the condition: the cross-attentions learn the teacher's condition activation.

`distill_blocks.py` trains the other operators, given the condition that these predict. Targets are
divided per channel by their standard deviation, so that losses of different blocks are comparable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uva_jax.graft.assemble import family_of
from uva_jax.models import surgery
from uva_jax.models.grafted_head import GraftedHead
from uva_jax.runtime import parallel
from uva_jax.runtime.batches import in_batches
from uva_jax.runtime.sections_graft import DistillOptions
from uva_jax.train.fit import Arrays, Fit, fit, make_fit


def distance(kind: str, error: jax.Array) -> jax.Array:
    """Returns the element-wise l1, l2 or huber loss (with delta 1) of a scaled error."""
    if kind == "l1":
        return jnp.abs(error)
    if kind == "l2":
        return error**2
    size = jnp.abs(error)
    return jnp.where(size < 1, 0.5 * error**2, size - 0.5)


def deviation(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Computes the standard deviation over axes, at least 1e-6."""
    return jnp.maximum(jnp.std(x.astype(jnp.float32), axis=axes), 1e-6)


def memory_features(head: GraftedHead, z: np.ndarray, *, batch: int = 256) -> tuple[jax.Array, ...]:
    """Computes the fixed features of the memory of all samples once, in bfloat16.

    Args:
      head: the grafted head.
      z: (samples, t * s, c) video tokens.
      batch: samples at a time.

    Returns:
      arrays of `Memory.features`, samples first.
    """
    graph, state = nnx.split(head.memory)

    @jax.jit
    def features(state, z):
        found = nnx.merge(graph, state).features(z.astype(jnp.float32))
        return tuple(x.astype(jnp.bfloat16) for x in found)

    found = in_batches(lambda rows: features(state, z[rows]), len(z), batch)
    return tuple(map(jnp.asarray, found))


def learnt_by_cross_attention(path: str) -> bool:
    """Whether the condition fit trains the array at a path of the head."""
    copied = ("memory/conv/", "memory/aggregator/", "condition_s")
    return family_of(path) == "cross_attn" and not path.startswith(copied)


def condition_loss(head: GraftedHead, arrays: Arrays, kind: str) -> Callable:
    """Returns the stream's loss (l1, l2 or huber) for `fit`.

    It is the loss of the last block's condition plus a tenth of the losses of earlier ones, so that
    every operator brings the stream closer to e_c.

    Args:
      head: gives the structure.
      arrays: of the whole head by path.
      kind: l1, l2 or huber.
    """
    scale = arrays["condition_scale"]

    def loss_fn(params, batch, key):
        del key  # the stream has no randomness
        errors = stream_errors(surgery.replace(head, arrays | params), batch, scale)
        losses = [jnp.mean(distance(kind, e)) for e in errors]
        loss = losses[-1] + 0.1 * sum(losses[:-1])
        return loss, {"loss": losses[-1]} | {f"block{i}": x for i, x in enumerate(losses)}

    return loss_fn


def distill_condition(
    head: GraftedHead,
    features: tuple[jax.Array, ...],
    condition: jax.Array,
    *,
    options: DistillOptions,
    seed: int,
    folder: Path,
    metrics,
) -> GraftedHead:
    """Trains the cross-attention stream on the teacher's condition activation.

    Args:
      head: the initial head.
      features: from `memory_features`, each (samples, m, c).
      condition: (samples, n, width) e_c.
      options, seed, folder, metrics: see `fit`.
    """
    shift = jnp.mean(condition.astype(jnp.float32), axis=(0, 1))
    scale = deviation(condition, (0, 1))
    arrays = surgery.flatten(head) | {"condition_scale": scale, "condition_shift": shift}
    head = surgery.replace(head, arrays)
    params = {k: v for k, v in arrays.items() if learnt_by_cross_attention(k)}
    loss_fn = condition_loss(head, arrays, options.loss["cross_attn"])
    data = {f"feature{i}": x for i, x in enumerate(features)} | {"condition": condition}
    params = fit(
        loss_fn,
        params,
        data,
        epochs=options.epochs,
        lr=options.lr,
        options=options,
        seed=seed,
        folder=folder / "cross_attn_state",
        metrics=metrics,
        name="cross_attn",
    )
    return surgery.replace(head, arrays | params)


def lower_condition_fit(
    head: GraftedHead,
    features: tuple[jax.ShapeDtypeStruct, ...],
    *,
    options: DistillOptions,
    seed: int,
    sharding: jax.sharding.Sharding,
) -> tuple[jax.stages.Lowered, Fit]:
    """Lowers one step of `distill_condition` from shapes; returns it and its fit.

    Args:
      head: without arrays (`surgery.abstract_policy`).
      features: shapes of `memory_features` of all samples.
      options, seed: see `fit`.
      sharding: of all arrays.
    """
    how = dict(epochs=options.epochs, lr=options.lr, options=options, seed=seed)
    count = features[0].shape[0]

    def step(arrays, state, data, rows, steps):
        # In a run the head's other arrays are constants of the program; shapes must be arguments.
        loss_fn = condition_loss(head, arrays, options.loss["cross_attn"])
        return make_fit(loss_fn, count, **how).advance(state, data, rows, steps)

    arrays = surgery.shapes(head)
    params = {k: v for k, v in arrays.items() if learnt_by_cross_attention(k)}
    whole = make_fit(condition_loss, count, **how)
    rows = (count, head.config.n_actions, head.config.width)
    data = {f"feature{i}": x for i, x in enumerate(features)}
    data["condition"] = jax.ShapeDtypeStruct(rows, jnp.bfloat16)
    shapes = (
        arrays,
        (params, jax.eval_shape(whole.optimizer.init, params)),
        data,
        jax.ShapeDtypeStruct((1, whole.batch), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    return jax.jit(step).lower(*parallel.shapes_on_mesh(shapes, sharding)), whole


def stream_errors(head: GraftedHead, batch: Arrays, scale: jax.Array) -> list[jax.Array]:
    """Returns (predicted condition - e_c) / scale after every block: depth arrays (b, n, width)."""
    features = [batch[f"feature{i}"].astype(jnp.float32) for i in range(len(batch) - 1)]
    target = batch["condition"].astype(jnp.float32)
    return [(s - target) / scale for s in head.stream(head.memory.project(*features))]


def predict_condition(
    head: GraftedHead, features: tuple[jax.Array, ...], *, batch: int = 256
) -> jax.Array:
    """Computes the condition that the stream predicts for all samples: (samples, n, width)."""
    graph, state = nnx.split(head)

    @jax.jit
    def predict(state, *features):
        head = nnx.merge(graph, state)
        memory = head.memory.project(*(x.astype(jnp.float32) for x in features))
        if head.config.cross_attention == "residual":
            return memory.astype(jnp.bfloat16)
        return head.stream(memory)[-1].astype(jnp.bfloat16)

    count = len(features[0])
    return jnp.asarray(
        in_batches(
            lambda rows: predict(state, *(x[rows] for x in features)), count, min(batch, count)
        )
    )


def check_budget(options: DistillOptions, samples: int) -> str:
    """Returns a line on the numbers of steps of the two fits."""
    per_epoch = max(1, samples // min(options.batch, samples))
    blocks = (options.block_epochs or options.epochs) * per_epoch
    return (
        f"{options.epochs * per_epoch} steps for the condition and {blocks} for the blocks, "
        f"{math.ceil(per_epoch)} per epoch"
    )
