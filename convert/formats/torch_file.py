"""Reads and writes PyTorch checkpoints (.ckpt, .pth, .pt) without torch and without running code.

`read` returns the payload as plain values, with tensors as `LazyTensor` (bytes are read on demand)
and all other objects as inert `Record`; a .safetensors file with its json is read as the equivalent
checkpoint. `write` makes a file for torch.load. Records are written as the calls they came from, so
nothing is lost.
"""

import hashlib
import os
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from convert.formats import omegaconf_records, safetensors_file
from convert.formats.omegaconf_records import records_from_dict
from convert.formats.open_file import OpenFile
from convert.formats.pickle_records import Global, Persistent, Record, loads
from convert.formats.pickle_writer import dumps
from convert.formats.torch_tensors import (
    QUANTISED_STORAGES,
    REBUILD,
    REBUILD_PARAMETER,
    REBUILD_SIZE,
    REBUILD_V2,
    REBUILD_V3,
    STORAGE_NAMES,
    STORAGES,
    UNTYPED_NAMES,
    UNTYPED_STORAGE,
    LazyTensor,
    Size,
    Storage,
    size_record,
    stored_bytes,
)
from convert.formats.torch_zip import Archive, Member, write_archive
from uva_jax.runtime.errors import UserError
from uva_jax.storage.lazy_array import LazyArray

__all__ = [
    "Checkpoint",
    "Global",
    "LazyTensor",
    "Record",
    "Size",
    "Storage",
    "dump_records",
    "load_records",
    "read",
    "records_from_dict",
    "write",
]

MAX_PICKLE_BYTES = 256 << 20


@dataclass(eq=False)
class Checkpoint:
    """An open checkpoint; `payload` is the value that was given to torch.save."""

    path: Path
    payload: object
    archive: OpenFile

    @property
    def state_dict_names(self) -> tuple[str, ...]:
        """Returns the names in `payload["state_dicts"]` (UVA: model, ema_model, optimizer, ...)."""
        parts = self.payload.get("state_dicts") if isinstance(self.payload, dict) else None
        return tuple(parts) if isinstance(parts, dict) else ()

    def state_dict(self, name: str) -> dict:
        """Returns UVA's `payload["state_dicts"][name]`.

        Raises:
          UserError: there is none.
        """
        names = self.state_dict_names
        found = self.payload["state_dicts"][name] if name in names else None
        if not isinstance(found, dict):
            there = ", ".join(map(str, names)) or "no state dicts at all"
            raise UserError(
                f"{self.path} has no state dict {name!r}: it holds {there}; choose one of them or "
                "give a checkpoint that UVA's training saved"
            )
        return found

    @cached_property
    def cfg(self) -> dict:
        """Returns the configuration as plain values, with interpolations resolved if possible.

        Raises:
          UserError: the file has no configuration.
        """
        cfg = self.payload.get("cfg") if isinstance(self.payload, dict) else None
        if cfg is None:
            raise UserError(
                f"{self.path} holds no configuration (cfg), so attention heads and sampling steps "
                "are unknown: name the published policy that it equals "
                "('python -m convert from_torch CKPT OUT --like pusht'), or give its policy.json "
                "(--architecture FILE); 'to_torch' then writes a checkpoint with a cfg"
            )
        return omegaconf_records.to_plain(cfg, str(self.path))

    def sha256(self) -> str:
        """Returns the SHA-256 of the whole file, in hexadecimal."""
        return self.archive.sha256()


def read(path: str | os.PathLike) -> Checkpoint:
    """Opens a checkpoint; tensors are read when they are loaded.

    Raises:
      UserError: the file is not a valid zip checkpoint of PyTorch 1.6 or later in little-endian
        order, or a valid .safetensors file.
    """
    if os.fspath(path).endswith(safetensors_file.ENDING):
        file, payload = safetensors_file.read(path)
        return Checkpoint(file.path, payload, file)
    archive = Archive(path)
    if "byteorder" in archive.entries and archive.read("byteorder", 64) != b"little":
        raise UserError(
            f"{archive.path} was saved on a big-endian machine: save it again on a little-endian "
            "one"
        )
    storages: dict[str, Storage] = {}

    def persistent(pid: object) -> Storage:
        match pid:
            case ("storage", Global() as kind, str() as key, str(), int() as numel):
                pass
            case _:
                raise ValueError("a storage is described in an unknown way")
        known = kind == UNTYPED_STORAGE or (
            kind.module in ("torch", "torch.cuda") and kind.name in STORAGES
        )
        if kind.module.startswith("torch") and kind.name in QUANTISED_STORAGES:
            raise UserError(
                f"{archive.path} holds quantised tensors ({kind}), which are not supported: "
                "dequantise them (tensor.dequantize()) and save the checkpoint again"
            )
        if not known:
            raise ValueError(f"the storage class {kind} is not supported")
        dtype = STORAGES.get(kind.name)
        nbytes = numel * (dtype.itemsize if dtype else 1)
        entry = archive.entries.get(f"data/{key}")
        if entry is None or not 0 <= nbytes <= entry.size:
            held = "no bytes" if entry is None else f"{entry.size} bytes"
            raise ValueError(f"storage {key!r} needs {nbytes} bytes, but the file has {held}")
        if key not in storages:
            storages[key] = Storage(archive, key, dtype, entry.offset, nbytes)
        if (storages[key].dtype, storages[key].nbytes) != (dtype, nbytes):
            raise ValueError(f"storage {key!r} is described in two ways")
        return storages[key]

    data = archive.read("data.pkl", MAX_PICKLE_BYTES)
    payload = loads(data, str(archive.path), REBUILD, persistent)
    return Checkpoint(archive.path, payload, archive)


