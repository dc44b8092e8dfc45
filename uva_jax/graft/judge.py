"""Evaluates a graft without rollouts: each operator, and the assembled head.

Losses alone mislead: operators that ignore the video can have a small loss, and a head whose
self-attention uses the other noisy steps has a lower diffusion loss but worse samples. So each
operator's loss is reported together with its loss on shuffled inputs, and heads are compared by
their samples from equal noise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uva_jax.graft.capture import head_activations
from uva_jax.graft.distill import distance, stream_errors
from uva_jax.graft.distill_blocks import block_errors, block_inputs, trained_families
from uva_jax.models import diffusion
from uva_jax.models.diffusion_head import DiffusionHead
from uva_jax.models.grafted_head import GraftedHead
from uva_jax.models.mlp_head import MLPHead
from uva_jax.models.operators import learns_in_stage1
from uva_jax.runtime.sections_graft import DistillOptions
from uva_jax.train.fit import Arrays

BUCKETS = (0, 200, 400, 600, 1000)  # ranges of timesteps for the error of eps


def _row(operator: str, block: int, kind: str, error, shuffled, target, scale) -> dict:
    """Returns a row of the report.

    "raw" is the loss in the target's units, "scaled" the loss divided by the target's standard
    deviation, and "fvu" the fraction of variance unexplained.
    """
    error, shuffled, target = (np.asarray(x, np.float32) for x in (error, shuffled, target))
    variance = np.var(target / scale, axis=(0, 1)).mean()
    return {
        "operator": operator,
        "block": block,
        "raw": float(np.mean(distance(kind, error))),
        "scaled": float(np.mean(distance(kind, error / scale))),
        "shuffled": float(np.mean(distance(kind, shuffled / scale))),
        "fvu": float(np.mean((error / scale) ** 2) / variance),
    }


def judge_condition(
    head: GraftedHead, features: tuple[jax.Array, ...], condition: jax.Array, kind: str
) -> list[dict]:
    """Returns a row per block of the stream, on held-out samples.

    Shuffled losses use another sample's video.

    Args:
      head: after distillation; its condition scale is the target's standard deviation.
      features: from `distill.memory_features`, each (samples, m, c).
      condition: (samples, n, width) e_c.
      kind: l1, l2 or huber.
    """
    scale = np.asarray(head.condition_scale[...])
    batch = {f"feature{i}": x for i, x in enumerate(features)}
    graph, state = nnx.split(head)
    errors = jax.jit(lambda s, b: stream_errors(nnx.merge(graph, s), b, 1.0))
    plain = errors(state, batch | {"condition": condition})
    other = {k: jnp.roll(v, len(v) // 2, axis=0) for k, v in batch.items()}
    shuffled = errors(state, other | {"condition": condition})
    return [
        _row("cross_attn", i, kind, e, s, condition, scale)
        for i, (e, s) in enumerate(zip(plain, shuffled, strict=True))
        if learns_in_stage1(head.blocks[i].cross_attn)
    ]


def judge_blocks(
    head: GraftedHead,
    teacher: MLPHead,
    data: Arrays,
    predicted: jax.Array,
    *,
    options: DistillOptions,
    key: jax.Array,
) -> list[dict]:
    """Returns a row for each operator that Stage 1 trains, on held-out samples.

    Shuffled losses use another sample's condition.
    """
    form = head.config.cross_attention

    @jax.jit
    def run(state, data, predicted):
        head = nnx.merge(graph, state)
        found = block_inputs(teacher, data, key if options.fresh_noise else None)
        e_t = head.time_embed(found["t"])[:, None]
        predicted = predicted.astype(jnp.float32)
        results = []
        for i, block in enumerate(head.blocks):
            h, residual = found["h"][:, i], found["residual"][:, i]
            plain = block_errors(block, h, residual, e_t, predicted, form)
            rolled = jnp.roll(predicted, len(predicted) // 2, axis=0)
            results.append((plain, block_errors(block, h, residual, e_t, rolled, form), residual))
        return results

    graph, state = nnx.split(head)
    rows = []
    for i, (plain, shuffled, residual) in enumerate(run(state, dict(data), predicted)):
        scale = np.maximum(np.std(np.asarray(residual), axis=(0, 1)), 1e-6)
        rows += [
            _row(name, i, options.loss[name], plain[name], shuffled[name], residual, scale)
            for name in trained_families(head.blocks[i], form, options)
        ]
    return rows


def judge_head(
    head: DiffusionHead,
    teacher: MLPHead,
    z: np.ndarray,
    actions: np.ndarray,
    *,
    temperature: float,
    sampling_steps: str | None,
    key: jax.Array,
) -> dict[str, float]:
    """Compares the assembled head with the teacher's on held-out tokens and equal noise.

    Args:
      head: the assembled head.
      teacher: the MLP head.
      z: (samples, t * s, c) video tokens.
      actions: (samples, n, a) normalised.
      temperature, sampling_steps: of sampling.
      key: of the noise.

    Returns:
      "pair_mse": mean squared error between their samples; "graft_mse" and "teacher_mse": of each
      to the demonstrated actions (all in normalised units); "eps_error_<a>_<b>": relative error of
      eps by range of timesteps; "diffusion_loss" of each, which are not comparable (see above).
    """
    schedule = diffusion.make_schedule("", teacher.config.train_steps)
    noise_key, t_key, sample_key = jax.random.split(key, 3)
    graphs = [nnx.split(h) for h in (head, teacher)]

    @jax.jit
    def run(states, z, actions):
        head, teacher = (nnx.merge(g, s) for (g, _), s in zip(graphs, states, strict=True))
        z = z.astype(jnp.float32)
        noise = jax.random.normal(noise_key, actions.shape)
        t = jax.random.randint(t_key, actions.shape[:1], 0, len(schedule))
        x_t = diffusion.q_sample(schedule, actions, t, noise)
        outputs = head.denoise(x_t, t, head.condition(z))
        reference = head_activations(teacher, teacher.condition(z), actions, t, noise)["out"]
        losses = [
            diffusion.training_losses(schedule, out, actions, x_t, t, noise)["loss"].mean()
            for out in (outputs, reference)
        ]
        eps, true_eps = (jnp.split(x, 2, axis=-1)[0] for x in (outputs, reference))
        samples = [
            h.sample(z, key=sample_key, temperature=temperature, sampling_steps=sampling_steps)
            for h in (head, teacher)
        ]
        return t, eps, true_eps, losses, samples

    t, eps, true_eps, losses, (graft, reference) = run([s for _, s in graphs], z, actions)
    t, eps, true_eps = (np.asarray(x) for x in (t, eps, true_eps))
    found = {
        "pair_mse": float(jnp.mean((graft - reference) ** 2)),
        "graft_mse": float(jnp.mean((graft - actions) ** 2)),
        "teacher_mse": float(jnp.mean((reference - actions) ** 2)),
        "graft_diffusion_loss": float(losses[0]),
        "teacher_diffusion_loss": float(losses[1]),
    }
    for low, high in zip(BUCKETS, BUCKETS[1:], strict=False):
        inside = (t >= low) & (t < high)
        if inside.any():
            error = np.mean((eps[inside] - true_eps[inside]) ** 2) / np.mean(true_eps[inside] ** 2)
            found[f"eps_error_{low}_{high}"] = float(error**0.5)
    return found
