"""Atomic writes of files and folders: a killed process leaves the old content or the new.

New content is written under a temporary name in the same folder and renamed when it is complete and
on disk. A killed process leaves the temporary name behind, which nothing reads.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary name to write to; it is renamed to `path` if the block raises nothing.

    The name has the suffix of `path`, because some writers depend on it. Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether a file is a temporary one that a killed process left in `new_file`."""
    return re.fullmatch(r"\..*\.tmp(\.[^.]*)?", path.name) is not None


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file atomically."""
    with new_file(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a value as JSON atomically.

    Raises:
      TypeError: the value holds something that `plain` does not convert.
    """
    write_bytes(path, (json.dumps(plain(value), indent=2, allow_nan=False) + "\n").encode())


def read_json(path: str | os.PathLike) -> dict[str, Any] | None:
    """Reads a JSON object; returns None if the file is missing or holds something else."""
    try:
        value = json.loads(Path(path).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def plain(value: Any) -> Any:
    """Converts a value for JSON: arrays to lists, paths to text, non-finite numbers to None.

    Raises:
      TypeError: the value cannot be converted.
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"{value!r} ({type(value).__name__}) cannot be stored as JSON")


@contextlib.contextmanager
def new_folder(
    path: str | os.PathLike,
    *,
    is_primary: bool = True,
    barrier: Callable[[str], None] = lambda name: None,
) -> Iterator[Path]:
    """Yields an empty folder, which replaces `path` if the block raises nothing.

    A killed process leaves the old folder or the new one or, between two renames, none; never a
    mixture. Only one writer may use a `path` at a time.

    Args:
      path: the folder; an older one is removed.
      is_primary, barrier: for several processes that fill one folder. The primary makes and
        renames it; the others wait at the barriers.
    """
    path = Path(path)
    new, old = (path.with_name(f".{path.name}.{end}") for end in ("new", "old"))
    with contextlib.ExitStack() as undo:
        if is_primary:
            for leftover in (new, old):
                shutil.rmtree(leftover, ignore_errors=True)
            new.mkdir(parents=True)
            undo.callback(shutil.rmtree, new, ignore_errors=True)
        barrier(f"{path.name}:opened")
        yield new
        barrier(f"{path.name}:written")
        if is_primary:
            if path.exists():
                os.rename(path, old)
            os.rename(new, path)
            shutil.rmtree(old, ignore_errors=True)
        undo.pop_all()
    barrier(f"{path.name}:named")


def remove_folder(path: Path) -> None:
    """Removes a folder atomically: after a kill it is complete or gone."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(path, old)
    shutil.rmtree(old)
