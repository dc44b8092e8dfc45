"""Diffusion-policy replay buffers: zarr v2, `data/<key>`, `meta/episode_ends`.

A buffer is opened lazily with tensorstore, from a `.zarr` folder or from the zip in which such
folders are published. `replay_writer` makes the same layout. Buffers of several tasks also say
which episode shows which: `meta/episode_task` numbers the sentences of the attribute `tasks` of
`meta`.
"""

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorstore as ts

from uva_jax.runtime.errors import UserError

FRAME_BYTES = 1024  # a step of at least this size is an image
OWN_ATTRIBUTES = "uva_jax"  # the writer's block among the root attributes
_CODECS = ("blosc", "bz2", "gzip", "zlib", "zstd")  # what tensorstore decodes

Progress = Callable[[int, int], None]  # (done, total), called as work advances


class ReplayBuffer:
    """Episodes stored end to end, one array a key, read without loading the whole.

    Attributes:
      path: where it was opened.
      episode_ends: int64 (n_episodes,), the cumulative lengths.
      attributes: the root's zarr attributes.
      tasks: the sentences of the tasks shown; empty if the buffer names none.
      episode_task: int64 (n_episodes,), each episode's place in `tasks`; zeros if it names none.
    """

    codecs = _CODECS  # those whose chunks this class reads

    def __init__(
        self, path: Path, kvstore: dict, arrays: dict[str, dict], attributes: dict, meta: dict
    ):
        self.path = path
        self.attributes = attributes
        self._kvstore = kvstore
        self._metadata = arrays
        self._stores: dict[str, ts.TensorStore] = {}
        ends = self._finish("meta/episode_ends", self._store("meta/episode_ends").read())
        self.episode_ends = np.asarray(ends, np.int64)
        check_episode_ends(self.episode_ends, str(path))
        tasks, episode_task = meta.get("tasks", []), np.zeros(self.n_episodes, np.int64)
        if "meta/episode_task" in arrays:
            name = "meta/episode_task"
            episode_task = np.asarray(self._finish(name, self._store(name).read()))
        elif len(tasks) > 1:
            raise UserError(
                f"{path} names {len(tasks)} tasks, but lacks meta/episode_task, which says which "
                "episode shows which: the copy is incomplete"
            )
        check_tasks(tasks, episode_task, self.n_episodes, str(path))
        self.tasks, self.episode_task = tuple(tasks), episode_task.astype(np.int64)
        for key in self.keys:
            if not self.shape(key) or self.shape(key)[0] != self.n_steps:
                raise UserError(
                    f"{path}: data/{key} has shape {self.shape(key)}, but meta/episode_ends says "
                    f"that the episodes hold {self.n_steps} steps: the copy is incomplete or the "
                    "arrays belong to different recordings"
                )

    @classmethod
    def open(cls, path: str | os.PathLike, *, required: Sequence[str] = ()) -> "ReplayBuffer":
        """Opens the buffer at `path`, a `.zarr` folder or a zip that holds one.

        Raises UserError when nothing is there, when it is not such a buffer, when one of the
        `required` arrays is missing, when images are stored by a codec that zarr v2 does not have
        of its own, or when lengths disagree.
        """
        path = Path(path)
        if not path.exists():
            raise UserError(f"there is no replay buffer at {path}: check the path")
        opened = _open_zip(path) if path.is_file() else _open_folder(path)
        kvstore, arrays, attributes, meta = opened
        own = attributes.get(OWN_ATTRIBUTES)
        if isinstance(own, dict) and own.get("complete") is False:
            raise UserError(
                f"{path} was never finished: run the command that writes it again (it resumes), "
                "or delete it"
            )
        if "meta/episode_ends" not in arrays:
            raise UserError(f"{path} lacks meta/episode_ends; it holds {_listing(arrays)}")
        missing = [key for key in required if f"data/{key}" not in arrays]
        if missing:
            wanted = ", ".join(f"data/{key}" for key in missing)
            raise UserError(f"{path} lacks {wanted}; it holds {_listing(arrays)}")
        for name, metadata in arrays.items():
            codec = (metadata.get("compressor") or {}).get("id")
            if codec is not None and codec not in cls.codecs:
                raise UserError(
                    f"{path}: {name} is stored with the codec {codec}, which is not one of zarr "
                    "v2's own: make a plain copy with python -m uva_jax import "
                    f"--kind zarr {path} --out COPY.zarr"
                )
        return cls(path, kvstore, arrays, attributes, meta)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(sorted(n.removeprefix("data/") for n in self._metadata if n[:5] == "data/"))

    @property
    def n_episodes(self) -> int:
        return len(self.episode_ends)

    @property
    def n_steps(self) -> int:
        return int(self.episode_ends[-1])

    def shape(self, key: str) -> tuple[int, ...]:
        """The whole array's shape, steps first."""
        return tuple(self._array(key)["shape"])

    def dtype(self, key: str) -> np.dtype:
        return np.dtype(self._array(key)["dtype"])

    def is_frame(self, key: str) -> bool:
        """Whether a step of this array is an image, judged by its size."""
        return is_frame(self.shape(key)[1:], self.dtype(key))

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Steps [start, stop) of one array, in its stored dtype."""
        stop = self.n_steps if stop is None else stop
        if not 0 <= start <= stop <= self.n_steps:
            raise ValueError(
                f"{self.path}: steps [{start}, {stop}) of data/{key} were asked for, but it has "
                f"{self.n_steps} steps"
            )
        self._array(key)
        return self._finish(f"data/{key}", self._store(f"data/{key}")[start:stop].read())

    def read_rows(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Gathers steps of several arrays at once; every chunk involved is decoded only once.

        Args:
          rows: for each key an integer array of any shape (...), steps in 0..n_steps-1.

        Returns:
          for each key an array (..., *item) in the stored dtype.
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

    def fingerprint(self) -> str:
        """A sha256 of the lengths, every small array and each image array's first and last frame.

        Two buffers with the same fingerprint hold the same recording in the same dtypes; it is
        meant as the "hash of the inputs" of whatever is computed from a buffer.
        """
        digest = hashlib.sha256(self.episode_ends.tobytes())
        if self.tasks:
            digest.update(json.dumps(self.tasks).encode() + self.episode_task.tobytes())
        for key in self.keys:
            shape, dtype = self.shape(key), self.dtype(key)
            digest.update(f"{key} {shape} {dtype}".encode())
            if self.is_frame(key):
                ends = self.read_rows({key: np.array([0, self.n_steps - 1])})[key]
                digest.update(ends.tobytes())
            else:
                digest.update(self.read(key).tobytes())
        return digest.hexdigest()

    def _array(self, key: str) -> dict:
        if f"data/{key}" not in self._metadata:
            raise UserError(f"{self.path} lacks data/{key}; it holds {_listing(self._metadata)}")
        return self._metadata[f"data/{key}"]

    def _store(self, name: str) -> ts.TensorStore:
        if name not in self._stores:
            inner = self._kvstore.get("path", "")
            spec = {
                "driver": "zarr",
                "kvstore": {**self._kvstore, "path": f"{inner}{name}/"},
                # A missing chunk is an incomplete copy; zarr would read it as zeros.
                "fill_missing_data_reads": False,
            }
            self._stores[name] = self._finish(name, ts.open(spec, read=True))
        return self._stores[name]

    def _finish(self, name: str, future: ts.Future):
        try:
            return future.result()
        except ValueError as error:
            reason = str(error).split(" [")[0]
            raise UserError(
                f"{self.path}: {name} cannot be read ({reason}): the copy is incomplete or "
                "damaged, or stored with a codec other than zarr v2's own"
            ) from error


def is_frame(item: Sequence[int], dtype) -> bool:
    return math.prod(item) * np.dtype(dtype).itemsize >= FRAME_BYTES


def to_uint8(frames: np.ndarray, name: str) -> np.ndarray:
    """Frames of any numeric dtype with values in 0..255 as uint8, rounded."""
    if frames.dtype == np.uint8 or frames.size == 0:
        return frames.astype(np.uint8, copy=False)
    low, high = float(frames.min()), float(frames.max())
    if not (low >= 0 and 1 < high <= 255):  # also false for NaN
        raise UserError(
            f"{name} should hold pixel values in 0..255, but some of its frames range from "
            f"{low:g} to {high:g}: scale them first"
        )
    return np.rint(frames).astype(np.uint8)


def check_episode_ends(ends: np.ndarray, name: str) -> None:
    if ends.ndim != 1 or not len(ends) or ends[0] < 1 or (np.diff(ends) < 1).any():
        raise UserError(
            f"{name}: meta/episode_ends must be increasing cumulative lengths of at least one "
            f"episode, but is {np.array2string(ends, threshold=6)}"
        )


def check_tasks(tasks: Sequence, episode_task: np.ndarray, n_episodes: int, name: str) -> None:
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


def _listing(arrays: Mapping) -> str:
    return ", ".join(sorted(arrays)) or "no arrays"


def read_json(path: Path) -> dict:
    return _parse(path.read_bytes(), str(path)) if path.is_file() else {}


def _parse(content: bytes, name: str) -> dict:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise UserError(f"{name} is not readable JSON ({error}): the copy is damaged") from error
    if not isinstance(found, dict):
        raise UserError(f"{name} should hold a JSON object: the copy is damaged")
    return found


def _open_folder(path: Path) -> tuple[dict, dict, dict, dict]:
    """The store, the arrays' metadata by name, and the attributes of the root and of meta."""
    if not (path / "data").is_dir() or not (path / "meta").is_dir():
        inner = [p for p in path.iterdir() if (p / "meta" / "episode_ends").is_dir()]
        hint = f"; did you mean {inner[0]}?" if inner else ""
        if (path / "zarr.json").exists():
            hint = "; it is a zarr of version 3"
        names = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise UserError(
            f"{path} is not a replay buffer: a zarr v2 folder with data/ and meta/ is needed, "
            f"found {names}{hint}"
        )
    files = [f for group in ("data", "meta") for f in (path / group).glob("*/.zarray")]
    arrays = {f.parent.relative_to(path).as_posix(): read_json(f) for f in files}
    kvstore = {"driver": "file", "path": f"{path.resolve()}/"}
    return kvstore, arrays, read_json(path / ".zattrs"), read_json(path / "meta" / ".zattrs")


