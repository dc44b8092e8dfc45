"""The training loop: optimiser, moving average, gradient accumulation, resumable states.

Stage 2 and the training of policies and VAEs use it with different losses and batches.

Several steps can run in one call of the compiled function (`lax.scan`), because on a CPU every call
allocates its working memory again, which takes a quarter of a small model's step. Models with
convolutions should not use it: XLA's CPU backend makes them a hundred times slower inside a loop.
The input of a step depends only on the seed and its number, so a resumed run repeats every bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from uva_jax.runtime import parallel
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.runtime.sections import LoopOptions
from uva_jax.storage.checkpoint import Checkpoints
from uva_jax.storage.finite import non_finite
from uva_jax.train.best import Best, Flat, Keep, better, unchecked
from uva_jax.train.optim import carry_optimizer_state, ema_update, loop_optimizer

_HEALTH = ("loss", "gradient's norm")
# (trained, frozen, batch, key, step) -> loss, scalars to log
Loss = Callable[[Flat, Flat, Any, jax.Array, jax.Array], tuple[jax.Array, Mapping]]


class LoopState(NamedTuple):
    """The state of training: trained parameters, their average, the optimiser's state.

    `best` is None unless the loop keeps the best parameters; steps do not change it.
    """

    params: Flat
    ema: Flat
    moments: object
    best: Best | None = None


def part(params: Mapping, name: str) -> dict:
    """Returns the parameters under a prefix, by the rest of their path."""
    start = f"{name}/"
    return {k.removeprefix(start): v for k, v in params.items() if k.startswith(start)}


def make_steps(loss: Loss, options: LoopOptions, mesh: Mesh, shardings) -> Callable:
    """Returns the jitted f(state, frozen, batches, first, key) -> state, scalars, health.

    `batches` has steps on the first axis and samples on the second; `first` is the number of the
    first step. The scalars are means over the steps that have them (NaN elsewhere), and `health` is
    (steps, 2).

    Args:
      loss: of one batch.
      options: of the optimiser.
      mesh: samples are divided over its data axes.
      shardings: of `LoopState`, which is donated.
    """
    optimizer, parts, ema = loop_optimizer(options), options.accumulate, asdict(options.ema)

    def gradients(params, frozen, batch, key, step):
        def one(batch, key):
            objective = jax.value_and_grad(
                lambda p: loss(p, frozen, batch, key, step), has_aux=True
            )
            (_, scalars), grads = objective(params)
            return grads, scalars

        if parts == 1:
            return one(batch, key)
        # Every device splits its own samples, so none move between devices.
        cut = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0),
            batch,
        )
        keys = jax.random.split(key, parts)

        def add(total, part):
            return jax.tree.map(jnp.add, total, one(*part)), None

        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], cut), keys[0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (cut, keys))
        return jax.tree.map(lambda x: x / parts, total)

    def steps_fn(state: LoopState, frozen, batches, first, key):
        def body(state, inputs):
            batch, step = inputs
            grads, scalars = gradients(
                state.params, frozen, batch, jax.random.fold_in(key, step), step
            )
            updates, moments = optimizer.update(grads, state.moments, state.params)
            params = jax.tree.map(jnp.add, state.params, updates)
            average = ema_update(state.ema, params, step, **ema)
            state = LoopState(params, average, moments, state.best)
            return state, (scalars, health(scalars["loss"], grads))

        count = jax.tree.leaves(batches)[0].shape[0]
        if count == 1:  # without a loop, in which convolutions are slow on a CPU
            state, (scalars, found) = body(state, (jax.tree.map(lambda x: x[0], batches), first))
        else:
            steps = (batches, first + jnp.arange(count))
            state, (scalars, found) = jax.lax.scan(body, state, steps)
        return state, jax.tree.map(jnp.nanmean, scalars), found.reshape(count, len(_HEALTH))

    whole = parallel.replicated(mesh)
    return jax.jit(steps_fn, donate_argnums=0, out_shardings=(shardings, whole, whole))


def lower_step(
    loss: Loss,
    params: Flat,
    frozen: Flat,
    batch: Mapping,
    *,
    options: LoopOptions,
    mesh: Mesh,
    keep: bool = False,
) -> jax.stages.Lowered:
    """Lowers one step, as `run_loop` compiles it, from shapes alone.

    Args:
      loss, options, mesh: as for `run_loop`.
      params, frozen: shapes with their shardings (`parallel.shapes_on_mesh`).
      batch: shapes of a whole batch, samples first.
      keep: count the memory of the best parameters, which `run_loop` holds during a step.
    """
    moments = jax.eval_shape(loop_optimizer(options).init, params)
    moments = parallel.shapes_on_mesh(moments, parallel.shardings_for(moments, mesh))
    whole = parallel.replicated(mesh)
    numbers = jax.ShapeDtypeStruct((1,), jnp.float32, sharding=whole)
    best = Best(params, numbers, numbers, numbers) if keep else None
    state = LoopState(params, params, moments, best)
    steps = {k: jax.ShapeDtypeStruct((1, *v.shape), v.dtype) for k, v in batch.items()}
    first = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    key = parallel.shapes_on_mesh(jax.eval_shape(lambda: jax.random.key(0)), whole)
    return make_steps(loss, options, mesh, jax.tree.map(lambda x: x.sharding, state)).lower(
        state,
        frozen,
        parallel.shapes_on_mesh(steps, parallel.batch_sharding(mesh, axis=1)),
        first,
        key,
    )


def start_state(
    params: Flat, options: LoopOptions, mesh: Mesh, before: LoopState | None = None
) -> LoopState:
    """Returns the state before the first step, placed on the mesh.

    Args:
      params: the trained parameters.
      options: of the optimiser.
      mesh: (data, fsdp, tensor).
      before: the state of an earlier phase with fewer trained parameters, whose parameters,
        averages, moments and step count are kept.
    """
    if before is not None:
        params = params | before.params
    shardings = parallel.shardings_for(params, mesh)
    # Copies, because the steps donate their state.
    placed = {k: jnp.array(v, copy=True) for k, v in parallel.on_mesh(params, shardings).items()}
    average = {k: jnp.array(v, copy=True) for k, v in placed.items()}
    optimizer = loop_optimizer(options)
    moments = jax.eval_shape(optimizer.init, placed)
    moments = jax.jit(optimizer.init, out_shardings=parallel.shardings_for(moments, mesh))(placed)
    best = None
    if before is not None:
        average |= before.ema
        moments = carry_optimizer_state(before.moments, moments)
        if before.best is not None:
            # What trains only from now on was the same when the best parameters were found.
            opened = {k: jnp.array(v, copy=True) for k, v in placed.items()}
            best = before.best._replace(params=opened | before.best.params)
    return LoopState(placed, average, moments, best)


def run_loop(
    loss: Loss,
    state: LoopState,
    frozen: Flat,
    batches: Callable[[int], Mapping[str, np.ndarray]],
    *,
    options: LoopOptions,
    mesh: Mesh,
    seed: int,
    folder: Path,
    metrics: MetricsWriter,
    steps: range | None = None,
    desc: str = "",
    judge: Callable[[Flat, int], Mapping[str, float]] | None = None,
    keep: Keep | None = None,
) -> LoopState:
    """Trains; resumes an interrupted run.

    Args:
      loss: of one batch.
      state: before the first step; its arrays are donated.
      frozen: parameters that are not trained.
      batches: step -> this process's share of that step's batch, samples first.
      options: of the loop.
      mesh: (data, fsdp, tensor).
      seed: of the loss's draws.
      folder: holds the resumable states.
      metrics: gets the scalars, named "<desc>/<scalar>", as means since the last line.
      steps: the steps to run, of `options.steps`; by default all.
      desc: name of what is trained.
      judge: (averaged parameters, steps done) -> scalars, called with every resumable state.
      keep: keeps the best averaged parameters in the state, which resumable states include, and
        logs the mean errors as "held_out_error".

    Returns:
      the state after the last step.

    Raises:
      UserError: training diverged, or the saved state does not fit.
    """
    steps = range(options.steps) if steps is None else steps
    key = jax.random.key(seed)
    frozen = parallel.on_mesh(frozen, parallel.shardings_for(frozen, mesh))
    # The steps do not take the best parameters along, which they would not change.
    shardings = jax.tree.map(lambda x: x.sharding, state._replace(best=None))
    run = make_steps(loss, options, mesh, shardings)
    prefix = f"{desc}/" if desc else ""
    step, running, recent = steps.start, [], []

    def check(state: LoopState) -> LoopState:
        errors = keep.errors(state.ema)
        metrics.log(step, **{f"{prefix}held_out_error": float(np.mean(errors))})
        return state._replace(best=better(state.best, state.ema, step, errors, mesh))

    if keep is not None and state.best is None:
        state = state._replace(best=unchecked(state.ema, keep, mesh))
    with Checkpoints(folder) as checkpoints:
        if (restored := checkpoints.restore(state)) is not None:
            step, state = restored
            if step < steps.stop:
                metrics.say(f"{desc} resumes at step {step} of {options.steps}".lstrip())
        if keep is not None and state.best.step < 0:
            state = check(state)
        with metrics.progress(options.steps, unit="steps", desc=desc, initial=step) as bar:
            while step < steps.stop:
                before, step = step, _next_stop(step, steps.stop, options, keep)
                group = [batches(i) for i in range(before, step)]
                group = {k: np.stack([batch[k] for batch in group]) for k in group[0]}
                group = parallel.shard_batch(mesh, group, axis=1)
                best = state.best
                state, scalars, found = run(
                    state._replace(best=None), frozen, group, jnp.int32(before), key
                )
                state = state._replace(best=best)
                running.append((before, scalars, found))
                checks = keep is not None and (step % keep.every == 0 or step == options.steps)
                saves = step % options.checkpoint_every == 0 or step == steps.stop
                logs = saves or step // options.log_every > before // options.log_every
                # One call runs asynchronously, so that the next batch is read meanwhile.
                while len(running) > (0 if logs or checks else 1):
                    first, scalars, found = running.pop(0)
                    stop_if_diverged(np.asarray(found), first, desc, options.key("lr"))
                    recent.append({k: float(v) for k, v in scalars.items()})
                    bar.update(len(found), loss=recent[-1]["loss"])
                if logs:
                    metrics.log(step, **{f"{prefix}{k}": v for k, v in _means(recent).items()})
                    recent = []
                if checks:
                    state = check(state)
                if saves:
                    stop_if_broken(state.params, step, desc, options.key("lr"))
                    checkpoints.save(step, state)
                    if judge is not None:
                        found = judge(state.ema, step)
                        metrics.log(step, **{f"{prefix}{k}": v for k, v in found.items()})
    return state


def health(loss: jax.Array, grads) -> jax.Array:
    """Returns the values that show divergence: the loss and the gradient's norm (2,)."""
    return jnp.stack([loss, optax.global_norm(grads)])


