"""Stage 1: trains every operator on the teacher's activations for the same inputs.

The cross-attentions come first: their stream is trained on the condition activation e_c. Given the
predicted condition, the self-attention and MLP operators of all blocks are then trained in parallel
under `vmap` on the residuals of the teacher's blocks. Targets are divided per channel by their
standard deviation, so that losses of different blocks are comparable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uva_jax.graft.assemble import family_of
from uva_jax.graft.capture import head_activations
from uva_jax.models import surgery
from uva_jax.models.grafted_head import GraftedBlock, GraftedHead
from uva_jax.models.mlp_head import MLPHead
from uva_jax.models.operators import learns_in_stage1
from uva_jax.runtime import parallel
from uva_jax.runtime.sections_graft import FAMILIES, DistillOptions
from uva_jax.train.fit import Arrays, Fit, fit, make_fit


def distance(kind: str, error: jax.Array) -> jax.Array:
    """Returns the element-wise l1, l2 or huber loss (with delta 1) of a scaled error."""
    if kind == "l1":
        return jnp.abs(error)
    if kind == "l2":
        return error**2
    size = jnp.abs(error)
    return jnp.where(size < 1, 0.5 * error**2, size - 0.5)


# ---- cross-attention: the condition ----


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

    pieces = []
    for start in range(0, len(z), batch):
        part = np.asarray(z[start : start + batch])
        padded = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
        pieces.append([np.asarray(x)[: len(part)] for x in features(state, padded)])
    return tuple(jnp.asarray(np.concatenate(column)) for column in zip(*pieces, strict=True))


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
      head: the initial head.
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
    starts = range(0, count, batch)
    pieces = []
    for start in starts:  # the last batch overlaps the one before, so that all have one shape
        start = max(0, min(start, count - batch))
        pieces.append((start, predict(state, *(x[start : start + batch] for x in features))))
    result = np.zeros((count, *pieces[0][1].shape[1:]), pieces[0][1].dtype)
    for start, piece in pieces:
        result[start : start + len(piece)] = np.asarray(piece)
    return jnp.asarray(result)


# ---- self-attention and MLP: the blocks ----

BLOCK_FAMILIES = {"condition": ("self_attn", "mlp"), "residual": ("cross_attn", "self_attn", "mlp")}


def block_inputs(teacher: MLPHead, batch: Arrays, key: jax.Array | None) -> dict[str, jax.Array]:
    """Returns input and residual of every block: recomputed with new noise of `key`, or as stored.

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
    """Returns the error of each operator of a block on its target, given the other operators.

    Args:
      block: a GraftedBlock.
      h, residual: (b, n, w) input and residual of the teacher's block.
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

    In the "residual" form the cross-attentions are trained here too, on the block's residual.

    Args:
      head: the initial head; blocks with the same operators are stacked.
      teacher: the MLP head.
      data: "actions", "condition" (e_c), and without fresh noise the stored "h", "residual", "t".
      condition: (samples, n, w) from `predict_condition`.
      options, seed, folder, metrics: see `fit`.
    """
    form = head.config.cross_attention
    groups = _alike(head, options)
    stacks = [_stacked(head, group) for group in groups]
    params = {
        f"{number}/{path}": x
        for number, (group, stack) in enumerate(zip(groups, stacks, strict=True))
        for path, x in stack.items()
        if path.split("/")[0] in group.trained
    }
    probe = {k: v[:512] for k, v in data.items()}
    scale = jax.jit(lambda b: _std(_inputs(teacher, b, options, jax.random.key(seed)), (0, 2)))(
        probe
    )

    def loss_fn(params, batch, key):
        found = block_inputs(teacher, batch, key if options.fresh_noise else None)
        e_t = head.time_embed(found["t"])[:, None]
        predicted = batch["predicted"].astype(jnp.float32)
        losses: dict[str, list[jax.Array]] = {}
        for number, (group, stack) in enumerate(zip(groups, stacks, strict=True)):

            def one(block_arrays, h, residual, scale, group=group):
                block = surgery.replace(head.blocks[group.blocks[0]], block_arrays)
                errors = block_errors(block, h, residual, e_t, predicted, form)
                return {
                    f: jnp.mean(distance(options.loss[f], errors[f] / scale)) for f in group.trained
                }

            mine = _below(params, f"{number}/")
            inputs = (stack | mine, found["h"], found["residual"], scale)
            if len(group.blocks) < len(head.blocks):
                rows = np.array(group.blocks)
                inputs = (inputs[0], inputs[1][:, rows], inputs[2][:, rows], scale[rows])
            for family, loss in jax.vmap(one, in_axes=(0, 1, 1, 0))(*inputs).items():
                losses.setdefault(family, []).append(loss)
        by_family = {f: jnp.concatenate(x) for f, x in losses.items()}
        return (
            sum(jnp.sum(v) for v in by_family.values()),
            {k: jnp.mean(v) for k, v in by_family.items()},
        )

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
    whole = surgery.flatten(head)
    for number, group in enumerate(groups):
        for path, x in _below(params, f"{number}/").items():
            whole |= {f"blocks/{block}/{path}": x[row] for row, block in enumerate(group.blocks)}
    return surgery.replace(head, whole)


class _Group(NamedTuple):
    """Blocks with the same operators, and their families that are trained."""

    blocks: list[int]
    trained: list[str]


def _alike(head: GraftedHead, options: DistillOptions) -> list[_Group]:
    """Returns the blocks with trained operators, grouped by equal operators."""
    by_names: dict[tuple, _Group] = {}
    for i, block in enumerate(head.blocks):
        trained = trained_families(block, head.config.cross_attention, options)
        if trained:
            names = tuple(type(getattr(block, family)) for family in FAMILIES)
            by_names.setdefault(names, _Group([], trained)).blocks.append(i)
    return list(by_names.values())


def trained_families(block: GraftedBlock, form: str, options: DistillOptions) -> list[str]:
    """Returns the families that `distill_blocks` trains in a block."""
    return [
        family
        for family in BLOCK_FAMILIES[form]
        if family in options.operators and learns_in_stage1(getattr(block, family))
    ]


def _stacked(head: GraftedHead, group: _Group) -> dict[str, jax.Array]:
    """Returns the stacked arrays of the group's blocks by path within a block."""
    states = [nnx.state(head.blocks[i]) for i in group.blocks]
    return surgery.flatten(jax.tree.map(lambda *x: jnp.stack(x), *states))


def _below(arrays: Arrays, prefix: str) -> dict[str, jax.Array]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def _inputs(teacher, batch, options, key):
    return block_inputs(teacher, batch, key if options.fresh_noise else None)["residual"]


def _std(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.maximum(jnp.std(x.astype(jnp.float32), axis=axes), 1e-6)


def check_budget(options: DistillOptions, samples: int) -> str:
    """Returns a line on the numbers of steps of the two fits."""
    per_epoch = max(1, samples // min(options.batch, samples))
    blocks = (options.block_epochs or options.epochs) * per_epoch
    return (
        f"{options.epochs * per_epoch} steps for the condition and {blocks} for the blocks, "
        f"{math.ceil(per_epoch)} per epoch"
    )
