"""Stage 1: every operator learns the teacher's activations on the same inputs.

Cross-attention first: its stream learns the condition activation e_c. Then, given the condition it
predicts, the self-attention and MLP operators of all blocks learn what each block of the teacher
adds, side by side under `vmap`. Targets are scaled per channel by their standard deviation, so a
loss means the same in every block; every figure comes with its twin on shuffled inputs, because an
operator that ignores its input can look fine on the loss alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from uva_jax.graft.assemble import family_of
from uva_jax.graft.capture import head_activations
from uva_jax.models import surgery
from uva_jax.models.grafted_head import GraftedHead
from uva_jax.models.mlp_head import MLPHead
from uva_jax.runtime import parallel
from uva_jax.runtime.sections_graft import DistillOptions
from uva_jax.storage.checkpoint import Checkpoints
from uva_jax.train.loop import stop_if_broken, stop_if_diverged
from uva_jax.train.optim import OptimOptions, make_optimizer
from uva_jax.train.order import epoch_rows

Arrays = Mapping[str, jax.Array]


def distance(kind: str, error: jax.Array) -> jax.Array:
    """Element-wise l1, l2 or huber (turning at 1) of a scaled error."""
    if kind == "l1":
        return jnp.abs(error)
    if kind == "l2":
        return error**2
    size = jnp.abs(error)
    return jnp.where(size < 1, 0.5 * error**2, size - 0.5)


def make_advance(loss_fn: Callable, optimizer, seed: int) -> Callable:
    """k steps in one program: f((params, moments), data, rows (k, batch), steps (k,)) -> the same
    state, mean scalars, and the sum of each step's scalars (k,)."""

    @jax.jit
    def advance(state, data, rows, steps):
        base = jax.random.key(seed)

        def one(state, step_rows):
            params, moments = state
            step, row = step_rows
            batch = jax.tree.map(lambda x: x[row], data)
            key = jax.random.fold_in(base, step)
            (_, scalars), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)
            updates, moments = optimizer.update(grads, moments, params)
            params = jax.tree.map(lambda p, u: p + u, params, updates)
            return (params, moments), scalars

        state, scalars = jax.lax.scan(one, state, (steps, rows))
        return state, jax.tree.map(jnp.mean, scalars), sum(scalars.values())

    return advance


class Fit(NamedTuple):
    """A fit's steps: `advance` is what `make_advance` gives; `total` steps of `batch` samples."""

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
    options: DistillOptions,
    seed: int,
    stacked_axes: int = 0,
) -> Fit:
    """How `fit` trains on `count` samples; the arguments are its own."""
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
    return Fit(make_advance(loss_fn, optimizer, seed), optimizer, batch, total)


