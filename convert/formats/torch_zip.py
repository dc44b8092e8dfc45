"""Reads and writes the zip container of a PyTorch checkpoint.

torch.save stores every entry uncompressed, so a tensor's bytes are read directly from the file, and
an archive that claims to unpack to more than it holds is refused. Files are written atomically.
"""

import itertools
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from convert.formats.open_file import OpenFile, Section, written_whole
from uva_jax.runtime.errors import UserError
from uva_jax.storage.lazy_array import ahead

ALIGNMENT = 64  # torch aligns the data of each entry to it, for memory mapping
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ZIP64_LIMIT_MARGIN = 1.05  # zipfile's rule for the 64-bit header of an entry


@dataclass(frozen=True, slots=True)
class Entry:
    """The place of an entry's data in the file."""

    offset: int
    size: int
    crc: int


class Archive(OpenFile):
    """An open checkpoint file; `entries` holds the entries by name below the archive's folder.

    Raises:
      UserError: the file is not a valid, uncompressed torch zip.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__(path)
        self._refuse_other_formats(bytes(self.read_at(0, min(self.size, 512))))
        self.entries = self._list()

    def read(self, name: str, limit: int) -> bytes:
        """Reads the bytes of an entry.

        Raises:
          UserError: it has more than `limit` bytes.
        """
        entry = self.entries[name]
        if entry.size > limit:
            raise UserError(
                f"{self.path} holds a {name} of {entry.size} bytes, but the limit is {limit}: it "
                "is not a checkpoint of a policy"
            )
        return bytes(self.read_at(entry.offset, entry.size))

    def sha256(self) -> str:
        """Returns the SHA-256 of the whole file.

        Raises:
          UserError: an entry does not have its checksum.
        """
        # torch writes zeros if checksums are switched off.
        entries = self.entries.items()
        return super().sha256(
            Section(name, e.offset, e.size, e.crc) for name, e in entries if e.crc
        )

    def _refuse_other_formats(self, head: bytes) -> None:
        start = head.lstrip().lower()
        again = "save it again with a PyTorch of 1.6 or later (torch.save writes a zip)"
        if not head:
            found, way_out = "is empty", "copy or download it again"
        elif head.startswith(b"version https://git-lfs"):
            found, way_out = "is a git-LFS pointer, not the checkpoint", "run git lfs pull first"
        elif start.startswith((b"<!doctype html", b"<html")):
            found, way_out = "is a web page, not a checkpoint", "download the file itself"
        elif head.startswith(_LEGACY_MAGIC) or head[257:262] == b"ustar":
            found, way_out = "is in the old PyTorch format from before the zip files", again
        elif head.startswith(b"\x80") and head[1:2] in b"\1\2\3\4\5":
            found, way_out = "is a bare pickle, not a torch zip file", again
        elif head[8:9] == b"{" and 0 < struct.unpack("<Q", head[:8])[0] < self.size:
            found = "is a safetensors file under another name"
            way_out = "let its name end in .safetensors, with the policy's .json in its folder"
        elif not head.startswith((b"PK\3\4", b"PK\5\6")):
            found, way_out = "is not a PyTorch checkpoint (no zip file)", "give a .ckpt or .pth"
        else:
            return
        raise UserError(f"{self.path} {found}: {way_out}")

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path} {what}: it is truncated or damaged; take a fresh copy")

    def _list(self) -> dict[str, Entry]:
        try:
            with os.fdopen(os.dup(self._file), "rb") as file, zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
        except (
            *(zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError),
            *(EOFError, IndexError),
        ):
            raise self._damaged("has no readable table of contents at its end") from None
        names = [info.filename for info in infos]
        roots = [n[: -len("data.pkl")] for n in names if n.endswith("/data.pkl")]
        roots = [root for root in roots if root.count("/") == 1]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(
                f"{self.path} holds two entries named {twice!r}, which torch.save never writes, so "
                "it is refused: take the file from its source again"
            )
        if len(roots) != 1 or f"{roots[0]}constants.pkl" in names:
            raise UserError(
                f"{self.path} is a zip file, but not one that torch.save wrote (no single data.pkl,"
                " or a TorchScript program): give a .ckpt or .pth file"
            )
        return {info.filename.removeprefix(roots[0]): self._place(info, roots[0]) for info in infos}

    def _place(self, info: zipfile.ZipInfo, root: str) -> Entry:
        name = info.filename
        inside = name.startswith(root) and "\\" not in name and ".." not in name.split("/")
        if not inside or len(name) > 512:
            raise UserError(
                f"{self.path} holds an entry named {name[:80]!r} outside its own folder: it is "
                "refused; take the file from its source again"
            )
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise UserError(
                f"{self.path} was repacked by another program (its entry {name!r} is compressed or "
                "encrypted): load and save it with torch"
            )
        if info.file_size != info.compress_size or info.header_offset + 30 > self.size:
            raise self._damaged(f"has no room for its entry {name!r}")
        header = bytes(self.read_at(info.header_offset, 30))
        name_size, extra_size = struct.unpack("<HH", header[26:])
        entry = Entry(info.header_offset + 30 + name_size + extra_size, info.file_size, info.CRC)
        if header[:4] != b"PK\3\4" or entry.offset + entry.size > self.size:
            raise self._damaged(f"has no room for its entry {name!r}")
        return entry


@dataclass(frozen=True, slots=True)
class Member:
    """An entry to write: name below the archive's folder, size, and bytes."""

    name: str
    size: int
    chunks: Iterable[bytes | memoryview]


def write_archive(path: str | os.PathLike, members: Iterable[Member], total: int) -> None:
    """Writes members, in order, as a torch zip.

    Args:
      path: of the file.
      members: the entries.
      total: expected bytes of data.

    Raises:
      UserError: the folder is missing, not writable, or full.
    """
    with (
        written_whole(path, total) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        for member, chunks in ahead(_begun, members):
            _write_member(archive, member, chunks)


def _begun(member: Member) -> tuple[Member, Iterator[bytes | memoryview]]:
    """Returns the member and its chunks, after computing the first of them."""
    chunks = iter(member.chunks)
    return member, itertools.chain([next(chunks, b"")], chunks)


def _write_member(
    archive: zipfile.ZipFile, member: Member, chunks: Iterable[bytes | memoryview]
) -> None:
    info = zipfile.ZipInfo(f"archive/{member.name}")
    info.file_size = member.size
    wide = member.size * _ZIP64_LIMIT_MARGIN > zipfile.ZIP64_LIMIT
    header = archive.fp.tell() + 30 + len(info.filename) + (20 if wide else 0)
    # An extra field, named FB as torch's, pads the space before the data.
    gap = -(header + 4) % ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", gap) + b"Z" * gap
    with archive.open(info, "w") as entry:
        for chunk in chunks:
            entry.write(chunk)
    info.extra = b""  # the table of contents at the end needs no padding
