"""Converts a PyTorch checkpoint of UVA to a policy.

`architecture.py` finds the architecture and `rules.py` has the table of names and layouts. Every
tensor is matched exactly once or ignored on purpose, every target is filled exactly once, and all
problems are reported together. Tensors are read one at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import ml_dtypes
import numpy as np

from convert import rules, state_dicts
from convert.architecture import (
    check_graftable,
    check_normalizer,
    contradictions,
    empty_policy,
    infer_policy,
)
from convert.formats import torch_file
from convert.formats.torch_file import Checkpoint, LazyTensor
from convert.formats.torch_tensors import in_c_order
from convert.state_dicts import WEIGHTS, state_tensors
from uva_jax.models import policy_folder, surgery
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import PolicyConfig
from uva_jax.runtime.errors import UserError
from uva_jax.storage.lazy_array import LazyArray

_SHOWN = 20  # problems that an error lists
_FLOATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)))


def to_array(tensor: LazyTensor, layout: rules.Layout) -> np.ndarray:
    """Returns the tensor's values in flax layout as float32.

    Raises:
      ValueError: the tensor has no floating type, is not finite, or does not fit float32.
    """
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"has dtype {tensor.dtype}, {_remedy(tensor.dtype)}")
    values = tensor.numpy()
    with np.errstate(over="ignore"):  # reported below
        array = in_c_order(layout.forward(values.astype(np.float32, copy=False)))
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise ValueError(f"has {bad} of {array.size} values that are not finite")
    if tensor.dtype == np.float64 and (values.astype(np.float32) != values).any():
        raise ValueError(
            "is float64 with values that float32 cannot hold (tensor.float() before saving)"
        )
    return array


def _remedy(dtype: np.dtype) -> str:
    if dtype.name.startswith("float8"):
        return "whose scale is stored separately (multiply by it and save as float32 or bfloat16)"
    if dtype.name in ("int8", "uint8"):
        return "as quantised weights have (dequantise it before saving)"
    return "which is not a floating type"


def plan(
    expected: Mapping[str, jax.ShapeDtypeStruct], tensors: Mapping[str, LazyTensor]
) -> tuple[dict[str, LazyArray], dict[str, str], list[str]]:
    """Finds the tensor of every array of a policy.

    Args:
      expected: `surgery.shapes` of the policy.
      tensors: of a checkpoint, by name.

    Returns:
      {path: array}; {ignored tensor: why}; [problem]: tensors without a rule, paths without a
      tensor, wrong shapes. Loading an array with wrong dtype or values that are not finite adds a
      problem to the list and gives zeros.
    """
    targets, ignored, problems = rules.plan(tensors)
    arrays: dict[str, LazyArray] = {}
    for path, (name, layout) in targets.items():
        if path not in expected:
            problems.append(f"{name} has no place in this architecture (it would be {path})")
            continue
        tensor, want = tensors[name], expected[path].shape
        try:
            # The layout is applied to an array without memory, to get its shape.
            got = layout.forward(np.broadcast_to(np.float32(0), tensor.shape)).shape
        except (ValueError, IndexError):
            got = None
        if got != want:
            problems.append(f"{name} has shape {tensor.shape}, but {path} takes {want}")
        else:
            load = functools.partial(_load, name, tensor, layout, want, problems)
            arrays[path] = LazyArray(want, np.dtype(np.float32), load)
    for path in expected:
        if path not in targets:
            back = rules.to_torch(path)
            problems.append(f"{back[0] if back else path} is missing")
    return arrays, ignored, problems


def _load(
    name: str, tensor: LazyTensor, layout: rules.Layout, shape: tuple[int, ...], problems: list[str]
) -> np.ndarray:
    try:
        return to_array(tensor, layout)
    except UserError:  # the file cannot be read
        raise
    except ValueError as error:
        problems.append(f"{name} {error}")
        return np.zeros(shape, np.float32)


def _refuse(source: str, arrays: Mapping[str, LazyArray], problems: list[str]) -> None:
    """Raises UserError if there are problems, after loading `arrays` to find all of them."""
    if problems:
        for array in arrays.values():
            array.load()
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UserError(
            f"{source} cannot be converted, {len(problems)} problem(s): "
            f"{'; '.join(problems[:_SHOWN])}{more}"
        )


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A checkpoint whose architecture and tensors are known and fit; no values are read yet."""

    checkpoint: Checkpoint
    weights: str
    tensors: Mapping[str, LazyTensor]
    config: PolicyConfig
    empty: Policy
    arrays: Mapping[str, LazyArray]
    ignored: Mapping[str, str]
    problems: list[str]
    notes: list[str]

    @property
    def source(self) -> str:
        return str(self.checkpoint.path)

    def facts(self, digest: str) -> dict[str, object]:
        raw = state_dicts.state_dicts(self.checkpoint)[WEIGHTS[self.weights]]
        wrappers = {part for name in raw for part in name.split(".")} & state_dicts.WRAPPERS
        return {
            "checkpoint": self.checkpoint.path.name,
            "sha256": digest,
            "weights": self.weights,
            "wrappers": sorted(wrappers),
            "dtypes": state_dicts.dtype_counts(self.tensors),
            "ignored": dict(self.ignored),
            "contradictions": self.notes,
        }


