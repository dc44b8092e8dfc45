"""A reader of .safetensors files that checks every rule of the format.

A file is 8 bytes of length, a json header that gives each tensor's dtype, shape and offsets, and
the data, without gaps or overlaps (https://github.com/huggingface/safetensors). `load` reads all
arrays; `entries` gives their offsets for reading one by one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

MAX_HEADER = 100_000_000  # bytes; the library's own limit
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file: `nbytes` bytes from byte `offset`, C order, little-endian."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def entries(size: int, read: Callable[[int, int], bytes]) -> dict[str, Entry]:
    """Returns the tensors of a file by name.

    Args:
      size: bytes of the file.
      read: (offset, number of bytes) -> bytes of the file.

    Raises:
      ValueError: the header contradicts the format or the file's size.
    """
    if size < 8:
        raise ValueError(f"it has {size} bytes")
    length = int.from_bytes(read(0, 8), "little")
    if length > min(MAX_HEADER, size - 8):
        raise ValueError(f"its header would have {length} bytes, but the file has {size}")
    text = read(8, length)
    if not text.startswith(b"{"):
        raise ValueError("its header is not a json object")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        found = {name: _entry(name, stated, 8 + length) for name, stated in header.items()}
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is malformed: {error!r}") from None
    reached = 8 + length
    for entry in sorted(found.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != reached:
            raise ValueError("its tensors overlap or leave gaps")
        reached += entry.nbytes
    if reached != size:
        raise ValueError(f"its header and tensors have {reached} bytes, but the file has {size}")
    return found


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header holds a name twice")
    return found


def _entry(name: str, stated: dict, start: int) -> Entry:
    dtype, shape, (begin, end) = (stated[key] for key in ("dtype", "shape", "data_offsets"))
    if dtype not in DTYPES:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
    if any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
        raise ValueError(f"the shape or the offsets of {name!r} are impossible")
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"{name!r} of shape {shape} has {end - begin} bytes")
    return Entry(DTYPES[dtype], tuple(shape), start + begin, end - begin)


def load(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of a file by name.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file contradicts the format.
    """
    data = path.read_bytes()
    found = entries(len(data), lambda offset, count: data[offset : offset + count])
    return {
        name: np.frombuffer(data, e.dtype, math.prod(e.shape), e.offset).reshape(e.shape)
        for name, e in found.items()
    }
