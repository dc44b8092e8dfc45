"""Finds and reads the files of a zarr, in a folder or a zip, and recognises other formats."""

from __future__ import annotations

import json
import os
import re
import zipfile
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from uva_jax.runtime.errors import UserError

GROUPS = ("data", "meta")
_ENDS = "meta/episode_ends"
_METADATA = {2: ".zarray", 3: "zarr.json"}  # of an array, by version
_LOOK_DEPTH, _LOOK_FOLDERS = 3, 2000  # limits of the search for a zarr below a folder

_HDF5 = "HDF5 files"
_BY_HAND = (
    "read it with its own library and write the episodes with write_replay_buffer of "
    "uva_jax.data.replay_writer"
)
_FOREIGN = (  # pattern of file names, format, and what to do
    (r"(^|/)meta/info\.json$|\.parquet$", "a LeRobot data set (parquet)", _BY_HAND),
    (
        r"\.(hdf5|h5)$",
        _HDF5,
        "import them with python -m uva_jax import --kind libero or --kind robomimic",
    ),
    (r"\.tfrecord", "an RLDS data set (TFRecord)", _BY_HAND),
    (r"\.np[yz]$", "NumPy's files", _BY_HAND),
    (r"(^|/)data\.pkl$", "a PyTorch checkpoint", "give the recording that it was trained on"),
    (r"\.(tar|tgz|gz|bz2|xz|zst|7z|rar)$", "a packed archive", "unpack it and give what it holds"),
)
_MAGIC = {  # first bytes of a file -> a name that `_FOREIGN` matches
    b"\x89HDF": "a.hdf5",
    b"PAR1": "a.parquet",
    b"\x93NUMPY": "a.npy",
    b"\x1f\x8b": "a.gz",
    b"\xfd7zXZ": "a.xz",
    b"\x28\xb5\x2f\xfd": "a.zst",
    b"7z\xbc\xaf": "a.7z",
}


class Container(ABC):
    """The files of a zarr, by names relative to its root.

    Attributes:
      path: of the folder or zip.
      arrays: names of arrays, such as "data/img", with the zarr version of each.
    """

    path: Path
    arrays: dict[str, int]

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Reads a file; returns None if there is none."""

    @abstractmethod
    def below(self, folder: str) -> Iterator[str]:
        """Yields the names of all files below a folder, relative to it."""

    @abstractmethod
    def kvstore(self, folder: str) -> dict:
        """Returns tensorstore's specification of a folder."""

    def metadata(self, array: str) -> tuple[int, dict]:
        """Reads the version and the metadata of an array."""
        version = self.arrays[array]
        return version, self._json(f"{array}/{_METADATA[version]}")

    def attributes(self, group: str = "") -> dict:
        """Reads the attributes of a group; "": the root."""
        prefix = f"{group}/" if group else ""
        found = self._json(f"{prefix}zarr.json").get("attributes") or {}
        return {**found, **self._json(f"{prefix}.zattrs")}

    def _json(self, name: str) -> dict:
        content = self.read(name)
        return {} if content is None else parse_json(content, f"{self.path}: {name}")


class _Folder(Container):
    def __init__(self, path: Path):
        self.path = path
        folders = [
            f"{group}/{p.name}" for group in GROUPS for p in sorted((path / group).glob("*"))
        ]
        self.arrays = {
            name: version
            for name in folders
            for version, file in reversed(_METADATA.items())
            if (path / name / file).is_file()
        }

    def read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def below(self, folder: str) -> Iterator[str]:
        base = self.path / folder
        for where, _, files in os.walk(base):
            inner = os.path.relpath(where, base)
            yield from files if inner == "." else (f"{inner}/{file}" for file in files)

    def kvstore(self, folder: str) -> dict:
        return {"driver": "file", "path": f"{self.path.resolve()}/{folder}/"}


class _Zip(Container):
    def __init__(self, path: Path, archive: zipfile.ZipFile, root: str):
        self.path, self._archive, self._root = path, archive, root
        self.arrays = {
            "/".join(parts[:2]): version
            for version, file in reversed(_METADATA.items())
            for parts in (n.split("/") for n in self._files[""] if n.endswith(f"/{file}"))
            if len(parts) == 3 and parts[0] in GROUPS
        }

    @cached_property
    def _files(self) -> dict[str, list[str]]:
        """Names of files by array; under "" all names."""
        found, start = defaultdict(list), len(self._root)
        for name in self._archive.namelist():
            if name.startswith(self._root) and not name.endswith("/"):
                parts = name[start:].split("/", 2)
                found[""].append(name[start:])
                if len(parts) == 3:
                    found["/".join(parts[:2])].append(parts[2])
        return found

    def read(self, name: str) -> bytes | None:
        try:
            return self._archive.read(f"{self._root}{name}")
        except KeyError:
            return None

    def below(self, folder: str) -> Iterator[str]:
        return iter(self._files.get(folder, ()))

    def kvstore(self, folder: str) -> dict:
        base = {"driver": "file", "path": str(self.path.resolve())}
        return {"driver": "zip", "base": base, "path": f"{self._root}{folder}/"}


