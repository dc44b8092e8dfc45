"""Arrays that are loaded when they are needed, and prefetching by threads; without jax."""

import collections
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

_WORKERS, _AHEAD = 2, 3
S, T = TypeVar("S"), TypeVar("T")


@dataclass(frozen=True, eq=False, slots=True)
class LazyArray:
    """An array that `load` makes at each call, of known shape and dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory when loaded."""
        return self.size * self.dtype.itemsize


def ahead(make: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """Yields `map(make, items)`; threads make a few results ahead."""
    being_made: collections.deque = collections.deque()
    with ThreadPoolExecutor(_WORKERS) as makers:
        for item in items:
            being_made.append(makers.submit(make, item))
            if len(being_made) > _AHEAD:
                yield being_made.popleft().result()
        while being_made:
            yield being_made.popleft().result()
