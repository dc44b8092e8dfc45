"""Writing replay buffers: resumable units, in the layout that `replay_buffer` reads.

A killed run goes on where it stopped and leaves nothing that looks finished: the root's attributes
say whether the whole is complete, and the chunks that exist say what has been done.
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

FRAME_CHUNK = 32  # steps a chunk of images: a 32-step window touches two
UNIT_STEPS = 1024  # steps that are written, and resumed, together
# Flat renderings compress best without shuffling: 0.3 kB a 96x96 frame, read as fast as lz4.
_CODEC = {"id": "blosc", "cname": "zstd", "clevel": 3, "shuffle": 0}


class ReplayBufferWriter:
    """Writes a replay buffer in units of `UNIT_STEPS` steps, in any order and from any process.

    A unit counts as written when its chunk of the last small array exists, because that chunk is
    written after all the others. The root's attributes say whether the whole is complete.
    """

    def __init__(self, path: Path, arrays: Mapping[str, tuple], episode_ends: np.ndarray):
        self.path = path
        self.n_steps = int(episode_ends[-1])
        self.n_units = math.ceil(self.n_steps / UNIT_STEPS)
        self._frames = [k for k, (shape, dtype) in arrays.items() if is_frame(shape, dtype)]
        self._small = [k for k in arrays if k not in self._frames]
        if not self._small:
            raise ValueError("a replay buffer needs at least one array besides its images")
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
        """Starts a buffer at `path`, or goes on with a half-written one of the same description.

        Args:
          arrays: key -> (shape of one step, dtype), for instance ("img": ((96, 96, 3), "uint8")).
          episode_ends: (n_episodes,) cumulative lengths.
          attributes: JSON-able facts kept in the root's attributes; part of the description.
          tasks: the sentences of the tasks shown, if there are several or a policy reads them.
          episode_task: (n_episodes,) each episode's place in `tasks`; the first by default.

        Raises UserError when something else is at `path`.
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
            _mark(path, about, complete=False)  # first of all: from now on the folder is ours
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
        return bool((own_attributes(self.path) or {}).get("complete"))

    def unit_range(self, unit: int) -> tuple[int, int]:
        """The steps [start, stop) of a unit."""
        return unit * UNIT_STEPS, min((unit + 1) * UNIT_STEPS, self.n_steps)

    def missing_units(self) -> list[int]:
        """The units that are still to be written."""
        key = self._small[-1]
        tail = ".0" * (self._stores[key].rank - 1)
        folder = self.path / "data" / key
        return [u for u in range(self.n_units) if not (folder / f"{u}{tail}").exists()]

    def write_unit(self, unit: int, values: Mapping[str, np.ndarray]) -> None:
        """Writes every array's steps `unit_range(unit)`; returns once they are on the disk."""
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
        """Marks the buffer complete and opens it."""
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
    """Writes arrays that are in memory, each (n_steps, *item), as one replay buffer.

    `tasks` and `episode_task` are those of `ReplayBufferWriter.create`.
    """
    described = {key: (value.shape[1:], value.dtype) for key, value in arrays.items()}
    for key, value in arrays.items():
        if len(value) != episode_ends[-1]:
            raise ValueError(f"{key} has {len(value)} steps, episode_ends says {episode_ends[-1]}")
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
    """Copies a buffer with its image arrays cast to uint8, so that windows read 30 times faster.

    An interrupted copy resumes; a finished one is opened as it is. Raises UserError when an image
    array does not hold values in 0..255, or something else is at `path`.
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
    """What `ReplayBufferWriter` noted at `path`, or None where it never wrote."""
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
        # Even a chunk of zeros is written: chunks that exist are what says that work is done.
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(spec, open=True, create=True).result()
