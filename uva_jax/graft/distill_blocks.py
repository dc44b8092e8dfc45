"""Stage 1 of the blocks: self-attention and MLP operators learn the teacher's block residuals.

Given the condition that the cross-attentions predict, the operators of all blocks learn side by
side under `vmap`. In the "residual" form of the head the cross-attentions are learnt here too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uva_jax.graft.capture import head_activations
from uva_jax.graft.distill import deviation, distance
from uva_jax.models import surgery
from uva_jax.models.grafted_head import GraftedBlock, GraftedHead
from uva_jax.models.mlp_head import MLPHead
from uva_jax.models.operators import learns_in_stage1
from uva_jax.runtime.sections_graft import FAMILIES, DistillOptions
from uva_jax.train.fit import Arrays, fit

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
    data = dict(data) | {"predicted": condition}
    params, loss_fn = block_training(head, teacher, data, options, seed)
    params = fit(
        loss_fn,
        params,
        data,
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
    for number, group in enumerate(_alike(head, options)):
        for path, x in _below(params, f"{number}/").items():
            whole |= {f"blocks/{block}/{path}": x[row] for row, block in enumerate(group.blocks)}
    return surgery.replace(head, whole)


def block_training(
    head: GraftedHead, teacher: MLPHead, data: Arrays, options: DistillOptions, seed: int
) -> tuple[dict[str, jax.Array], Callable]:
    """Returns the initial parameters of `distill_blocks`, stacked by group, and its loss for `fit`.

    Arguments are those of `distill_blocks`; `data` includes the condition as "predicted".
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
    scale = jax.jit(
        lambda b: deviation(_inputs(teacher, b, options, jax.random.key(seed)), (0, 2))
    )(probe)

    def loss_fn(params, batch, key):
        found = block_inputs(teacher, batch, key if options.fresh_noise else None)
        e_t = head.time_embed(found["t"])[:, None]
        predicted = batch["predicted"].astype(jnp.float32)
        losses: dict[str, dict[int, jax.Array]] = {}  # by family and block
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
                losses.setdefault(family, {}).update(zip(group.blocks, loss, strict=True))
        by_family = {f: jnp.stack(list(x.values())) for f, x in losses.items()}
        by_block = {f"{f}/block{i}": x for f, found in losses.items() for i, x in found.items()}
        return (
            sum(jnp.sum(v) for v in by_family.values()),
            {k: jnp.mean(v) for k, v in by_family.items()} | by_block,
        )

    return params, loss_fn


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
