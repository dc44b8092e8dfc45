"""Stage 3: the grafted head learns to sample in few evaluations.

The head learns the distribution of its own samples: the loss is the energy score of its outputs for
two noises against the samples. The samples come from the policy's own sampler; the map of DDIM from
noise to actions is easier to learn, but DDIM scores less, and so does a policy whose samples have
too little spread. The head goes on predicting eps: given noise at the first timestep of
`diffusion.few_step_loop`, a trained head already implies nearly the mean of its samples, so that it
has to learn little more than their spread. Everything before the diffusion stays the same, so the
condition of a window is computed only once. Further evaluations start from diffused samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uva_jax.graft.assemble import assemble
from uva_jax.graft.energy import distance, mixed_distance
from uva_jax.graft.own_samples import draw_samples
from uva_jax.models import diffusion, surgery
from uva_jax.models.grafted_head import GraftedHead
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import steps_of
from uva_jax.runtime.sections_graft import ShortenOptions
from uva_jax.storage.sample_store import Rows
from uva_jax.storage.site import Site
from uva_jax.train.fit import Arrays, fit


def shorten_head(
    policy: Policy,
    train: Mapping[str, np.ndarray | Rows],
    held_out: Mapping[str, np.ndarray],
    options: ShortenOptions,
    *,
    seed: int,
    site: Site,
) -> tuple[Policy, dict]:
    """Trains the head to sample in `options.evaluations` evaluations.

    Args:
      policy: a graft, in float32.
      train, held_out: "z" (samples, tokens, c), the policy's video tokens, and "actions"
        (samples, n, channels), normalised.
      options: of the training.
      seed: of noise and sample order.
      site: the folder for samples and resumable states, metrics and processes.

    Returns:
      the policy with the shortened head, and its `_figures` on held-out windows.
    """
    head = policy.action_head
    config = dataclasses.replace(
        head.config, prediction="x0_from_eps", sampling_steps=str(options.evaluations)
    )

    def drawn(name: str, z: np.ndarray | Rows, samples: int, seed: int) -> dict[str, np.ndarray]:
        return draw_samples(
            site._replace(folder=site.folder / name),
            policy,
            z,
            samples=samples,
            sampling_steps=options.sampling_steps,
            seed=seed,
        )

    data = drawn("samples", train["z"], options.samples, seed + 1)
    arrays = surgery.flatten(head)
    student = nnx.merge(*nnx.split(head))
    student.config = config
    params = {k: x for k, x in arrays.items() if _after_condition(k, config.cross_attention)}
    params = fit(
        _loss(student, arrays, options),
        params,
        {k: jnp.asarray(v) for k, v in data.items()},
        epochs=options.epochs,
        lr=options.lr,
        options=options,
        seed=seed,
        folder=site.folder / "state",
        metrics=site.metrics,
        name="shorten",
    )
    student = surgery.replace(student, arrays | params)
    found = drawn("samples_held_out", held_out["z"], 2, seed + 2)
    figures = _figures(
        student, found, held_out["actions"], policy.config.temperature, jax.random.key(seed + 3)
    )
    site.metrics.say(
        f"{options.evaluations} evaluation(s) in the place of "
        f"{steps_of(head.config, options.sampling_steps)}: on held-out windows the energy distance "
        f"between the samples is {figures['energy_distance']:.5f}, their variance over noises "
        f"{figures['shortened_spread']:.5f} (before {figures['graft_spread']:.5f})"
    )
    return assemble(policy, student), figures


def _after_condition(path: str, form: str) -> bool:
    """Whether a parameter of the head works after the condition, in the diffusion."""
    top, *rest = path.split("/")
    if top == "blocks":
        return form == "residual" or rest[1] != "cross_attn"
    return top in ("input_proj", "time_embed", "final_layer")


def _loss(student: GraftedHead, arrays: Arrays, options: ShortenOptions):
    """The energy score of two outputs for each window, as `fit` takes it.

    With more than one evaluation, every other window starts from two of its samples, diffused to
    one of the later evaluations' timesteps. An output is not compared with the sample it starts
    from: it would learn to keep it, and lose the spread that the sample had.
    """
    times = jnp.asarray(diffusion.few_step_times(options.evaluations))
    schedule, count = diffusion.make_schedule(), options.samples

    def loss_fn(params, batch, key):
        noise_key, time_key, sample_key = jax.random.split(key, 3)
        condition = batch["condition"].astype(jnp.float32)
        samples = jnp.moveaxis(batch["samples"], 1, 0)  # (samples, b, n, c)
        b, shape = len(condition), samples.shape[1:]
        t, start = jnp.full(b, times[0]), jnp.zeros((2, *shape))
        weights = jnp.ones((2, count, b))
        if options.evaluations > 1:
            later = jax.random.choice(time_key, times[1:], (b,))
            first = jax.random.randint(sample_key, (b,), 0, count)
            sources = jnp.stack([first, (first + 1) % count])
            again = jnp.arange(b) % 2 == 1
            t = jnp.where(again, later, t)
            start = jnp.where(again[:, None, None], samples[sources, jnp.arange(b)], start)
            own = sources[:, None] == jnp.arange(count)[:, None]
            weights = jnp.where(again & own, 0.0, 1.0)
        noise = jax.random.normal(noise_key, (2, *shape))
        x = diffusion.q_sample(schedule, start, jnp.stack([t, t]), noise)
        head = surgery.replace(student, arrays | params)
        modulations, context = head.modulations(t, condition), head.context(condition)
        outputs = jax.vmap(lambda x: head.step(x, modulations, context))(x)
        eps = outputs[..., : head.config.channels]
        actions = diffusion.predict_x0(schedule, x, jnp.stack([t, t]), eps)
        across = jnp.average(
            mixed_distance(actions[:, None], samples), axis=(0, 1), weights=weights
        )
        loss = jnp.mean(across - mixed_distance(*actions) / 2)
        return loss, {"loss": loss}

    return loss_fn


def _figures(
    student: GraftedHead,
    data: Mapping[str, np.ndarray],
    actions: np.ndarray,
    temperature: float,
    key: jax.Array,
) -> dict[str, float]:
    """Compares two samples of the shortened head with two of the graft, on every window.

    Returns:
      "energy_distance", 0 for equal distributions; "graft_spread" and "shortened_spread", the
      variances over noises; "graft_mse" and "shortened_mse", the mean squared errors to the true
      actions.
    """
    graph, state = nnx.split(student)
    evaluations = int(student.config.sampling_steps)

    @jax.jit
    def sample(state, condition, noise):
        head = nnx.merge(graph, state)
        return head.sample_given(
            condition.astype(jnp.float32), noise=noise, temperature=temperature
        )

    noise = jax.random.normal(key, (2, evaluations + 1, *actions.shape))
    ours = np.stack([np.asarray(sample(state, data["condition"], x)) for x in noise])
    theirs = np.moveaxis(data["samples"], 1, 0)
    across = np.mean([distance(a, b) for a in ours for b in theirs])
    within = np.mean(distance(*ours)) + np.mean(distance(*theirs))
    return {
        "energy_distance": float(2 * across - within),
        "graft_spread": float(np.mean((theirs[0] - theirs[1]) ** 2) / 2),
        "shortened_spread": float(np.mean((ours[0] - ours[1]) ** 2) / 2),
        "graft_mse": float(np.mean((theirs - actions) ** 2)),
        "shortened_mse": float(np.mean((ours - actions) ** 2)),
    }
