"""Policies as a .safetensors file with the policy's json beside it (x.safetensors, x.json).

The names, shapes and dtypes are those of the PyTorch state dict, so whatever reads safetensors
gets the tensors; the json is a policy folder's `policy.json` with the hash of the tensors' file.
Both ways are done a tensor at a time, because the safetensors library wants all of a file's tensors
in memory to write it; what a file's header says is checked by `storage/safetensors.py`.
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
    """The json that belongs to a .safetensors file."""
    return Path(path).with_suffix(".json")


class SafetensorsFile(OpenFile):
    """An open .safetensors file whose bytes must have the hash `expected`, if that is given."""

    expected: str | None = None

    def sha256(self) -> str:
        """The hash of the whole file; raises UserError if the json states another one."""
        found = super().sha256()
        if self.expected not in (None, found):
            raise UserError(
                f"{self.path} is damaged or was changed: {json_of(self.path)} states another "
                'sha256; take a fresh copy of both, or remove "sha256" from the json if you '
                "changed the tensors yourself."
            )
        return found


def read(path: str | os.PathLike) -> tuple[SafetensorsFile, dict]:
    """Opens the pair; tensor bytes stay on disk until they are asked for.

    Returns:
      The open file, and a payload as an export of this project has it in a checkpoint:
      "state_dicts" with the tensors as "ema_model", and "uva_jax" with the architecture.

    Raises:
      UserError: a file is missing, or anything in it contradicts the format.
    """
    file = SafetensorsFile(path)
    try:
        entries = safetensors.entries(file.size, lambda *place: file.read_at(*place).tobytes())
        tensors = {name: _tensor(file, name, entry) for name, entry in entries.items()}
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{file.path} is no sound safetensors file ({error}): take a fresh copy."
        ) from None
    beside = json_of(path)
    if not beside.exists():
        raise UserError(
            f"{file.path} has no {beside.name} beside it, which says what the policy is; copy "
            "both files that 'python -m convert to_torch' wrote."
        )
    if beside.stat().st_size > MAX_JSON:
        raise UserError(f"{beside} has more than {MAX_JSON >> 20} MiB, which no policy needs.")
    _, described = parse_description(beside)
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
    """Writes tensors and `description.describe`'s values as a pair; each file appears whole.

    Raises UserError for what cannot be written, and leaves nothing behind then.
    """
    if json_of(path).exists():
        try:
            parse_description(json_of(path))
        except UserError:
            raise UserError(
                f"{json_of(path)} is not a policy's json, and would be replaced: give {path} "
                "another name."
            ) from None
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)  # so all are aligned
    places, reached = {}, 0
    for name in order:
        places[name] = [reached, reached + tensors[name].nbytes]
        reached = places[name][1]
    for name, value in tensors.items():
        dtype = value.dtype.newbyteorder("=")
        if dtype not in safetensors.NAMES:
            raise UserError(f"{path} cannot be written: safetensors has no dtype {dtype}.")
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
        with written_whole(json_of(path), len(text)) as beside:
            beside.write(text)
