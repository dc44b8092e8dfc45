"""Hashes of values, arrays and files, and the identity of a stage, which is made of them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from uva_jax.storage.atomic import plain, read_json, write_json

_REST_SECONDS = 2.0  # a file changed more recently may change again with the same mtime
_SHOWN_CHANGES = 8


def hash_json(value: Any) -> str:
    """Returns the SHA-256 of a value as JSON; the order of keys does not matter.

    Raises:
      TypeError: the value holds something that `plain` does not convert.
    """
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def hash_arrays(arrays: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of arrays by name: of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        values = np.asarray(array)
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values.reshape(-1)).view(np.uint8))
    return digest.hexdigest()


@dataclass(frozen=True)
class Part(os.PathLike):
    """A path to a folder of which not all counts.

    Attributes:
      path: of the whole.
      group: a folder in it.
      members: the folders in the group that count; others are not looked into.
    """

    path: str | os.PathLike
    group: str
    members: tuple[str, ...]

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    __str__ = __fspath__


@dataclass(frozen=True)
class Identity:
    """The values that a stage's result depends on, and their hashes.

    Attributes:
      config: the settings on which the result depends, by dotted name.
      inputs: hashes of the stages and external files it reads, by label.
    """

    config: Mapping[str, Any]
    inputs: Mapping[str, str]

    @cached_property
    def config_hash(self) -> str:
        """SHA-256 of the settings."""
        return hash_json(self.config)

    @cached_property
    def inputs_hash(self) -> str:
        """SHA-256 of the inputs' hashes."""
        return hash_json(self.inputs)

    @property
    def hash(self) -> str:
        """SHA-256 of both hashes."""
        return hash_json([self.config_hash, self.inputs_hash])

    def record(self) -> dict[str, Any]:
        """Returns a JSON record for `matches` and `changes`."""
        hashes = {"config_hash": self.config_hash, "inputs_hash": self.inputs_hash}
        return {**hashes, "config": self.config, "inputs": self.inputs}

    def matches(self, record: Mapping[str, Any] | None) -> bool:
        """Whether a record has the same configuration and inputs."""
        return (
            record is not None
            and record.get("config_hash") == self.config_hash
            and record.get("inputs_hash") == self.inputs_hash
        )

    def changes(self, record: Mapping[str, Any]) -> str:
        """Returns the differences from a record: `head.depth: 3 -> 4; input convert`."""
        old, new = record.get("config", {}), self.config
        said = [
            f"{key}: {_shown(old, key)} -> {_shown(new, key)}"
            for key in sorted(old.keys() | new.keys())
            if _shown(old, key) != _shown(new, key)
        ]
        old, new = record.get("inputs", {}), self.inputs
        said += [f"input {k}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
        more = len(said) - _SHOWN_CHANGES
        return "; ".join(said[:_SHOWN_CHANGES] + ([f"and {more} more"] if more > 0 else []))


def shaping_values(config: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Returns the JSON values of the settings at or below dotted keys, by dotted name.

    Raises:
      ValueError: the configuration lacks one of the keys.
    """
    leaves: dict[str, Any] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key in value:
                collect(f"{name}.{key}", value[key])
        else:
            leaves[name] = plain(value)

    for dotted in keys:
        value: Any = config
        for part in dotted.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise ValueError(f"a stage reads {dotted!r}, which the configuration lacks")
            value = value[part]
        collect(dotted, value)
    return leaves


def external_hash(path: str | os.PathLike, workdir: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file's content, or of the names and contents of a folder's files.

    Of a `Part` that is a folder, only what counts is opened. `workdir/.hashes.json` caches hashes
    by size and modification time, so that large files are not read again on every run.
    """
    root, cache_path = Path(path), Path(workdir) / ".hashes.json"
    cache = read_json(cache_path) or {}
    known = len(cache)
    part = path if isinstance(path, Part) else None
    files = sorted(_files(root, part)) if root.is_dir() else [root]
    hashes = {str(p.relative_to(root)): _file_hash(p, cache) for p in files}
    if len(cache) != known:
        write_json(cache_path, cache)
    return hash_json(hashes) if root.is_dir() else hashes["."]


def _files(root: Path, part: Part | None) -> Iterator[Path]:
    for where, folders, names in os.walk(root):
        if part and Path(where) == root / part.group:
            folders[:] = [folder for folder in folders if folder in part.members]
        yield from (file for name in names if (file := Path(where, name)).is_file())


def _file_hash(path: Path, cache: dict[str, str]) -> str:
    stat = path.stat()
    key = f"{path.absolute()}|{stat.st_size}|{stat.st_mtime_ns}"
    if key in cache:
        return cache[key]
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - stat.st_mtime > _REST_SECONDS:
        cache[key] = digest
    return digest


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "absent"
