"""Opens what stages read by the configuration: the data, a policy, the teacher's file, the mesh."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from uva_jax import assets
from uva_jax.data import source
from uva_jax.data.readers import open_reader
from uva_jax.data.windows import WindowSpec
from uva_jax.models import policy_folder
from uva_jax.models.policy import Policy
from uva_jax.pipeline.engine import Context
from uva_jax.runtime import parallel
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections import EMBEDDED, DataOptions
from uva_jax.runtime.settings import section


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


def recording(config) -> dict:
    """Returns the path of the recording by label; empty for the embedded one."""
    data = section(config.data, DataOptions)
    return {} if data.embedded else {"data": data.path}


def data_files(config) -> dict:
    """Returns the paths of the recording and of the language latents by label."""
    return recording(config) | ({"language": config.data.language} if config.data.language else {})
