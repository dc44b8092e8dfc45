"""Files and folders that hold the old content or the new one, whatever ends the process.

New content is made under another name beside the old and renamed when it is complete and on disk.
A process killed in between leaves that other name behind, which nobody reads.
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
    """A name to write a file to, which becomes `path` once the block has ended well.

    The name has the suffix of `path`, for writers that go by it. Missing folders are made.
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
    """Whether a name is one of `new_file`'s, left by a process that was killed."""
    return re.fullmatch(r"\..*\.tmp(\.[^.]*)?", path.name) is not None


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes a small file."""
    with new_file(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON; see `plain` for what it may hold."""
    write_bytes(path, (json.dumps(plain(value), indent=2, allow_nan=False) + "\n").encode())


def read_json(path: str | os.PathLike) -> dict[str, Any] | None:
    """Reads a JSON object; None where there is no such file or it holds something else."""
    try:
        value = json.loads(Path(path).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def plain(value: Any) -> Any:
    """Returns what JSON can hold: arrays as lists, paths as text, non-finite numbers as null."""
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
    """An empty folder to fill, which takes the place of `path` once the block has ended well.

    A killed process leaves the old folder or the new one or, in the moment between two renames,
    none; never a mixture. Only one writer may be at work on a `path` at a time.

    Args:
      path: the folder; an older one is removed.
      is_primary, barrier: for several processes that fill one folder. The primary makes and names
        it, while the others wait at the barriers.
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
    """Removes a folder at once, so that a killed process leaves no half of it under its name."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(path, old)
    shutil.rmtree(old)
