"""Which episodes train and which are held out."""

from __future__ import annotations

import numpy as np

from uva_jax.runtime.errors import UserError


def validation_mask(n_episodes: int, ratio: float, seed: int = 0) -> np.ndarray:
    """Upstream's held-out episodes as bool (n_episodes,): at least one, never all; none at 0."""
    mask = np.zeros(n_episodes, bool)
    if ratio <= 0:
        return mask
    count = min(max(1, round(n_episodes * ratio)), n_episodes - 1)
    mask[np.random.default_rng(seed).choice(n_episodes, size=count, replace=False)] = True
    return mask


def select_episodes(
    episode_ends: np.ndarray, fraction: float, seed: int, *, mask: np.ndarray | None = None
) -> np.ndarray:
    """Picks a `fraction` of whole episodes (of those in `mask`), at least one; bool (e,).

    With the same seed a smaller fraction is a subset of a larger one, so data-efficiency curves
    compare nested data.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"data_fraction must be above 0 and at most 1, got {fraction}")
    n = len(episode_ends)
    candidates = np.arange(n) if mask is None else np.flatnonzero(mask)
    if not len(candidates):
        raise UserError(f"data_fraction picks from none of the {n} episodes")
    order = np.random.default_rng(seed).permutation(candidates)
    result = np.zeros(n, bool)
    result[order[: max(1, round(fraction * len(candidates)))]] = True
    return result
