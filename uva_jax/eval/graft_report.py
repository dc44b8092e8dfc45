"""The report of a graft: results of the evaluation and what the stages have logged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from uva_jax.eval.evaluate import EvaluateOptions, rollout_seeds
from uva_jax.eval.report import write_report
from uva_jax.eval.report_data import ReportData, curve_series, hash_rows, stage_rows
from uva_jax.models import surgery
from uva_jax.models.diffusion import make_schedule
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import steps_of
from uva_jax.runtime.metrics import read_metrics
from uva_jax.runtime.sections_graft import FAMILIES
from uva_jax.runtime.settings import leaves, section
from uva_jax.storage.atomic import read_json

_SHOWN = (
    "teacher.checkpoint data.path capture.num_samples distill.epochs distill.lr head.memory "
    "head.start finetune.steps finetune.lr finetune.data_fraction evaluate.sampling_steps seed"
).split()

_SUFFIXES = {"graft": "", "graft_stage1": "_stage1", "graft_shortened": "_shortened"}
_PAIR = ("teacher", "graft")
_EPS_ERROR = "eps_error_"
_BASELINES = {"last_frame": "last frame, held", "reconstruction": "VAE of the truth"}


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
    exist = {k: v for k, v in stages.items() if v.exists()}
    distilled = _done(stages.get("distill")).get("metrics", {})
    shown = leaves(config)
    data = ReportData(
        title=f"Graft of {teacher.config.task}: {workdir.name}",
        verdict=found.get("verdict", {}),
        config={k: shown[k] for k in _SHOWN},
        hashes=hash_rows(exist | {"evaluate": path.parent}),
        versions=_done(stages.get("convert")).get("versions", {}),
        stages=stage_rows(exist),
        architecture=[
            {
                "part": part,
                "teacher": _count(getattr(teacher, part)),
                "graft": _count(getattr(graft, part)),
            }
            for part in ("vae", "mar", "action_head")
        ],
        costs=[
            _cost(name, policies[name], found[name], options.sampling_steps)
            for name in policies
            if seeds
        ],
        operators=distilled.get("operators", ()),
        timesteps={
            " to ".join(key.removeprefix(_EPS_ERROR).split("_")): value
            for key, value in distilled.get("head", {}).items()
            if key.startswith(_EPS_ERROR)
        },
        curves=_curves(workdir),
        scores=[_score(name, found[name]) for name in policies if seeds],
        comparisons=[
            _comparison(name, found, suffix)
            for name, suffix in _SUFFIXES.items()
            if seeds and name in policies
        ],
        actions=[
            {"policy": name} | found[name]["actions"]
            for name in policies
            if "actions" in found[name]
        ],
        per_seed={
            "names": _PAIR,
            "scores": tuple(found[name]["scores"] for name in _PAIR),
        }
        if seeds
        else {},
        videos=_videos(path.parent / "videos", found) if seeds else (),
        frames=_frames(policies, found),
    )
    return write_report(path, data)


def _done(folder: Path | None) -> dict:
    return (folder and read_json(folder / "done.json")) or {}


def _score(name: str, figures: Mapping) -> dict:
    return {
        "policy": name,
        "score": figures["test_mean_score"],
        "ci": figures["ci95"],
        "success": figures["success_rate"],
        "success_ci": figures.get("success_ci95"),
        "episodes": len(figures["scores"]),
    }


def _comparison(name: str, found: Mapping, suffix: str) -> dict:
    paired, verdict = found["paired_difference" + suffix], found.get("verdict" + suffix, {})
    return {
        "policy": name,
        "difference": paired["mean"],
        "ci": paired["ci95"],
        "mcnemar": paired.get("mcnemar"),
        # The graft's stands at the top of the page.
        "verdict": verdict.get("sentence") if suffix else None,
    }


def _frames(policies: Mapping[str, Policy], found: Mapping) -> list[dict]:
    """Returns the figures of each policy's video, then those of held and reconstructed frames."""
    rows, baselines = [], {}
    for name in policies:
        for camera, kinds in found[name].get("video", {}).get("cameras", {}).items():
            where = "" if camera == "main" else f", {camera}"
            for kind, row in kinds.items():
                shown = row | {"fvd": row["fvd_unlimited"], "ci": row["ci95"]}
                shown["videos"] = found[name]["video"]["windows"]
                if kind == "predicted":
                    rows.append(shown | {"policy": name + where})
                else:  # of the teacher, whose VAE the others have
                    title = _BASELINES[kind] + where
                    baselines.setdefault(title, shown | {"policy": title})
    return rows + list(baselines.values())


def _cost(name: str, policy: Policy, figures: Mapping, wanted: str) -> dict:
    calls = sum(-(-steps // policy.config.n_action_steps) for steps in figures["steps"])
    head = policy.config.action_head
    return {
        "policy": name,
        "steps": len(make_schedule(steps_of(head, wanted))),
        "seconds": figures["policy_seconds"] / calls,
        "parameters": _count(policy.action_head),
    }


def _curves(workdir: Path) -> list[dict]:
    """Returns the plots of what the stages logged, with one for each family of operators."""
    logged = _logged(workdir, "distill")
    families: dict[str, dict[str, str]] = {}  # label of each curve by the scalar's name
    for family in FAMILIES:
        labels = {key: key.rpartition("/")[2] for key in logged if family in key.split("/")}
        # The mean is left out where there are curves of the blocks.
        blocks = {key: label for key, label in labels.items() if label.startswith("block")}
        families[family] = blocks or labels
    kept = _done(workdir / "finetune").get("metrics", {}).get("kept_step")
    best = "" if kept is None else f"; step {kept} was kept"
    groups = [
        *(("distill", f"Stage 1: {f}, scaled loss", labels) for f, labels in families.items()),
        ("finetune", "Stage 2: loss", ("loss", "mse", "vb")),
        ("finetune", "Stage 2: squared distance to the teacher’s output", ("distance",)),
        ("finetune", f"Stage 2: error of held-out samples{best}", ("held_out_error",)),
        ("shorten", "Stage 3: few evaluations", _logged(workdir, "shorten")),
    ]
    plots = []
    for stage, title, keys in groups:
        labels = keys if isinstance(keys, dict) else {key: key for key in keys}
        series = curve_series(workdir, stage, list(labels))
        plots.append({"title": title, "series": {labels[key]: x for key, x in series.items()}})
    return plots


def _logged(workdir: Path, stage: str) -> list[str]:
    names = {name for line in read_metrics(workdir, stage) for name in line}
    return sorted(names - {"time", "stage", "step"})


def _videos(folder: Path, found: Mapping) -> list[dict]:
    """Returns the recorded seeds with their scores; those that differ most come first."""
    both = [dict(zip(found[k]["seeds"], found[k]["scores"], strict=True)) for k in _PAIR]
    rows = []
    for clip in folder.glob("seed_*.mp4"):
        seed = int(clip.stem.removeprefix("seed_"))
        if seed in both[0]:
            first, second = (scores[seed] for scores in both)
            caption = f"Seed {seed}: teacher {first:.3f}, graft {second:.3f}"
            rows.append((abs(second - first), {"path": clip, "caption": caption}))
    return [row for _, row in sorted(rows, key=lambda row: -row[0])]


def _count(module) -> int:
    return sum(x.size for x in surgery.flatten(module).values())
