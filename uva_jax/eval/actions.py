"""Action metrics on held-out windows: error, accuracy and average precision of sampled actions.

They need no simulator, so they exist for every task. Each policy draws several samples per window
from the same noise. Average precision ranks predictions by the spread of their samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from einops import rearrange
from flax import nnx

from uva_jax.data import source
from uva_jax.data.windows import Strips
from uva_jax.models import diffusion
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import steps_of
from uva_jax.runtime.batches import in_batches

TOLERANCES = (0.02, 0.05, 0.1, 0.2)  # distances in normalised units, whose range is 2


def average_precision(correct: np.ndarray, confidence: np.ndarray) -> float:
    """Computes average precision: the mean of the precision at each correct prediction.

    Args:
      correct: (n,) booleans.
      confidence: (n,) numbers that rank the predictions; ties keep their order.

    Returns:
      a number in 0..1; 0 if nothing is correct.
    """
    ranked = np.asarray(correct, bool)[np.argsort(-np.asarray(confidence), kind="stable")]
    if not ranked.any():
        return 0.0
    precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    return float(precision[ranked].mean())


def action_figures(
    samples: np.ndarray, truth: np.ndarray, tolerances: Sequence[float] = TOLERANCES
) -> dict:
    """Computes error, accuracy and mean average precision of sampled actions.

    A predicted step is correct if its distance to the demonstrated one (root mean square over the
    action's dimensions) is within a tolerance. A smaller spread of samples is more confidence.

    Args:
      samples: (draws, windows, n, a) normalised; the first draw is the prediction.
      truth: (windows, n, a) normalised.
      tolerances: in normalised units.

    Returns:
      "mse", "accuracy" {tolerance: share of steps}, "average_precision" {tolerance: AP} and
      "map", their mean over the tolerances.
    """
    distance = np.sqrt(np.mean((samples[0] - truth) ** 2, axis=-1)).ravel()
    spread = np.sqrt(np.mean(np.var(samples, axis=0), axis=-1)).ravel()
    accuracy = {str(t): float(np.mean(distance <= t)) for t in tolerances}
    precision = {str(t): average_precision(distance <= t, -spread) for t in tolerances}
    return {
        "mse": float(np.mean((samples[0] - truth) ** 2)),
        "accuracy": accuracy,
        "average_precision": precision,
        "map": float(np.mean(list(precision.values()))),
    }


def sample_actions(
    policy: Policy,
    reader: source.WindowReader,
    strips: Strips,
    *,
    draws: int,
    sampling_steps: str,
    seed: int,
    sampler: str = "ancestral",
    batch: int = 16,
) -> tuple[np.ndarray, np.ndarray]:
    """Samples a policy's actions on windows; the noise depends only on the seed and the window.

    Args:
      policy: the policy.
      reader, strips: the windows, as strips of one window.
      draws: samples per window.
      sampling_steps: respacing of the head's diffusion ("": the policy's own).
      seed: of all noise.
      sampler: see `diffusion.sample_loop`.
      batch: windows per call of the policy.

    Returns:
      samples (draws, windows, n, a) and truth (windows, n, a), normalised.
    """
    graph, variables = nnx.split(policy)
    head = policy.config.action_head
    steps = steps_of(head, sampling_steps)
    loop = len(diffusion.make_schedule(steps)) + 1

    @jax.jit
    def run(variables, obs, numbers):
        policy = nnx.merge(graph, variables)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(numbers)

        def normal(stream, shape):
            return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, stream), shape))(keys)

        latent = policy.latent_shape(1)[1:]
        cond, streams = policy.condition(
            obs, vae_eps=normal(0, latent), wrist_eps=normal(1, latent)
        )
        z = policy.video_tokens(cond, streams)
        noise = normal(2, (draws, loop, head.n_actions, head.channels))

        def sample(noise):  # the condition does not depend on the noise, so it is computed once
            return policy.action_head.sample(
                z,
                noise=noise,
                temperature=policy.config.temperature,
                sampling_steps=steps,
                sampler=sampler,
            )

        samples = jax.vmap(sample)(rearrange(noise, "b d k n a -> d k b n a"))
        return policy.normalize("action", obs["action"]), samples

    def sample_rows(rows):
        obs = source.single_windows(reader.read(strips, rows))
        truth, samples = run(variables, obs, rows)
        return np.moveaxis(np.asarray(samples), 1, 0), truth  # windows first

    samples, truth = in_batches(sample_rows, len(strips), batch)
    return np.ascontiguousarray(np.moveaxis(samples, 0, 1)), truth
