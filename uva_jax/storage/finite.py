"""Checks arrays for values that are not finite before they are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from uva_jax.runtime.errors import UserError
from uva_jax.storage.lazy_array import LazyArray

_SHOWN = 4


def is_finite(array) -> bool:
    """Whether all values of an array are finite.

    Of an array that is divided over processes, only the part on this process's devices is checked.
    """
    shards = getattr(array, "addressable_shards", None)
    parts = [array] if shards is None else [shard.data for shard in shards]
    for part in map(np.asarray, parts):
        if part.dtype.kind in "biuSU":
            continue
        wide = part if part.dtype.kind == "f" else part.astype(np.float32)  # bfloat16
        # NaN and infinity propagate to the sum, which needs no further memory.
        if not np.isfinite(wide.sum(dtype=np.float64)) and not np.isfinite(wide).all():
            return False
    return True


def non_finite(arrays: Mapping[str, object]) -> list[str]:
    """Returns the names of the arrays with values that are not finite."""
    return [name for name, array in arrays.items() if not is_finite(array)]


def refuse_non_finite(names: Iterable[str], what: str) -> None:
    """Raises UserError if there are names of arrays with values that are not finite.

    Args:
      names: of the arrays.
      what: name of what holds them, for the message.
    """
    names = list(names)
    if not names:
        return
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise UserError(
        f"{what} holds values that are not finite, in {', '.join(names[:_SHOWN])}{more}, and is "
        "not written: training diverged, or the weights were damaged before; go back to a finite "
        "state and lower the learning rate"
    )


def finite_when_loaded(name: str, array: LazyArray, what: str) -> LazyArray:
    """Returns the array with a `load` that raises UserError for values that are not finite."""

    def load() -> np.ndarray:
        values = array.load()
        refuse_non_finite([] if is_finite(values) else [name], what)
        return values

    return LazyArray(array.shape, array.dtype, load)
