"""Resumable training of a few arrays on data that fit on the device, with many steps per program.

Distillation of operators uses it. `train/loop.py` trains whole policies on windows that are read
meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from uva_jax.runtime.sections import FitOptions
from uva_jax.storage.checkpoint import Checkpoints
from uva_jax.train.loop import health, stop_if_broken, stop_if_diverged
from uva_jax.train.optim import OptimOptions, make_optimizer
from uva_jax.train.order import epoch_rows

Arrays = Mapping[str, jax.Array]


def make_advance(loss_fn: Callable, optimizer, seed: int, precision: str = "default") -> Callable:
    """Returns a program of k steps, with linear layers in a precision of `FitOptions`.

    It is f((params, moments), data, rows (k, batch), steps (k,)) -> ((params, moments), mean
    scalars, `health` of each step (k, 2)).
    """

    @jax.jit
    def advance(state, data, rows, steps):
        base = jax.random.key(seed)

        def one(state, step_rows):
            params, moments = state
            step, row = step_rows
            batch = jax.tree.map(lambda x: x[row], data)
            key = jax.random.fold_in(base, step)
            objective = jax.value_and_grad(loss_fn, has_aux=True)
            with jax.default_matmul_precision(precision):
                (loss, scalars), grads = objective(params, batch, key)
            updates, moments = optimizer.update(grads, moments, params)
            params = jax.tree.map(lambda p, u: p + u, params, updates)
            return (params, moments), (scalars, health(loss, grads))

        state, (scalars, found) = jax.lax.scan(one, state, (steps, rows))
        return state, jax.tree.map(jnp.mean, scalars), found

    return advance


class Fit(NamedTuple):
    """The program of a fit: `advance` of `make_advance`, for `total` steps of `batch` samples."""

    advance: Callable
    optimizer: optax.GradientTransformation
    batch: int
    total: int


def make_fit(
    loss_fn: Callable,
    count: int,
    *,
    epochs: int,
    lr: float,
    options: FitOptions,
    seed: int,
    stacked_axes: int = 0,
) -> Fit:
    """Returns the program with which `fit` trains on `count` samples; arguments as for `fit`."""
    batch = min(options.batch, count)
    total = epochs * (count // batch)
    optimizer = make_optimizer(
        OptimOptions(
            lr=lr,
            warmup_steps=min(options.warmup, total // 10),
            total_steps=total,
            weight_decay=options.weight_decay,
            clip_norm=options.clip_norm or None,
        ),
        stacked_axes=stacked_axes,
    )
    advance = make_advance(loss_fn, optimizer, seed, options.matmul_precision)
    return Fit(advance, optimizer, batch, total)


def fit(
    loss_fn: Callable[[dict, Arrays, jax.Array], tuple[jax.Array, dict]],
    params: dict[str, jax.Array],
    data: Arrays,
    *,
    epochs: int,
    lr: float,
    options: FitOptions,
    seed: int,
    folder: Path,
    metrics,
    name: str,
    stacked_axes: int = 0,
) -> dict[str, jax.Array]:
    """Trains a flat dict of parameters on arrays on the device; resumes from `folder`.

    Args:
      loss_fn: (params, batch, key) -> loss and scalars to log; `batch` is rows of `data`.
      params: trainable arrays by path.
      data: arrays with the samples first.
      epochs, lr: of this fit.
      options: batch, warm-up, decay, clipping and intervals.
      seed: of the sample order and of the keys; both are functions of the step alone.
      folder: holds the resumable states.
      metrics: writer of progress and messages.
      name: prefix of logged scalars.
      stacked_axes: leading axes of `params` over which operators are stacked.

    Returns:
      the trained parameters.

    Raises:
      UserError: training diverged.
    """
    count = len(next(iter(data.values())))
    advance, optimizer, batch, total = make_fit(
        loss_fn,
        count,
        epochs=epochs,
        lr=lr,
        options=options,
        seed=seed,
        stacked_axes=stacked_axes,
    )
    state = (params, optimizer.init(params))
    with Checkpoints(folder) as checkpoints:
        step = 0
        if (restored := checkpoints.restore(state)) is not None:
            step, state = restored
            metrics.say(f"{name} resumes at step {step} of {total}")
        with metrics.progress(total, unit="steps", desc=name, initial=step) as bar:
            while step < total:
                stop = min(total, step + options.log_every - step % options.log_every)
                rows = epoch_rows(seed, count, batch, step, stop)
                state, scalars, found = advance(state, data, rows, jnp.arange(step, stop))
                setting = options.key("lr")
                stop_if_diverged(np.asarray(found), step, name, setting)
                named = {f"{name}/{k}": float(v) for k, v in scalars.items()}
                metrics.log(stop, **named)
                bar.update(stop - step, loss=named.get(f"{name}/loss", next(iter(named.values()))))
                crossed = stop // options.checkpoint_every > step // options.checkpoint_every
                step = stop
                if crossed or step == total:
                    stop_if_broken(state[0], step, name, setting)
                    checkpoints.save(step, state)
    return state[0]
