"""Several devices and hosts: the mesh, the sharding of arrays, and the start of processes.

JAX's SPMD runtime does the distributed work. A mesh has three axes: "data" (samples are divided),
"fsdp" (samples and every large parameter are divided) and "tensor" (the wide layers' features are
divided). Rules over paths and shapes give the sharding of an array, so that parameters, averages
and optimiser states are all placed alike.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import multihost

from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections import DistributedOptions

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # the leading axis holds samples

# (regular expression on a leaf's path, the axis that "tensor" divides): outputs of the widening
# layers of attention and MLPs, inputs of the narrowing ones.
DEFAULT_RULES: tuple[tuple[str, int], ...] = (
    (r"(^|/)(qkv|q|kv|fc1)/kernel$", -1),
    (r"(^|/)(proj|fc2)/kernel$", -2),
)
_PATIENCE = 24 * 3600  # seconds that processes wait for each other
MIN_SHARDED_SIZE = 2**16  # smaller leaves cost less to keep everywhere than to gather


# ---- processes ----


def initialize_distributed(options: DistributedOptions) -> bool:
    """Joins a distributed run if the options or the environment ask for it.

    Call it before anything uses a device. A second call does nothing.

    Returns:
      whether the process is part of a distributed run.

    Raises:
      UserError: a distributed run is asked for, but its address or size is unknown.
    """
    if jax.distributed.is_initialized():
        return True
    given = (options.coordinator_address, options.num_processes, options.process_id)
    if not options.coordinator_address:
        if not options.enabled and not _environment_has_others(os.environ):
            return False
        given = ()  # jax finds the others
    try:
        jax.distributed.initialize(*given)
    except ValueError as error:  # jax names what is missing
        raise UserError(
            f"the other processes cannot be found ({error}): give config.distributed."
            "coordinator_address, num_processes and process_id"
        ) from error
    return True


def is_primary() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes have called it; `name` is equal on all of them and used once.

    It does not use a collective of the devices, which would time out while one process works alone
    (rollouts, an export).
    """
    if jax.process_count() > 1:
        everyone = set(range(jax.process_count()))
        multihost.sync_global_processes(name, timeout=_PATIENCE, processes=everyone)


def savable(tree):
    """Returns `tree` in a form that orbax saves from several processes.

    Orbax refuses arrays that lie on the devices of one process alone, so these become NumPy
    arrays, which it writes once. In a single process nothing changes.
    """
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: x if _is_global(x) else np.asarray(x), tree)


def _environment_has_others(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that jax supports has started other processes."""
    counts = (environment.get(k, "1") for k in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    pod = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    given = "JAX_COORDINATOR_ADDRESS" in environment
    return given or pod or any(count.isdecimal() and int(count) > 1 for count in counts)


# ---- the mesh ----


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns the mesh ("data", "fsdp", "tensor") over `devices`, or over all devices.

    Args:
      data, fsdp, tensor: devices along each axis; data=-1 takes all that remain.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    n = len(devices)
    if min(fsdp, tensor) < 1 or data < -1 or data == 0:
        raise UserError(f"mesh axes are at least 1, but data={data}, fsdp={fsdp}, tensor={tensor}")
    fixed = fsdp * tensor
    if data == -1 and n % fixed == 0:
        data = n // fixed
    if data * fixed != n:
        shown = "any number of" if data == -1 else str(data)
        raise UserError(
            f"a mesh of {shown} data x {fsdp} fsdp x {tensor} tensor does not fit {n} devices: "
            "the axes must multiply to that number (data=-1 takes all that remain)"
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=types, devices=devices)


# ---- sharding of arrays ----


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that lies whole on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding of a batch: samples, on `axis`, are divided over (data, fsdp)."""
    return NamedSharding(mesh, P(*[None] * axis, *BATCH))


def shardings_for(
    abstract_tree,
    mesh: Mesh,
    rules: Sequence[tuple[str, int]] = DEFAULT_RULES,
    *,
    min_size: int = MIN_SHARDED_SIZE,
):
    """Returns a sharding for every leaf of a tree of parameters, averages or optimiser states.

    Leaves of at least two axes and `min_size` elements are divided over "tensor" on the axis that
    the first matching rule names, and over "fsdp" on the largest remaining axis, if the lengths
    divide evenly. All other leaves lie whole on every device.

    Args:
      abstract_tree: leaves with a shape; arrays will do.
      rules: (regular expression on the path "a/b/kernel", axis).
      min_size: elements.

    Returns:
      the same tree with `NamedSharding`s as leaves.
    """

    def place(path, leaf):
        shape, spec = leaf.shape, [None] * len(leaf.shape)
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        large = len(shape) >= 2 and math.prod(shape) >= min_size
        axis = next((axis for pattern, axis in rules if re.search(pattern, name)), None)
        if large and axis is not None and _divides(mesh, "tensor", shape[axis]):
            spec[axis] = "tensor"
        free = [i for i, n in enumerate(shape) if spec[i] is None and _divides(mesh, "fsdp", n)]
        if large and free:
            spec[max(free, key=lambda i: shape[i])] = "fsdp"
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(place, abstract_tree)


def on_mesh(arrays: Mapping[str, jax.Array], shardings: Mapping[str, NamedSharding]) -> dict:
    """Places arrays that every process holds whole by their `shardings`."""
    if jax.process_count() == 1:
        return {name: jax.device_put(x, shardings[name]) for name, x in arrays.items()}

    def put(x, sharding):
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return {name: x if _is_global(x) else put(x, shardings[name]) for name, x in arrays.items()}


def shapes_on_mesh(tree, shardings):
    """Returns `tree` as shapes with shardings; `shardings` is one for all leaves, or a tree."""

    def place(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: place(x, shardings), tree)
    return jax.tree.map(place, tree, shardings)


def _is_global(x) -> bool:
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def on_host(arrays: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Gathers arrays of a mesh whole into the memory of every process."""
    if jax.process_count() == 1:
        return {name: np.asarray(x) for name, x in arrays.items()}
    # One by one, because all together may not fit a device.
    return {
        name: np.asarray(multihost_utils.process_allgather(x, tiled=True))
        for name, x in arrays.items()
    }


def shard_batch(mesh: Mesh, batch, axis: int = 0):
    """Turns this process's samples into global arrays over the mesh.

    Args:
      mesh: the mesh.
      batch: a tree of NumPy arrays with samples on `axis`.
      axis: the axis of samples.

    Raises:
      UserError: the samples do not divide evenly over the devices.
    """
    sharding = batch_sharding(mesh, axis)
    shares = mesh.shape["data"] * mesh.shape["fsdp"]

    def put(array):
        array = np.asarray(array)
        total = array.shape[axis] * jax.process_count()
        if total % shares:
            raise UserError(
                f"a batch of {total} samples does not divide evenly over the mesh's {shares} data "
                f"shares (data x fsdp): use a multiple of {shares}"
            )
        return jax.make_array_from_process_local_data(sharding, array)

    return jax.tree.map(put, batch)


def sharded_map(f: Callable, mesh: Mesh, *, in_specs, out_specs) -> Callable:
    """Returns `f`, jitted, which each device runs on its own part of the inputs.

    Args:
      f: function of arrays.
      mesh: the mesh.
      in_specs, out_specs: how inputs and outputs are divided: `P()` for parameters, `BATCH` for
        samples. Outputs with `P()` must be equal on all devices; that is not checked.
    """
    return jax.jit(
        jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    )


def _divides(mesh: Mesh, axis: str, length: int) -> bool:
    return mesh.shape[axis] > 1 and length % mesh.shape[axis] == 0
