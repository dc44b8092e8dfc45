"""Policies compared in rollouts on the same seeds and noise; `python -m uva_jax evaluate` runs it.

The first policy is the reference. Every episode is stored as it ends, in a file that is named after
everything that its scores depend on, so that a run may be killed, repeated and extended.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uva_jax.eval import statistics
from uva_jax.eval.acting import LocalPolicy
from uva_jax.eval.rollout import RolloutPool
from uva_jax.eval.scores import ScoreFile, noise_number
from uva_jax.eval.server import ServerPolicy
from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.storage.identity import hash_json


@dataclass(frozen=True)
class Entrant:
    """A policy with one way of sampling.

    Attributes:
      label: its name in tables.
      policy: its path or address.
      act: the policy.
      settings: everything that its scores depend on, as JSON values.
    """

    label: str
    policy: str
    act: LocalPolicy | ServerPolicy
    settings: Mapping[str, Any]

    @property
    def identity(self) -> str:
        """The hash of the settings."""
        return hash_json(self.settings)

    @property
    def file(self) -> str:
        """The name of its scores' file."""
        label = re.sub("[^A-Za-z0-9]+", "_", self.label).strip("_")[-60:]
        return f"{label}-{self.identity[:12]}.jsonl"


class Comparison:
    """The scores of several entrants.

    Attributes:
      scores: the stored scores by label.
    """

    def __init__(
        self,
        entrants: Sequence[Entrant],
        pool: RolloutPool,
        folder: Path,
        metrics: MetricsWriter,
        *,
        draws: int,
        slots: int,
    ):
        """Reads what earlier runs stored.

        Args:
          entrants: the first is the reference.
          pool: of the simulator.
          folder: of the scores.
          metrics: writer of progress and messages.
          draws: episodes of each seed, which differ in their noise.
          slots: episodes that run at a time.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.entrants, self._pool, self._metrics = entrants, pool, metrics
        self._draws, self._slots = draws, slots
        self.scores = {e.label: ScoreFile(folder / e.file) for e in entrants}

    def roll_out(self, seeds: Sequence[int]) -> None:
        """Runs the episodes of these seeds that are not stored yet."""
        episodes = [key for seed in seeds for key in self._episodes(seed)]
        for entrant in self.entrants:
            scores = self.scores[entrant.label]
            if scores.count(episodes) < len(episodes):
                scores.roll_out_shown(
                    self._metrics,
                    entrant.label,
                    self._pool,
                    entrant.act,
                    episodes,
                    slots=self._slots,
                )

    def figures(self, seeds: Sequence[int]) -> list[dict]:
        """Returns scores and intervals of each entrant on these seeds, as JSON values.

        A seed's score is the mean over its draws, because these are not independent.
        """
        found = []
        for entrant in self.entrants:
            file = self.scores[entrant.label]
            episodes = [[file.scores[key] for key in self._episodes(seed)] for seed in seeds]
            scores = np.array([np.mean([e.score for e in row]) for row in episodes])
            success = np.array([np.mean([e.success for e in row]) for row in episodes])
            mean = statistics.mean_interval(scores, seed=0)
            if self._draws == 1:
                rate = statistics.wilson(int(success.sum()), len(seeds))
            else:
                rate = statistics.mean_interval(success, seed=0)
            found.append(
                {"label": entrant.label, "policy": entrant.policy}
                | entrant.settings
                | {
                    "mean": mean.mean,
                    "ci95": [mean.low, mean.high],
                    "success_rate": rate.mean,
                    "success_ci95": [rate.low, rate.high],
                    "scores": scores.tolist(),
                    "success": success.tolist(),
                    "steps": [float(np.mean([e.steps for e in row])) for row in episodes],
                    "seconds": file.times.total,
                    "policy_seconds": file.times.policy,
                    "simulator_seconds": file.times.simulator,
                }
            )
        return found

    def verdicts(self, figures: Sequence[Mapping], margin: float) -> list[dict]:
        """Compares every entrant with the reference, by `figures`' results.

        Returns:
          for each: its label, the paired difference with its interval for one look at these seeds,
          McNemar's p-value of its successes (None with several draws), and its verdict.
        """
        first, *others = figures
        found = []
        for other in others:
            gain = np.subtract(other["scores"], first["scores"])
            paired = statistics.paired_difference(other["scores"], first["scores"])
            said = statistics.verdict(gain, margin, policy=other["label"], reference=first["label"])
            found.append(
                {
                    "label": other["label"],
                    "paired_difference": paired.mean,
                    "ci95": [paired.low, paired.high],
                    "mcnemar": statistics.mcnemar(other["success"], first["success"])
                    if self._draws == 1
                    else None,
                    "verdict": said.as_json(),
                }
            )
        return found

    def _episodes(self, seed: int) -> list[tuple[int, int]]:
        return [(seed, noise_number(seed, draw)) for draw in range(self._draws)]


def table(figures: Sequence[Mapping], verdicts: Sequence[Mapping]) -> str:
    """Formats the results; the differences are those from the first policy.

    Args:
      figures: see `Comparison.figures`.
      verdicts: see `Comparison.verdicts`; empty for a single policy.
    """
    width = max(len("policy"), *(len(row["label"]) for row in figures))
    gains = {row["label"]: row for row in verdicts}
    lines = [
        f"{'policy':<{width}}  seeds  score  95% interval    success  95% interval"
        + "  difference  95% interval" * bool(verdicts)
    ]
    for row in figures:
        low, high = row["ci95"]
        success = [f"{100 * x:.0f}" for x in row["success_ci95"]]
        text = (
            f"{row['label']:<{width}}  {len(row['scores']):>5}  {row['mean']:.3f}  "
            f"{low:.3f} to {high:.3f}  {row['success_rate']:>7.1%}  {'% to '.join(success):>11}%"
        )
        if gain := gains.get(row["label"]):
            low, high = gain["ci95"]
            text += f"  {gain['paired_difference']:>+10.3f}  {low:+.3f} to {high:+.3f}"
        lines.append(text)
    return "\n".join(lines)
