"""A store of arrays by sample, as zarr v3 on disk: activation caches and encoded latents.

A folder holds one array per name, in chunks of whole samples, and `index.json`, which records what
the cache was made from and whether it is finished. A chunk is complete when its file exists in
every array. tensorstore syncs a chunk file before it renames it into place, so no further record
is needed.

bfloat16 is stored as its bits in uint16 arrays with the attribute `dtype`, because zarr-python does
not support it: `zarr.open_array(path)[:].view(ml_dtypes.bfloat16)` reads one.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from uva_jax.runtime.errors import UserError
from uva_jax.storage.atomic import is_leftover, read_json, write_json
from uva_jax.storage.identity import Identity, shaping_values

INDEX = "index.json"
_FORMAT = "uva_jax activation cache 1"
_BITS = {np.dtype(ml_dtypes.bfloat16): np.dtype(np.uint16)}  # dtypes stored as their bits
_HELD_BYTES = 4 * 2**30  # of arrays that `SampleStore.arrays` keeps in memory
_MAX_CHUNK_BYTES = 2**31 - 64  # the limit of blosc
_MEND = "delete it and run the command that made it again, or copy it again"


class SampleStore:
    """Arrays (num_samples, *item), written by chunks of samples and read by rows.

    Several processes may write different chunks of one cache on a shared disk. The primary calls
    `create` first, the others then open the cache by the same call; the primary finishes it after
    all have flushed.

    Attributes:
      folder: where the cache is.
      num_samples: samples of every array.
      chunk: samples per chunk; the last chunk may hold fewer.
      num_chunks: chunks of every array.
      meta: what the cache was made from, as given to `create`.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], max_in_flight: int = 1):
        self.folder = folder
        self.num_samples: int = about["num_samples"]
        self.chunk: int = about["chunk"]
        self.num_chunks = math.ceil(self.num_samples / self.chunk)
        self.meta: dict[str, Any] = about["meta"]
        self._about = about
        self._arrays = {
            name: (tuple(a["item_shape"]), np.dtype(a["dtype"]))
            for name, a in about["arrays"].items()
        }
        self._stores: dict[str, ts.TensorStore] = {}
        self._in_flight: deque[ts.Future] = deque()
        self._max_in_flight = max_in_flight

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike,
        arrays: Mapping[str, tuple[Sequence[int], Any]],
        num_samples: int,
        *,
        chunk: int,
        meta: Mapping[str, Any],
        replace: bool = False,
        max_in_flight: int = 4,
    ) -> SampleStore:
        """Starts a cache, or opens the one that an earlier call with the same arguments started.

        Args:
          folder: where the cache is made.
          arrays: name -> (shape of one sample, dtype); dtypes "bfloat16", "float16", "float32" and
            numpy's integers.
          num_samples: samples of every array.
          chunk: samples per chunk, the unit of writing, resuming and decoding.
          meta: JSON values that the content depends on (teacher hash, configuration hash...).
          replace: remove a cache made from something else instead of raising.
          max_in_flight: chunks that may wait for the disk before `write_chunk` blocks.

        Raises:
          UserError: the folder holds other files, or a cache made from something else.
          ValueError: an array cannot be stored.
        """
        folder = Path(folder)
        about = _describe(arrays, num_samples, chunk, meta)
        index = read_json(folder / INDEX)
        if index is None or index.get("format") != _FORMAT:
            if folder.exists() and not all(map(is_leftover, folder.iterdir())):
                raise UserError(f"{folder} holds files but no cache: choose another folder")
            index = None
        elif changes := _changes(index, about):
            if not replace:
                raise UserError(
                    f"{folder} holds an activation cache made from something else ({changes}): "
                    "delete it, or choose another folder"
                )
            # The index says unfinished before chunks go, so that a kill here leaves a valid cache.
            write_json(folder / INDEX, {**index, "finished": False})
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
            index = None
        if index is None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / INDEX, {**about, "finished": False, "samples_done": 0})
        if not (folder / "zarr.json").exists():
            write_json(folder / "zarr.json", {"zarr_format": 3, "node_type": "group"})
        cache = cls(folder, about, max_in_flight)
        cache._open_arrays(create=True)
        return cache

    @classmethod
    def open(cls, folder: str | os.PathLike) -> SampleStore:
        """Opens a finished cache for reading.

        Raises:
          UserError: there is no cache, or it is unfinished or damaged.
        """
        folder = Path(folder)
        index = read_json(folder / INDEX)
        if index is None or index.get("format") != _FORMAT:
            found = "is damaged" if (folder / INDEX).exists() else "does not exist"
            raise UserError(
                f"there is no activation cache at {folder} ({INDEX} {found}): run the command that "
                "makes it"
            )
        cache = cls(folder, index)
        missing = cache.missing_chunks()
        if not index["finished"]:
            raise UserError(
                f"the activation cache {folder} is unfinished: it holds {cache.samples_done()} of "
                f"{cache.num_samples} samples; run the command that made it again to resume"
            )
        if missing:
            raise UserError(
                f"the activation cache {folder} is damaged: {len(missing)} of its "
                f"{cache.num_chunks} chunks are missing, the first is {missing[0]}: {_MEND}"
            )
        cache._open_arrays(create=False)
        return cache

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the arrays."""
        return tuple(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array, (num_samples, *item)."""
        return (self.num_samples, *self._array(name)[0])

    def dtype(self, name: str) -> np.dtype:
        """The dtype of an array as it is read."""
        return self._array(name)[1]

    def nbytes(self, names: Sequence[str] | None = None) -> int:
        """Bytes that the named arrays take in memory; all arrays by default."""
        names = self.names if names is None else names
        return sum(math.prod(self.shape(n)) * self.dtype(n).itemsize for n in names)

    def chunk_range(self, index: int) -> tuple[int, int]:
        """The samples [start, stop) of a chunk.

        Raises:
          ValueError: there is no such chunk.
        """
        if not 0 <= index < self.num_chunks:
            raise ValueError(f"{self.folder} has no chunk {index}, only {self.num_chunks}")
        return index * self.chunk, min((index + 1) * self.chunk, self.num_samples)

    def missing_chunks(self) -> list[int]:
        """The chunks that are not on disk in every array."""
        found = []
        for name, (item, _) in self._arrays.items():
            folder = self.folder / name
            files = set(os.listdir(folder)) if folder.is_dir() else set()
            tail = ".0" * len(item)
            found.append([f"c.{i}{tail}" in files for i in range(self.num_chunks)])
        return np.flatnonzero(~np.all(found, axis=0)).tolist()

    def samples_done(self) -> int:
        """The number of samples whose chunks are on disk."""
        missing = (self.chunk_range(i) for i in self.missing_chunks())
        return self.num_samples - sum(stop - start for start, stop in missing)

    def write_chunk(self, index: int, values: Mapping[str, np.ndarray]) -> ts.Future:
        """Starts to write one chunk of every array.

        With `max_in_flight` chunks still being written it first waits for the oldest, and raises
        its error.

        Args:
          index: of the chunk.
          values: for each array its samples `chunk_range(index)`, (samples, *item); copied.

        Returns:
          a future whose `result()` waits until the chunk is on disk in every array.

        Raises:
          ValueError: `values` has other names or shapes than the cache.
        """
        start, stop = self.chunk_range(index)
        values = {name: np.asarray(value) for name, value in values.items()}
        given = {name: (value.shape, value.dtype) for name, value in values.items()}
        wanted = {name: ((stop - start, *s), d) for name, (s, d) in self._arrays.items()}
        if given != wanted:
            raise ValueError(f"{self.folder}: chunk {index} needs arrays {wanted}, got {given}")
        while len(self._in_flight) >= self._max_in_flight:
            self._in_flight.popleft().result()
        # One transaction gives one future for the chunk in all arrays.
        transaction = ts.Transaction()
        for name, value in values.items():
            stored = np.ascontiguousarray(value).view(_BITS.get(value.dtype, value.dtype))
            self._stores[name].with_transaction(transaction)[start:stop].write(stored).result()
        self._in_flight.append(transaction.commit_async())
        return self._in_flight[-1]

    def flush(self) -> None:
        """Waits until all chunks are on disk and records their number in the index."""
        written = bool(self._in_flight)
        while self._in_flight:
            self._in_flight.popleft().result()
        if written:
            self._note(finished=False)

    def finish(self) -> None:
        """Flushes and marks the cache as finished.

        Raises:
          ValueError: chunks are missing.
        """
        self.flush()
        if missing := self.missing_chunks():
            raise ValueError(f"{self.folder}: {len(missing)} chunks are not written yet")
        self._note(finished=True)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads samples [start, stop) of one array, (stop - start, *item).

        Raises:
          UserError: the array is missing, or a chunk is missing or damaged.
          ValueError: the samples are out of range.
        """
        stop = self.num_samples if stop is None else stop
        self._check(start, stop)
        dtype = self.dtype(name)
        return self._finish(name, self._stores[name][start:stop].read()).view(dtype)

    def read_rows(self, names: Sequence[str], rows: np.ndarray) -> dict[str, np.ndarray]:
        """Gathers samples of several arrays; each chunk is decoded once per array.

        Args:
          names: of the arrays.
          rows: integers (...) in 0..num_samples-1.

        Returns:
          for each name an array (..., *item).

        Raises:
          UserError: an array is missing, or a chunk is missing or damaged.
          ValueError: a row is out of range.
        """
        rows = np.asarray(rows, np.int64)
        self._check(rows.min(initial=0), rows.max(initial=0) + 1)
        shapes = {name: (*rows.shape, *self._array(name)[0]) for name in names}
        pending = {name: self._stores[name][rows.reshape(-1)].read() for name in names}
        return {
            name: self._finish(name, future).view(self.dtype(name)).reshape(shapes[name])
            for name, future in pending.items()
        }

    def load(
        self, names: Sequence[str] | None = None, max_bytes: int | None = None
    ) -> dict[str, np.ndarray] | None:
        """Reads whole arrays, all by default; returns None if they exceed `max_bytes`."""
        names = self.names if names is None else names
        if max_bytes is not None and self.nbytes(names) > max_bytes:
            return None
        return {name: self.read(name) for name in names}

    def arrays(self, names: Sequence[str], max_bytes: int = _HELD_BYTES) -> dict[str, Any]:
        """Returns arrays to look up rows in: in memory if they fit in `max_bytes`, else `Rows`."""
        held = self.load(names, max_bytes)
        return {name: Rows(self, name) for name in names} if held is None else held

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_samples:
            asked = f"samples [{start}, {stop})"
            raise ValueError(f"{self.folder}: {asked} are out of range, it has {self.num_samples}")

    def _array(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        if name not in self._arrays:
            held = ", ".join(self._arrays)
            raise UserError(f"the activation cache {self.folder} lacks {name!r}; it holds {held}")
        return self._arrays[name]

    def _note(self, *, finished: bool) -> None:
        done = {"finished": finished, "samples_done": self.samples_done()}
        write_json(self.folder / INDEX, {**self._about, **done})

    def _finish(self, name: str, future: ts.Future) -> Any:
        try:
            return future.result()
        except (ValueError, OSError) as error:
            raise UserError(
                f"the activation cache {self.folder} is damaged: {name} cannot be read "
                f"({str(error).split(' [')[0]}): {_MEND}"
            ) from error

    def _open_arrays(self, *, create: bool) -> None:
        opened = {
            name: _open(self.folder / name, self.shape(name), self.chunk, dtype, create)
            for name, (_, dtype) in self._arrays.items()
        }
        self._stores = {name: self._finish(name, future) for name, future in opened.items()}


class Rows:
    """An array of a store that stays on disk: `rows[numbers]` reads the rows of these numbers."""

    def __init__(self, store: SampleStore, name: str):
        self._store, self._name = store, name
        self.shape = (store.num_samples, *store.shape(name))
        self.dtype = store.dtype(name)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        """See `SampleStore.read_rows`."""
        return self._store.read_rows((self._name,), np.asarray(numbers))[self._name]


def _open(path: Path, shape: Sequence, chunk: int, dtype: np.dtype, create: bool) -> ts.Future:
    """Opens an array with zstd at level 1; level 3 writes half as fast and saves 5 %."""
    shuffle = "shuffle" if dtype.itemsize > 1 else "noshuffle"
    blosc = {"cname": "zstd", "clevel": 1, "shuffle": shuffle, "typesize": dtype.itemsize}
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path.resolve()}/"},
        "metadata": {
            "shape": list(shape),
            "data_type": _BITS.get(dtype, dtype).name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [chunk, *shape[1:]]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "blosc", "configuration": {**blosc, "blocksize": 0}},
                {"name": "crc32c"},
            ],
            "attributes": {"dtype": dtype.name},
        },
        # Chunks of zeros are written too, because existing files mark chunks as complete,
        "store_data_equal_to_fill_value": True,
        # and a missing file is an error, where zarr would read zeros.
        "fill_missing_data_reads": False,
    }
    return ts.open(spec, open=True, create=create)


def _describe(
    arrays: Mapping[str, tuple[Sequence[int], Any]], num_samples: int, chunk: int, meta: Mapping
) -> dict[str, Any]:
    """Returns the content of `index.json` that does not change while a cache is written."""
    if min(num_samples, chunk, len(arrays)) < 1:
        raise ValueError(f"no cache of {num_samples} {chunk=} samples of {list(arrays)}")
    described = {}
    for name, (item, dtype) in arrays.items():
        size = chunk * math.prod(item) * np.dtype(dtype).itemsize
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) or size > _MAX_CHUNK_BYTES:
            raise ValueError(
                f"array {name!r} with {size} bytes a chunk cannot be stored: names are letters, "
                f"digits, '_', '.', '-', and a chunk takes at most {_MAX_CHUNK_BYTES}"
            )
        described[name] = {"item_shape": list(item), "dtype": np.dtype(dtype).name}
    about = {"num_samples": num_samples, "chunk": chunk, "arrays": described, "meta": dict(meta)}
    return {"format": _FORMAT, **json.loads(json.dumps(about))}


def _changes(index: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Names the leaves in which two descriptions differ: `meta.teacher: "a" -> "b"`."""
    old, new = (
        shaping_values(d, ("num_samples", "chunk", "arrays", "meta")) for d in (index, about)
    )
    return Identity(new, {}).changes({"config": old})
