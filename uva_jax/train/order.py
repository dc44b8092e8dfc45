"""The order of samples as a function of (seed, step), so that a resumed run needs only its step."""

from __future__ import annotations

import functools

import numpy as np


def epoch_rows(seed: int, count: int, batch: int, start: int, stop: int) -> np.ndarray:
    """Returns the sample numbers (stop - start, batch) of steps start..stop-1.

    Every epoch is a permutation seeded by (seed, epoch); an incomplete last batch is dropped.

    Raises:
      ValueError: a batch is larger than the number of samples.
    """
    per_epoch = count // batch
    if per_epoch < 1:
        raise ValueError(f"a batch of {batch} cannot be drawn from {count} samples")
    rows = []
    for step in range(start, stop):
        epoch, position = divmod(step, per_epoch)
        rows.append(_order(seed, epoch, count)[position * batch : (position + 1) * batch])
    return np.stack(rows).astype(np.int32)


@functools.lru_cache(maxsize=4)  # training asks for one step at a time
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)
