"""A writer of TensorBoard event files, for scalars only.

It uses no library, because tensorboardX imports torch if it is installed and TensorFlow is large.
The format is TFRecord frames (length, masked CRC-32C, payload, masked CRC-32C) around `Event`
protocol buffers. Writes are synchronous, so that a full disk raises here and not in a thread.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

_file_number = itertools.count()


class EventFile:
    """An open event file.

    Args:
      folder: one TensorBoard run, made if missing; its files are shown as one series.
      first_step: TensorBoard drops values of the folder's earlier files from this step on, because
        a run resumed at this step logs them again.
    """

    def __init__(self, folder: str | os.PathLike, first_step: int):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # Readers sort the files of a folder by name, oldest first; the number and the process id
        # separate two writers that start in the same second.
        name = f"events.out.tfevents.{now:.0f}.{socket.gethostname()}"
        self._file = open(
            folder / f"{name}.{os.getpid()}.{next(_file_number):05d}", "xb", buffering=0
        )
        self._write(_double(1, now) + _bytes(3, b"brain.Event:2"))
        session_start = _varint(1, 1)
        self._write(_double(1, now) + _varint(2, first_step) + _bytes(7, session_start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one event with a value for each tag."""
        summary = b"".join(
            _bytes(1, _bytes(1, tag.encode()) + _float(2, value)) for tag, value in values.items()
        )
        self._write(_double(1, time.time()) + _varint(2, step) + _bytes(5, summary))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked_crc(length) + event + _masked_crc(event))


def _key(field: int, wire_type: int) -> bytes:
    return bytes([field << 3 | wire_type])


def _varint(field: int, value: int) -> bytes:
    return _key(field, 0) + _base128(value)


def _double(field: int, value: float) -> bytes:
    return _key(field, 1) + struct.pack("<d", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _key(field, 2) + _base128(len(value)) + value


def _float(field: int, value: float) -> bytes:
    try:
        return _key(field, 5) + struct.pack("<f", value)
    except OverflowError:  # finite, but beyond float32
        return _key(field, 5) + struct.pack("<f", float("inf") if value > 0 else float("-inf"))


def _base128(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # the Castagnoli polynomial
        table.append(byte)
    return table


_TABLE = _crc_table()


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C, masked as TFRecord requires."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