def _open_zip(path: Path) -> tuple[dict, dict, dict, dict]:
    """As `_open_folder`; the buffer may lie in a folder inside the zip."""
    tail = "meta/episode_ends/.zarray"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            roots = [n.removesuffix(tail) for n in names if f"/{n}".endswith(f"/{tail}")]
            if len(roots) != 1:
                found = ", ".join(roots or sorted({n.split("/")[0] for n in names})) or "nothing"
                raise UserError(
                    f"{path} should hold one zarr v2 replay buffer (with meta/episode_ends), but "
                    f"holds {len(roots)}; found {found}"
                )
            inner = {n.removeprefix(roots[0]): n for n in names if n.startswith(roots[0])}
            arrays = {
                short.removesuffix("/.zarray"): _parse(archive.read(name), f"{path}: {name}")
                for short, name in inner.items()
                if short.endswith("/.zarray") and short.count("/") == 2
            }
            attributes, meta = (
                _parse(archive.read(inner[name]), f"{path}: {name}") if name in inner else {}
                for name in (".zattrs", "meta/.zattrs")
            )
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is neither a zarr folder nor a readable zip: {error}") from error
    base = {"driver": "file", "path": str(path.resolve())}
    return {"driver": "zip", "base": base, "path": roots[0]}, arrays, attributes, meta
