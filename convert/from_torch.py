"""A PyTorch checkpoint of UVA becomes a policy.

The architecture is inferred (`infer.py`), names and layouts come from the rule table (`rules.py`).
Every tensor is matched exactly once or left out on purpose, every target is filled exactly once,
and everything that is wrong is reported together. Tensors are read one at a time.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import ml_dtypes
import numpy as np

from convert import infer, rules
from convert.formats import torch_file
from convert.formats.torch_file import Checkpoint, LazyTensor
from convert.formats.torch_tensors import in_c_order
from uva_jax.models import policy_folder, surgery
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import PolicyConfig
from uva_jax.runtime.errors import UserError
from uva_jax.storage.lazy_array import LazyArray

WEIGHTS = {"ema": "ema_model", "model": "model"}
_PREFIX = "module."
# What numbers that make no sense run into while an architecture is read or built.
_CONTRADICTIONS = (ValueError, TypeError, LookupError, ArithmeticError, AssertionError)
_FLOATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)))


def state_tensors(checkpoint: Checkpoint, weights: str) -> dict[str, LazyTensor]:
    """The tensors of the chosen weights by name, without a leading "module.".

    Raises:
      UserError: the weights are not in the file, are no tensors, or names collide.
    """
    if weights not in WEIGHTS:
        raise UserError(f"--weights is {weights!r}; it can be {' or '.join(WEIGHTS)}.")
    if WEIGHTS[weights] not in checkpoint.state_dict_names:
        there = ", ".join(checkpoint.state_dict_names) or "none at all"
        other = [name for name, key in WEIGHTS.items() if key in checkpoint.state_dict_names]
        hint = f"try --weights {other[0]}" if other else "give a checkpoint of UVA's training"
        raise UserError(
            f"{checkpoint.path} has no {weights} weights (state dict {WEIGHTS[weights]!r}); its "
            f"state dicts are: {there}; {hint}."
        )
    tensors: dict[str, LazyTensor] = {}
    for name, value in checkpoint.state_dict(WEIGHTS[weights]).items():
        if not isinstance(name, str) or not isinstance(value, LazyTensor):
            raise UserError(
                f"{checkpoint.path}: entry {name!r} of {WEIGHTS[weights]} is no tensor; the file "
                "is no UVA checkpoint."
            )
        plain = name.removeprefix(_PREFIX)
        if plain in tensors:
            raise UserError(f"{checkpoint.path} holds {plain} with and without {_PREFIX!r}.")
        tensors[plain] = value
    return tensors


def infer_policy(checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor]) -> PolicyConfig:
    """The architecture: as an export of this project states it, or else inferred."""
    source = str(checkpoint.path)
    stored = infer.stored_config(checkpoint.payload, source)
    if stored is not None:
        return stored
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        config = infer.infer_config(shapes, checkpoint.cfg, source)
    except _CONTRADICTIONS as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{source}: its configuration or a tensor's shape makes no sense ({error}); give a "
            "checkpoint that UVA's training wrote."
        ) from error
    if config.action_head is None:
        raise UserError(
            f"{source} holds a grafted action head, but not the 'uva_jax' entry that describes it; "
            "export the policy again with 'python -m convert to_torch'."
        )
    return config


def empty_policy(config: PolicyConfig, tensors: Mapping[str, LazyTensor], source: str) -> Policy:
    """The policy without arrays.

    Raises:
      UserError: no model of that description can be built, or it has more layers than tensors.
    """
    deepest = max(
        (config.mar.encoder_depth, config.mar.decoder_depth)
        + (config.vae.num_res_blocks, config.vae.num_res_blocks * len(config.vae.ch_mult))
        + tuple(head.depth for head in (config.action_head, config.video_head) if head)
        + tuple(head.depth for head in (config.wrist_head, config.proprio_head) if head)
    )
    if deepest > len(tensors):
        raise UserError(
            f"{source} describes a part of {deepest} layers, and has {len(tensors)} tensors in "
            "all; it is damaged."
        )
    for side in ("encoder", "decoder"):
        width, heads = (getattr(config.mar, f"{side}_{k}") for k in ("embed_dim", "num_heads"))
        if heads < 1 or width < 1 or width % heads:
            raise UserError(
                f"{source} describes an {side} of width {width} with {heads} heads, which do not "
                "divide it; it is damaged."
            )
    try:
        return surgery.abstract_policy(config)
    except _CONTRADICTIONS as error:
        raise UserError(
            f"{source} describes a model that cannot be built ({str(error).splitlines()[0]}); "
            "it is damaged."
        ) from error


def to_array(tensor: LazyTensor, layout: rules.Layout) -> np.ndarray:
    """The tensor's values in flax layout, widened to float32.

    Raises:
      ValueError: it is not of a floating type, not finite, or more precise than float32.
    """
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"has dtype {tensor.dtype}, which is no floating type")
    values = tensor.numpy()
    with np.errstate(over="ignore"):  # said below
        array = in_c_order(layout.forward(values.astype(np.float32, copy=False)))
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise ValueError(f"has {bad} of {array.size} values that are not finite")
    if tensor.dtype == np.float64 and (values.astype(np.float32) != values).any():
        raise ValueError("is float64 with values that float32 cannot hold")
    return array


def plan(
    expected: Mapping[str, jax.ShapeDtypeStruct], tensors: Mapping[str, LazyTensor]
) -> tuple[dict[str, LazyArray], dict[str, str], list[str]]:
    """Finds the tensor of every array of a policy.

    Args:
      expected: `surgery.shapes` of the policy.
      tensors: a checkpoint's, by name.

    Returns:
      {path: array}; {tensor that was left out: why}; [what is wrong]: tensors without a rule,
      paths without a tensor, wrong shapes. While the arrays are loaded, values that are not
      finite and wrong dtypes are added to that list, and zeros stand for them.
    """
    targets, ignored, problems = rules.plan(tensors)
    arrays: dict[str, LazyArray] = {}
    for path, (name, layout) in targets.items():
        if path not in expected:
            problems.append(f"{name} has no place in this architecture (it would be {path})")
            continue
        tensor, want = tensors[name], expected[path].shape
        try:
            # The layout's effect on the shape, tried on an array that takes no memory.
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
    """Raises what is wrong, if anything is; then `arrays` are loaded to name all that is."""
    if problems:
        for array in arrays.values():
            array.load()
        raise UserError(
            f"{source} cannot be converted, {len(problems)} problem(s): {'; '.join(problems)}."
        )


def convert_checkpoint(path: str | os.PathLike, *, weights: str = "ema") -> tuple[Policy, dict]:
    """Reads a checkpoint of UVA, or an export of this project, as a policy.

    Args:
      path: the .ckpt file.
      weights: "ema" or "model".

    Returns:
      The policy and plain facts on its source: "checkpoint", "sha256", "weights",
      "module_prefix", "dtypes" (count of tensors by dtype), "ignored" (names and why).

    Raises:
      UserError: the file is missing or unsound, or does not hold a whole policy.
    """
    checkpoint = torch_file.read(path)
    return convert_open(checkpoint, weights=weights)


def convert_open(checkpoint: Checkpoint, *, weights: str = "ema") -> tuple[Policy, dict]:
    """`convert_checkpoint` of a checkpoint that is already open."""
    tensors, source = state_tensors(checkpoint, weights), str(checkpoint.path)
    config = infer_policy(checkpoint, tensors)
    with ThreadPoolExecutor(1) as beside:
        digest = beside.submit(checkpoint.sha256)
        empty = empty_policy(config, tensors, source)
        arrays, ignored, problems = plan(surgery.shapes(empty), tensors)
        _refuse(source, arrays, problems)
        # Without a copy where jax can take the memory over.
        held = {path: jax.device_put(array.load()) for path, array in arrays.items()}
        _refuse(source, {}, problems)
        return surgery.replace(empty, held), _facts(checkpoint, weights, ignored, digest.result())


def _facts(
    checkpoint: Checkpoint, weights: str, ignored: Mapping[str, str], digest: str
) -> dict[str, object]:
    dtypes: dict[str, int] = {}
    for tensor in state_tensors(checkpoint, weights).values():
        dtypes[tensor.dtype.name] = dtypes.get(tensor.dtype.name, 0) + 1
    raw = checkpoint.state_dict(WEIGHTS[weights])
    return {
        "checkpoint": checkpoint.path.name,
        "sha256": digest,
        "weights": weights,
        "module_prefix": any(name.startswith(_PREFIX) for name in raw),
        "dtypes": dtypes,
        "ignored": dict(ignored),
    }


def export_records(checkpoint: Checkpoint, weights: str) -> bytes:
    """What an export needs to give back: cfg, pickles, and every tensor's name, dtype and shape."""
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
) -> tuple[PolicyConfig, dict]:
    """Converts a checkpoint into a policy folder, without ever holding the whole policy.

    With several processes, all of them call this, with the same folder.

    Args:
      path: the .ckpt or .safetensors file.
      out: the policy folder to write.
      weights: "ema" or "model".
      to_graft: refuse a policy whose action head cannot be grafted.

    Returns:
      The architecture, and the facts that `convert_checkpoint` gives.

    Raises:
      UserError: as `convert_checkpoint`; the folder holds something that is not a policy; or the
        policy has no MLP action head although `to_graft` asks for one.
    """
    checkpoint = torch_file.read(path)
    tensors, source = state_tensors(checkpoint, weights), str(checkpoint.path)
    config = infer_policy(checkpoint, tensors)
    if to_graft and (config.action_head is None or config.action_head.kind != "mlp"):
        found = "no action head" if config.action_head is None else "a head that is a graft already"
        raise UserError(
            f"{source} has no MLP action head to graft from, but {found}; give a checkpoint that "
            "UVA's training wrote with predict_action=True."
        )
    info: dict = {}
    with ThreadPoolExecutor(1) as beside:
        digest = beside.submit(checkpoint.sha256)
        empty = empty_policy(config, tensors, source)
        arrays, ignored, problems = plan(surgery.shapes(empty), tensors)
        _refuse(source, arrays, problems)

        def facts() -> dict:
            _refuse(source, {}, problems)
            info.update(_facts(checkpoint, weights, ignored, digest.result()))
            return info

        records = export_records(checkpoint, weights)
        policy_folder.save_arrays(out, config, arrays, source=facts, records=records)
    return config, info
