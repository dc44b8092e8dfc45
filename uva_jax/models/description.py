"""The content of `policy.json`: a policy's architecture and the origin of its weights.

It is separate from `policy_folder`, so that the json of a .safetensors file is read without jax.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from uva_jax.models.policy_config import PolicyConfig, from_dict, to_dict
from uva_jax.runtime.errors import UserError

FORMAT = 1


def describe(config: PolicyConfig, source: Mapping) -> dict:
    """Returns the content of `policy.json` as plain JSON values."""
    return {"format": FORMAT, "policy": to_dict(config), "source": dict(source)}


def parse_description(path: Path) -> tuple[PolicyConfig, dict]:
    """Reads a json file of `describe`; returns the architecture and the whole content.

    Raises:
      UserError: the file is damaged or of a newer format.
    """
    try:
        described = json.loads(path.read_text())
        version, policy, _ = (described[k] for k in ("format", "policy", "source"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error!r}): convert the checkpoint again") from error
    if version != FORMAT:
        raise UserError(
            f"{path} has format {version}, but this version reads format {FORMAT}: convert the "
            "checkpoint again"
        )
    try:
        return from_dict(policy), described
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse_architecture(path: Path) -> PolicyConfig:
    """Reads the architecture in a json file: a `policy.json`, or its value of "policy".

    Raises:
      UserError: there is no such file, or it holds no architecture.
    """
    try:
        held = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a policy.json") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not json ({error}): give a policy.json") from error
    if not isinstance(held, dict):
        raise UserError(f"{path} holds no architecture: give a policy.json")
    try:
        return from_dict(held.get("policy", held))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
