"""Selection of the training windows that make more progress than others from similar states.

A policy that imitates demonstrations needs as many steps as they do. Trained only on the actions
that shorten the remaining episode more than expected, it needs fewer: this is the binary filter of
critic-regularised regression (https://arxiv.org/abs/2006.15134), with the mean over the nearest
states of other episodes as the critic. It suits recordings whose episodes end when the task is
done.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

_NEIGHBOURS = 64
_SPARE = 4  # times as many are looked up, because those of the same episode do not count
_BLOCK = 8192


def advantages(
    states: np.ndarray, episode_ends: np.ndarray, mirrored: np.ndarray | None, *, steps: int
) -> np.ndarray:
    """Returns by how many steps the actions of each step's window shorten its episode.

    It is `V(s_t) - V(s_{t+k}) - k`, where V is the expected number of steps to the end of the
    episode (0 at the end) and k is `steps` or, if fewer, the steps that are left.

    Args:
      states: (n, c) of all steps, scaled so that distances are comparable.
      episode_ends: (e,) cumulative lengths.
      mirrored: (n, c) mirror images of the states, if the data are mirrored.
      steps: number of steps over which progress is counted.

    Returns:
      (n,) float32, about 0 on average.
    """
    lengths = np.diff(episode_ends, prepend=0)
    episode = np.repeat(np.arange(len(lengths)), lengths)
    rows = np.arange(len(states))
    last = episode_ends[episode] - 1
    left = (last - rows).astype(np.float32)
    expected = _expected(states, episode, left, mirrored)
    later = np.minimum(rows + steps, last)
    following = np.where(later == last, 0.0, expected[later])
    return (expected - following - (later - rows)).astype(np.float32)


def _expected(
    states: np.ndarray, episode: np.ndarray, left: np.ndarray, mirrored: np.ndarray | None
) -> np.ndarray:
    """Returns the mean of `left` over the nearest states of other episodes, (n,) float32."""
    count = len(states)
    known = states if mirrored is None else np.concatenate([states, mirrored])
    tree = cKDTree(known)
    wanted = min(_SPARE * _NEIGHBOURS, len(known))
    found = np.empty(count, np.float32)
    for at in range(0, count, _BLOCK):
        _, near = tree.query(states[at : at + _BLOCK], k=wanted, workers=-1)
        near = near.reshape(-1, wanted) % count
        other = episode[near] != episode[at : at + _BLOCK, None]
        counts = other & (np.cumsum(other, axis=1) <= _NEIGHBOURS)
        weight = np.maximum(counts.sum(axis=1), 1)
        mean = (left[near] * counts).sum(axis=1) / weight
        # Without a neighbour of another episode nothing better is known than the episode itself.
        found[at : at + _BLOCK] = np.where(counts.any(axis=1), mean, left[at : at + _BLOCK])
    return found


def best_share(values: np.ndarray, share: float) -> np.ndarray:
    """Returns the rows with the largest `share` of values (n,) as booleans; at least one."""
    count = max(1, round(share * len(values)))
    chosen = np.zeros(len(values), bool)
    chosen[np.argsort(-values, kind="stable")[:count]] = True
    return chosen
