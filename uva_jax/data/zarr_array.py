"""Reads one array of a zarr of version 2 or 3: its metadata and a tensorstore.

Metadata is parsed here, because tensorstore refuses members that other writers add and no decoder
needs (numcodecs' `checksum` of Zstd, a level of -1). `zarr_codecs` decodes chunks of codecs that
tensorstore lacks. A missing chunk holds the fill value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts

from uva_jax.data.zarr_codecs import IMAGE_CODECS, Config, decoder
from uva_jax.data.zarr_container import Container
from uva_jax.runtime.errors import UserError

# Codecs that tensorstore decodes. Their settings matter only to an encoder.
_V2_CODECS = ("blosc", "bz2", "gzip", "zlib", "zstd")
_V3_CODECS = ("blosc", "bytes", "crc32c", "gzip", "sharding_indexed", "transpose", "zstd")


@dataclass(frozen=True)
class ArrayInfo:
    """The metadata of an array.

    Attributes:
      name: its path in the zarr, such as "data/img".
      shape, chunks: as in zarr; rank at least 1.
      dtype: of numbers, in the machine's byte order.
      stored: the same in the byte order of the chunks.
      fill: value of missing chunks, or None.
      keys: text before a chunk's indices, and between them.
      spec: tensorstore's specification; None if it lacks a codec.
      codecs: in the order of encoding.
      order: "C" or "F", of the values in a chunk.
    """

    name: str
    shape: tuple[int, ...]
    stored: np.dtype
    chunks: tuple[int, ...]
    fill: Any
    keys: tuple[str, str]
    spec: dict | None
    codecs: tuple[Config, ...]
    order: str = "C"

    @property
    def dtype(self) -> np.dtype:
        """The dtype in the machine's byte order."""
        return self.stored.newbyteorder("=")

    @property
    def image_codec(self) -> str | None:
        """The codec of images, one per chunk, or None."""
        found = [codec["id"] for codec in self.codecs if codec["id"] in IMAGE_CODECS]
        return found[0] if found else None

    def chunk_key(self, index: Sequence[int]) -> str:
        """Returns the name of a chunk's file by its indices."""
        prefix, separator = self.keys
        return prefix + separator.join(map(str, index))

    def missing_chunks(self, container: Container) -> tuple[int, int]:
        """Returns the number of missing chunks and the number of all chunks."""
        grid = [
            math.ceil(size / chunk) for size, chunk in zip(self.shape, self.chunks, strict=True)
        ]
        present = set(container.below(self.name))
        missing = sum(self.chunk_key(index) not in present for index in np.ndindex(*grid))
        return missing, math.prod(grid)


def read_info(container: Container, name: str) -> ArrayInfo:
    """Parses an array's metadata.

    Raises:
      UserError: it is damaged, or the array does not hold numbers.
    """
    where = f"{container.path}: {name}"
    version, metadata = container.metadata(name)
    try:
        return (_of_v2 if version == 2 else _of_v3)(container, name, metadata)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise UserError(
            f"{where} has impossible metadata ({type(error).__name__}: {error}): the copy is "
            "damaged"
        ) from error


def open_store(container: Container, info: ArrayInfo) -> ts.TensorStore:
    """Returns a tensorstore of the array, which gives the fill value for missing chunks.

    Without a fill value, reading a missing chunk is an error.

    Raises:
      UserError: a codec is not supported.
      ValueError: tensorstore refuses the array.
    """
    if info.spec is None:
        return _decoded(container, info)
    spec = {
        **info.spec,
        "kvstore": container.kvstore(info.name),
        "open": True,
        "assume_metadata": True,
        "fill_missing_data_reads": info.fill is not None,
    }
    return ts.open(spec, read=True).result()


def _of_v2(container: Container, name: str, metadata: dict) -> ArrayInfo:
    shape, chunks = _sizes(metadata["shape"], metadata["chunks"])
    dtype = _dtype(metadata["dtype"], f"{container.path}: {name}")
    compressor, filters = metadata.get("compressor"), metadata.get("filters") or []
    codecs = tuple(filters) + ((compressor,) if compressor else ())
    fill = _fill(metadata.get("fill_value"), dtype)
    order = metadata.get("order", "C")
    spec = None
    separator = metadata.get("dimension_separator") or _separator(container, name)
    if not filters and (compressor is None or compressor["id"] in _V2_CODECS):
        cleaned = {
            "zarr_format": 2,
            "shape": list(shape),
            "chunks": list(chunks),
            "dtype": dtype.str,
            "compressor": compressor and {"id": compressor["id"]},
            "fill_value": _as_json(fill),
            "filters": None,
            "order": order,
            "dimension_separator": separator,
        }
        spec = {"driver": "zarr", "metadata": cleaned}
    return ArrayInfo(name, shape, dtype, chunks, fill, ("", separator), spec, codecs, order)


def _separator(container: Container, name: str) -> str:
    """Returns the text between a chunk's indices; zarr before 2.8 does not record "/"."""
    return "/" if any(key[0].isdigit() and "/" in key for key in container.below(name)) else "."


