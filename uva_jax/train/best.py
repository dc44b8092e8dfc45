"""The averaged parameters with the smallest error, as the training loop keeps them in its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from uva_jax.runtime import parallel

Flat = dict[str, jax.Array]


class Best(NamedTuple):
    """The best averaged parameters so far.

    Attributes:
      params: the parameters.
      step: () after which step they were found; negative before the first check.
      errors: (n,) their errors.
      start: (n,) the errors before the first step.
    """

    params: Flat
    step: jax.Array
    errors: jax.Array
    start: jax.Array


class Keep(NamedTuple):
    """Tells `run_loop` to keep the averaged parameters with the smallest mean error.

    Attributes:
      errors: averaged parameters -> their errors (n,), equal for equal parameters.
      count: n.
      every: steps between checks; there is also one before the first step and after the last.
    """

    errors: Callable[[Flat], np.ndarray]
    count: int
    every: int


def unchecked(params: Flat, keep: Keep, mesh: Mesh) -> Best:
    """Returns the best parameters before the first check."""
    nothing = np.full(keep.count, np.nan)
    return _best(params, -1, nothing, nothing, mesh)


def better(best: Best, params: Flat, step: int, errors: np.ndarray, mesh: Mesh) -> Best:
    """Returns the best parameters after a check: `params` if their errors are smaller, else `best`.

    Smaller means that the mean of the paired differences exceeds its standard error, so that noise
    does not replace a state by one that is as good (the one-standard-error rule of Breiman et al.,
    Classification and Regression Trees, 1984, 3.4.3). Errors that are not numbers are the largest.

    Args:
      best: so far.
      params: the averaged parameters after `step` steps.
      step: steps done.
      errors: (n,) theirs, in the order of `best.errors`.
      mesh: on which the result is placed.
    """
    if best.step < 0:
        return _best(params, step, errors, errors, mesh)
    gain = np.asarray(best.errors, np.float64) - np.asarray(errors, np.float64)
    noise = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else 0.0
    replaces = gain.mean() > noise
    if np.isnan(np.mean(best.errors)):
        replaces = not np.isnan(np.mean(errors))
    if not replaces:
        return best
    return _best(params, step, errors, np.asarray(best.start), mesh)


def _best(params: Flat, step: int, errors: np.ndarray, start: np.ndarray, mesh: Mesh) -> Best:
    numbers = {
        "step": np.int32(step),
        "errors": np.asarray(errors, np.float32),
        "start": np.asarray(start, np.float32),
    }
    whole = dict.fromkeys(numbers, parallel.replicated(mesh))
    # A copy, because the next step donates its parameters.
    params = {k: jnp.array(v, copy=True) for k, v in params.items()}
    return Best(params, **parallel.on_mesh(numbers, whole))