def write(path: str | os.PathLike, payload: object, head: object = None) -> None:
    """Writes `payload` as a file for torch.load(path, weights_only=False).

    Arrays, LazyArrays and LazyTensors become contiguous CPU tensors, and records become their
    calls. Tensors are copied one after another.

    Args:
      path: of the file.
      payload: the value.
      head: plain containers with some of the payload's tensors, for a second pickle, `head.pkl`,
        which shares their bytes and which torch.load ignores.

    Raises:
      UserError: a value or the file cannot be written; nothing is left behind.
    """
    tensors = _Tensors(str(path))
    pickled = dumps(payload, str(path), tensors.translate)
    identity = int.from_bytes(hashlib.sha256(pickled).digest(), "big") % 10**40
    plain = {} if head is None else {"head.pkl": dumps(head, str(path), tensors.translate)}
    small = {
        "data.pkl": pickled,
        ".format_version": b"1",
        ".storage_alignment": b"64",
        "byteorder": b"little",
        "version": b"3\n",
        ".data/serialization_id": b"%040d" % identity,
    }
    texts = [Member(name, len(content), [content]) for name, content in (small | plain).items()]
    members = texts[:4] + list(tensors.members.values()) + texts[4:]
    total = sum(member.size + 256 for member in members)
    write_archive(path, members, total)


class _Tensors:
    """Turns tensors into records while pickling, and collects their bytes for the archive."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.members: dict[object, Member] = {}  # storage -> its entry

    def translate(self, value: object) -> object:
        if isinstance(value, Size):
            return size_record(value)
        if isinstance(value, Storage):
            key = (id(value), value.dtype, 0, value.nbytes)
            chunks = value.archive.chunks(value.offset, value.nbytes)
            return self.persistent(key, value.dtype, value.nbytes, chunks)
        if isinstance(value, LazyTensor):
            view = (value.nbytes,) if value.contiguous else (value.shape, value.strides)
            key = (id(value.storage), value.dtype, value.offset, *view)
            tensor = self.tensor(key, value, value.dtype, value.requires_grad)
            if value.parameter:
                args = (tensor, value.requires_grad, OrderedDict())
                return Record(REBUILD_PARAMETER, args)
            return tensor
        if isinstance(value, np.ndarray | LazyArray):
            return self.tensor((id(value),), value, value.dtype.newbyteorder("="), False)
        return NotImplemented

    def tensor(self, key, value, dtype: np.dtype, requires_grad: bool) -> Record:
        if dtype not in STORAGE_NAMES and dtype not in UNTYPED_NAMES:
            raise UserError(
                f"{self.name} cannot be written: torch has no tensors of dtype {dtype}; convert "
                "the array first"
            )
        strides, step = [], 1
        for extent in reversed(value.shape):
            strides.insert(0, step)
            step *= max(extent, 1)
        typed = dtype if dtype in STORAGE_NAMES else None
        storage = self.persistent(key, typed, value.nbytes, stored_bytes(value))
        args = (storage, 0, tuple(value.shape), tuple(strides), requires_grad, OrderedDict())
        if typed is not None:
            return Record(REBUILD_V2, args)
        return Record(REBUILD_V3, (*args, Global("torch", UNTYPED_NAMES[dtype])))

    def persistent(self, key, dtype: np.dtype | None, nbytes: int, chunks) -> Persistent:
        if key not in self.members:
            self.members[key] = Member(f"data/{len(self.members)}", nbytes, chunks)
        number = self.members[key].name.removeprefix("data/")
        kind = Global("torch", STORAGE_NAMES[dtype]) if dtype is not None else UNTYPED_STORAGE
        numel = nbytes // (dtype.itemsize if dtype is not None else 1)
        return Persistent(("storage", kind, number, "cpu", numel))


def dump_records(value: object) -> bytes:
    """Returns a value without tensors (a source's `cfg`, its `pickles`) as bytes."""
    return dumps(
        value, "the record", lambda v: size_record(v) if isinstance(v, Size) else NotImplemented
    )


def load_records(data: bytes, name: str = "the record") -> object:
    """Returns the value that `dump_records` was given.

    Args:
      data: the bytes.
      name: of their file, for error messages.

    Raises:
      UserError: the bytes are damaged.
    """
    return loads(data, name, REBUILD_SIZE)