def fit(
    loss_fn: Callable[[dict, Arrays, jax.Array], tuple[jax.Array, dict]],
    params: dict[str, jax.Array],
    data: Arrays,
    *,
    epochs: int,
    lr: float,
    options: DistillOptions,
    seed: int,
    folder: Path,
    metrics,
    name: str,
    stacked_axes: int = 0,
) -> dict[str, jax.Array]:
    """Trains a flat dict of parameters on arrays that live on the device; resumes from `folder`.

    Args:
      loss_fn: (params, batch, key) -> loss and scalars to log; `batch` is rows of `data`.
      params: trainable arrays by path.
      data: arrays with the samples first.
      epochs, lr: of this fit.
      options: batch, warm-up, decay, clipping and intervals.
      seed: of the sample order and of the keys; both are functions of the step alone.
      folder: holds the resumable states.
      metrics: a MetricsWriter.
      name: prefix of what is logged.
      stacked_axes: leading axes of `params` that are a stack of operators.
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
            metrics.say(f"{name} goes on at step {step} of {total}")
        with metrics.progress(total, unit="steps", desc=name, initial=step) as bar:
            while step < total:
                stop = min(total, step + options.log_every - step % options.log_every)
                rows = epoch_rows(seed, count, batch, step, stop)
                state, scalars, sums = advance(state, data, rows, jnp.arange(step, stop))
                setting = options.key("lr")
                stop_if_diverged(np.asarray(sums), step, name, setting)
                named = {f"{name}/{k}": float(v) for k, v in scalars.items()}
                metrics.log(stop, **named)
                bar.update(stop - step, loss=next(iter(named.values())))
                crossed = stop // options.checkpoint_every > step // options.checkpoint_every
                step = stop
                if crossed or step == total:
                    stop_if_broken(state[0], step, name, setting)
                    checkpoints.save(step, state)
    return state[0]


# ---- cross-attention: the condition ----


def memory_features(head: GraftedHead, z: np.ndarray, *, batch: int = 256) -> tuple[jax.Array, ...]:
    """The fixed part of the memory for all samples: computed once, kept in bfloat16."""
    graph, state = nnx.split(head.memory)

    @jax.jit
    def features(state, z):
        found = nnx.merge(graph, state).features(z.astype(jnp.float32))
        return tuple(x.astype(jnp.bfloat16) for x in found)

    pieces = []
    for start in range(0, len(z), batch):
        part = np.asarray(z[start : start + batch])
        padded = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
        pieces.append([np.asarray(x)[: len(part)] for x in features(state, padded)])
    return tuple(jnp.asarray(np.concatenate(column)) for column in zip(*pieces, strict=True))


def learnt_by_cross_attention(path: str) -> bool:
    copied = ("memory/conv/", "memory/aggregator/", "condition_s")
    return family_of(path) == "cross_attn" and not path.startswith(copied)


def condition_loss(head: GraftedHead, arrays: Arrays, kind: str) -> Callable:
    """The stream's loss (l1, l2 or huber) as `fit` takes it; `arrays` are all the head's by path.

    That of the last block's condition, plus a tenth of every earlier one's, so that each operator
    moves the stream towards e_c.
    """
    scale = arrays["condition_scale"]

    def loss_fn(params, batch, key):
        del key  # nothing random in the stream
        errors = stream_errors(surgery.replace(head, arrays | params), batch, scale)
        losses = [jnp.mean(distance(kind, e)) for e in errors]
        loss = losses[-1] + 0.1 * sum(losses[:-1])
        return loss, {"loss": losses[-1]}

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
      head: its stream is trained from where it stands.
      features: from `memory_features`, each (samples, m, c).
      condition: (samples, n, width) e_c.
      options, seed, folder, metrics: see `fit`.
    """
    shift = jnp.mean(condition.astype(jnp.float32), axis=(0, 1))
    scale = _std(condition, (0, 1))
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
    """One step of `distill_condition`, from shapes alone, and the fit that it is of.

    Args:
      head: without arrays (`surgery.abstract_policy`).
      features: shapes of `memory_features` of all samples.
      options, seed: see `fit`.
      sharding: where everything lies.
    """
    how = dict(epochs=options.epochs, lr=options.lr, options=options, seed=seed)
    count = features[0].shape[0]

    def step(arrays, state, data, rows, steps):
        # The head's other arrays are constants of the run's program; shapes have to be arguments.
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
    """(predicted condition - e_c) / scale after every block: depth arrays (b, n, width)."""
    features = [batch[f"feature{i}"].astype(jnp.float32) for i in range(len(batch) - 1)]
    target = batch["condition"].astype(jnp.float32)
    return [(s - target) / scale for s in head.stream(head.memory.project(*features))]


def predict_condition(
    head: GraftedHead, features: tuple[jax.Array, ...], *, batch: int = 256
) -> jax.Array:
    """What the stream predicts for all samples: (samples, n, width) in bfloat16."""
    graph, state = nnx.split(head)

    @jax.jit
    def predict(state, *features):
        head = nnx.merge(graph, state)
        memory = head.memory.project(*(x.astype(jnp.float32) for x in features))
        if head.config.cross_attention == "residual":
            return memory.astype(jnp.bfloat16)
        return head.stream(memory)[-1].astype(jnp.bfloat16)

    count = len(features[0])
    starts = range(0, count, batch)
    pieces = []
    for start in starts:  # the last batch overlaps the one before, so that one program serves all
        start = max(0, min(start, count - batch))
        pieces.append((start, predict(state, *(x[start : start + batch] for x in features))))
    result = np.zeros((count, *pieces[0][1].shape[1:]), pieces[0][1].dtype)
    for start, piece in pieces:
        result[start : start + len(piece)] = np.asarray(piece)
    return jnp.asarray(result)


# ---- self-attention and MLP: the blocks ----

BLOCK_FAMILIES = {"condition": ("self_attn", "mlp"), "residual": ("cross_attn", "self_attn", "mlp")}


def block_inputs(teacher: MLPHead, batch: Arrays, key: jax.Array | None) -> dict[str, jax.Array]:
    """h and r of every block: recomputed with fresh noise under `key`, or as stored.

    Returns:
      "h", "residual" (b, depth, n, w) float32 and "t" (b,).
    """
    if key is None:
        stored = {k: batch[k].astype(jnp.float32) for k in ("h", "residual")}
        return stored | {"t": batch["t"]}
    actions = batch["actions"]
    t_key, noise_key = jax.random.split(key)
    t = jax.random.randint(t_key, actions.shape[:1], 0, teacher.config.train_steps)
    noise = jax.random.normal(noise_key, actions.shape)
    e_c = batch["condition"].astype(jnp.float32)
    found = head_activations(teacher, e_c, actions, t, noise)
    return {"h": found["h"], "residual": found["residual"], "t": t}


