"""LoRA (arXiv 2106.09685) on any Linear of a policy, by path pattern.

Works on flat parameters: the adapters are two more arrays a kernel, added to it before the model
is put together. Merging for export is therefore the same addition.
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
    """Adapters for every 2-d kernel whose path a pattern matches.

    Returns:
      {"lora/<path>/a": (in, rank), "lora/<path>/b": (rank, out)}; b is zero at first.

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
            raise UserError(f"config.finetune.lora_targets: {pattern!r} matches no Linear")
        for index, path in enumerate(hits):
            rows, cols = arrays[path].shape
            draw = jax.random.fold_in(jax.random.fold_in(key, number), index)
            adapters[f"{PREFIX}{path}/a"] = jax.random.normal(draw, (rows, rank)) * rows**-0.5
            adapters[f"{PREFIX}{path}/b"] = jnp.zeros((rank, cols))
    return adapters


def merge_lora(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The parameters with adapters added to their kernels, and without them."""
    merged = {k: v for k, v in arrays.items() if not k.startswith(PREFIX)}
    for path, a in arrays.items():
        if path.startswith(PREFIX) and path.endswith("/a"):
            target = path.removeprefix(PREFIX).removesuffix("/a")
            merged[target] = merged[target] + a @ arrays[f"{path.removesuffix('/a')}/b"]
    return merged
