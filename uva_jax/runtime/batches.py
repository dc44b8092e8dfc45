"""Computing many rows in batches of one size, so that they share one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def in_batches(run: Callable[[np.ndarray], Any], count: int, batch: int) -> Any:
    """Calls a function on the numbers of rows, some at a time, and joins what it returns.

    Args:
      run: from the numbers of `batch` rows to arrays of as many rows, in any tree. Numbers of the
        last row fill the last batch; what is computed for them is dropped.
      count: of rows, at least 1.
      batch: rows in one call.

    Returns:
      the tree, with arrays of `count` rows on the host.
    """
    pieces = []
    for start in range(0, count, batch):
        found = run(np.minimum(np.arange(start, start + batch), count - 1))
        pieces.append(jax.tree.map(lambda x, start=start: np.asarray(x)[: count - start], found))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)
