"""The architecture of a checkpoint's policy: given by the user, stored in the file, or inferred.

Only names, shapes, the cfg and the normaliser's numbers are read. A policy that cannot be built,
run or grafted is refused before any weight is converted.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert import cfg, infer
from convert.formats.torch_file import Checkpoint, LazyTensor
from uva_jax.models import surgery
from uva_jax.models.architectures import ARCHITECTURES
from uva_jax.models.description import parse_architecture
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import PolicyConfig
from uva_jax.runtime.errors import UserError

# Exceptions that impossible numbers cause while an architecture is read or built.
_CONTRADICTIONS = (ValueError, TypeError, LookupError, ArithmeticError, AssertionError)


def infer_policy(
    checkpoint: Checkpoint,
    tensors: Mapping[str, LazyTensor],
    architecture: PolicyConfig | None = None,
) -> PolicyConfig:
    """Returns the architecture: the given one, that stored by an export, or the inferred one.

    Args:
      checkpoint: the open file.
      tensors: its `state_tensors`.
      architecture: for a file without cfg; normaliser and language tower are the file's.

    Raises:
      UserError: the architecture is unknown or impossible.
    """
    source = str(checkpoint.path)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if architecture is not None:
        return dataclasses.replace(
            architecture,
            normalizer_fields=infer.normalizer_fields(shapes),
            text_tower=infer.text_tower(shapes, source),
        )
    stored = infer.stored_config(checkpoint.payload, source)
    if stored is not None:
        return stored
    try:
        config = infer.infer_config(shapes, checkpoint.cfg, source)
    except _CONTRADICTIONS as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{source}: its configuration or a tensor's shape is impossible ({error}); give a "
            "checkpoint that UVA's training wrote"
        ) from error
    if config.action_head is None and any(n.startswith("model.diffactloss.") for n in shapes):
        raise UserError(
            f"{source} holds a grafted action head, but not the 'uva_jax' entry that describes it; "
            "export the policy again with 'python -m convert to_torch'"
        )
    return config


def check_graftable(config: PolicyConfig, source: str) -> None:
    """Checks that a policy has an action head that a graft can replace.

    Raises:
      UserError: the policy was trained for video alone, or is already a graft.
    """
    head = config.action_head
    if head is None or head.kind != "mlp":
        found = "no action head at all" if head is None else "one that is already a graft"
        raise UserError(
            f"{source} has no MLP action head to graft from, but {found}; give a checkpoint that "
            "UVA's training wrote with predict_action=True"
        )


def given_architecture(like: str | None, file: str | os.PathLike | None) -> PolicyConfig | None:
    """Returns an architecture by the name of a published policy or from a json file, or None.

    Raises:
      UserError: both are given, the name is unknown, or the file holds no architecture.
    """
    if like is not None and file is not None:
        raise UserError("give --like or --architecture, not both")
    if like is not None:
        if like not in ARCHITECTURES:
            raise UserError(f"--like is {like!r}; it can be {', '.join(ARCHITECTURES)}")
        return ARCHITECTURES[like]
    if file is None:
        return None
    config = parse_architecture(Path(file))
    cfg.check(config, str(file), inferred=False)
    return config


def check_normalizer(config: PolicyConfig, tensors: Mapping[str, LazyTensor], source: str) -> None:
    """Checks the normaliser of actions and states.

    Raises:
      UserError: a field that the policy reads is missing, has another width than its values, or
        has a scale of 0.
    """
    if config.normalizer_type == "none":
        return
    widths = dict(config.normalizer_fields)
    again = "save the policy after set_normalizer(), as UVA's training does"
    off = "if it was trained without, set task.dataset.normalizer_type to none in its cfg"
    states = config.proprio_keys if config.mar.proprio_dim else ()
    for field in ("action", *states):
        if field not in widths:
            raise UserError(
                f"{source} has no normaliser of {field!r} (normalizer.params_dict.{field}.*), "
                f"which the policy reads; {again}; {off}"
            )
    if widths["action"] != config.action_dim:
        raise UserError(
            f"{source}: its normaliser of 'action' is {widths['action']} numbers wide, but the "
            f"policy's actions are {config.action_dim}; {again}"
        )
    if states and sum(widths[field] for field in states) != config.mar.proprio_dim:
        found = ", ".join(f"{field} {widths[field]}" for field in states)
        raise UserError(
            f"{source}: its normalisers of the robot's state ({found}) do not make the "
            f"{config.mar.proprio_dim} numbers that the policy reads; {again}"
        )
    for field in ("action", *states):
        scale = tensors.get(f"normalizer.params_dict.{field}.scale")
        if scale is None:  # `plan` reports it
            continue
        # What is below the smallest normal number is 0 to an accelerator.
        zero = np.abs(scale.numpy().astype(np.float32)) < np.finfo(np.float32).tiny
        if zero.any():
            columns = ", ".join(map(str, np.flatnonzero(zero)))
            raise UserError(
                f"{source}: its normaliser of {field!r} has scale 0 (column {columns}), so that "
                "unnormalised values would be infinite: fit it again on data that vary, or set the "
                "scale of a constant column to 1"
            )


def empty_policy(config: PolicyConfig, tensors: Mapping[str, LazyTensor], source: str) -> Policy:
    """Returns the policy without arrays.

    Raises:
      UserError: the model cannot be built, or has more layers than the file has tensors.
    """
    deepest = max(
        (config.mar.encoder_depth, config.mar.decoder_depth)
        + (config.vae.num_res_blocks, config.vae.num_res_blocks * len(config.vae.ch_mult))
        + tuple(head.depth for head in (config.action_head, config.video_head) if head)
        + tuple(head.depth for head in (config.wrist_head, config.proprio_head) if head)
    )
    if deepest > len(tensors):
        raise UserError(
            f"{source} describes a part of {deepest} layers, but has only {len(tensors)} tensors; "
            "it is damaged"
        )
    for side in ("encoder", "decoder"):
        width, heads = (getattr(config.mar, f"{side}_{k}") for k in ("embed_dim", "num_heads"))
        if heads < 1 or width < 1 or width % heads:
            raise UserError(
                f"{source} describes an {side} of width {width} with {heads} heads, which do not "
                "divide it; it is damaged"
            )
    try:
        return surgery.abstract_policy(config)
    except _CONTRADICTIONS as error:
        raise UserError(
            f"{source} describes a model that cannot be built ({str(error).splitlines()[0]}); "
            "it is damaged"
        ) from error


def contradictions(checkpoint: Checkpoint, config: PolicyConfig) -> list[str]:
    """Returns a sentence for each value of the file's cfg that contradicts its tensors."""
    payload = checkpoint.payload
    if not isinstance(payload, Mapping) or payload.get("cfg") is None:
        return []
    if infer.stored_config(payload, str(checkpoint.path)) is not None:
        return []  # the cfg of an export is that of its source
    return cfg.contradictions(cfg.Cfg(checkpoint.cfg, str(checkpoint.path)), config)
