"""The Fréchet distance between two sets of features, its value for unlimited data, and an interval.

The distance between Gaussians that are fitted to n features each is too large by about a constant
over n, and by much if n is below the number of features (Chong and Forsyth 2020). Here the constant
is estimated from subsets and removed. Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_PARTS = (1, 2, 3, 4)  # the features are divided into this many subsets


@dataclass(frozen=True)
class Unlimited:
    """The distance that is expected for unlimited data, with a 95% interval."""

    value: float
    low: float
    high: float


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Computes the squared Fréchet distance between Gaussians fitted to two sets of features.

    |mean x - mean y|^2 + trace(A + B - 2 (A B)^(1/2)) with the unbiased covariances A and B. The
    inputs are not changed. (Upstream's routine subtracts the mean from its inputs in place.)

    Args:
      x, y: (n, d) and (m, d), n and m at least 2.
    """
    mean_x, root_x = _moments(x)
    mean_y, root_y = _moments(y)
    # With A = X'X and B = Y'Y, the trace of (A B)^(1/2) is the sum of the singular values of X Y'.
    shared = np.linalg.svd(root_x @ root_y.T, compute_uv=False).sum()
    spread = (root_x**2).sum() + (root_y**2).sum() - 2.0 * shared
    return float(((mean_x - mean_y) ** 2).sum() + spread)


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean (d,) and a matrix (at most d, d) whose Gram matrix is the covariance."""
    values = np.asarray(features, np.float64)
    mean = values.mean(axis=0)
    root = (values - mean) / np.sqrt(len(values) - 1)
    return mean, np.linalg.qr(root, mode="r") if root.shape[0] > root.shape[1] else root


def unlimited(
    x: np.ndarray, y: np.ndarray, *, seed: int, orders: int = 10, resamples: int = 200
) -> Unlimited:
    """Estimates the distance for unlimited data, with a basic bootstrap interval.

    The features are divided into one to four disjoint subsets, in several random orders, and the
    line of the mean distance against 1 / (size of a subset) is extended to 0. The bootstrap draws
    pairs of features with replacement and repeats this; the distance between the distributions it
    draws from is known, and the interval is that of the estimate's deviations from it.

    Args:
      x, y: (n, d), in pairs (for example the prediction and the truth of a window), n at least 16.
      seed: of the orders and resamples.
      orders: number of random orders.
      resamples: number of bootstrap resamples, each with one order.
    """
    x, y = (np.asarray(v, np.float64) for v in (x, y))
    random, count = np.random.default_rng(seed), len(x)
    value = _extrapolated(x, y, [random.permutation(count) for _ in range(orders)])
    # Of a resample, whose population is the features themselves, with covariances over n.
    shrink = np.sqrt((count - 1) / count)
    known = frechet_distance(*(v.mean(axis=0) + shrink * (v - v.mean(axis=0)) for v in (x, y)))
    draws = random.integers(0, count, (resamples, count))
    errors = [_extrapolated(x, y, [draw]) - known for draw in draws]
    low, high = value - np.quantile(errors, [0.975, 0.025])
    return Unlimited(float(value), float(low), float(high))


def _extrapolated(x: np.ndarray, y: np.ndarray, orders: list[np.ndarray]) -> float:
    """Returns the intercept of distances by 1 / size over the subsets of orders (n,) of indices."""
    inverse, distances = [], []
    for parts in _PARTS:
        found = [
            frechet_distance(x[part], y[part])
            for order in (orders[:1] if parts == 1 else orders)
            for part in np.array_split(order, parts)
        ]
        inverse.append(parts / len(orders[0]))
        distances.append(np.mean(found))
    return float(np.polyfit(inverse, distances, 1)[1])
