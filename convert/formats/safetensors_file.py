"""Reads and writes policies as a pair of files, x.safetensors and x.json.

The tensors have the names, shapes and dtypes of the PyTorch state dict; the json is a policy
folder's `policy.json` with the hash of the tensors' file. One tensor is in memory at a time, while
the safetensors library needs all of them to write a file. `storage/safetensors.py` checks the
header.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert.formats.open_file import OpenFile, written_whole
from convert.formats.torch_tensors import LazyTensor, Storage, stored_bytes
from uva_jax.models.description import parse_description
from uva_jax.runtime.errors import UserError
from uva_jax.storage import safetensors
from uva_jax.storage.lazy_array import LazyArray, ahead

ENDING = ".safetensors"
MAX_JSON = 16 << 20


def json_of(path: str | os.PathLike) -> Path:
    """Returns the path of the json that belongs to a .safetensors file."""
    return Path(path).with_suffix(".json")


class SafetensorsFile(OpenFile):
    """An open .safetensors file, with the `expected` SHA-256 of its bytes, or None."""

    expected: str | None = None

    def sha256(self) -> str:
        """Returns the SHA-256 of the whole file.

        Raises:
          UserError: it is not the expected one.
        """
        found = super().sha256()
        if self.expected not in (None, found):
            raise UserError(
                f"{self.path} is damaged or was changed: {json_of(self.path)} states another "
                'sha256; take a fresh copy of both, or remove "sha256" from the json if you '
                "changed the tensors yourself"
            )
        return found


def read(path: str | os.PathLike) -> tuple[SafetensorsFile, dict]:
    """Opens the pair; tensors are read when they are loaded.

    Returns:
      the open file, and the payload of an exported checkpoint: "state_dicts" with the tensors as
      "ema_model", and "uva_jax" with the architecture.

    Raises:
      UserError: a file is missing or contradicts the format.
    """
    file = SafetensorsFile(path)
    try:
        entries = safetensors.entries(file.size, lambda *place: file.read_at(*place).tobytes())
        tensors = {name: _tensor(file, name, entry) for name, entry in entries.items()}
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{file.path} is not a valid safetensors file ({error}): take a fresh copy"
        ) from None
    description = json_of(path)
    if not description.exists():
        raise UserError(
            f"{file.path} lacks {description.name} in its folder, which holds the policy's "
            "architecture: copy both files that 'python -m convert to_torch' wrote"
        )
    if description.stat().st_size > MAX_JSON:
        raise UserError(
            f"{description} has more than {MAX_JSON >> 20} MiB, so it is not a policy's json: take "
            "a fresh copy"
        )
    _, described = parse_description(description)
    file.expected = described.get("sha256")
    payload = {
        "state_dicts": {"ema_model": tensors},
        "pickles": {},
        "uva_jax": json.dumps({"policy": described["policy"]}),
    }
    return file, payload


def _tensor(file: OpenFile, name: str, entry: safetensors.Entry) -> LazyTensor:
    storage = Storage(file, name, entry.dtype, entry.offset, entry.nbytes)
    strides, step = [], 1
    for extent in reversed(entry.shape):
        strides.insert(0, step)
        step *= max(extent, 1)
    return LazyTensor(storage, entry.dtype, entry.shape, tuple(strides))


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray | LazyTensor | LazyArray],
    described: Mapping,
) -> None:
    """Writes tensors and the values of `description.describe` as a pair, each file atomically.

    Args:
      path: of the .safetensors file.
      tensors: by name.
      described: the values for the json.

    Raises:
      UserError: a tensor or a file cannot be written; nothing is left behind.
    """
    if json_of(path).exists():
        try:
            parse_description(json_of(path))
        except UserError:
            raise UserError(
                f"{json_of(path)} exists and is not a policy's json: give {path} another name"
            ) from None
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    order = sorted(
        tensors, key=lambda name: -tensors[name].dtype.itemsize
    )  # so that all are aligned
    places, reached = {}, 0
    for name in order:
        places[name] = [reached, reached + tensors[name].nbytes]
        reached = places[name][1]
    for name, value in tensors.items():
        dtype = value.dtype.newbyteorder("=")
        if dtype not in safetensors.NAMES:
            raise UserError(
                f"{path} cannot be written: safetensors has no dtype {dtype}; convert the array "
                "first"
            )
        shape = list(value.shape)
        header[name] = {
            "dtype": safetensors.NAMES[dtype],
            "shape": shape,
            "data_offsets": places[name],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with written_whole(path, 8 + len(text) + reached) as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for parts in ahead(lambda name: list(stored_bytes(tensors[name])), order):
            for part in parts:
                digest.update(part)
                file.write(part)
        values = dict(described) | {"sha256": digest.hexdigest()}
        text = (json.dumps(values, indent=1) + "\n").encode()
        with written_whole(json_of(path), len(text)) as description:
            description.write(text)