def open_container(path: Path) -> Container:
    """Opens a zarr: a folder, or a zip that may hold it in a folder.

    Raises:
      UserError: there is none; the message names what is there.
    """
    if not path.exists():
        raise UserError(f"there is no replay buffer at {path}: check the path")
    return _open_zip(path) if path.is_file() else _open_folder(path)


def check_kind(path: Path) -> None:
    """A quick look at what is given as a zarr, before long work on other things.

    Raises:
      UserError: it is something else, which is named.
    """
    if path.is_dir():
        _open_folder(path)
    elif said := foreign(path):
        raise UserError(f"{path} holds {said}")


def parse_json(content: bytes, name: str) -> dict:
    """Parses a JSON object.

    Raises:
      UserError: it is damaged or not an object.
    """
    try:
        found = json.loads(content)
    except ValueError as error:
        raise UserError(f"{name} is not readable JSON ({error}): the copy is damaged") from error
    if not isinstance(found, dict):
        raise UserError(f"{name} should hold a JSON object: the copy is damaged")
    return found


def foreign(path: Path) -> str | None:
    """Returns the other format of a file or folder and what to do with it, or None if unknown."""
    if path.is_dir():
        return _foreign(_look(path)[1])
    with open(path, "rb") as file:
        start = file.read(8)
    return _foreign(
        [*(name for magic, name in _MAGIC.items() if start.startswith(magic)), path.name]
    )


def not_hdf5(path: Path) -> str | None:
    """Returns a sentence about a file or folder given as HDF5, if it is known to be another."""
    if _is_buffer(path) or path.name.endswith(".zarr.zip"):
        return f"{path} is a zarr: use it as it is, or import it with --kind zarr"
    said = foreign(path)
    return f"{path} holds {said}" if said and not said.startswith(_HDF5) else None


def _foreign(names: Iterable[str]) -> str | None:
    names = list(names)
    for pattern, what, way in _FOREIGN:
        if any(re.search(pattern, name) for name in names):
            return f"{what}, not a zarr: {way}"
    return None


def _is_buffer(folder: Path) -> bool:
    return any((folder / _ENDS / file).is_file() for file in _METADATA.values())


def _look(path: Path) -> tuple[list[Path], list[str]]:
    """Returns the replay buffers in a folder, up to a limited depth, and names of other files."""
    buffers, names = [], []
    for count, (where, folders, files) in enumerate(os.walk(path)):
        inner = os.path.relpath(where, path)
        if where != str(path) and _is_buffer(Path(where)):
            buffers.append(Path(where))
            folders.clear()
            continue
        if inner.count(os.sep) >= _LOOK_DEPTH - 1 or count > _LOOK_FOLDERS:
            folders.clear()
        folders.sort()
        buffers += [Path(where) / file for file in files if file.endswith(".zarr.zip")]
        names += [os.path.join(inner, file) for file in files]
    return sorted(buffers), names


def _open_folder(path: Path) -> Container:
    container = _Folder(path)
    grouped = all((path / group).is_dir() for group in GROUPS)
    if grouped and container.arrays:
        return container
    buffers, names = _look(path)
    buffers = [p for p in path.resolve().parents[:2] if _is_buffer(p)] or buffers
    if not buffers and (said := _foreign(names)):
        raise UserError(f"{path} holds {said}")
    if grouped:
        return container
    hint = "; it is a zarr of version 3" if (path / "zarr.json").exists() else ""
    if buffers:
        several = "one of " if len(buffers) > 1 else ""
        hint = f"; did you mean {several}{', '.join(map(str, buffers[:4]))}?"
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{path} is not a replay buffer: a zarr folder with data/ and meta/ is needed, "
        f"found {found}{hint}"
    )


def _open_zip(path: Path) -> Container:
    tails = tuple(f"/{_ENDS}/{file}" for file in _METADATA.values())
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        if said := foreign(path):
            raise UserError(f"{path} holds {said}") from error
        raise UserError(f"{path} is neither a zarr folder nor a readable zip: {error}") from error
    names = archive.namelist()
    ends = [name for name in names if f"/{name}".endswith(tails)]
    roots = sorted({name[: name.rindex(_ENDS)] for name in ends})
    if len(roots) == 1:
        return _Zip(path, archive, roots[0])
    archive.close()
    if not roots and (said := _foreign(names)):
        raise UserError(f"{path} holds {said}")
    found = ", ".join(roots or sorted({n.split("/")[0] for n in names})) or "nothing"
    raise UserError(
        f"{path} should hold one zarr replay buffer (with meta/episode_ends), but holds "
        f"{len(roots)}; found {found}"
    )
