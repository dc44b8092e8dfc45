"""The stages that make a graft: convert, capture, distill, assemble, finetune, shorten."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from convert.from_torch import from_torch
from uva_jax.data import source
from uva_jax.graft import assemble, distill, finetune, record, stage1, stage2, stage3
from uva_jax.graft.capture import CaptureOptions
from uva_jax.models import policy_folder, surgery
from uva_jax.models.policy import Policy
from uva_jax.pipeline.engine import Context, Stage
from uva_jax.pipeline.inputs import (
    graft_data,
    load_policy,
    mesh_of,
    open_data,
    teacher_checkpoint,
)
from uva_jax.runtime.sections_graft import ShortenOptions
from uva_jax.runtime.settings import section
from uva_jax.storage import sample_store
from uva_jax.storage.identity import external_hash
from uva_jax.storage.site import Site

_STORE = "store"  # in the folder of `run_latents`


def run_convert(context: Context) -> dict:
    """Converts the torch checkpoint to teacher/policy."""
    path, weights = teacher_checkpoint(context.config), context.config.teacher.weights
    config, info = from_torch(path, context.folder / "policy", weights=weights, to_graft=True)
    parameters = nnx.state(surgery.abstract_policy(config), nnx.Param)
    count, head = sum(x.size for x in jax.tree.leaves(parameters)), config.action_head
    context.metrics.say(
        f"{path.name}: {config.task}, {count / 1e6:.2f} M parameters, {config.image_size} px, "
        f"{head.aggregator} head, {head.depth} x {head.width}"
    )
    for note in info["contradictions"]:
        context.metrics.say(f"{path.name}: {note}; the tensors are used")
    return {"parameters": count, "sha256": info["sha256"], "weights": info["weights"]}


def _teacher(context: Context) -> Policy:
    return load_policy(context.inputs["convert"] / "policy", context.config)


def _teacher_hash(context: Context) -> str:
    return external_hash(teacher_checkpoint(context.config), context.workdir)


def run_capture(
    context: Context,
    *,
    blocks: bool = True,
    episodes: Callable[[source.WindowReader], np.ndarray] | None = None,
) -> dict:
    """Captures the teacher's activations into train/ and held_out/ of the stage's folder.

    Args:
      context: of the stage.
      blocks: False: only what comes before the head's blocks, whatever `config.capture` says.
      episodes: from the reader to the mask (e,) of the training episodes; by default all that are
        not held out.
    """
    config, teacher = context.config, _teacher(context)
    reader, options = open_data(context, teacher), section(config.capture, CaptureOptions)
    return record.capture_activations(
        teacher,
        reader,
        dataclasses.replace(options, blocks=options.blocks and blocks),
        context.folder,
        context.metrics,
        seed=config.seed,
        origin=_teacher_hash(context),
        episodes=None if episodes is None else episodes(reader),
        is_primary=context.is_primary,
        barrier=context.barrier,
    )


def run_distill(context: Context) -> dict:
    """Distils operators/<family> from the activations and measures their errors."""
    config = context.config
    teacher = policy_folder.load_policy(context.inputs["convert"] / "policy")  # in float32
    folders = context.inputs["capture"]
    return stage1.distill_operators(
        teacher,
        sample_store.SampleStore.open(folders / "train"),
        sample_store.SampleStore.open(folders / "held_out"),
        head_options=section(config.head, assemble.HeadOptions),
        options=section(config.distill, distill.DistillOptions),
        seed=config.seed,
        folder=context.folder,
        metrics=context.metrics,
    )


def run_assemble(context: Context) -> dict:
    """Puts the operators into the policy and writes grafted/policy."""
    config = context.config
    policy = assemble.graft_policy(
        policy_folder.load_policy(context.inputs["convert"] / "policy"),
        section(config.head, assemble.HeadOptions),
        context.inputs.get("distill"),
        seed=config.seed,
        say=context.metrics.say,
    )
    _save_like_teacher(context, policy)
    return {"parameters": sum(x.size for x in jax.tree.leaves(nnx.state(policy, nnx.Param)))}


def run_finetune(context: Context) -> dict:
    """Fine-tunes the assembled policy (Stage 2) and writes finetune/policy."""
    config = context.config
    start = context.inputs.get("assemble", context.inputs["convert"])
    tuned, found = stage2.fine_tune(
        _stage2_inputs(context, load_policy(start / "policy", config)),
        section(config.finetune, finetune.FinetuneOptions),
        context.folder,
        context.metrics,
        capture=section(config.capture, CaptureOptions),
        mesh=mesh_of(config),
        seed=config.seed,
        is_primary=context.is_primary,
        barrier=context.barrier,
    )
    _save_like_teacher(context, tuned)
    return found


def run_latents(context: Context) -> dict:
    """Stores the latents on which Stage 2 trains, for several trainings on the same ones."""
    config = context.config
    site = Site(context.folder / _STORE, context.metrics, context.is_primary, context.barrier)
    store = stage2.store_latents(
        _stage2_inputs(context, _teacher(context)),
        section(config.finetune, finetune.FinetuneOptions),
        section(config.capture, CaptureOptions),
        site,
        config.seed,
    )
    return {"samples": store.num_samples, "bytes": store.nbytes()}


def _stage2_inputs(context: Context, policy: Policy) -> stage2.Inputs:
    latents = context.inputs.get("latents")
    return stage2.Inputs(
        policy,
        teacher=lambda: _teacher(context),
        reader=lambda: open_data(context, policy),
        cache=context.inputs.get("capture"),
        origin=_teacher_hash(context),
        latents=latents and latents / _STORE,
    )


def run_shorten(context: Context) -> dict:
    """Trains the fine-tuned head to sample in few evaluations (Stage 3): shortened/policy."""
    config, inputs = context.config, context.inputs
    policy = policy_folder.load_policy(inputs["finetune"] / "policy")  # in float32
    shortened, found = stage3.shorten(
        stage2.Inputs(
            policy,
            teacher=lambda: policy_folder.load_policy(inputs["convert"] / "policy"),
            reader=lambda: open_data(context, policy),
            cache=inputs.get("capture"),
            origin=_teacher_hash(context),
        ),
        section(config.shorten, ShortenOptions),
        context.folder,
        context.metrics,
        capture=section(config.capture, CaptureOptions),
        seed=config.seed,
        is_primary=context.is_primary,
        barrier=context.barrier,
    )
    _save_like_teacher(context, shortened)
    return found


def _save_like_teacher(context: Context, policy: Policy) -> None:
    """Saves a graft as the stage's policy, with the teacher's records for an export."""
    teacher = context.inputs["convert"] / "policy"
    policy_folder.save_policy(
        context.folder / "policy",
        policy,
        source=policy_folder.read_description(teacher)[1],
        records=policy_folder.read_records(teacher),
    )


def _init_paths(config) -> dict:
    return {f"head.init_paths.{k}": v for k, v in config.head.init_paths.items() if v}


GRAFT_STAGES = (
    Stage(
        "convert",
        run_convert,
        needs=(),
        config_keys=("teacher",),
        folder="teacher",
        describe="converts the torch checkpoint",
        fingerprint=lambda config: {"checkpoint": teacher_checkpoint(config)},
    ),
    Stage(
        "capture",
        run_capture,
        needs=("convert",),
        config_keys=("seed", "precision", "data", "capture"),
        folder="activations",
        describe="stores the teacher's activations",
        fingerprint=graft_data,
    ),
    Stage(
        "distill",
        run_distill,
        needs=("convert", "capture"),
        config_keys=(
            "seed",
            "distill",
            "head.cross_attention",
            "head.memory",
            "head.adapter",
            "head.size",
            "head.num_heads",
            "head.self_attn_heads",
            "head.cross_mlp_ratio",
            "head.mlp_ratio",
            "head.self_attn_window",
            "head.depth",
            "head.start",
            "head.operators",
        ),
        folder="operators",
        describe="trains each operator on the teacher's activations",
    ),
    Stage(
        "assemble",
        run_assemble,
        needs=("convert", "distill"),
        config_keys=("seed", "head"),
        folder="grafted",
        describe="puts the operators into the policy",
        fingerprint=_init_paths,
        # Earlier versions wrote the policy in the stage of fine-tuning.
        unrecorded=("policy.json", "params", "source.records"),
    ),
    Stage(
        "finetune",
        run_finetune,
        needs=("convert", "capture", "distill"),
        derived=("assemble",),  # its result depends on the first and the last of these
        config_keys=("seed", "precision", "data", "capture", "head", "finetune"),
        folder="finetune",
        describe="fine-tunes the whole policy",
        fingerprint=lambda config: graft_data(config) | _init_paths(config),
    ),
    Stage(
        "shorten",
        run_shorten,
        needs=("convert", "capture", "finetune"),
        config_keys=("seed", "data", "capture", "shorten"),
        folder="shortened",
        describe="trains the head to sample in few evaluations",
        fingerprint=graft_data,
    ),
)
