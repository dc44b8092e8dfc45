"""Makes numpy arrays of the calls that numpy pickles them as, without numpy's unpickling code.

`pickle_records.loads` returns such calls as records. Only arrays of real numbers are made of them.
"""

import math

import numpy as np

from convert.formats.pickle_records import Global, Record

# numpy 1 and 2 name the module differently.
_RECONSTRUCT = {Global(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
_FROM_BUFFER = {Global(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}
_DTYPE = Global("numpy", "dtype")
_REAL = ("f2", "f4", "f8")


def array_of(value: object) -> np.ndarray:
    """Returns the array, of little-endian float16, float32 or float64, that a record describes.

    Raises:
      ValueError: the value is anything else, or is damaged; the message follows a name.
    """
    match value:
        case Record(
            function=Global() as function,
            state=(_, tuple() as shape, dtype, bool() as fortran, bytes() as data),
        ) if function in _RECONSTRUCT:
            order = "F" if fortran else "C"
        case Record(  # protocol 5
            function=Global() as function,
            args=((bytes() | bytearray()) as data, dtype, tuple() as shape, ("C" | "F") as order),
            state=None,
        ) if function in _FROM_BUFFER:
            pass
        case _:
            raise ValueError("is not an array of numpy")
    match dtype:
        case Record(function=kind, args=(str() as code, *_), state=(_, "<", *_)):
            known = kind == _DTYPE and code in _REAL
        case _:
            known = False
    if not known:
        raise ValueError("is not an array of little-endian real numbers")
    sizes = all(type(n) is int and 0 <= n < 2**40 for n in shape)
    if not sizes or math.prod(shape) * int(code[1]) != len(data):
        raise ValueError(f"is damaged: its shape is {shape}, but it has {len(data)} bytes")
    return np.frombuffer(data, f"<{code}").reshape(shape, order=order)
