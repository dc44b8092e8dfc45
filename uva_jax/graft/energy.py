"""The energy score: how well a few samples represent the distribution that a true value is from.

Stage 2 keeps its best state by it, and Stage 3 minimises it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def distance(a: jax.Array, b: jax.Array, axes: tuple[int, ...] = (-2, -1)) -> jax.Array:
    """Computes the root mean square of a - b over steps and channels: (..., n, c) -> (...)."""
    # The constant keeps the gradient finite where a equals b.
    return jnp.sqrt(jnp.mean((a - b) ** 2, axis=axes) + 1e-10)


def mixed_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes the mean of `distance` and the mean distance of single steps, (..., n, c) -> (...).

    An energy score with either is proper. The second tells more of the distribution of each step,
    the first tells how the steps of a sample belong together.
    """
    return (distance(a, b) + distance(a, b, axes=(-1,)).mean(axis=-1)) / 2


def energy_scores(samples: jax.Array, truth: jax.Array) -> jax.Array:
    """Computes the energy score (doi 10.1198/016214506000001437) of each window's samples.

    It is the mean distance of a sample to the truth minus half the mean distance between two
    samples. Its expectation is least for samples from the truth's distribution, while a mean
    squared error would prefer samples with too little spread.

    Args:
      samples: (draws, b, n, c), at least two draws.
      truth: (b, n, c).

    Returns:
      (b,), smaller is better.
    """
    samples, draws = jnp.asarray(samples), len(samples)
    pairs = [(i, j) for i in range(draws) for j in range(i)]
    first, second = (samples[jnp.array(side)] for side in zip(*pairs, strict=True))
    return distance(samples, truth).mean(axis=0) - distance(first, second).mean(axis=0) / 2
