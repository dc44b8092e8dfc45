"""Selection of training and held-out episodes."""

from __future__ import annotations

import numpy as np

from uva_jax.runtime.errors import UserError


def validation_mask(n_episodes: int, ratio: float, seed: int = 0) -> np.ndarray:
    """Returns upstream's held-out episodes as booleans (n_episodes,).

    At least one and never all episodes are held out; none if `ratio` is 0.
    """
    mask = np.zeros(n_episodes, bool)
    if ratio <= 0:
        return mask
    count = min(max(1, round(n_episodes * ratio)), n_episodes - 1)
    mask[np.random.default_rng(seed).choice(n_episodes, size=count, replace=False)] = True
    return mask


def select_episodes(
    episode_ends: np.ndarray, fraction: float, seed: int, *, mask: np.ndarray | None = None
) -> np.ndarray:
    """Selects a fraction of the episodes, at least one, as booleans (e,).

    With the same seed a smaller fraction is a subset of a larger one.

    Args:
      episode_ends: (e,) cumulative lengths.
      fraction: in (0, 1].
      seed: of the selection.
      mask: (e,) episodes to select from; all by default.

    Raises:
      UserError: the fraction is out of range, or `mask` is empty.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"data_fraction is {fraction}, but must be above 0 and at most 1")
    n = len(episode_ends)
    candidates = np.arange(n) if mask is None else np.flatnonzero(mask)
    if not len(candidates):
        raise UserError(f"data_fraction selects from none of the {n} episodes: give more episodes")
    order = np.random.default_rng(seed).permutation(candidates)
    result = np.zeros(n, bool)
    result[order[: max(1, round(fraction * len(candidates)))]] = True
    return result
