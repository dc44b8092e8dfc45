"""Saves and loads policies as folders.

A policy folder holds `policy.json` (architecture and origin), `params/` (orbax: every variable,
with the normaliser) and, for policies from PyTorch, `source.records` (what only an export needs).
Flax's own update functions accept wrong shapes and missing keys silently, so modules are filled by
`surgery.replace`, which checks them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.experimental import multihost_utils

from uva_jax.models import surgery
from uva_jax.models.description import describe, parse_description
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import PolicyConfig
from uva_jax.runtime import parallel
from uva_jax.runtime.errors import UserError
from uva_jax.storage import atomic, policy_arrays
from uva_jax.storage.finite import finite_when_loaded, non_finite, refuse_non_finite
from uva_jax.storage.lazy_array import LazyArray

_JSON, _PARAMS, _RECORDS = "policy.json", "params", "source.records"


def save_policy(
    folder: str | os.PathLike,
    policy: Policy,
    *,
    source: Mapping,
    records: bytes | None = None,
) -> None:
    """Writes a policy folder atomically. All processes call this, with the same folder.

    Args:
      folder: the folder; an older policy in it is replaced.
      policy: the policy; its parameters may be sharded.
      source: origin of the weights, plain JSON values (checkpoint name, sha256, ...).
      records: records for an export, as `convert.formats.torch_file.dump_records` writes them.

    Raises:
      UserError: the folder holds something that is not a policy, or a value is not finite.
    """
    with _appearing(folder) as partial:
        if jax.process_index() == 0:
            _write_description(partial, policy.config, source, records)
        refuse_non_finite(non_finite(surgery.flatten(policy)), f"the policy for {folder}")
        arrays = parallel.savable(surgery.flatten(policy))
        with policy_arrays.checkpointer(arrays) as checkpointer:
            checkpointer.save(
                partial / _PARAMS,
                args=ocp.args.PyTreeSave(traverse_util.unflatten_dict(arrays, sep="/")),
            )


def save_arrays(
    folder: str | os.PathLike,
    config: PolicyConfig,
    arrays: Mapping[str, LazyArray],
    *,
    source: Callable[[], Mapping],
    records: bytes | None = None,
) -> None:
    """Writes a policy folder from lazy arrays, which are never all in memory.

    Every process loads every array, so that all raise the same errors; the primary writes.

    Args:
      folder: the folder; an older policy in it is replaced.
      config: the architecture.
      arrays: every array by path; each is loaded once, one after another.
      source: returns the origin of the weights; called after all arrays are loaded, so that it can
        still raise.
      records: as for `save_policy`.

    Raises:
      UserError: the folder holds something that is not a policy, the arrays do not fit the
        architecture, a value is not finite, or `source` raises it. Nothing is written then.
    """
    if problems := surgery.mismatches(surgery.shapes(surgery.abstract_policy(config)), arrays):
        raise UserError(f"these arrays do not fit the model: {'; '.join(problems)}")
    with _appearing(folder) as partial:
        chief = jax.process_index() == 0
        if chief:
            what = f"the policy for {folder}"
            checked = {k: finite_when_loaded(k, v, what) for k, v in arrays.items()}
            policy_arrays.write(partial / _PARAMS, checked)
        else:
            for array in arrays.values():
                array.load()
        about = source()
        if chief:
            _write_description(partial, config, about, records)


@contextlib.contextmanager
def _appearing(folder: str | os.PathLike) -> Iterator[Path]:
    """Yields a folder to write to, which becomes the policy folder when it is complete."""
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give the name of a folder to write the policy to")
    if folder.exists() and any(folder.iterdir()) and not (folder / _JSON).exists():
        raise UserError(
            f"{folder} holds files that are not a policy (it has no {_JSON}): give another folder"
        )
    with atomic.new_folder(folder, is_primary=jax.process_index() == 0, barrier=_wait) as partial:
        yield partial


def _write_description(
    folder: Path, config: PolicyConfig, source: Mapping, records: bytes | None
) -> None:
    text = json.dumps(describe(config, source), indent=1) + "\n"
    atomic.write_bytes(folder / _JSON, text.encode())
    if records is not None:
        atomic.write_bytes(folder / _RECORDS, records)


def _wait(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def read_description(folder: str | os.PathLike) -> tuple[PolicyConfig, dict]:
    """Reads the architecture and the origin of a policy folder.

    Raises:
      UserError: there is no policy, or its description is damaged or of a newer format.
    """
    path = Path(folder) / _JSON
    if not path.exists():
        raise UserError(
            f"{folder} is not a policy folder (it has no {_JSON}): make one with "
            "'python -m convert from_torch CKPT OUT'"
        )
    config, described = parse_description(path)
    return config, described["source"]


def read_records(folder: str | os.PathLike) -> bytes | None:
    """Returns the `records` of a policy folder, or None."""
    path = Path(folder) / _RECORDS
    return path.read_bytes() if path.exists() else None


def load_policy(
    folder: str | os.PathLike,
    *,
    dtype=None,
    shardings: Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding] | None = None,
) -> Policy:
    """Loads a policy from its folder, directly into its shardings.

    Args:
      folder: a policy folder.
      dtype: of matrix products; None: float32, like the parameters.
      shardings: (path as in `surgery.flatten`, shape and dtype) -> sharding; None: the first
        device.

    Raises:
      UserError: the folder is not a policy, or its arrays do not fit its architecture.
    """
    config, _ = read_description(folder)
    policy = surgery.abstract_policy(config, dtype=dtype)
    expected = surgery.shapes(policy)
    params = Path(folder).absolute() / _PARAMS
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {
        path: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=alone if shardings is None else shardings(path, leaf)
        )
        for path, leaf in expected.items()
    }
    with policy_arrays.damage_as_user_error(params):
        with policy_arrays.checkpointer(expected) as checkpointer:
            found = traverse_util.flatten_dict(
                checkpointer.metadata(params).item_metadata.tree, sep="/"
            )
            _refuse_mismatches(folder, expected, found)
            tree = traverse_util.unflatten_dict(target, sep="/")
            how = ocp.checkpoint_utils.construct_restore_args(tree)
            wanted = ocp.args.PyTreeRestore(tree, restore_args=how)
            arrays = traverse_util.flatten_dict(checkpointer.restore(params, args=wanted), sep="/")
    return surgery.replace(policy, arrays)


def read_arrays(folder: str | os.PathLike) -> dict[str, LazyArray]:
    """Returns the arrays of a policy folder by path; each is read when it is loaded.

    Raises:
      UserError: the folder is not a policy, or its arrays do not fit its architecture.
    """
    config, _ = read_description(folder)
    found = policy_arrays.read(Path(folder).absolute() / _PARAMS)
    _refuse_mismatches(folder, surgery.shapes(surgery.abstract_policy(config)), found)
    return found


def _refuse_mismatches(folder: str | os.PathLike, expected: Mapping, found: Mapping) -> None:
    if problems := surgery.mismatches(expected, found):
        raise UserError(
            f"the arrays in {Path(folder).absolute() / _PARAMS} do not fit the architecture in "
            f"{Path(folder) / _JSON}: {'; '.join(problems)}"
        )