def _open(
    checkpoint: Checkpoint, weights: str, architecture: PolicyConfig | None, to_graft: bool
) -> _Opened:
    tensors, source = state_tensors(checkpoint, weights), str(checkpoint.path)
    config = infer_policy(checkpoint, tensors, architecture)
    if to_graft:
        check_graftable(config, source)
    empty = empty_policy(config, tensors, source)
    arrays, ignored, problems = plan(surgery.shapes(empty), tensors)
    check_normalizer(config, tensors, source)
    _refuse(source, arrays, problems)
    notes = contradictions(checkpoint, config)
    return _Opened(checkpoint, weights, tensors, config, empty, arrays, ignored, problems, notes)


def convert_checkpoint(
    path: str | os.PathLike, *, weights: str = "ema", architecture: PolicyConfig | None = None
) -> tuple[Policy, dict]:
    """Reads a checkpoint of UVA, or an export of this project, as a policy.

    Args:
      path: the .ckpt file.
      weights: "ema" or "model".
      architecture: see `infer_policy`.

    Returns:
      the policy, and plain values on its source: "checkpoint", "sha256", "weights", "wrappers"
      (removed from keys), "dtypes" (number of tensors by dtype), "ignored" (names and why),
      "contradictions" (between cfg and tensors).

    Raises:
      UserError: the file is missing or damaged, or does not hold a whole policy.
    """
    checkpoint = torch_file.read(path)
    return convert_open(checkpoint, weights=weights, architecture=architecture)


def convert_open(
    checkpoint: Checkpoint, *, weights: str = "ema", architecture: PolicyConfig | None = None
) -> tuple[Policy, dict]:
    """Does the work of `convert_checkpoint` for an open checkpoint."""
    opened = _open(checkpoint, weights, architecture, to_graft=False)
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(checkpoint.sha256)
        # jax takes the memory over without a copy if it can.
        held = {path: jax.device_put(array.load()) for path, array in opened.arrays.items()}
        _refuse(opened.source, {}, opened.problems)
        return surgery.replace(opened.empty, held), opened.facts(digest.result())


def export_records(checkpoint: Checkpoint, weights: str) -> bytes:
    """Returns the records for an export: cfg, pickles, and every tensor's name, dtype and shape."""
    payload = checkpoint.payload
    tensors = state_tensors(checkpoint, weights)
    return torch_file.dump_records(
        {
            "cfg": payload.get("cfg"),
            "pickles": payload.get("pickles", {}),
            "tensors": {name: (t.dtype.name, tuple(t.shape)) for name, t in tensors.items()},
        }
    )


def from_torch(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    weights: str = "ema",
    to_graft: bool = False,
    architecture: PolicyConfig | None = None,
) -> tuple[PolicyConfig, dict]:
    """Converts a checkpoint to a policy folder, without having the whole policy in memory.

    All processes call this, with the same folder.

    Args:
      path: the .ckpt or .safetensors file.
      out: the policy folder to write.
      weights: "ema" or "model".
      to_graft: require an action head that can be grafted.
      architecture: see `infer_policy`.

    Returns:
      the architecture, and the same values as `convert_checkpoint`.

    Raises:
      UserError: as `convert_checkpoint`; or the folder holds something that is not a policy; or
        `to_graft` is set and the policy has no MLP action head.
    """
    checkpoint = torch_file.read(path)
    opened = _open(checkpoint, weights, architecture, to_graft)
    info: dict = {}
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(checkpoint.sha256)

        def facts() -> dict:
            _refuse(opened.source, {}, opened.problems)
            info.update(opened.facts(digest.result()))
            return info

        records = export_records(checkpoint, weights)
        policy_folder.save_arrays(out, opened.config, opened.arrays, source=facts, records=records)
    return opened.config, info
