"""Policies as a .safetensors file with the policy's json beside it (x.safetensors, x.json).

The names, shapes and dtypes are those of the PyTorch state dict, so whatever reads safetensors
gets the tensors; the json is a policy folder's `policy.json` with the hash of the tensors' file.
The container is 8 bytes of length, a json header and the bytes: both ways are done here, a tensor
at a time, because the safetensors library wants all of a file's tensors in memory to write it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.formats.open_file import OpenFile, written_whole
from convert.formats.torch_tensors import LazyTensor, Storage, stored_bytes
from uva_jax.runtime.errors import UserError
from uva_jax.storage.lazy_array import LazyArray, ahead

ENDING = ".safetensors"
MAX_HEADER = 100_000_000  # bytes; the library's own limit
MAX_JSON = 16 << 20
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
    from uva_jax.models import policy_folder  # jax is not needed to read a checkpoint

    file = SafetensorsFile(path)
    try:
        tensors = _tensors(file)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
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
    _, described = policy_folder.parse_description(beside)
    file.expected = described.get("sha256")
    payload = {
        "state_dicts": {"ema_model": tensors},
        "pickles": {},
        "uva_jax": json.dumps({"policy": described["policy"]}),
    }
    return file, payload


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header holds a name twice")
    return found


def _tensors(file: OpenFile) -> dict[str, LazyTensor]:
    if file.size < 8:
        raise ValueError(f"it has {file.size} bytes")
    length = int.from_bytes(file.read_at(0, 8).tobytes(), "little")
    if length > min(MAX_HEADER, file.size - 8):
        raise ValueError(f"its header would have {length} bytes, and the file has {file.size}")
    text = file.read_at(8, length).tobytes()
    if not text.startswith(b"{"):
        raise ValueError("its header is no json object")
    header = json.loads(text.decode(), object_pairs_hook=_unique)
    header.pop("__metadata__", None)
    start, total = 8 + length, file.size - 8 - length
    tensors, spans = {}, []
    for name, entry in header.items():
        dtype, shape, (begin, end) = (entry[key] for key in ("dtype", "shape", "data_offsets"))
        if dtype not in DTYPES:
            raise ValueError(f"{name!r} has the dtype {dtype!r}, which is not known here")
        if any(type(n) is not int or n < 0 for n in (*shape, begin, end)) or end > total:
            raise ValueError(f"the shape or place of {name!r} is impossible")
        storage = Storage(file, name, DTYPES[dtype], start + begin, max(end - begin, 0))
        strides = [1]
        for extent in shape[:0:-1]:
            strides.insert(0, strides[0] * max(extent, 1))
        strides = tuple(strides[: len(shape)])
        tensors[name] = LazyTensor(storage, DTYPES[dtype], tuple(shape), strides)
        if tensors[name].nbytes != end - begin:
            raise ValueError(f"{name!r} of shape {shape} has {end - begin} bytes")
        spans.append((begin, end))
    reached = 0
    for begin, end in sorted(spans):
        if begin != reached:
            raise ValueError("its tensors overlap or leave gaps")
        reached = end
    if reached != total:
        raise ValueError(f"its tensors have {reached} bytes, and the file has {total} for them")
    return tensors


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray | LazyTensor | LazyArray],
    described: Mapping,
) -> None:
    """Writes tensors and `policy_folder.describe`'s values as a pair; each file appears whole.

    Raises UserError for what cannot be written, and leaves nothing behind then.
    """
    from uva_jax.models import policy_folder

    if json_of(path).exists():
        try:
            policy_folder.parse_description(json_of(path))
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
        if dtype not in _NAMES:
            raise UserError(f"{path} cannot be written: safetensors has no dtype {dtype}.")
        shape = list(value.shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": places[name]}
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
