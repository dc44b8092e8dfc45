"""The optimiser, the learning-rate schedule and the moving average of parameters.

All functions take only the trainable parameters (`trainable.partition`), as an `nnx.State`, nested
dicts or a flat dict. So a frozen leaf has no gradient, optimiser state or weight decay.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections import LoopOptions
from uva_jax.train.trainable import path_name

_ADAM_RMS = 0.2  # root mean square of AdamW's updates; Muon's are scaled to it


@dataclasses.dataclass(frozen=True)
class OptimOptions:
    """AdamW (as UVA trains) or Muon, with warm-up and cosine decay.

    Muon (https://arxiv.org/abs/2502.16982) updates the matrices of `muon_mask`, AdamW the rest.
    Muon's updates are scaled to the size of AdamW's, so that both use one learning rate.

    Raises:
      UserError: the warm-up is as long as the training, or the optimiser is unknown.
    """

    lr: float
    warmup_steps: int
    total_steps: int
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.02
    clip_norm: float | None = 1.0  # largest global norm of the gradient; None: no clipping
    optimizer: str = "adamw"

    def __post_init__(self):
        if not 0 <= self.warmup_steps < self.total_steps:
            raise UserError(
                f"warmup_steps is {self.warmup_steps} and total_steps {self.total_steps}, so the "
                "learning rate would never fall: make the warm-up shorter"
            )
        if self.optimizer not in ("adamw", "muon"):
            raise UserError(f"optimizer is {self.optimizer!r}, but must be 'adamw' or 'muon'")


def warmup_cosine(base_lr: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Returns a schedule: linear from 0 to `base_lr`, then half a cosine to 0 at `total_steps`.

    It equals `get_scheduler("cosine")` of diffusers, also after `total_steps`, where the cosine
    rises again. It uses the half angle, which is exact near 0.
    """
    span = max(1, total_steps - warmup_steps)

    def schedule(step):
        step = jnp.asarray(step)
        warm = step / max(1, warmup_steps)
        left = (warmup_steps + span - step) / span
        return base_lr * jnp.where(step < warmup_steps, warm, jnp.sin(math.pi / 2 * left) ** 2)

    return schedule


def decay_mask(params, stacked_axes: int = 0):
    """Returns a tree of booleans: True for leaves with weight decay.

    Biases and 1-d leaves have none; placeholder and position embeddings do, as in UVA.

    Args:
      params: a tree whose leaves have a shape.
      stacked_axes: leading axes of every leaf that stacking (vmap) has added.
    """

    def decays(path, leaf):
        return len(leaf.shape) - stacked_axes > 1 and path_name(path).rsplit("/", 1)[-1] != "bias"

    return jax.tree_util.tree_map_with_path(decays, params)


def muon_mask(params):
    """Returns a tree of booleans: True for matrices inside blocks, which Muon updates.

    Input and output layers, embedding tables and biases are False.
    """

    def inside(path, leaf):
        name = path_name(path)
        return len(leaf.shape) == 2 and "blocks/" in name and name.endswith("/kernel")

    return jax.tree_util.tree_map_with_path(inside, params)


def make_optimizer(options: OptimOptions, *, stacked_axes: int = 0) -> optax.GradientTransformation:
    """Returns the optimiser of trainable parameters: clipping, AdamW or Muon, and the schedule.

    The gradient is clipped by the norm of the whole tree.
    """
    schedule = warmup_cosine(options.lr, options.warmup_steps, options.total_steps)
    adamw = optax.adamw(
        schedule,
        b1=options.b1,
        b2=options.b2,
        eps=options.eps,
        weight_decay=options.weight_decay,
        mask=lambda params: decay_mask(params, stacked_axes),
    )
    parts = [adamw]
    if options.optimizer == "muon":
        muon = optax.contrib.muon(
            schedule, weight_decay=options.weight_decay, consistent_rms=_ADAM_RMS
        )
        parts = [
            optax.partition(
                {True: muon, False: adamw},
                lambda params: muon_mask(params),
            )
        ]
    if options.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(options.clip_norm))
    return optax.chain(*parts)


def loop_optimizer(options: LoopOptions) -> optax.GradientTransformation:
    """Returns the optimiser of a training loop.

    Raises:
      UserError: the options contradict each other.
    """
    return make_optimizer(
        OptimOptions(
            lr=options.lr,
            warmup_steps=options.warmup,
            total_steps=options.steps,
            b1=options.betas[0],
            b2=options.betas[1],
            weight_decay=options.weight_decay,
            clip_norm=options.clip_norm or None,
            optimizer=options.optimizer,
        )
    )


def carry_optimizer_state(old_state, new_state):
    """Returns `new_state` with the leaves of `old_state` at all paths that both have.

    At a change of phase, leaves that trained before keep their moments, the step count continues,
    and newly trainable leaves take their initial state from `new_state`. It also works on moving
    averages.

    Raises:
      ValueError: a leaf has different shapes in the two states.
    """
    old = {
        path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(old_state)[0]
    }

    def pick(path, fresh):
        kept = old.get(path_name(path), fresh)
        if jnp.shape(kept) != jnp.shape(fresh):
            raise ValueError(
                f"{path_name(path)} had shape {jnp.shape(kept)} before and now has "
                f"{jnp.shape(fresh)}: the states belong to different models"
            )
        return kept

    return jax.tree_util.tree_map_with_path(pick, new_state)


def ema_decay(
    step,
    *,
    inv_gamma: float = 1.0,
    power: float = 0.75,
    min_value: float = 0.0,
    max_value: float = 0.9999,
    update_after_step: int = 0,
) -> jax.Array:
    """Returns the decay of the moving average at update number `step` (from 0), float32.

    As in UVA it is 0 for the first two updates, which therefore copy the parameters, then
    1 - (1 + n / inv_gamma) ** -power, clipped to [min_value, max_value].
    """
    n = jnp.maximum(jnp.asarray(step) - update_after_step - 1, 0)
    # expm1 and log1p keep digits that the plain form loses as the decay nears 1.
    value = -jnp.expm1(-power * jnp.log1p(n / inv_gamma))
    return jnp.where(n > 0, jnp.clip(value, min_value, max_value), 0.0)


def ema_update(ema, params, step, **options):
    """Returns the average after update number `step` (from 0); `options` as for `ema_decay`.

    Args:
      ema, params: trees of the trainable leaves; frozen leaves are their own average.
      step: number of the update.
    """
    decay = ema_decay(step, **options)
    return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)
