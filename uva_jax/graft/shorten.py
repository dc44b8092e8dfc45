"""Stage 3: the grafted head learns to sample in few evaluations.

The targets are the head's own deterministic samples, by DDIM from a noise x_T. The head learns to
map that noise to them in one evaluation (arXiv 2101.02388). It predicts actions (x0) instead of
noise (eps), so its final layer starts at zero. Everything before the diffusion stays the same, so
the condition of a window is computed only once. Further evaluations work as in consistency models
(arXiv 2303.01469).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uva_jax.graft.assemble import assemble
from uva_jax.models import diffusion, surgery
from uva_jax.models.grafted_head import GraftedHead
from uva_jax.models.policy import Policy
from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.runtime.sections_graft import ShortenOptions
from uva_jax.train.fit import Arrays, fit

_BATCH = 256  # windows in one call of a program


def shorten_head(
    policy: Policy,
    train: Mapping[str, np.ndarray],
    held_out: Mapping[str, np.ndarray],
    options: ShortenOptions,
    *,
    seed: int,
    folder: Path,
    metrics: MetricsWriter,
) -> tuple[Policy, dict]:
    """Trains the head to sample in `options.evaluations` evaluations.

    Args:
      policy: a graft, in float32.
      train, held_out: "z" (samples, tokens, c), the policy's video tokens, and "actions"
        (samples, n, channels), normalised.
      options: of the training.
      seed: of noise and sample order.
      folder: holds the resumable states.
      metrics: writer of progress and messages.

    Returns:
      the policy with the shortened head, and its figures on held-out windows: "pair_mse", the mean
      squared error to the target of the same noise; "target_variance", over windows;
      "noise_variance", of a window's targets over noises (0 with one noise); "graft_mse" and
      "shortened_mse", the mean squared errors to the true actions.
    """
    head = policy.action_head
    config = dataclasses.replace(
        head.config, prediction="x0", sampling_steps=str(options.evaluations)
    )
    make_pairs = _pairs_of(head, options)
    pairs = {
        name: make_pairs(data["z"], jax.random.key(seed + number))
        for number, (name, data) in enumerate((("train", train), ("held_out", held_out)), 1)
    }
    arrays = surgery.flatten(head)
    student = nnx.merge(*nnx.split(head))
    student.config = config
    params = {
        path: jnp.zeros_like(x) if path.startswith("final_layer/linear/") else x
        for path, x in arrays.items()
        if _after_condition(path, config.cross_attention)
    }
    params = fit(
        _loss(student, arrays, options),
        params,
        {k: jnp.asarray(v) for k, v in pairs["train"].items()},
        epochs=options.epochs,
        lr=options.lr,
        options=options,
        seed=seed,
        folder=folder / "state",
        metrics=metrics,
        name="shorten",
    )
    student = surgery.replace(student, arrays | params)
    figures = _figures(student, pairs["held_out"], held_out["actions"])
    over = f", and {figures['noise_variance']:.5f} over noises" if options.noises > 1 else ""
    metrics.say(
        f"{options.evaluations} evaluation(s) in the place of {options.target_steps} DDIM steps: "
        f"error {figures['pair_mse']:.5f} on held-out windows, where the targets' variance is "
        f"{figures['target_variance']:.4f}{over}"
    )
    return assemble(policy, student), figures


def _after_condition(path: str, form: str) -> bool:
    """Whether a parameter of the head works after the condition, in the diffusion."""
    top, *rest = path.split("/")
    if top == "blocks":
        return form == "residual" or rest[1] != "cross_attn"
    return top in ("input_proj", "time_embed", "final_layer")


def _pairs_of(head: GraftedHead, options: ShortenOptions):
    """Returns f(z, key) -> "condition" (samples, ...) bfloat16, "noise" and "target" (samples,
    noises, n, c), with which a head's samples are learnt."""
    graph, state = nnx.split(head)
    steps = len(diffusion.make_schedule(options.target_steps, 1000))
    shape = (options.noises, head.config.n_actions, head.config.channels)

    @jax.jit
    def run(state, z, samples, key):
        head = nnx.merge(graph, state)
        condition = head.condition(z.astype(jnp.float32))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(samples)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)

        def sample(start):
            unused = jnp.zeros((steps, *start.shape))  # DDIM with eta 0 adds no noise
            return head.sample_given(
                condition,
                noise=jnp.concatenate([start[None], unused]),
                eta=0.0,
                sampling_steps=options.target_steps,
            )

        target = jax.lax.map(sample, noise.swapaxes(0, 1)).swapaxes(0, 1)
        return condition.astype(jnp.bfloat16), noise, target

    def pairs(z: np.ndarray, key: jax.Array) -> dict[str, np.ndarray]:
        count, pieces = len(z), []
        for start in range(0, count, _BATCH):
            rows = np.minimum(np.arange(start, start + _BATCH), count - 1)  # a full last batch
            found = run(state, jnp.asarray(z[rows]), jnp.asarray(rows), key)
            pieces.append([np.asarray(x)[: count - start] for x in found])
        names = ("condition", "noise", "target")
        return {k: np.concatenate(x) for k, x in zip(names, zip(*pieces, strict=True), strict=True)}

    return pairs


def _loss(student: GraftedHead, arrays: Arrays, options: ShortenOptions):
    """The mean squared error to a target, as `fit` takes it.

    With more than one evaluation, every other row starts from its target, diffused to one of the
    later evaluations' timesteps.
    """
    times = jnp.asarray(diffusion.few_step_times(options.evaluations))
    schedule = diffusion.make_schedule()

    def loss_fn(params, batch, key):
        draw_key, time_key, noise_key = jax.random.split(key, 3)
        count = len(batch["condition"])
        draw = jax.random.randint(draw_key, (count,), 0, options.noises)
        x, target = (batch[k][jnp.arange(count), draw] for k in ("noise", "target"))
        t = jnp.full(count, times[0])
        if options.evaluations > 1:
            later = jax.random.choice(time_key, times[1:], (count,))
            again = jnp.arange(count) % 2 == 1
            diffused = diffusion.q_sample(
                schedule, target, later, jax.random.normal(noise_key, target.shape)
            )
            t = jnp.where(again, later, t)
            x = jnp.where(again[:, None, None], diffused, x)
        head = surgery.replace(student, arrays | params)
        error = head.predict_x0(x, t, batch["condition"].astype(jnp.float32)) - target
        loss = jnp.mean(error**2)
        return loss, {"loss": loss}

    return loss_fn


def _figures(student: GraftedHead, pairs: Mapping, actions: np.ndarray) -> dict[str, float]:
    graph, state = nnx.split(student)

    @jax.jit
    def sample(state, condition, noise):
        head = nnx.merge(graph, state)
        return head.sample_given(condition.astype(jnp.float32), noise=noise)

    evaluations = int(student.config.sampling_steps)
    start = pairs["noise"][:, 0]
    added = np.asarray(jax.random.normal(jax.random.key(0), (evaluations, *start.shape)))
    found = np.asarray(sample(state, pairs["condition"], np.concatenate([start[None], added])))
    target = pairs["target"]
    return {
        "pair_mse": float(np.mean((found - target[:, 0]) ** 2)),
        "target_variance": float(target.var(axis=(0, 1)).mean()),
        "noise_variance": float(target.var(axis=1).mean()),
        "graft_mse": float(np.mean((target[:, 0] - actions) ** 2)),
        "shortened_mse": float(np.mean((found - actions) ** 2)),
    }
