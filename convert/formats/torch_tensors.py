"""Tensors in a checkpoint's file, and the pickled calls that describe them.

Names and argument orders are those of torch.serialization and torch._utils.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from convert.formats.open_file import OpenFile, aligned
from convert.formats.pickle_records import Global, Record
from uva_jax.storage.lazy_array import LazyArray

MAX_DIMENSIONS = 32
# An expanded view (stride 0) may be larger than its storage, up to this number of elements.
MAX_EXPANDED = 1 << 24
_LINE = 16  # float32 values in a cache line

STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
}
QUANTISED_STORAGES = (
    "QInt8Storage QUInt8Storage QInt32Storage QUInt4x2Storage QUInt2x4Storage".split()
)
STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
# Types without a storage class: torch stores them as bytes and names the type with each tensor.
_UNTYPED = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        *("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"),
        *("float8_e4m3fnuz", "float8_e5m2fnuz"),
    )
}
UNTYPED_NAMES = {dtype: name for name, dtype in _UNTYPED.items()}
_DTYPES = _UNTYPED | {dtype.name: dtype for dtype in STORAGES.values()}
REBUILD_V2 = Global("torch._utils", "_rebuild_tensor_v2")
REBUILD_V3 = Global("torch._utils", "_rebuild_tensor_v3")
REBUILD_PARAMETER = Global("torch._utils", "_rebuild_parameter")
REBUILD_WITH_STATE = Global("torch._utils", "_rebuild_parameter_with_state")
REBUILD_FROM_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")
UNTYPED_STORAGE = Global("torch.storage", "UntypedStorage")


def in_c_order(values: np.ndarray) -> np.ndarray:
    """Returns the array in C order, aligned for jax; a copy unless it is in C order already.

    A transposed array is copied a few rows at a time, which is several times as fast as numpy: each
    step fills whole cache lines of the copy from rows that are read in order.
    """
    if values.flags.c_contiguous:
        return values
    out = aligned(values.nbytes).view(values.dtype).reshape(values.shape)
    axis, run = values.ndim - 1, 1  # the copy has `run` consecutive values below `axis`
    while axis and run * values.shape[axis] < _LINE:
        run *= values.shape[axis]
        axis -= 1
    step, before = -(-_LINE // run), (slice(None),) * axis
    for start in range(0, values.shape[axis], step):
        part = (*before, slice(start, start + step))
        out[part] = values[part]
    return out


class Size(tuple):
    """A torch.Size: a tuple that is written as a torch.Size."""

    __slots__ = ()


def size_record(size: Size) -> Record:
    """Returns the call that makes a torch.Size."""
    return Record(Global("torch", "Size"), (tuple(size),))


@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """A range of `nbytes` bytes from `offset` of the file; tensors that share memory share it.

    `dtype` is None for torch's untyped storages.
    """

    archive: OpenFile
    key: str
    dtype: np.dtype | None
    offset: int
    nbytes: int


@dataclass(frozen=True, eq=False, slots=True)
class LazyTensor:
    """A tensor in a file; strides and offset count elements, as in torch.

    Raises:
      ValueError: the tensor does not lie inside its storage.
    """

    storage: Storage
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    requires_grad: bool = False
    parameter: bool = False

    def __post_init__(self) -> None:
        numbers = (self.offset, *self.shape, *self.strides)
        if any(type(n) is not int or not 0 <= n < 2**62 for n in numbers):
            raise ValueError("a tensor's shape, strides or offset are not whole numbers from 0")
        if len(self.shape) != len(self.strides) or len(self.shape) > MAX_DIMENSIONS:
            raise ValueError("a tensor's shape and strides differ in length")
        held = self.storage.nbytes // self.dtype.itemsize
        if self.size and self.offset + self._span > held:
            raise ValueError(
                f"a tensor of shape {self.shape}, strides {self.strides} and offset {self.offset} "
                f"reaches beyond the {held} elements of its storage {self.storage.key!r}"
            )
        if self.size > max(held, MAX_EXPANDED):
            raise ValueError(f"a tensor of shape {self.shape} is expanded from {held} elements")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.dtype.itemsize

    @property
    def _span(self) -> int:
        steps = zip(self.shape, self.strides, strict=True)
        return 1 + sum((extent - 1) * stride for extent, stride in steps)

    @property
    def contiguous(self) -> bool:
        """Whether the elements are in C order without gaps."""
        expected = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and stride != expected:
                return self.size == 0
            expected *= extent
        return True

    @property
    def file_offset(self) -> int:
        """Offset of the first element in the file, in bytes."""
        return self.storage.offset + self.offset * self.dtype.itemsize

    def numpy(self) -> np.ndarray:
        """Reads the tensor as a new contiguous array; only its own bytes are read."""
        if not self.size:
            return np.zeros(self.shape, self.dtype)
        raw = self.storage.archive.read_at(self.file_offset, self._span * self.dtype.itemsize)
        # A byte other than 0 or 1 in a bool array would be undefined behaviour.
        flat = raw != 0 if self.dtype == np.bool_ else raw.view(self.dtype)
        if self.contiguous:
            return flat.reshape(self.shape)
        strides = tuple(stride * self.dtype.itemsize for stride in self.strides)
        view = np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)
        return view.copy(order="C")


def stored_bytes(value: LazyTensor | LazyArray | np.ndarray) -> Iterator[memoryview]:
    """Yields the bytes of a tensor in parts, in C order and little-endian, as files hold them."""
    if isinstance(value, LazyTensor) and value.contiguous:
        yield from value.storage.archive.chunks(value.file_offset, value.nbytes)
        return
    if isinstance(value, LazyTensor):
        array = value.numpy()
    else:
        array = value.load() if isinstance(value, LazyArray) else value
        array = array.astype(value.dtype.newbyteorder("="), copy=False)
    yield memoryview(in_c_order(array).reshape(-1).view(np.uint8))


def _rebuild_tensor(args: tuple) -> object:
    # Version 2 has six arguments, version 3 the dtype as a seventh. With a further one (conjugated,
    # negated or subclassed tensors), which is not supported, the call stays a record.
    match args:
        case (Storage(), _, tuple(), tuple(), bool(), _):
            dtype = args[0].dtype
        case (Storage(), _, tuple(), tuple(), bool(), _, Global("torch", name)):
            dtype = _DTYPES.get(name)
        case _:
            return NotImplemented
    storage, offset, shape, strides, grad = args[:5]
    if dtype is None:
        return NotImplemented
    return LazyTensor(storage, dtype, tuple(shape), strides, offset, grad)


def described_tensor(value: object) -> LazyTensor | None:
    """Returns the tensor of a value, which may be a record of one with attributes, or None."""
    match value:
        case LazyTensor():
            return value
        case Record(
            function=Global() as function, args=(LazyTensor() as tensor, bool(), _, dict())
        ):
            return tensor if function == REBUILD_WITH_STATE else None
        case Record(
            function=Global() as function, args=(Global() as made_by, _, tuple() as args, _)
        ):
            if function == REBUILD_FROM_TYPE and made_by in (REBUILD_V2, REBUILD_V3):
                tensor = _rebuild_tensor(args)
                return tensor if isinstance(tensor, LazyTensor) else None
    return None


def _rebuild_parameter(args: tuple) -> object:
    match args:
        case (LazyTensor() as t, bool() as grad, _):
            return LazyTensor(t.storage, t.dtype, t.shape, t.strides, t.offset, grad, True)
    return NotImplemented


def _rebuild_size(args: tuple) -> object:
    if len(args) == 1 and isinstance(args[0], tuple) and all(type(n) is int for n in args[0]):
        return Size(args[0])
    return NotImplemented


REBUILD_SIZE = {Global("torch", "Size"): _rebuild_size}
REBUILD = {
    **REBUILD_SIZE,
    REBUILD_V2: _rebuild_tensor,
    REBUILD_V3: _rebuild_tensor,
    REBUILD_PARAMETER: _rebuild_parameter,
}
