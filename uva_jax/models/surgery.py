"""Converts modules to flat dictionaries of arrays and back, hashes them, and makes empty modules.

Flax's own update functions accept wrong shapes and missing keys silently, so modules are filled by
`replace`, which checks them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import PolicyConfig, to_dict
from uva_jax.runtime.errors import UserError
from uva_jax.storage.identity import hash_arrays, hash_json


def _path(keys: tuple) -> str:
    return "/".join(map(str, keys))


def flatten(module: nnx.Module | nnx.State) -> dict[str, jax.Array]:
    """Returns every variable of a module as {"mar/encoder_blocks/0/norm1/scale": array}."""
    state = module if isinstance(module, nnx.State) else nnx.state(module)
    return {_path(keys): variable[...] for keys, variable in nnx.to_flat_state(state)}


def shapes(module: nnx.Module | nnx.State) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a module, which may be abstract, by path as `flatten`."""
    state = module if isinstance(module, nnx.State) else nnx.state(module)
    return {
        _path(keys): jax.ShapeDtypeStruct(variable.shape, variable.dtype)
        for keys, variable in nnx.to_flat_state(state)
    }


def policy_hash(policy: Policy) -> str:
    """Returns the SHA-256 of a policy's architecture and of all its arrays."""
    return hash_json([to_dict(policy.config), hash_arrays(flatten(policy))])


def is_abstract(module: nnx.Module) -> bool:
    """Whether a module has shapes in place of arrays, as from `abstract_policy`."""
    return isinstance(jax.tree.leaves(nnx.state(module))[0], jax.ShapeDtypeStruct)


class _OneKey:
    """A replacement of `nnx.Rngs` for abstract modules.

    Tracing the counters of `nnx.Rngs` takes several times as long as all the rest.
    """

    def params(self) -> jax.Array:
        return jax.random.key(0)


@functools.lru_cache(maxsize=16)
def _abstract_parts(config: PolicyConfig, dtype, remat) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(
        nnx.eval_shape(lambda: Policy(config, dtype=dtype, remat=remat, rngs=_OneKey()))
    )


def abstract_policy(config: PolicyConfig, *, dtype=None, remat: bool = False) -> Policy:
    """Returns a policy with shapes in place of arrays; arguments as for `Policy`."""
    graph, state = _abstract_parts(config, dtype, remat)
    # Merging shares variables, so they are copied: the cached ones must not change.
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf, state))


def mismatches(expected: Mapping, found: Mapping) -> list[str]:
    """Returns a sentence on every path that is missing, unknown, or of another shape or dtype."""
    problems = [f"{path} is missing" for path in expected if path not in found]
    problems += [f"{path} is unknown to the architecture" for path in found if path not in expected]
    for path in expected:
        if path not in found:
            continue
        want, got = expected[path], found[path]
        if tuple(got.shape) != tuple(want.shape):
            problems.append(f"{path} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
        elif np.dtype(got.dtype) != np.dtype(want.dtype):
            problems.append(f"{path} has dtype {got.dtype}, not {want.dtype}")
    return problems


def replace(module: nnx.Module, arrays: Mapping[str, jax.Array]) -> nnx.Module:
    """Returns a copy of a (possibly abstract) module whose variables are exactly `arrays`.

    Raises:
      UserError: a path is missing or unknown, or a shape or dtype differs; all are listed.
    """
    if problems := mismatches(shapes(module), arrays):
        raise UserError(f"these arrays do not fit the model: {'; '.join(problems)}")
    graph, state = nnx.split(module)
    leaves = [
        (keys, variable.replace(arrays[_path(keys)])) for keys, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(leaves))
