"""Arrays that are there only when they are needed, and made a little ahead; jax is not needed."""

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
    """What `load` will give: an array of this shape and dtype, made anew at each call."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def ahead(make: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """`map(make, items)`, with a few made by other threads while the one before is used."""
    being_made: collections.deque = collections.deque()
    with ThreadPoolExecutor(_WORKERS) as makers:
        for item in items:
            being_made.append(makers.submit(make, item))
            if len(being_made) > _AHEAD:
                yield being_made.popleft().result()
        while being_made:
            yield being_made.popleft().result()
