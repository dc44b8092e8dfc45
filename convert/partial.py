"""Initialises parts of a policy from an image MAR, a KL-VAE or an earlier UVA.

Tensors are matched by name and shape through the table of `rules.py`; other arrays do not change. A
sentence reports the numbers of both.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from convert import rules
from convert.formats import torch_file
from convert.formats.torch_file import Checkpoint, LazyTensor
from convert.from_torch import to_array
from convert.state_dicts import WEIGHTS, plain_name, state_tensors
from uva_jax.runtime.errors import UserError

# kind -> (keys of the state dict in the file, the first found counts; the policy's tensor names)
_KINDS = {
    "mar": (("model_ema", "model"), "model."),
    "vae": (("state_dict", "model"), "vae_model."),
}
_SHOWN = 4


def start_from(
    arrays: Mapping[str, jax.Array],
    path: str | os.PathLike,
    kind: str,
    *,
    trained: tuple[str, ...] = ("",),
) -> tuple[dict[str, jax.Array], str]:
    """Replaces the arrays that a checkpoint has.

    Args:
      arrays: of a policy, or of its VAE alone, by path.
      path: for "mar" MAR's .pth (`model_ema`, or `model`); for "vae" the KL-VAE of LDM or MAR
        (.ckpt); or a checkpoint of UVA for either.
      kind: "mar" (all but the VAE) or "vae".
      trained: path prefixes of arrays that are trained afterwards; by default all. The checkpoint
        must have all others.

    Returns:
      the arrays, and a sentence on what matched and what did not.

    Raises:
      UserError: the file is missing or damaged, has no such weights, nothing fits, or arrays that
        are not trained stay random.
    """
    checkpoint = torch_file.read(path)
    place, tensors = _tensors(checkpoint, kind)
    wanted = {k for k in arrays if k.startswith("vae/") == (kind == "vae")}
    filled, left = {}, []
    for name, tensor in tensors.items():
        found = rules.to_flax(name) if isinstance(tensor, LazyTensor) else None
        if found is None or found[0] not in wanted:
            left.append(name)
            continue
        target, layout = found
        try:
            value = to_array(tensor, layout)
        except ValueError as error:
            raise UserError(f"{path}: {name} {error}") from error
        if value.shape == arrays[target].shape:
            filled[target] = jnp.asarray(value)
        else:
            left.append(name)
    if not filled:
        raise UserError(
            f"not one of the {len(left)} tensors in {path} ({place}) has the name and shape of one "
            "in this policy: check config.pretrain.model against the checkpoint"
        )
    fresh = sorted(k for k in wanted - set(filled) if not k.startswith("normalizer/"))
    if random := [k for k in fresh if not k.startswith(trained)]:
        raise UserError(
            f"{path} ({place}) fills {len(filled)} of {len(wanted)} arrays of the {kind.upper()}, "
            f"and the other {len(random)}{_some(random)} are not trained and would stay random: "
            f"give a {kind.upper()} of this architecture (config.pretrain.model)"
            + (", or train it (config.pretrain.vae_training.steps)" if kind == "vae" else "")
        )
    said = (
        f"{len(filled)} tensors from {checkpoint.path.name} ({place}); "
        f"{len(left)} of the file unused{_some(left)}; "
        f"{len(fresh)} of the policy start from random values{_some(fresh)}"
    )
    return {**arrays, **filled}, said


def _tensors(checkpoint: Checkpoint, kind: str) -> tuple[str, dict[str, object]]:
    """Returns the key of the weights in the file, and the tensors by the policy's names."""
    if held := [k for k, name in WEIGHTS.items() if name in checkpoint.state_dict_names]:
        tensors = state_tensors(checkpoint, held[0])  # averaged weights come first
        own = {k: v for k, v in tensors.items() if k.startswith("vae_model.") == (kind == "vae")}
        return WEIGHTS[held[0]], {k: v for k, v in own.items() if not k.startswith("normalizer.")}
    places, prefix = _KINDS[kind]
    payload = checkpoint.payload if isinstance(checkpoint.payload, dict) else {}
    place = next((p for p in places if isinstance(payload.get(p), dict)), None)
    if place is None:
        raise UserError(
            f"{checkpoint.path} has no {' or '.join(map(repr, places))}: give a {kind.upper()} "
            "checkpoint as it was published, or one of UVA"
        )
    return place, {
        f"{prefix}{plain_name(name)}": value
        for name, value in payload[place].items()
        if isinstance(name, str)
    }


def _some(names: list[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f" ({', '.join(names[:_SHOWN])}{more})" if names else ""
