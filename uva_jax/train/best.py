"""The averaged parameters with the smallest error, as the training loop keeps them in its state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from uva_jax.runtime import parallel

Flat = dict[str, jax.Array]


class Best(NamedTuple):
    """The averaged parameters with the smallest error so far; numbers are arrays of shape ().

    `step` is negative before the first check, and `start` is the error before the first step.
    """

    params: Flat
    step: jax.Array
    error: jax.Array
    start: jax.Array


class Keep(NamedTuple):
    """Tells `run_loop` to keep the averaged parameters with the smallest error.

    Attributes:
      error: averaged parameters -> their error, always the same number for the same parameters.
      every: steps between checks; there is also one before the first step and after the last.
    """

    error: Callable[[Flat], float]
    every: int


def unchecked(params: Flat, mesh: Mesh) -> Best:
    """Returns the best parameters before the first check."""
    return _best(params, -1, math.nan, math.nan, mesh)


def better(best: Best, params: Flat, step: int, error: float, mesh: Mesh) -> Best:
    """Returns the best parameters after a check: `params` if their error is less, else `best`.

    An error that is not a number is larger than any other.
    """
    start = float(best.start)
    if best.step < 0:
        start = error
    elif not (error < float(best.error) or math.isnan(float(best.error))):
        return best
    return _best(params, step, error, start, mesh)


def _best(params: Flat, step: int, error: float, start: float, mesh: Mesh) -> Best:
    numbers = {"step": np.int32(step), "error": np.float32(error), "start": np.float32(start)}
    whole = dict.fromkeys(numbers, parallel.replicated(mesh))
    # A copy, because the next step donates its parameters.
    params = {k: jnp.array(v, copy=True) for k, v in params.items()}
    return Best(params, **parallel.on_mesh(numbers, whole))
