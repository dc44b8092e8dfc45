"""Reads diffusion-policy replay buffers: zarr with `data/<key>` and `meta/episode_ends`.

A buffer is read lazily with tensorstore, from a `.zarr` folder of version 2 or 3 or from a zip of
one. `replay_writer` writes the same layout. In a buffer of several tasks, `meta/episode_task` holds
for each episode the index of its sentence in the attribute `tasks` of `meta`.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorstore as ts

from uva_jax.data.zarr_array import ArrayInfo, open_store, read_info
from uva_jax.data.zarr_container import Container, open_container, parse_json
from uva_jax.runtime.errors import UserError

FRAME_BYTES = 1024  # a step of at least this size is an image
OWN_ATTRIBUTES = "uva_jax"  # the writer's block among the root attributes
_MISSING = 0.25  # allowed share of missing chunks of images; one may always be missing

Progress = Callable[[int, int], None]  # called with (units done, total units)


class ReplayBuffer:
    """Concatenated episodes, one array per key, which are read in parts.

    An array is checked when it is first used; arrays that are not used may be invalid.

    Attributes:
      path: of the buffer.
      episode_ends: int64 (n_episodes,), cumulative lengths.
      attributes: the root's zarr attributes.
      tasks: sentences of the tasks; empty if the buffer has none.
      episode_task: int64 (n_episodes,), index of each episode's task; zeros if there are none.
    """

    reads_images = False  # whether arrays of encoded images, one per chunk, can be read

    def __init__(self, container: Container):
        self.path = container.path
        self.attributes = container.attributes()
        self._container = container
        self._infos: dict[str, ArrayInfo] = {}
        self._stores: dict[str, ts.TensorStore] = {}
        own = self.attributes.get(OWN_ATTRIBUTES)
        if isinstance(own, dict) and own.get("complete") is False:
            raise UserError(
                f"{self.path} is unfinished: run the command that writes it again to resume, or "
                "delete it"
            )
        self.episode_ends = check_episode_ends(self._read_meta("episode_ends"), str(self.path))
        tasks = container.attributes("meta").get("tasks", [])
        episode_task = np.zeros(self.n_episodes, np.int64)
        if "meta/episode_task" in container.arrays:
            episode_task = self._read_meta("episode_task")
        elif len(tasks) > 1:
            raise UserError(
                f"{self.path} names {len(tasks)} tasks, but lacks meta/episode_task, the task of "
                "each episode: the copy is incomplete"
            )
        check_tasks(tasks, episode_task, self.n_episodes, str(self.path))
        self.tasks, self.episode_task = tuple(tasks), episode_task.astype(np.int64)

    @classmethod
    def open(
        cls, path: str | os.PathLike, *, required: Sequence[str] | None = None
    ) -> "ReplayBuffer":
        """Opens the buffer at `path`, a `.zarr` folder or a zip that holds one.

        Args:
          path: of a zarr of version 2 or 3.
          required: the arrays that will be read; only these are checked. None: all.

        Raises:
          UserError: there is no such buffer, an array is missing, incomplete or not readable, or
            lengths disagree.
        """
        buffer = cls(open_container(Path(path)))
        wanted = buffer.keys if required is None else required
        missing = [f"data/{key}" for key in wanted if key not in buffer.keys]
        if missing:
            raise UserError(
                f"{buffer._lacks(', '.join(missing))}: give the data that the policy was trained "
                "on, or name its arrays with config.data.image_key, wrist_key and action_key"
            )
        for key in wanted:
            buffer._array(key)
        for key in required or ():
            buffer._store(f"data/{key}")
        return buffer

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the arrays in data/."""
        names = self._container.arrays
        return tuple(sorted(n.removeprefix("data/") for n in names if n.startswith("data/")))

    @property
    def n_episodes(self) -> int:
        """Number of episodes."""
        return len(self.episode_ends)

    @property
    def n_steps(self) -> int:
        """Number of steps of all episodes."""
        return int(self.episode_ends[-1])

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of an array, (n_steps, *item)."""
        return self._array(key).shape

    def dtype(self, key: str) -> np.dtype:
        """The stored dtype of an array."""
        return self._array(key).dtype

    def is_frame(self, key: str) -> bool:
        """Whether a step of an array is an image, by its size."""
        return is_frame(self.shape(key)[1:], self.dtype(key))

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads steps [start, stop) of one array, (stop - start, *item), in its stored dtype.

        Raises:
          UserError: the array is missing or damaged.
          ValueError: the steps are out of range.
        """
        stop = self.n_steps if stop is None else stop
        if not 0 <= start <= stop <= self.n_steps:
            raise ValueError(
                f"{self.path}: steps [{start}, {stop}) of data/{key} were asked for, but it has "
                f"{self.n_steps} steps"
            )
        self._array(key)
        return self._finish(f"data/{key}", self._store(f"data/{key}")[start:stop].read())

    def read_rows(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Gathers steps of several arrays; each chunk is decoded once.

        Args:
          rows: for each key an integer array of any shape (...), steps in 0..n_steps-1.

        Returns:
          for each key an array (..., *item) in the stored dtype.

        Raises:
          UserError: an array is missing or damaged.
          ValueError: a step is out of range.
        """
        pending = {}
        for key, wanted in rows.items():
            wanted = np.asarray(wanted, np.int64)
            self._array(key)
            if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.n_steps):
                raise ValueError(
                    f"{self.path}: steps {wanted.min()} to {wanted.max()} of data/{key} were "
                    f"asked for, but it has {self.n_steps} steps"
                )
            store = self._store(f"data/{key}")
            pending[key] = wanted.shape, store[wanted.reshape(-1)].read()
        return {
            key: self._finish(f"data/{key}", future).reshape(*shape, *self.shape(key)[1:])
            for key, (shape, future) in pending.items()
        }

    def fingerprint(self, keys: Sequence[str] | None = None) -> str:
        """Returns a SHA-256 of lengths, small arrays and the first and last frame of image arrays.

        Buffers with the same fingerprint hold the same recording in the same dtypes. It identifies
        the input of what is computed from a buffer.

        Args:
          keys: the arrays to include; None: all.
        """
        digest = hashlib.sha256(self.episode_ends.tobytes())
        if self.tasks:
            digest.update(json.dumps(self.tasks).encode() + self.episode_task.tobytes())
        for key in self.keys if keys is None else sorted(keys):
            shape, dtype = self.shape(key), self.dtype(key)
            digest.update(f"{key} {shape} {dtype}".encode())
            if self.is_frame(key):
                ends = self.read_rows({key: np.array([0, self.n_steps - 1])})[key]
                digest.update(ends.tobytes())
            else:
                digest.update(self.read(key).tobytes())
        return digest.hexdigest()

    def _read_meta(self, key: str) -> np.ndarray:
        name = f"meta/{key}"
        if name not in self._container.arrays:
            raise self._lacks(name)
        return np.asarray(self._finish(name, self._store(name).read()))

    def _lacks(self, names: str) -> UserError:
        found = ", ".join(sorted(self._container.arrays)) or "no arrays"
        return UserError(f"{self.path} lacks {names}; it holds {found}")

    def _array(self, key: str) -> ArrayInfo:
        """Returns the metadata of an array, checked at its first use."""
        name = f"data/{key}"
        if name in self._infos:
            return self._infos[name]
        if name not in self._container.arrays:
            raise self._lacks(name)
        info = read_info(self._container, name)
        if info.shape[0] != self.n_steps:
            raise UserError(
                f"{self.path}: {name} has shape {info.shape}, but meta/episode_ends says that the "
                f"episodes hold {self.n_steps} steps: the copy is incomplete or the arrays belong "
                "to different recordings"
            )
        if info.image_codec and not self.reads_images:
            raise UserError(
                f"{self.path}: {name} is stored with the codec {info.image_codec}, which is too "
                "slow to train from: make a plain copy with python -m uva_jax import --kind zarr "
                f"{self.path} --out COPY.zarr"
            )
        return self._infos.setdefault(name, info)

    def _store(self, name: str) -> ts.TensorStore:
        """Returns the array's store, opened at its first use."""
        if name not in self._stores:
            group, key = name.split("/")
            info = self._array(key) if group == "data" else read_info(self._container, name)
            if info.fill is not None and is_frame(info.shape[1:], info.dtype):
                self._check_missing(info)
            try:
                self._stores[name] = open_store(self._container, info)
            except UserError:
                raise
            except ValueError as error:
                raise self._unreadable(name, error) from error
        return self._stores[name]

    def _check_missing(self, info: ArrayInfo) -> None:
        """Raises UserError if more chunks of images are missing than a writer leaves out.

        Writers leave out chunks of only the fill value, such as a few black frames at an episode's
        start. An interrupted copy can lack any share of the chunks.
        """
        missing, total = info.missing_chunks(self._container)
        if 2 * missing >= total or missing > max(_MISSING * total, 1):
            raise UserError(
                f"{self.path}: {info.name} lacks {missing} of its {total} chunks of images: copy "
                "it again or, if these images hold only the fill value, store them (zarr: "
                "write_empty_chunks=True)"
            )

    def _finish(self, name: str, future: ts.Future):
        try:
            return future.result()
        except UserError:
            raise
        except ValueError as error:
            raise self._unreadable(name, error) from error

    def _unreadable(self, name: str, error: ValueError) -> UserError:
        reason = re.sub("^[A-Z_]+: ", "", str(error).split(" [")[0])  # without the status
        return UserError(
            f"{self.path}: {name} cannot be read ({reason}): the copy is incomplete or damaged"
        )


def is_frame(item: Sequence[int], dtype) -> bool:
    """Whether a step of this shape and dtype is an image, by its size."""
    return math.prod(item) * np.dtype(dtype).itemsize >= FRAME_BYTES


def to_uint8(frames: np.ndarray, name: str) -> np.ndarray:
    """Converts frames of any numeric dtype with values in 0..255 to uint8, rounded.

    Raises:
      UserError: values are out of range.
    """
    if frames.dtype == np.uint8 or frames.size == 0:
        return frames.astype(np.uint8, copy=False)
    low, high = float(frames.min()), float(frames.max())
    if not (low >= 0 and 1 < high <= 255):  # also false for NaN
        raise UserError(
            f"{name} should hold pixel values in 0..255, but some of its frames range from "
            f"{low:g} to {high:g}: scale them first"
        )
    return np.rint(frames).astype(np.uint8)


def check_episode_ends(ends: np.ndarray, name: str) -> np.ndarray:
    """Returns the cumulative lengths of episodes as int64 (n,).

    Raises:
      UserError: they are not whole numbers that increase from at least 1.
    """
    stored, ends = np.asarray(ends), np.zeros(0, np.int64)
    if stored.dtype.kind in "iu" or (stored.dtype.kind == "f" and (stored % 1 == 0).all()):
        ends = stored.astype(np.int64)
    if ends.ndim != 1 or not len(ends) or ends[0] < 1 or (np.diff(ends) < 1).any():
        raise UserError(
            f"{name}: meta/episode_ends must be increasing cumulative lengths of at least one "
            f"episode, but is {stored.dtype} {np.array2string(stored, threshold=6)}"
        )
    return ends


def check_tasks(tasks: Sequence, episode_task: np.ndarray, n_episodes: int, name: str) -> None:
    """Raises UserError if `episode_task` does not index `tasks` for every episode."""
    if not isinstance(tasks, list | tuple) or not all(isinstance(task, str) for task in tasks):
        raise UserError(f"{name}: the attribute tasks of meta must be a list of sentences")
    if episode_task.shape != (n_episodes,) or episode_task.dtype.kind not in "iu":
        raise UserError(
            f"{name}: meta/episode_task must hold one whole number for each of the {n_episodes} "
            f"episodes, but has shape {episode_task.shape} and dtype {episode_task.dtype}"
        )
    low, high = int(episode_task.min()), int(episode_task.max())
    if low < 0 or high >= max(len(tasks), 1):
        raise UserError(
            f"{name}: meta/episode_task names the tasks {low} to {high}, but the attribute tasks "
            f"of meta holds {len(tasks)} sentences"
        )


def read_json(path: Path) -> dict:
    """Reads a JSON object; raises UserError if it is damaged."""
    return parse_json(path.read_bytes(), str(path)) if path.is_file() else {}
