"""Published weights as a start: an image MAR, or a KL-VAE, into the parts of a policy they fit.

What fits is decided by name and shape, through the table of `rules.py`; everything else stays as it
was, and is counted in a sentence, because a start that silently matches nothing is no start.
"""

from __future__ import annotations

import os

import jax.numpy as jnp

from convert import rules, torch_file
from convert.from_torch import to_array
from convert.torch_file import LazyTensor
from uva_jax import policy_io
from uva_jax.errors import UserError
from uva_jax.models.policy import Policy

# kind -> (where the state dict lies in the file, first found; the policy's names for its tensors)
_KINDS = {
    "mar": (("model_ema", "model"), "model."),
    "vae": (("state_dict", "model"), "vae_model."),
}
_SHOWN = 4


def start_from(policy: Policy, path: str | os.PathLike, kind: str) -> tuple[Policy, str]:
    """Fills what a published checkpoint fits.

    Args:
      policy: with arrays; what is not matched keeps them.
      path: "mar": MAR's .pth (`model_ema`, or `model`); "vae": LDM's or MAR's KL-VAE (.ckpt).
      kind: "mar" or "vae".

    Returns:
      The policy, and a sentence that says what was and what was not matched.

    Raises:
      UserError: the file is missing or unsound, holds no such weights, or none of them fits.
    """
    checkpoint = torch_file.read(path)
    places, prefix = _KINDS[kind]
    payload = checkpoint.payload if isinstance(checkpoint.payload, dict) else {}
    place = next((p for p in places if isinstance(payload.get(p), dict)), None)
    if place is None:
        raise UserError(
            f"{path} has no {' or '.join(map(repr, places))}: give a {kind.upper()} checkpoint as "
            "it was published"
        )
    arrays = policy_io.flatten(policy)
    wanted = {k for k in arrays if k.startswith("vae/") == (kind == "vae")}
    filled, left = {}, []
    for name, tensor in payload[place].items():
        found = rules.to_flax(prefix + name) if isinstance(tensor, LazyTensor) else None
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
    said = (
        f"{len(filled)} tensors from {checkpoint.path.name} ({place}); "
        f"{len(left)} of its own find no place{_some(left)}, "
        f"{len(fresh)} of the policy's start fresh{_some(fresh)}"
    )
    return policy_io.replace(policy, arrays | filled), said


def _some(names: list[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f" ({', '.join(names[:_SHOWN])}{more})" if names else ""
