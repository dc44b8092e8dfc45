"""The table of all stages, and those that judge and export a graft: evaluate, export.

Each stage reads only what earlier stages wrote. A stage opens its inputs, turns sections of the
configuration into options, calls `graft/` or `eval/`, and saves the result.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert.to_torch import export_policy
from uva_jax.data.language import task_latents
from uva_jax.eval import evaluate
from uva_jax.eval.graft_report import write_graft_report
from uva_jax.models import policy_folder
from uva_jax.models.policy import Policy
from uva_jax.pipeline.engine import Context, Stage
from uva_jax.pipeline.graft_stages import GRAFT_STAGES
from uva_jax.pipeline.inputs import (
    compute_dtype,
    evaluation_data,
    load_policy,
    open_data,
    teacher_checkpoint,
)
from uva_jax.pipeline.training_stages import TRAINING_STAGES
from uva_jax.pipeline.videos import judge_videos
from uva_jax.runtime.settings import section


def run_evaluate(context: Context) -> dict:
    """Evaluates the teacher and the graft after each stage, on held-out windows and in rollouts."""
    config, folder, inputs = context.config, context.folder, context.inputs
    policies = {
        name: load_policy(inputs[stage] / "policy", config)
        for name, stage in (
            ("teacher", "convert"),
            ("graft_stage1", "assemble"),
            ("graft", "finetune"),
            ("graft_shortened", "shorten"),
        )
        if stage in inputs
    }
    if not context.is_primary:
        return {}
    options = section(config.evaluate, evaluate.EvaluateOptions)
    windows = held_out_windows(context, policies["teacher"])
    videos, language = judge_videos(context, policies), language_of(config)
    found = evaluate.evaluate(policies, windows, options, folder, context.metrics, language, videos)
    shown = {s.name for s in GRAFT_STAGES}
    path = write_graft_report(
        folder / "report.html",
        policies,
        found,
        config=config,
        workdir=context.workdir,
        stages={s.name: context.workdir / s.folder for s in stages(config) if s.name in shown},
    )
    context.metrics.say(f"report: {path}")
    if "verdict" in found:
        both = [inputs[stage] / "policy" for stage in ("convert", "finetune")]
        out = context.workdir / "compared"
        more = {name: config.data[name] for name in ("language", "vocabulary")}
        more["precision"] = "bfloat16" if compute_dtype(config) else ""
        evaluate.say_verdict(found["verdict"], both, out, options, context.metrics, more)
    return evaluate.summary(found)


def language_of(config) -> Callable[..., np.ndarray]:
    """Returns the function that gives the language latents of a simulator's tasks."""
    return functools.partial(
        task_latents, path=config.data.language, vocabulary=config.data.vocabulary
    )


def held_out_windows(context: Context, policy: Policy):
    """Returns (reader, windows of the held-out episodes), or None if the settings ask for none."""
    if not (count := context.config.evaluate.windows):
        return None
    # Not mirrored, because the actions are compared with the demonstrations.
    reader = open_data(context, policy, mirror="")
    strips = reader.held_out(
        seed=context.config.evaluate.noise_seed,
        way_out="; or set config.evaluate.windows=0 and judge without windows",
    )
    return reader, strips.first(count)


def run_export(context: Context) -> dict:
    """Exports the grafts to export/: checkpoints in the original's layout, and their head.

    `grafted_head.py` runs the head in PyTorch without this package.
    """
    out = context.folder / context.config.export.filename
    found = _export(context, context.inputs["finetune"], out)
    if "shorten" in context.inputs:
        short = out.with_name(f"{out.stem}_shortened{out.suffix}")
        found["shortened"] = _export(context, context.inputs["shorten"], short)
    return found


def _export(context: Context, policy: Path, out: Path) -> dict:
    _, about = policy_folder.read_description(policy / "policy")
    # Tensors that no policy keeps, such as CLIP's vision tower, come from the teacher's file.
    kept = set(about.get("ignored", ())) - {"_dummy_variable"}
    base = teacher_checkpoint(context.config) if kept else None
    if not context.is_primary:
        return {}
    found = export_policy(policy / "policy", out, base=base)
    context.metrics.say(
        f"{out} ({found['bytes'] / 1e6:.1f} MB, {found['tensors']} tensors); {found['head']}"
    )
    return {"file": str(out), "bytes": found["bytes"]}


_STAGES = (
    *TRAINING_STAGES,
    *GRAFT_STAGES,
    Stage(
        "evaluate",
        run_evaluate,
        needs=("convert", "finetune", "shorten"),
        derived=("assemble",),
        config_keys=("seed", "precision", "data", "evaluate"),
        folder=evaluate.FOLDER,
        describe="compares teacher and graft, writes the report",
        fingerprint=evaluation_data,
    ),
    Stage(
        "export",
        run_export,
        needs=("finetune", "shorten"),
        config_keys=("teacher", "export"),
        folder="export",
        describe="writes a torch checkpoint",
    ),
)


def stages(config) -> tuple[Stage, ...]:
    """Returns the stages of a configuration.

    If all operators are given, or nothing is grafted, capture and distillation are left out; if
    only a policy's decoder trains, the encoding of latents is; and without evaluations of a
    shortened head, its training.
    """
    skipped = set() if config.pretrain.steps else {"encode"}
    if not config.shorten.evaluations:
        skipped.add("shorten")
    if not config.head.replace:
        skipped.add("assemble")
    if any(config.head.init_paths.values()) or not config.head.replace:
        skipped |= {"distill"} if config.finetune.reuse_cache else {"capture", "distill"}
    table = [s for s in _STAGES if s.name not in skipped]
    names = {s.name for s in table}

    def present(stage: Stage, kind: str) -> tuple[str, ...]:
        return tuple(name for name in getattr(stage, kind) if name in names)

    return tuple(
        dataclasses.replace(s, **{kind: present(s, kind) for kind in ("needs", "derived")})
        for s in table
    )
