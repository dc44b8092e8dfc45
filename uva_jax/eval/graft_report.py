"""The report of a graft: results of the evaluation and what the stages have logged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from uva_jax.eval import report
from uva_jax.eval.evaluate import EvaluateOptions, rollout_seeds
from uva_jax.models import surgery
from uva_jax.models.policy import Policy
from uva_jax.runtime.metrics import read_metrics
from uva_jax.runtime.settings import leaves, section
from uva_jax.storage.atomic import read_json

_SHOWN = (
    "teacher.checkpoint data.path capture.num_samples distill.epochs distill.lr head.memory "
    "head.start finetune.steps finetune.lr finetune.data_fraction evaluate.sampling_steps seed"
).split()


def write_graft_report(
    path: Path,
    policies: Mapping[str, Policy],
    found: Mapping,
    *,
    config,
    workdir: Path,
    stages: Mapping[str, Path],
) -> Path:
    """Writes the page from `evaluate`'s results and from what the stages have logged.

    Args:
      path: of the page; its folder holds videos/.
      policies: the evaluated policies, with "teacher" and "graft".
      found: the results of `evaluate`.
      config: the run's configuration.
      workdir: holds metrics.jsonl.
      stages: folder of each earlier stage by name.

    Returns:
      the page's path.
    """
    options = section(config.evaluate, EvaluateOptions)
    seeds = rollout_seeds(options)
    teacher, graft = policies["teacher"], policies["graft"]
    distilled = {}
    if "distill" in stages:
        distilled = (read_json(stages["distill"] / "done.json") or {}).get("metrics", {})
    curves = []
    for stage, title in (
        ("distill", "Stage 1: distillation"),
        ("finetune", "Stage 2: fine-tuning"),
        ("shorten", "Stage 3: few evaluations"),
    ):
        keys = sorted(
            {k for line in read_metrics(workdir, stage) for k in line} - {"time", "stage", "step"}
        )
        wanted = [k for k in keys if stage != "finetune" or k in ("loss", "mse", "vb")]
        if wanted:
            curves.append({"title": title, "series": report.curve_series(workdir, stage, wanted)})
    shown = leaves(config)
    paired = found.get("paired_difference")
    data = report.ReportData(
        title=f"Graft of {teacher.config.task}: {workdir.name}",
        config={k: shown[k] for k in _SHOWN},
        stages=report.stage_rows({k: v for k, v in stages.items() if v.exists()}),
        architecture=[
            {
                "part": part,
                "teacher": _count(getattr(teacher, part)),
                "graft": _count(getattr(graft, part)),
            }
            for part in ("vae", "mar", "action_head")
        ],
        operators=distilled.get("operators", ()),
        curves=curves,
        scores=[
            {
                "policy": name,
                "score": found[name]["test_mean_score"],
                "ci": tuple(found[name]["ci95"]),
                "success": found[name]["success_rate"],
                "episodes": len(seeds),
            }
            for name in policies
            if seeds
        ],
        paired={"difference": paired["mean"], "ci": tuple(paired["ci95"])} if paired else {},
        actions=[
            {"policy": name} | found[name]["actions"]
            for name in policies
            if "actions" in found[name]
        ],
        per_seed={
            "seeds": seeds,
            "teacher": found["teacher"]["scores"],
            "graft": found["graft"]["scores"],
        }
        if seeds
        else {},
        videos=[
            {"path": clip, "caption": f"seed {seed}: teacher, graft"}
            for seed in seeds[: options.videos]
            if (clip := path.parent / "videos" / f"seed_{seed}.mp4").exists()
        ],
    )
    return report.write_report(path, data)


def _count(module) -> int:
    return sum(x.size for x in surgery.flatten(module).values())
