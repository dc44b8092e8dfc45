"""The order of samples: a pure function of (seed, step), so that a position is one integer."""

from __future__ import annotations

import numpy as np


def epoch_rows(seed: int, count: int, batch: int, start: int, stop: int) -> np.ndarray:
    """Sample numbers (stop - start, batch) of steps start ... stop - 1.

    Every epoch is a permutation seeded by (seed, epoch); what does not fill a batch is left out.

    Raises:
      ValueError: a batch is larger than the number of samples.
    """
    per_epoch = count // batch
    if per_epoch < 1:
        raise ValueError(f"a batch of {batch} cannot be drawn from {count} samples")
    orders: dict[int, np.ndarray] = {}
    rows = []
    for step in range(start, stop):
        epoch, position = divmod(step, per_epoch)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng((seed, epoch)).permutation(count)
        rows.append(orders[epoch][position * batch : (position + 1) * batch])
    return np.stack(rows).astype(np.int32)
