"""Decoders of zarr's codecs that tensorstore lacks, by their names in numcodecs.

Codecs that need only the standard library, NumPy or `imagecodecs` (optional) are decoded here;
others are left to numcodecs, if it is installed.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from uva_jax.runtime.errors import UserError

# Codecs of images, one per chunk; the name in imagecodecs follows the first underscore.
IMAGE_CODECS = tuple(
    f"imagecodecs_{name}"
    for name in ("avif", "jpeg", "jpeg2k", "jpegls", "jpegxl", "jpegxr", "png", "qoi", "webp")
)

Config = Mapping[str, Any]  # a codec's settings, with its name as "id"
Decoder = Callable[[Any], Any]  # bytes or an array -> bytes or an array


def decoder(config: Config, dtype: np.dtype, name: str) -> Decoder:
    """Returns the decoder of a codec.

    Args:
      config: the codec in the array's metadata.
      dtype: of the array, for filters that name none.
      name: of the array, for error messages.

    Raises:
      UserError: the codec needs a package that is missing, or is not supported.
    """
    kind = str(config.get("id"))
    if kind in IMAGE_CODECS:
        return getattr(_imagecodecs(kind, name), f"{kind.removeprefix('imagecodecs_')}_decode")
    if kind in _BY_IMAGECODECS:
        return _BY_IMAGECODECS[kind](_imagecodecs(kind, name))
    if kind in _PLAIN:
        return lambda data: _PLAIN[kind](data, config, dtype)
    return _by_numcodecs(config, name)


def _imagecodecs(kind: str, name: str):
    try:
        import imagecodecs
    except ImportError as error:
        raise UserError(
            f"{name} is stored with the codec {kind}, which needs imagecodecs: install it with "
            "pip install 'uva_jax[codecs]'"
        ) from error
    return imagecodecs


def _by_numcodecs(config: Config, name: str) -> Decoder:
    said = f"{name} is stored with the codec {config.get('id')}"
    try:
        import numcodecs
    except ImportError as error:
        raise UserError(
            f"{said}, which needs Python's numcodecs: install it with pip install numcodecs"
        ) from error
    try:
        return numcodecs.get_codec(dict(config)).decode
    except (ValueError, TypeError, KeyError, ImportError) as error:  # unknown, or wrong settings
        raise UserError(
            f"{said}, which the installed numcodecs cannot decode ({error}): write the array again "
            "with a codec of zarr itself, such as blosc or zstd"
        ) from error


def _values(data, dtype) -> np.ndarray:
    return np.frombuffer(data, np.dtype(dtype))


def _lzma(data, config: Config, dtype) -> bytes:
    form = config.get("format", lzma.FORMAT_XZ)
    if form == lzma.FORMAT_RAW:
        return lzma.decompress(data, form, filters=config["filters"])
    return lzma.decompress(data, form)


def _delta(data, config: Config, dtype) -> np.ndarray:
    kind = config.get("dtype", dtype)
    steps = _values(data, config.get("astype", kind))
    values = np.empty(steps.shape, kind)
    return np.cumsum(steps, out=values)


def _scale_offset(data, config: Config, dtype) -> np.ndarray:
    kind = config.get("dtype", dtype)
    stored = _values(data, config.get("astype", kind))
    return (stored / config["scale"] + config["offset"]).astype(kind)


def _quantize(data, config: Config, dtype) -> np.ndarray:
    kind = config.get("dtype", dtype)
    return _values(data, config.get("astype", kind)).astype(kind)


def _as_type(data, config: Config, dtype) -> np.ndarray:
    return _values(data, config["encode_dtype"]).astype(config["decode_dtype"])


def _unshuffle(data, config: Config, dtype) -> bytes:
    data, size = _values(data, np.uint8), config.get("elementsize", 4)
    whole = len(data) // size * size
    return data[:whole].reshape(size, -1).T.tobytes() + data[whole:].tobytes()


def _checked(checksum: Callable[[bytes], int]) -> Callable:
    def decode(data, config: Config, dtype) -> bytes:
        data = bytes(data)
        at_end = config.get("location", "start") == "end"
        stored, content = (data[-4:], data[:-4]) if at_end else (data[:4], data[4:])
        if checksum(content) != int.from_bytes(stored, "little"):
            raise ValueError("its checksum differs")
        return content

    return decode


_PLAIN = {
    "zlib": lambda data, config, dtype: zlib.decompress(data),
    "gzip": lambda data, config, dtype: gzip.decompress(data),
    "bz2": lambda data, config, dtype: bz2.decompress(data),
    "lzma": _lzma,
    "delta": _delta,
    "fixedscaleoffset": _scale_offset,
    "quantize": _quantize,
    "astype": _as_type,
    "bitround": lambda data, config, dtype: data,
    "shuffle": _unshuffle,
    "crc32": _checked(zlib.crc32),
    "adler32": _checked(zlib.adler32),
}
_BY_IMAGECODECS = {
    "zstd": lambda package: package.zstd_decode,
    "blosc": lambda package: package.blosc_decode,
    "lz4": lambda package: lambda data: package.lz4_decode(data, header=True),
}
