"""What a report shows, and how its rows are gathered from the files of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uva_jax.runtime.metrics import read_metrics
from uva_jax.storage.atomic import read_json


@dataclass(frozen=True)
class ReportData:
    """The content of a report. Rows are dictionaries; a missing key or None is shown as a dash.

    Attributes:
      title: heading of the page.
      verdict: `Verdict.as_json` of the main comparison.
      config: the run's main settings by name, about a dozen.
      hashes: rows of `name`, `config`, `inputs`: what identifies each stage's result.
      versions: of packages, by name.
      stages: rows of `name`, `seconds`, `done` (bool), optionally `memory` (bytes), `note`.
      architecture: rows of `part`, `teacher`, `graft` (numbers of parameters).
      costs: rows of `policy`, `steps` (evaluations of the action head in a call), `seconds` (of a
        call for one episode), `parameters`.
      operators: rows of `operator`, `block`, `raw`, `scaled`, `shuffled` (the scaled loss when the
        operator gets other samples' inputs), `fvu` (fraction of variance unexplained).
      timesteps: error of eps, relative to the teacher's, by range of timesteps.
      curves: rows of `title`, `series` (label to (steps, values)), optionally `ylabel`, `log`.
      scores: rows of `policy`, `score`, `ci` (low, high), `success` (share), `success_ci`,
        `episodes`.
      reference: what `comparisons` compare with.
      comparisons: rows of `policy`, `difference` (from the reference), `ci`, `mcnemar` (p-value of
        the successes), `verdict` (sentence).
      sampling: rows of `policy`, `steps` (number of sampling steps), `score`, `ci`.
      actions: rows of `policy`, `mse`, `map`, `accuracy` (tolerance to share); see `actions.py`.
      per_seed: `names` of two policies and their `scores` on the same seeds.
      videos: rows of `path` (an mp4, teacher and graft side by side), `caption`.
      frames: figures of predicted video, rows of `policy`, `videos`, `fvd`, `ci`, `video_fvd`,
        `psnr`, `ssim`.
      notes: sentences shown below the heading.
    """

    title: str
    verdict: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    hashes: Sequence[Mapping[str, Any]] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    stages: Sequence[Mapping[str, Any]] = ()
    architecture: Sequence[Mapping[str, Any]] = ()
    costs: Sequence[Mapping[str, Any]] = ()
    operators: Sequence[Mapping[str, Any]] = ()
    timesteps: Mapping[str, float] = field(default_factory=dict)
    curves: Sequence[Mapping[str, Any]] = ()
    scores: Sequence[Mapping[str, Any]] = ()
    reference: str = "teacher"
    comparisons: Sequence[Mapping[str, Any]] = ()
    sampling: Sequence[Mapping[str, Any]] = ()
    actions: Sequence[Mapping[str, Any]] = ()
    per_seed: Mapping[str, Any] = field(default_factory=dict)
    videos: Sequence[Mapping[str, Any]] = ()
    frames: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


def stage_rows(folders: Mapping[str, str | os.PathLike]) -> list[dict[str, Any]]:
    """Returns the rows of the stage table from the done.json of each stage's folder."""
    rows = []
    for name, folder in folders.items():
        done = read_json(Path(folder) / "done.json") or {}
        note = "resumed; time of the last run" if done.get("resumed") else None
        row = {"name": name, "done": bool(done), "seconds": done.get("seconds"), "note": note}
        rows.append(row | {"memory": done.get("peak_memory")})
    return rows


def hash_rows(folders: Mapping[str, str | os.PathLike]) -> list[dict[str, Any]]:
    """Returns the rows of the table of hashes from what each stage has recorded."""
    rows = []
    for name, folder in folders.items():
        record = read_json(Path(folder) / "done.json") or read_json(Path(folder) / "started.json")
        if record:
            config, files = record["config_hash"], record["inputs"]
            rows.append({"name": name, "config": config, "inputs": record["inputs_hash"]})
            rows += [
                {"name": f"{name}: {label}", "inputs": files[label]}
                for label in files
                if label.startswith("file ")
            ]
    return rows


def curve_series(
    workdir: str | os.PathLike, stage: str, names: Sequence[str]
) -> dict[str, tuple[list[int], list[float | None]]]:
    """Returns (steps, values) by name of scalars that a stage has logged.

    Args:
      workdir: holds metrics.jsonl.
      stage: name of the stage.
      names: of the scalars; those that were never logged are absent from the result.
    """
    records = read_metrics(workdir, stage)
    series = {}
    for name in names:
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            series[name] = ([step for step, _ in points], [value for _, value in points])
    return series
