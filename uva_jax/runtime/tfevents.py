"""TensorBoard event files, scalars only, without any library.

tensorboardX imports torch whenever it is installed, and TensorFlow is larger still; neither belongs
in a run. The format is small: TFRecord frames (length, masked CRC-32C, payload, masked CRC-32C)
around `Event` protocol buffers. Writes are synchronous, so that a full disk is an error here and
not a silent death of a background thread.
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
    """An event file in `folder` (made if missing), ready for scalars.

    Args:
      folder: one TensorBoard run; several files in it are shown as one series.
      first_step: TensorBoard drops what earlier files of the folder hold at this step and later,
        which is what a run resumed at that step logs again.
    """

    def __init__(self, folder: str | os.PathLike, first_step: int):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # readers take the files of a folder in the order of their names, oldest first; the number
        # and the process id keep two writers of one second apart
        name = f"events.out.tfevents.{now:.0f}.{socket.gethostname()}"
        self._file = open(
            folder / f"{name}.{os.getpid()}.{next(_file_number):05d}", "xb", buffering=0
        )
        self._write(_double(1, now) + _bytes(3, b"brain.Event:2"))
        session_start = _varint(1, 1)
        self._write(_double(1, now) + _varint(2, first_step) + _bytes(7, session_start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one event with a value a tag."""
        summary = b"".join(
            _bytes(1, _bytes(1, tag.encode()) + _float(2, value)) for tag, value in values.items()
        )
        self._write(_double(1, time.time()) + _varint(2, step) + _bytes(5, summary))

    def close(self) -> None:
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
    """CRC-32C, rotated and shifted as TFRecord wants it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
