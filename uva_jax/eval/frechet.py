"""The Fréchet distance between two sets of features, its value for unlimited data, and an interval.

The distance between Gaussians that are fitted to n features each is too large by about a constant
over n, and by much if n is below the number of features (Chong and Forsyth 2020). Here the constant
is estimated from subsets and removed. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The features are divided into up to this many subsets, unless they are smaller than this: the
# excess is proportional to 1 / n only if n is well above the number of the main directions.
_MOST_SUBSETS = 4
_LEAST_SUBSET = 64
_LEAST_GROUPS = 12  # fewer say nothing of other groups
_SHAPE = 16  # of the bootstrap's weights, whose variance is its inverse


@dataclass(frozen=True)
class Unlimited:
    """The distance that is expected for unlimited data, with a 95% interval.

    Attributes:
      value, low, high: the distance.
      grouped: whether groups were drawn, and not single features.
    """

    value: float
    low: float
    high: float
    grouped: bool


def frechet_distance(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Computes the squared Fréchet distance between Gaussians fitted to two sets of features.

    |mean x - mean y|^2 + trace(A + B - 2 (A B)^(1/2)) with the unbiased covariances A and B. The
    inputs are not changed. (Upstream's routine subtracts the mean from its inputs in place.)

    Args:
      x, y: (n, d) and (m, d), n and m at least 2.
      weights: (n,) of the features of both sets, positive; by default all are equal.
    """
    mean_x, root_x = _moments(x, weights)
    mean_y, root_y = _moments(y, weights)
    # With A = X'X and B = Y'Y, the trace of (A B)^(1/2) is the sum of the singular values of X Y'.
    shared = np.linalg.svd(root_x @ root_y.T, compute_uv=False).sum()
    spread = (root_x**2).sum() + (root_y**2).sum() - 2.0 * shared
    return float(((mean_x - mean_y) ** 2).sum() + spread)


def _moments(features: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean (d,) and a matrix (at most d, d) whose Gram matrix is the covariance."""
    values = np.asarray(features, np.float64)
    weights = np.ones(len(values)) if weights is None else weights
    weights = weights / weights.sum()
    mean = weights @ values
    root = (values - mean) * np.sqrt(weights / (1.0 - (weights**2).sum()))[:, None]
    return mean, np.linalg.qr(root, mode="r") if root.shape[0] > root.shape[1] else root


def unlimited(
    x: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray,
    *,
    seed: int,
    orders: int = 10,
    resamples: int = 100,
) -> Unlimited:
    """Estimates the distance for unlimited data, with a bootstrap interval.

    The groups are divided into one, two and up to four disjoint subsets, in several random orders,
    and the line of the mean distance against 1 / (size of a subset) is extended to 0. With fewer
    than 128 features of many dimensions the value is still too large. The bootstrap weighs the
    groups at random (gamma weights near 1, whose deviations are scaled up; ordinary resampling
    repeats features, which changes the rank of a covariance). The interval is cautious: with as
    many features as dimensions it is about 1.5 times as wide as it should be.

    Args:
      x, y: (n, d), in pairs (for example the prediction and the truth of a window), n at least 8.
      groups: (n,) the group of each pair (for example the episode); pairs of a group resemble each
        other. With fewer than 12 groups, every pair is treated as a group.
      seed: of the orders and weights.
      orders: number of random orders.
      resamples: number of the bootstrap's draws.
    """
    x, y = (np.asarray(v, np.float64) for v in (x, y))
    names, member = np.unique(groups, return_inverse=True)
    grouped = len(names) >= _LEAST_GROUPS
    if not grouped:
        names, member = np.arange(len(x)), np.arange(len(x))
    random = np.random.default_rng(seed)
    shuffled = [random.permutation(len(names)) for _ in range(orders)]
    value = _extrapolated(x, y, member, shuffled)
    base = _extrapolated(x, y, member, shuffled[:1])
    deviations = [
        _extrapolated(x, y, member, shuffled[:1], draw[member]) - base
        for draw in random.gamma(_SHAPE, 1.0 / _SHAPE, (resamples, len(names)))
    ]
    half = 1.96 * float(np.std(deviations)) * _SHAPE**0.5
    return Unlimited(value, value - half, value + half, grouped)


def _extrapolated(
    x: np.ndarray,
    y: np.ndarray,
    member: np.ndarray,
    orders: Sequence[np.ndarray],
    weights: np.ndarray | None = None,
) -> float:
    """Returns the intercept of distances by 1 / size over subsets of the groups in given orders."""
    inverse, distances = [], []
    most = min(max(len(x) // _LEAST_SUBSET, 2), _MOST_SUBSETS)
    for parts in range(1, most + 1):
        found = []
        for order in orders[:1] if parts == 1 else orders:
            for groups in np.array_split(order, parts):
                part = np.flatnonzero(np.isin(member, groups))
                some = None if weights is None else weights[part]
                found.append(frechet_distance(x[part], y[part], some))
        inverse.append(parts / len(x))
        distances.append(np.mean(found))
    return float(np.polyfit(inverse, distances, 1)[1])
