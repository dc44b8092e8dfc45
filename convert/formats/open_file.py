"""Reads parts of a checkpoint's file in place, or writes a file atomically.

The containers (`torch_zip`, `safetensors_file`) build on it and interpret the bytes.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import weakref
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from uva_jax.runtime.errors import UserError
from uva_jax.storage.atomic import new_file

ALIGNMENT = 64  # with this alignment jax takes an array over without a copy
CHUNK = 8 << 20
_HASH_CHUNK = 32 << 20  # large, because hashing in a thread waits for the GIL at each chunk


def aligned(size: int) -> np.ndarray:
    """Returns an uninitialised uint8 array (size,), aligned so that jax does not copy it."""
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size]


@dataclass(frozen=True, slots=True)
class Section:
    """A range of bytes with its expected checksum (CRC-32)."""

    name: str
    offset: int
    size: int
    crc: int


class OpenFile:
    """A file that stays open, so that its content stays the same if the file is replaced.

    Raises:
      UserError: the file is missing or cannot be read.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        try:
            self._file = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            if self.path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file")
            self.size = os.fstat(self._file).st_size
        except FileNotFoundError:
            raise UserError(
                f"{self.path} does not exist: give the path of a .ckpt, .pth or .safetensors file"
            ) from None
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be read ({error.strerror or error}): give the path of a "
                "checkpoint file that you may read"
            ) from None

    def read_at(self, offset: int, size: int) -> np.ndarray:
        """Reads `size` bytes from `offset` as uint8 (size,), aligned to `ALIGNMENT`.

        Raises:
          UserError: the file cannot be read, or ends before.
        """
        out = aligned(size)
        self._read_into(memoryview(out), offset)
        return out

    def _read_into(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._file, [view[done : done + CHUNK]], offset + done)
            except OSError as error:
                raise UserError(
                    f"{self.path} cannot be read ({error.strerror}): copy it to a disk that works"
                ) from None
            if got == 0:
                raise UserError(
                    f"{self.path} ends in the middle of its data: it was truncated after it was "
                    "opened; take a fresh copy"
                )
            done += got

    def sha256(self, sections: Iterable[Section] = ()) -> str:
        """Returns the SHA-256 of the whole file, in hexadecimal.

        Raises:
          UserError: a section does not have its expected checksum.
        """
        waiting = sorted(sections, key=lambda section: section.offset, reverse=True)
        begun: list[tuple[Section, int]] = []  # sections and their checksums so far
        digest, buffer = hashlib.sha256(), memoryview(aligned(min(self.size, _HASH_CHUNK)))
        for start in range(0, self.size, _HASH_CHUNK):
            part = buffer[: self.size - start]
            self._read_into(part, start)
            digest.update(part)
            while waiting and waiting[-1].offset < start + len(part):
                begun.append((waiting.pop(), 0))
            going_on = []
            for section, crc in begun:
                first, end = section.offset - start, section.offset + section.size - start
                crc = zlib.crc32(part[max(first, 0) : end], crc)
                if end > len(part):
                    going_on.append((section, crc))
                elif crc != section.crc:
                    raise UserError(
                        f"{self.path} is damaged: the bytes of its entry {section.name!r} are not "
                        "those that were written; take a fresh copy"
                    )
            begun = going_on
        return digest.hexdigest()

    def chunks(self, offset: int, size: int) -> Iterator[memoryview]:
        """Yields the bytes [offset, offset + size), a few MiB at a time."""
        for start in range(0, size, CHUNK):
            yield memoryview(self.read_at(offset + start, min(CHUNK, size - start)))


@contextlib.contextmanager
def written_whole(path: str | os.PathLike, total: int) -> Iterator[BinaryIO]:
    """Yields a file to write `total` bytes to; it gets the name `path` when it is complete.

    Raises:
      UserError: the folder is missing, not writable, or full.
    """
    path = Path(path)
    try:
        free = shutil.disk_usage(path.parent).free
        if free < total:
            raise OSError(errno.ENOSPC, f"{free >> 20} MiB are free")
        with new_file(path) as unfinished, open(unfinished, "wb") as file:
            yield file
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else "the file cannot be written"
        raise UserError(
            f"{path} was not written: {reason} ({error.strerror}), and {max(total >> 20, 1)} MiB "
            "are needed; free some space or choose another folder"
        ) from None
