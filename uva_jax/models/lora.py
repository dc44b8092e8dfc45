"""LoRA (arXiv 2106.09685) on any Linear of a policy, by path pattern.

It works on flat parameters: the product of two further arrays per kernel is added to the kernel
before the model is built. Merging adapters for an export is the same addition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp

from uva_jax.runtime.errors import UserError

PREFIX = "lora/"


def init_lora(
    arrays: Mapping[str, jax.Array], patterns: Sequence[str], rank: int, key: jax.Array
) -> dict[str, jax.Array]:
    """Returns initial adapters for every 2-d kernel whose path matches a pattern.

    Args:
      arrays: parameters by path.
      patterns: of paths.
      rank: of the adapters.
      key: of the random arrays.

    Returns:
      {"lora/<path>/a": (in, rank), "lora/<path>/b": (rank, out)}; b is zero.

    Raises:
      UserError: a pattern matches no kernel.
    """
    adapters = {}
    for number, pattern in enumerate(patterns):
        hits = [
            path
            for path, x in arrays.items()
            if path.endswith("/kernel") and x.ndim == 2 and fnmatchcase(path, f"{pattern}/kernel")
        ] or [
            path
            for path, x in arrays.items()
            if path.endswith("/kernel") and x.ndim == 2 and fnmatchcase(path, f"{pattern}*")
        ]
        if not hits:
            raise UserError(
                f"config.finetune.lora_targets: {pattern!r} matches no Linear: correct the pattern"
            )
        for index, path in enumerate(hits):
            rows, cols = arrays[path].shape
            draw = jax.random.fold_in(jax.random.fold_in(key, number), index)
            adapters[f"{PREFIX}{path}/a"] = jax.random.normal(draw, (rows, rank)) * rows**-0.5
            adapters[f"{PREFIX}{path}/b"] = jnp.zeros((rank, cols))
    return adapters


def merge_lora(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the parameters with the adapters added to their kernels and removed."""
    merged = {k: v for k, v in arrays.items() if not k.startswith(PREFIX)}
    for path, a in arrays.items():
        if path.startswith(PREFIX) and path.endswith("/a"):
            target = path.removeprefix(PREFIX).removesuffix("/a")
            merged[target] = merged[target] + a @ arrays[f"{path.removesuffix('/a')}/b"]
    return merged