def _of_v3(container: Container, name: str, metadata: dict) -> ArrayInfo:
    where = f"{container.path}: {name}"
    grid, encoding = metadata["chunk_grid"], metadata["chunk_key_encoding"]
    shape, chunks = _sizes(metadata["shape"], grid["configuration"]["chunk_shape"])
    dtype = _dtype(metadata["data_type"], where)
    fill = _fill(metadata["fill_value"], dtype)
    dotted = encoding["name"] == "v2"
    separator = encoding.get("configuration", {}).get("separator", "." if dotted else "/")
    keys = ("" if dotted else f"c{separator}", separator)
    codecs = [_v3_codec(codec) for codec in metadata["codecs"]]
    spec = None
    if all(codec["name"] in _V3_CODECS for codec in _flat(codecs)):
        kept = ("zarr_format", "node_type", "data_type", "shape", "chunk_grid")
        cleaned = {key: metadata[key] for key in (*kept, "chunk_key_encoding", "fill_value")}
        spec = {"driver": "zarr3", "metadata": {**cleaned, "codecs": codecs}}
    elif around := [c["name"] for c in codecs if c["name"] in ("sharding_indexed", "transpose")]:
        unknown = next(c["name"] for c in _flat(codecs) if c["name"] not in _V3_CODECS)
        raise UserError(
            f"{where} is stored with the codecs {unknown} and {around[0]}, which are not supported "
            "together: write the array again with a codec of zarr itself, such as blosc or zstd"
        )
    applied = [
        {"id": codec["name"].removeprefix("numcodecs."), **codec.get("configuration", {})}
        for codec in codecs
    ]
    if {"id": "bytes", "endian": "big"} in applied:
        dtype = dtype.newbyteorder(">")
    others = tuple(codec for codec in applied if codec["id"] != "bytes")
    return ArrayInfo(name, shape, dtype, chunks, fill, keys, spec, others)


def _v3_codec(codec: dict) -> dict:
    """Returns a codec by tensorstore's name, without settings that a decoder does not need."""
    name, settings = codec["name"], codec.get("configuration") or {}
    short = name.removeprefix("numcodecs.")
    if short in ("blosc", "gzip", "zstd"):
        name, settings = short, {}  # the encoded bytes do not depend on the writer
    elif name == "sharding_indexed":
        lists = {k: [_v3_codec(c) for c in settings.get(k, ())] for k in ("codecs", "index_codecs")}
        settings = {**settings, **lists}
    return {"name": name, **({"configuration": settings} if settings else {})}


def _flat(codecs: Sequence[dict]) -> list[dict]:
    """Returns codecs, each sharding codec followed by those inside its shards."""
    inner = [c.get("configuration", {}).get("codecs", ()) for c in codecs]
    return [*codecs, *(found for each in inner for found in _flat(each))]


def _decoded(container: Container, info: ArrayInfo) -> ts.TensorStore:
    """Returns a virtual tensorstore whose chunks `zarr_codecs` decodes when they are read."""
    where = f"{container.path}: {info.name}"
    images = info.image_codec is not None
    if images and (info.chunks != (1, *info.shape[1:]) or len(info.codecs) > 1):
        raise UserError(
            f"{where} has chunks of shape {list(info.chunks)}, but each must hold one whole image "
            f"of {info.shape[1:]}: write the array again"
        )
    steps = [decoder(codec, info.stored, where) for codec in reversed(info.codecs)]

    def read_chunk(domain: ts.IndexDomain, out: np.ndarray, _) -> None:
        begin = domain.inclusive_min
        index = [low // size for low, size in zip(begin, info.chunks, strict=True)]
        key = info.chunk_key(index)
        said = f"image {index[0]} of {info.name}" if images else f"chunk {key} of {info.name}"
        data = container.read(f"{info.name}/{key}")
        if data is None:
            if info.fill is None:
                raise UserError(
                    f"{container.path}: {said} is missing, and the array has no fill value: the "
                    "copy is incomplete"
                )
            out[...] = info.fill
            return
        try:
            for step in steps:
                data = step(data)
            if not images:
                data = np.frombuffer(data, info.stored)
            values = np.asarray(data).reshape(info.chunks, order=info.order)
        except Exception as error:  # every decoder raises its own exceptions
            raise UserError(f"{container.path}: {said} is damaged: {error}") from error
        inside = (slice(low % size, None) for low, size in zip(begin, info.chunks, strict=True))
        out[...] = values[tuple(inside)][tuple(map(slice, out.shape))]

    return ts.virtual_chunked(
        read_chunk,
        dtype=ts.dtype(info.dtype),
        domain=ts.IndexDomain(shape=info.shape),
        chunk_layout=ts.ChunkLayout(chunk_shape=info.chunks),
    )


def _sizes(shape: Sequence[int], chunks: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape, chunks = tuple(map(int, shape)), tuple(map(int, chunks))
    if not shape or len(shape) != len(chunks) or min(shape) < 0 or min(chunks) < 1:
        raise ValueError(f"shape {shape} in chunks of {chunks}")
    return shape, chunks


def _dtype(name: Any, where: str) -> np.dtype:
    try:
        dtype = np.dtype(name) if isinstance(name, str) else None
    except TypeError:
        dtype = None
    if dtype is None or dtype.kind not in "biuf":
        raise UserError(
            f"{where} holds {name}, but only arrays of numbers can be read: leave it out, or "
            "store it as numbers"
        )
    return dtype


def _fill(value: Any, dtype: np.dtype):
    """Converts a fill value to the array's dtype; writers also store 0 as 0.0, false or "0"."""
    if value is None:
        return None
    if isinstance(value, str) and value.startswith("0x"):
        return np.frombuffer(bytes.fromhex(value[2:])[::-1], dtype.newbyteorder("<"))[0]
    filled = np.asarray(float(value) if isinstance(value, str) else value).astype(dtype)[()]
    if dtype.kind != "f" and float(filled) != float(value):
        raise ValueError(f"fill value {value} of an array of {dtype}")
    return filled


def _as_json(fill):
    if fill is None or fill.dtype.kind != "f" or np.isfinite(fill):
        return None if fill is None else fill.item()
    return "NaN" if np.isnan(fill) else "Infinity" if fill > 0 else "-Infinity"
