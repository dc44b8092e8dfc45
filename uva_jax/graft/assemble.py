"""Assembles a graft: the head's architecture, its initial weights, and operators on disk.

Shared layers, the memory's convolution and aggregator, and (with `start="preserve"`) the MLP
operators start as copies of the teacher's; widening an MLP does not change its function. Each
family of operators is saved in a separate folder, which any head of the same shape can load.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax import nnx, traverse_util

from uva_jax.models import surgery
from uva_jax.models.grafted_head import GraftedHead
from uva_jax.models.mlp_head import MLPHead
from uva_jax.models.operators import KEEP, learns_in_stage1
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import GraftedHeadConfig, from_dict, to_dict
from uva_jax.runtime import parallel
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections_graft import FAMILIES, HeadOptions
from uva_jax.storage.atomic import read_json, write_json
from uva_jax.storage.finite import non_finite, refuse_non_finite


def grafted_config(teacher: Policy, options: HeadOptions) -> GraftedHeadConfig:
    """Returns the architecture of the grafted head of a teacher.

    Raises:
      UserError: the teacher's action head is not an MLP head, or the options do not fit it.
    """
    head = teacher.config.action_head
    if head is None or head.kind != "mlp":
        found = "none" if head is None else "a grafted one"
        raise UserError(
            f"a graft replaces an MLP action head, but the teacher has {found}: give another one"
        )
    if options.depth and options.depth != head.depth:
        raise UserError(
            f"config.head.depth is {options.depth}, but the teacher's head has {head.depth} "
            f"blocks: set config.head.depth={head.depth} (or 0 for the teacher's own)"
        )
    if options.adapter == "conv" and head.aggregator != "conv_fc":
        raise UserError(
            "config.head.adapter is 'conv', which copies the convolution of a conv_fc aggregator, "
            f"but the teacher's is {head.aggregator!r}: set config.head.adapter=linear"
        )
    triples, small = _operators(options, head.depth), options.size == "small"
    for name, heads in (
        ("num_heads", options.num_heads),
        ("self_attn_heads", options.self_attn_heads),
    ):
        if heads < 1 or head.width % heads:
            raise UserError(
                f"config.head.{name} is {heads}, which does not divide the head's "
                f"width {head.width}: set it to a divisor"
            )
    return GraftedHeadConfig(
        channels=head.channels,
        z_channels=head.z_channels,
        width=head.width,
        depth=head.depth,
        cross_attention=options.cross_attention,
        memory=options.memory,
        adapter=options.adapter,
        operators=triples,
        num_heads=options.num_heads,
        self_attn_heads=options.self_attn_heads,
        memory_width=head.z_channels,
        cross_mlp_ratio=options.cross_mlp_ratio,
        mlp_ratio=options.mlp_ratio or (1 if small else 4),
        self_attn_window=options.self_attn_window,
        n_actions=head.n_actions,
        n_frames=head.n_frames,
        grid=head.grid,
        train_steps=head.train_steps,
        sampling_steps=head.sampling_steps,
        clip=head.clip,
        aggregator=head.aggregator,
    )


def _operators(options: HeadOptions, depth: int) -> tuple[tuple[str, str, str], ...]:
    """Returns a triple of operator names for each block; () stands for three standard ones."""
    if not options.operators and options.size == "small":
        light = [i % 2 == 1 or depth == 1 for i in range(depth)]
        attentions = ("light_self_attn" if here else "none" for here in light)
        return tuple(("cross_attn", attention, "mlp") for attention in attentions)
    entries = options.operators * depth if len(options.operators) == 1 else options.operators
    triples = tuple(KEEP if e == "keep" else tuple(e.split(",")) for e in entries)
    if triples and (len(triples) != depth or any(len(t) != 3 for t in triples)):
        raise UserError(
            f"config.head.operators should name {depth} blocks as 'cross,self,mlp' or 'keep' (or "
            f"one entry for all), but is {options.operators!r}"
        )
    residual = options.cross_attention == "residual"
    if residual and any(mlp == KEEP[2] for _, _, mlp in triples):
        raise UserError(
            "config.head.operators keeps a block of the teacher, which needs the condition, but "
            "config.head.cross_attention='residual' has none: set it to 'condition'"
        )
    if triples and not residual and all(cross == "none" for cross, _, _ in triples):
        raise UserError(
            "config.head.operators has no cross-attention in any block, so the head would have no "
            "video input: name cross_attn in at least one block"
        )
    return triples


def start_head(teacher: MLPHead, config: GraftedHeadConfig, start: str, seed: int) -> GraftedHead:
    """Makes a grafted head from copies of the teacher's arrays and random ones.

    Args:
      teacher: the head that it replaces.
      config: from `grafted_config`.
      start: "preserve" (MLP operators compute the functions of the teacher's blocks) or "random".
      seed: of the random arrays.
    """
    head = GraftedHead(config, rngs=nnx.Rngs(seed))
    arrays, source = surgery.flatten(head), surgery.flatten(teacher)
    for path in arrays:
        if path.startswith(("input_proj/", "time_embed/", "final_layer/")):
            arrays[path] = source[f"net/{path}"]
        elif path.startswith("memory/conv/"):
            arrays[path] = source[path.replace("memory/", "aggregator/")]
        elif path.startswith("memory/aggregator/"):
            arrays[path] = source[path.removeprefix("memory/")]
    for i, block in enumerate(head.blocks):
        copies = start == "preserve" or not learns_in_stage1(block.mlp)
        if copies and hasattr(block.mlp, "from_teacher"):
            origin = f"net/res_blocks/{i}/"
            given = {k.removeprefix(origin): v for k, v in source.items() if k.startswith(origin)}
            made = block.mlp.from_teacher(given)
            arrays |= {f"blocks/{i}/mlp/{k}": v for k, v in made.items()}
    return surgery.replace(head, arrays)


def assemble(teacher: Policy, head: GraftedHead) -> Policy:
    """Returns the teacher with `head` as its action head; other variables are shared."""
    graph, state = nnx.split(teacher)
    policy = nnx.merge(graph, state)
    policy.action_head = head
    policy.config = dataclasses.replace(teacher.config, action_head=head.config)
    return policy


# ---- operators on disk ----


def family_of(path: str) -> str | None:
    """Returns the operator family of a path of the grafted head; None for other layers."""
    parts = path.split("/")
    if parts[0] == "blocks":
        return parts[2]
    if parts[0] in ("memory", "queries", "condition_scale", "condition_shift"):
        return "cross_attn"
    return None


def family_arrays(head: GraftedHead, family: str) -> dict[str, jax.Array]:
    """Returns the arrays of one family by path."""
    return {k: v for k, v in surgery.flatten(head).items() if family_of(k) == family}


def save_operator(folder: str | os.PathLike, head: GraftedHead, family: str, metrics: Mapping):
    """Writes one family of operators: `params/` (orbax), operator.json and metrics.json.

    Raises:
      UserError: a value is not finite.
    """
    folder = Path(folder).absolute()
    checkpointer = ocp.StandardCheckpointer()
    arrays = family_arrays(head, family)
    refuse_non_finite(non_finite(arrays), f"the {family} operators for {folder}")
    arrays = traverse_util.unflatten_dict(parallel.savable(arrays), sep="/")
    checkpointer.save(folder / "params", arrays, force=True)
    checkpointer.wait_until_finished()
    write_json(folder / "metrics.json", metrics)
    # operator.json is written last, because it marks the folder as complete.
    write_json(folder / "operator.json", {"family": family, "head": to_dict(head.config)})


def load_operator(folder: str | os.PathLike, head: GraftedHead, family: str) -> GraftedHead:
    """Returns the head with one family's weights from a folder.

    Raises:
      UserError: the folder holds no operators, another family, or operators for another head.
    """
    folder = Path(folder).absolute()
    about = read_json(folder / "operator.json")
    if about is None:
        raise UserError(
            f"config.head.init_paths.{family} is {folder}, which holds no operators (it has no "
            "operator.json): give a folder that the distill stage wrote"
        )
    if about.get("family") != family:
        raise UserError(
            f"config.head.init_paths.{family} is {folder}, which holds {about.get('family')!r} "
            f"operators: give a folder of {family} operators"
        )
    made_for = from_dict(json.loads(json.dumps(about["head"])), GraftedHeadConfig)
    if made_for.depth != head.config.depth:
        raise UserError(
            f"config.head.init_paths.{family}: {folder} holds operators for a head of "
            f"{made_for.depth} blocks, but this head has {head.config.depth}: distil them again"
        )
    wanted = family_arrays(head, family)
    target = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in wanted.items()}
    checkpointer = ocp.StandardCheckpointer()
    stored = traverse_util.flatten_dict(
        checkpointer.metadata(folder / "params").item_metadata.tree, sep="/"
    )
    if problems := surgery.mismatches(target, stored):
        raise UserError(
            f"config.head.init_paths.{family}: {folder} was made for another head, distil it "
            f"again: {'; '.join(problems[:4])}"
        )
    target = {
        k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for k, v in wanted.items()
    }
    found = checkpointer.restore(folder / "params", traverse_util.unflatten_dict(target, sep="/"))
    return surgery.replace(head, surgery.flatten(head) | traverse_util.flatten_dict(found, sep="/"))


def load_operators(
    head: GraftedHead, init_paths: Mapping[str, str], distilled: Path | None, say
) -> GraftedHead:
    """Loads each family from `init_paths`, or this run's distillation; otherwise it stays."""
    for family in FAMILIES:
        if not family_arrays(head, family):
            continue
        folder = init_paths.get(family) or ""
        if folder:
            head = load_operator(folder, head, family)
            say(f"{family} operators from {folder}")
        elif distilled is not None and (distilled / family / "operator.json").exists():
            head = load_operator(distilled / family, head, family)
        else:
            say(
                f"{family} operators start from random weights "
                f"(config.head.init_paths.{family} is not set)"
            )
    return head


def graft_policy(
    teacher: Policy, options: HeadOptions, distilled: Path | None, *, seed: int, say
) -> Policy:
    """Returns the teacher with the grafted head of the options and loaded operators.

    Args:
      teacher: the policy.
      options: architecture of the head and paths of operators.
      distilled: folder of this run's distillation, or None.
      seed: of random weights.
      say: called with a line on the origin of each family that is not from `distilled`.

    Raises:
      UserError: the options or the operators do not fit the teacher.
    """
    config = grafted_config(teacher, options)
    head = start_head(teacher.action_head, config, options.start, seed)
    return assemble(teacher, load_operators(head, options.init_paths, distilled, say))