def block_errors(
    block, h: jax.Array, residual: jax.Array, e_t: jax.Array, condition: jax.Array, form: str
) -> dict[str, jax.Array]:
    """What each operator of one block misses of its target, given the others as they stand.

    Args:
      block: a GraftedBlock.
      h, residual: (b, n, w) the teacher's block input and what it adds.
      e_t: (b, 1, w) time embedding.
      condition: (b, n, w) the predicted condition, or the memory in the "residual" form.
      form: `cross_attention` of the head.
    """
    stop = jax.lax.stop_gradient
    errors, added = {}, jnp.zeros_like(h)
    y = e_t + jnp.zeros_like(h) if form == "residual" else e_t + condition
    if form == "residual":
        added = block.cross_attn(h, condition, y)
        errors["cross_attn"] = added - residual
        added = stop(added)
    attended = block.self_attn(h + added, y)
    errors["self_attn"] = attended - (residual - added - stop(block.mlp(h + added, y)))
    added = added + stop(attended)
    errors["mlp"] = added + block.mlp(h + added, y) - residual
    return errors


def distill_blocks(
    head: GraftedHead,
    teacher: MLPHead,
    data: Arrays,
    condition: jax.Array,
    *,
    options: DistillOptions,
    seed: int,
    folder: Path,
    metrics,
) -> GraftedHead:
    """Trains the self-attention and MLP operators of all blocks at once under `vmap`.

    In the "residual" form the cross-attentions are trained here too, on the block residual.

    Args:
      head: blocks of equal operators, trained from where they stand.
      teacher: the MLP head.
      data: "actions", "condition" (e_c), and the stored "h", "residual", "t" unless noise is fresh.
      condition: (samples, n, w) from `predict_condition`.
      options, seed, folder, metrics: see `fit`.
    """
    form = head.config.cross_attention
    graph, _ = nnx.split(head.blocks[0])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(nnx.state(b) for b in head.blocks))
    arrays = surgery.flatten(stacked)
    trained = [f for f in BLOCK_FAMILIES[form] if f in options.operators]
    params = {k: v for k, v in arrays.items() if k.split("/")[0] in trained}
    probe = {k: v[:512] for k, v in data.items()}
    scale = jax.jit(lambda b: _std(_inputs(teacher, b, options, jax.random.key(seed)), (0, 2)))(
        probe
    )
    template = head.blocks[0]

    def loss_fn(params, batch, key):
        found = block_inputs(teacher, batch, key if options.fresh_noise else None)
        e_t = head.time_embed(found["t"])[:, None]
        predicted = batch["predicted"].astype(jnp.float32)

        def one(block_arrays, h, residual, scale):
            block = surgery.replace(template, block_arrays)
            errors = block_errors(block, h, residual, e_t, predicted, form)
            return {f: jnp.mean(distance(options.loss[f], errors[f] / scale)) for f in trained}

        losses = jax.vmap(one, in_axes=(0, 1, 1, 0))(
            arrays | params, found["h"], found["residual"], scale
        )
        return sum(jnp.sum(v) for v in losses.values()), {k: jnp.mean(v) for k, v in losses.items()}

    params = fit(
        loss_fn,
        params,
        dict(data) | {"predicted": condition},
        epochs=options.block_epochs or options.epochs,
        lr=options.block_lr or options.lr,
        options=options,
        seed=seed + 1,
        folder=folder / "blocks_state",
        metrics=metrics,
        name="blocks",
        stacked_axes=1,
    )
    final = arrays | params
    whole = surgery.flatten(head)
    for i in range(len(head.blocks)):
        whole |= {f"blocks/{i}/{k}": v[i] for k, v in final.items()}
    return surgery.replace(head, whole)


def _inputs(teacher, batch, options, key):
    return block_inputs(teacher, batch, key if options.fresh_noise else None)["residual"]


def _std(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.maximum(jnp.std(x.astype(jnp.float32), axis=axes), 1e-6)


def check_budget(options: DistillOptions, samples: int) -> str:
    """One line on what the two fits will cost."""
    per_epoch = max(1, samples // min(options.batch, samples))
    blocks = (options.block_epochs or options.epochs) * per_epoch
    return (
        f"{options.epochs * per_epoch} steps for the condition and {blocks} for the blocks, "
        f"{math.ceil(per_epoch)} an epoch"
    )
