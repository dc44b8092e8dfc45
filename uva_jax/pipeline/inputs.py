"""Opens what stages read by the configuration: the data, a policy, the teacher's file, the mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from convert.architecture import infer_policy
from convert.formats import torch_file
from convert.from_torch import convert_checkpoint
from convert.i3d import load_i3d, weights_file
from convert.state_dicts import state_tensors
from uva_jax import assets
from uva_jax.data import source
from uva_jax.data.readers import READERS, open_reader
from uva_jax.data.windows import WindowSpec
from uva_jax.data.zarr_container import check_kind
from uva_jax.models import policy_folder, surgery
from uva_jax.models.policy import Policy
from uva_jax.pipeline.engine import Context
from uva_jax.runtime import parallel
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections import EMBEDDED, DataOptions
from uva_jax.runtime.settings import section
from uva_jax.storage.identity import Part


def compute_dtype(config, platform: str | None = None):
    """Returns the dtype of matrix products, or None for float32.

    Args:
      config: the configuration.
      platform: "cpu", "gpu" or "tpu", for precision "auto"; by default that of JAX's devices.
    """
    choice = config.precision
    if choice == "auto":
        on_cpu = (platform or jax.default_backend()) == "cpu"
        choice = "float32" if on_cpu else "bfloat16"
    return jnp.bfloat16 if choice == "bfloat16" else None


def policy_path(name: str) -> Path:
    """Returns the path of a policy's file or folder; "embedded" is the file in the package."""
    return assets.POLICY if name == EMBEDDED else Path(name).expanduser()


def any_policy(name: str, weights: str = "ema", *, dtype=None) -> Policy:
    """Loads a policy from a folder, a PyTorch checkpoint, or "embedded".

    Args:
      name: path, or "embedded".
      weights: of a checkpoint: "ema" or "model".
      dtype: of matrix products; None: float32.

    Raises:
      UserError: the path does not exist or is not a policy.
    """
    path = policy_path(name)
    if not path.exists():
        raise UserError(
            f"the policy is {name}, but there is no such file or folder: give a policy folder, a "
            "UVA .ckpt, or 'embedded'"
        )
    if path.is_dir():
        return policy_folder.load_policy(path, dtype=dtype)
    policy = convert_checkpoint(path, weights=weights)[0]
    if dtype is None:
        return policy
    empty = surgery.abstract_policy(policy.config, dtype=dtype)
    return surgery.replace(empty, surgery.flatten(policy))


def teacher_checkpoint(config) -> Path:
    """Returns the path of the teacher's checkpoint.

    Raises:
      UserError: there is no such file.
    """
    path = policy_path(config.teacher.checkpoint)
    if not path.is_file():
        raise UserError(
            f"config.teacher.checkpoint is {path}, but there is no such file: give a UVA "
            "checkpoint (.ckpt), or 'embedded' for the small one that ships with the package"
        )
    return path


def mesh_of(config):
    """Returns the mesh of `config.mesh`."""
    return parallel.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)


def load_policy(folder: Path, config) -> Policy:
    """Loads a policy folder with the configuration's compute dtype."""
    return policy_folder.load_policy(folder, dtype=compute_dtype(config))


def open_data(
    context: Context, policy: Policy, *, spec: WindowSpec | None = None, **changes
) -> source.WindowReader:
    """Opens the data for a policy, checks them against it, and logs what is read in another form.

    Args:
      context: of the stage.
      policy: see `open_reader`, as `spec`.
      changes: override fields of `config.data`.

    Raises:
      UserError: see `open_reader`.
    """
    options = dataclasses.replace(section(context.config.data, DataOptions), **changes)
    with context.metrics.late_progress("frames", desc="rendering") as progress:
        reader = open_reader(options, policy, spec=spec, progress=progress)
    for note in reader.buffer.notes:
        context.metrics.say(note)
    return reader


def _language(config) -> dict:
    return {"language": config.data.language} if config.data.language else {}


def recording(config) -> dict:
    """Returns the part of a recording that policy training reads, by label."""
    model = config.pretrain.model
    more = (config.pretrain.readout,) if config.pretrain.readout else ()
    spec = WindowSpec(1, 1, 1, states=tuple(model.states), wrist=model.wrist)
    return _recording(config, lambda: spec, *more)


def training_data(config) -> dict:
    """Returns all data that policy training reads, by label."""
    return recording(config) | _language(config)


def graft_data(config) -> dict:
    """Returns all data that a graft reads, by label: what its teacher reads."""
    return _recording(config, lambda: _teacher_windows(config)) | _language(config)


def evaluation_data(config) -> dict:
    """Returns all data that the evaluation reads, by label: the graft's, and weights of I3D.

    Raises:
      UserError: the weights are no I3D.
    """
    found = graft_data(config)
    if name := config.evaluate.fvd_weights:
        found["fvd_weights"] = weights_file(name)
        load_i3d(name)  # before hours of training
    return found


def _recording(config, spec: Callable[[], WindowSpec], *more: str) -> dict:
    """Returns the part of a recording that is read by windows of `spec`, and `more` arrays.

    Raises:
      UserError: what is there is no recording.
    """
    data = section(config.data, DataOptions)
    if data.embedded:
        return {}
    if Path(data.path).exists():
        check_kind(Path(data.path))
    try:
        arrays = READERS[data.layout].arrays(spec(), data)
    except (KeyError, UserError):  # for the stage to tell
        return {"data": data.path}
    return {"data": Part(data.path, "data", tuple(sorted({*arrays, *more})))}


def _teacher_windows(config) -> WindowSpec:
    path = teacher_checkpoint(config)
    return _windows_of(path, config.teacher.weights, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)  # several stages ask, and a large file takes a second
def _windows_of(path: Path, weights: str, changed: int) -> WindowSpec:
    checkpoint = torch_file.read(path)
    return WindowSpec.of(infer_policy(checkpoint, state_tensors(checkpoint, weights)))
