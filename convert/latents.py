"""Converts upstream's language latents (`prepared_data/language_latents.pkl`) to a plain .npz file.

The pickle is a dictionary of numpy vectors by task. It is read as records (`pickle_records.py`), so
that no code in it runs.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np

from convert.formats.numpy_records import array_of
from convert.formats.open_file import written_whole
from convert.formats.pickle_records import loads
from uva_jax.runtime.errors import UserError

MAX_BYTES = 64 << 20


def read_latents(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the vectors (width,) float32 of a language_latents.pkl by task.

    Raises:
      UserError: the file is missing, damaged, or not a pickled dictionary of vectors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}: give upstream's language_latents.pkl")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES >> 20} MiB: it holds no latents by task")
    found = loads(path.read_bytes(), str(path))
    if not isinstance(found, dict) or not found:
        raise UserError(
            f"{path} holds no dictionary of vectors by task: give upstream's language_latents.pkl"
        )
    return {str(task): _vector(value, f"{path}: {task!r}") for task, value in found.items()}


def _vector(value: object, name: str) -> np.ndarray:
    try:
        values = array_of(value)
    except ValueError as error:
        raise UserError(f"{name} {error}; no code in the file was run") from None
    if values.ndim != 1 or not np.isfinite(values).all():
        raise UserError(f"{name} is no vector of finite numbers (its shape is {values.shape})")
    return values.astype(np.float32)


def convert_latents(path: str | os.PathLike, out: str | os.PathLike) -> dict[str, int]:
    """Writes the vectors of a language_latents.pkl as an .npz, one array by task.

    Returns:
      {task: width}.

    Raises:
      UserError: as for `read_latents`, or the file cannot be written.
    """
    if Path(out).suffix != ".npz":
        raise UserError(f"the output is {out}, but its name must end in .npz")
    vectors = read_latents(path)
    total = sum(v.nbytes for v in vectors.values()) + 1024 * len(vectors)
    with written_whole(out, total) as file, zipfile.ZipFile(file, "w") as archive:
        for task, vector in vectors.items():  # not np.savez, because a task can have any name
            with archive.open(zipfile.ZipInfo(f"{task}.npy"), "w") as member:
                np.lib.format.write_array(member, vector)
    return {task: len(vector) for task, vector in vectors.items()}
