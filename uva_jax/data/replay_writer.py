"""Writes replay buffers in resumable units, in the layout that `replay_buffer` reads.

A killed run resumes and never leaves a buffer that looks finished: the root's attributes say
whether the buffer is complete, and existing chunks show which units are.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorstore as ts

from uva_jax.data.replay_buffer import (
    OWN_ATTRIBUTES,
    Progress,
    ReplayBuffer,
    check_episode_ends,
    check_tasks,
    is_frame,
    read_json,
    to_uint8,
)
from uva_jax.runtime.errors import UserError
from uva_jax.storage.atomic import is_leftover, write_bytes

FRAME_CHUNK = 32  # steps per chunk of images: a 32-step window reads two
UNIT_STEPS = 1024  # steps that are written, and resumed, together
# Flat renderings compress best without shuffling: 0.3 kB per 96x96 frame, read as fast as lz4.
_CODEC = {"id": "blosc", "cname": "zstd", "clevel": 3, "shuffle": 0}


class ReplayBufferWriter:
    """Writes a replay buffer in units of `UNIT_STEPS` steps, in any order and from any process.

    A unit is complete when its chunk of the last small array exists, because that chunk is written
    last. The root's attributes say whether the buffer is complete.
    """

    def __init__(self, path: Path, arrays: Mapping[str, tuple], episode_ends: np.ndarray):
        self.path = path
        self.n_steps = int(episode_ends[-1])
        self.n_units = math.ceil(self.n_steps / UNIT_STEPS)
        self._frames = [k for k, (shape, dtype) in arrays.items() if is_frame(shape, dtype)]
        self._small = [k for k in arrays if k not in self._frames]
        if not self._small:
            raise ValueError("a replay buffer needs at least one array other than images")
        self._stores = {
            key: _create_array(path, f"data/{key}", (self.n_steps, *shape), dtype)
            for key, (shape, dtype) in arrays.items()
        }
        ends = _create_array(path, "meta/episode_ends", episode_ends.shape, np.int64)
        ends[...].write(episode_ends).result()

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        arrays: Mapping[str, tuple[tuple[int, ...], np.dtype | str]],
        episode_ends: np.ndarray,
        *,
        attributes: Mapping | None = None,
        tasks: Sequence[str] = (),
        episode_task: np.ndarray | None = None,
    ) -> "ReplayBufferWriter":
        """Starts a buffer, or resumes an unfinished one with the same arguments.

        Args:
          path: the buffer's folder.
          arrays: key -> (shape of one step, dtype), for example "img": ((96, 96, 3), "uint8").
          episode_ends: (n_episodes,) cumulative lengths.
          attributes: JSON values stored in the root's attributes.
          tasks: sentences of the tasks, if there are several or a policy reads them.
          episode_task: (n_episodes,) index of each episode's task; 0 by default.

        Raises:
          UserError: the folder holds something else.
        """
        path = Path(path)
        episode_ends = np.asarray(episode_ends, np.int64)
        check_episode_ends(episode_ends, str(path))
        about = {
            "arrays": {k: [list(s), np.dtype(d).str] for k, (s, d) in arrays.items()},
            "episodes": hashlib.sha256(episode_ends.tobytes()).hexdigest(),
            **json.loads(json.dumps(attributes or {})),
        }
        if tasks:
            number = np.zeros(len(episode_ends)) if episode_task is None else episode_task
            episode_task = np.asarray(number, np.int64)
            check_tasks(tasks, episode_task, len(episode_ends), str(path))
            about["tasks"] = [list(tasks), episode_task.tolist()]
        found = own_attributes(path)
        path.mkdir(parents=True, exist_ok=True)
        if found is None and not all(map(is_leftover, path.iterdir())):
            raise UserError(
                f"{path} exists and was not written by uva_jax: choose another path or delete it"
            )
        if found is not None and {**found, "complete": None} != {**about, "complete": None}:
            raise UserError(
                f"{path} holds a different replay buffer: choose another path or delete it"
            )
        if found is None:
            _mark(path, about, complete=False)  # first, because it marks the folder as ours
        for group in ("", "data", "meta"):
            (path / group).mkdir(exist_ok=True)
            for name, content in ((".zattrs", b"{}"), (".zgroup", b'{"zarr_format": 2}')):
                if not (path / group / name).exists():
                    write_bytes(path / group / name, content)
        if tasks:
            numbers = _create_array(path, "meta/episode_task", episode_task.shape, np.int64)
            numbers[...].write(episode_task).result()
            named = json.dumps({"tasks": list(tasks)}, indent=2)
            write_bytes(path / "meta" / ".zattrs", named.encode())
        return cls(path, arrays, episode_ends)

    @property
    def complete(self) -> bool:
        """Whether the buffer is marked as complete."""
        return bool((own_attributes(self.path) or {}).get("complete"))

    def unit_range(self, unit: int) -> tuple[int, int]:
        """The steps [start, stop) of a unit."""
        return unit * UNIT_STEPS, min((unit + 1) * UNIT_STEPS, self.n_steps)

    def missing_units(self) -> list[int]:
        """The units that are not complete."""
        key = self._small[-1]
        tail = ".0" * (self._stores[key].rank - 1)
        folder = self.path / "data" / key
        return [u for u in range(self.n_units) if not (folder / f"{u}{tail}").exists()]

    def write_unit(self, unit: int, values: Mapping[str, np.ndarray]) -> None:
        """Writes one unit and waits until it is on disk.

        Args:
          unit: number of the unit.
          values: for each array its steps `unit_range(unit)`, (steps, *item).

        Raises:
          ValueError: `values` has other names or shapes than the buffer.
        """
        start, stop = self.unit_range(unit)
        wanted = {key: (stop - start, *s.shape[1:]) for key, s in self._stores.items()}
        given = {key: np.shape(value) for key, value in values.items()}
        if given != wanted:
            raise ValueError(f"{self.path}: unit {unit} needs arrays {wanted}, got {given}")
        for group in (self._frames, self._small[:-1], self._small[-1:]):
            pending = [self._stores[k][start:stop].write(np.asarray(values[k])) for k in group]
            for future in pending:
                future.result()

    def finish(self) -> ReplayBuffer:
        """Marks the buffer as complete and opens it.

        Raises:
          ValueError: units are missing.
        """
        missing = self.missing_units()
        if missing:
            raise ValueError(f"{self.path}: units {missing} of {self.n_units} are not written yet")
        _mark(self.path, own_attributes(self.path), complete=True)
        return ReplayBuffer.open(self.path)


def write_replay_buffer(
    path: str | os.PathLike,
    arrays: Mapping[str, np.ndarray],
    episode_ends: np.ndarray,
    *,
    tasks: Sequence[str] = (),
    episode_task: np.ndarray | None = None,
) -> ReplayBuffer:
    """Writes arrays in memory, each (n_steps, *item), as one replay buffer.

    Other arguments as for `ReplayBufferWriter.create`.

    Raises:
      UserError: the folder holds something else.
      ValueError: an array has another number of steps.
    """
    described = {key: (value.shape[1:], value.dtype) for key, value in arrays.items()}
    for key, value in arrays.items():
        if len(value) != episode_ends[-1]:
            raise ValueError(f"{key} has {len(value)} steps, but episode_ends {episode_ends[-1]}")
    writer = ReplayBufferWriter.create(
        path, described, episode_ends, tasks=tasks, episode_task=episode_task
    )
    for unit in writer.missing_units():
        start, stop = writer.unit_range(unit)
        writer.write_unit(unit, {key: value[start:stop] for key, value in arrays.items()})
    return writer.finish()


def to_uint8_cache(
    source: ReplayBuffer,
    path: str | os.PathLike,
    *,
    keys: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> ReplayBuffer:
    """Copies a buffer with image arrays cast to uint8, of which windows are read 30 times faster.

    An interrupted copy resumes; a finished one is opened.

    Args:
      source: the buffer to copy.
      path: folder of the copy.
      keys: arrays to copy; all by default.
      progress: called with (steps done, total steps).

    Raises:
      UserError: an image array holds values outside 0..255, or the folder holds something else.
    """
    keys = source.keys if keys is None else tuple(keys)
    frames = [key for key in keys if source.is_frame(key)]
    described = {
        key: (source.shape(key)[1:], np.uint8 if key in frames else source.dtype(key))
        for key in keys
    }
    attributes = {"cast_from": source.fingerprint(keys)}
    writer = ReplayBufferWriter.create(
        path,
        described,
        source.episode_ends,
        attributes=attributes,
        tasks=source.tasks,
        episode_task=source.episode_task,
    )
    if writer.complete:
        return ReplayBuffer.open(path)
    for unit in writer.missing_units():
        start, stop = writer.unit_range(unit)
        values = {key: source.read(key, start, stop) for key in keys}
        for key in frames:
            values[key] = to_uint8(values[key], f"{source.path}: data/{key}")
        writer.write_unit(unit, values)
        if progress is not None:
            progress(stop, source.n_steps)
    return writer.finish()


def own_attributes(path: Path) -> dict | None:
    """Returns the attributes that `ReplayBufferWriter` has written at `path`, or None."""
    return read_json(path / ".zattrs").get(OWN_ATTRIBUTES)


def _mark(path: Path, about: Mapping, *, complete: bool) -> None:
    block = {OWN_ATTRIBUTES: {**about, "complete": complete}}
    write_bytes(path / ".zattrs", json.dumps(block, indent=2).encode())


def _create_array(path: Path, name: str, shape: tuple, dtype) -> ts.TensorStore:
    step = FRAME_CHUNK if is_frame(shape[1:], dtype) else UNIT_STEPS
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{path}/{name}/"},
        "metadata": {
            "shape": list(shape),
            "chunks": [step, *shape[1:]],
            "dtype": np.dtype(dtype).str,
            "compressor": _CODEC,
            "fill_value": None,
            "filters": None,
            "order": "C",
        },
        # Chunks of zeros are written too, because existing chunks mark units as complete.
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(spec, open=True, create=True).result()