def stop_if_diverged(found: np.ndarray, first: int, desc: str, setting: str) -> None:
    """Checks that losses and gradients are finite.

    Args:
      found: `health` of consecutive steps (steps, 2).
      first: number of the first of these steps.
      desc: name of what is trained.
      setting: name of its learning rate.

    Raises:
      UserError: a value is not finite; the message names the first such step.
    """
    bad = np.argwhere(~np.isfinite(found))
    if len(bad):
        step, what = bad[0]
        raise UserError(_diverged(f"the {_HEALTH[what]} of step {first + step}", desc, setting))


def stop_if_broken(params: Flat, step: int, desc: str, setting: str) -> None:
    """Raises UserError if the parameters after `step` steps are not finite."""
    if bad := non_finite(params):
        raise UserError(_diverged(f"after {step} steps {bad[0]}", desc, setting))


def _diverged(what: str, desc: str, setting: str) -> str:
    return (
        f"{desc or 'training'} stops: {what} is not finite. The last saved state is kept; lower "
        f"{setting}, or correct values that are not finite in the data, and run the command again"
    )


def _means(recent: list[dict[str, float]]) -> dict[str, float]:
    """Returns each scalar's mean over the calls that have it (losses of other modes are NaN)."""
    found = {k: [call[k] for call in recent if not math.isnan(call[k])] for k in recent[0]}
    return {k: float(np.mean(v)) if v else math.nan for k, v in found.items()}


def _next_stop(step: int, stop: int, options: LoopOptions, keep: Keep | None) -> int:
    """Returns where the call that begins at `step` stops; it is the same after resuming."""
    ends = (options.steps_per_call, options.checkpoint_every) + ((keep.every,) if keep else ())
    return min(stop, *((step // every + 1) * every for every in ends))
