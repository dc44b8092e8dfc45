"""Damaged and hostile .safetensors files; `hostile_torch` describes the tuples of a kind."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hostile_torch import CONFIG, Made

from convert.formats import safetensors_file
from uva_jax.models import description


def _pair(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    """Writes a .safetensors file from header and data, with a valid json."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(encoded) if length is None else length)
    path.write_bytes(size + encoded + data)
    values = description.describe(CONFIG, {})
    safetensors_file.json_of(path).write_text(json.dumps(values))


def headers() -> Made:
    """Headers with wrong values."""

    def entry(begin: int, end: int, shape=(1,), dtype: object = "F32") -> dict:
        return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}

    good, word = entry(0, 4), bytes(4)
    twice = b'{"a":' + json.dumps(good).encode() + b',"a":' + json.dumps(good).encode() + b"}"
    cases: dict[str, tuple] = {
        "length of 2**63": ({"a": good}, word, 1 << 63),
        "length of 100 MB": ({"a": good}, word, 100_000_001),
        "length one more than the file": (b"{}", b"", 3),
        "length 0": (b"", b"", 0),
        "header is not a json": (b"{evil", word),
        "header is a list": (b"[1]", word),
        "header of noise": (b"{" + np.random.default_rng(0).bytes(100), word),
        "endless header": (b'{"a":' + b"[" * 100_000, word),
        "a number of 5000 digits": (b'{"a":' + b"1" * 5000 + b"}", word),
        "a name twice": (twice, word),
        "an entry that is a number": ({"a": 1}, word),
        "an entry without offsets": ({"a": {"dtype": "F32", "shape": [1]}}, word),
        "offsets beyond the file": ({"a": entry(0, 8, (2,))}, word),
        "offsets beyond 2**64": ({"a": entry(1 << 65, (1 << 65) + 4)}, word),
        "negative offset": ({"a": entry(-4, 0)}, word),
        "offsets backwards": ({"a": entry(4, 0)}, word),
        "offsets of a text": ({"a": entry("0", "4")}, word),
        "overlapping tensors": ({"a": good, "b": good}, word),
        "partly overlapping": ({"a": entry(0, 8, (2,)), "b": entry(4, 12, (2,))}, word * 3),
        "a gap between tensors": ({"a": good, "b": entry(8, 12)}, word * 3),
        "data that belongs to none": ({"a": good}, word * 2),
        "shape larger than its bytes": ({"a": entry(0, 4, (2,))}, word),
        "negative extent": ({"a": entry(0, 4, (-1,))}, word),
        "extent of true": ({"a": entry(0, 4, (True,))}, word),
        "extent of 2**62": ({"a": entry(0, 4, (2**62, 4))}, word),
        "a thousand axes": ({"a": entry(0, 4, (1,) * 1000)}, word),
        "unknown dtype": ({"a": entry(0, 4, (1,), "EVIL")}, word),
        "dtype that is a list": ({"a": entry(0, 4, (1,), ["F32"])}, word),
        "no tensors": (b"{}", b""),
        "only a foreign tensor": ({"a": good}, word),
    }
    for name, arguments in cases.items():
        yield name, "", lambda path, arguments=arguments: _pair(path, *arguments)


def damaged_pairs(pair: Path) -> Made:
    """Pairs of files of which one is damaged."""
    whole, described = pair.read_bytes(), json.loads(safetensors_file.json_of(pair).read_text())

    def make(data: bytes = whole, beside: object = described) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            path.write_bytes(data)
            if beside is not None:
                text = beside if isinstance(beside, bytes) else json.dumps(beside).encode()
                safetensors_file.json_of(path).write_bytes(text)

        return write

    length = struct.unpack("<Q", whole[:8])[0]
    cuts = {"in the length": 4, "in the header": 8 + length // 2, "at the data": 8 + length}
    for name, size in (cuts | {"in the data": len(whole) - 100, "last byte": -1}).items():
        yield f"cut {name}", "not a valid safetensors", make(whole[:size])
    for name, place in {"first": 8 + length, "middle": len(whole) // 2 + 4000, "last": -1}.items():
        data = bytearray(whole)
        data[place] ^= 0x10
        yield f"flipped: {name} byte of the data", "states another sha256", make(bytes(data))
    yield "no json", "in its folder", make(beside=None)
    yield "empty json", "is damaged", make(beside=b"")
    yield "json of something else", "is damaged", make(beside={"model": 1})
    yield "endless json", "is damaged", make(beside=b"[" * 100_000)
    yield "json of a later version", "format 99", make(beside=described | {"format": 99})
    deep = json.loads(json.dumps(described))
    deep["policy"]["mar"]["encoder_depth"] = 10**9
    yield "json with a billion layers", "layers", make(beside=deep)
