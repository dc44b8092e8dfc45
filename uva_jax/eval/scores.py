"""The finished episodes of one policy, a line of JSON each, with which a killed run resumes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from uva_jax.data.replay_buffer import Progress
from uva_jax.envs.episode import Outcome, RolloutSpec
from uva_jax.eval.rollout import SLOTS, Predict, RolloutPool, Times
from uva_jax.runtime.metrics import MetricsWriter, open_for_lines, read_lines, write_line

_FIRST_SEED = 100_000  # of upstream's test seeds, which have the numbers from 0 on
_DRAWS_APART = 10_000_019


def noise_number(seed: int, draw: int = 0) -> int:
    """Returns the number of an episode's noise, which depends on the seed and the draw alone."""
    return (seed - _FIRST_SEED + draw * _DRAWS_APART) % 2**31


class Score(NamedTuple):
    """The result of one episode: score in 0..1, whether the task was solved, and its length."""

    score: float
    success: bool
    steps: int


class ScoreFile:
    """The scores of one policy, stored as each episode ends.

    Attributes:
      path: of the file, whose folder exists.
      scores: by (seed, number of the noise).
      times: of the rollouts that are stored.
    """

    def __init__(self, path: Path):
        """Reads what an earlier run stored."""
        self.path, self.scores, self.times = path, {}, Times()
        for line in read_lines(path):
            key = line["seed"], line["number"]
            self.scores[key] = Score(line["score"], line["success"], line["steps"])
            self.times = Times(*line["times"])

    def count(self, episodes: Iterable[tuple[int, int]]) -> int:
        """Returns how many of these (seed, number of the noise) are stored."""
        return sum(episode in self.scores for episode in episodes)

    def add(self, scores: Mapping[tuple[int, int], Score], times: Times) -> int:
        """Stores episodes that were rolled out elsewhere, unless they are stored already.

        Args:
          scores: by (seed, number of the noise).
          times: of all these episodes, each of which counts with an equal share.

        Returns:
          how many were added.
        """
        missing = [key for key in scores if key not in self.scores]
        if missing:
            before = self.times
            with open_for_lines(self.path) as file:
                for done, key in enumerate(missing, 1):
                    share = Times(*(t * done / len(scores) for t in times))
                    self._store(file, key, scores[key], before.plus(share))
        return len(missing)

    def _store(self, file, key: tuple[int, int], score: Score, times: Times) -> None:
        """Writes an episode's line; `times` is that of all lines."""
        self.times = Times(*(round(t, 3) for t in times))
        line = {"seed": key[0], "number": key[1], **score._asdict(), "times": self.times}
        write_line(file, line)
        self.scores[key] = score

    def roll_out(
        self,
        pool: RolloutPool,
        predict: Predict,
        episodes: Iterable[tuple[int, int]],
        *,
        spec: RolloutSpec,
        slots: int = SLOTS,
        progress: Progress | None = None,
    ) -> None:
        """Runs the episodes that are not stored yet.

        Args:
          pool: of the simulator.
          predict: the policy; see `RolloutPool.run`, as for the further arguments.
          episodes: (seed, number of the noise) of each.
          progress: called in every turn with (episodes done, all episodes).
        """
        episodes = list(episodes)
        missing = [key for key in episodes if key not in self.scores]
        if not missing:
            return
        known, before = len(episodes) - len(missing), self.times
        with open_for_lines(self.path) as file:

            def store(outcome: Outcome, times: Times) -> None:
                seed, number, *score, _ = outcome
                self._store(file, (seed, number), Score(*score), before.plus(times))

            pool.run(
                predict,
                [seed for seed, _ in missing],
                numbers=[number for _, number in missing],
                spec=spec,
                # Not fewer in a resumed run: XLA's last bits may depend on the size of the batch.
                slots=min(slots, len(episodes)),
                ended=store,
                progress=progress and (lambda done, _: progress(known + done, len(episodes))),
            )

    def roll_out_shown(
        self,
        metrics: MetricsWriter,
        name: str,
        pool: RolloutPool,
        actor: Predict,
        episodes: Sequence[tuple[int, int]],
        *,
        slots: int,
    ) -> None:
        """Does `roll_out` with a line of progress under the policy's name.

        `actor` has the `spec` of what it observes.
        """
        done = self.count(episodes)
        with metrics.progress(len(episodes), unit="episodes", desc=name, initial=done) as bar:

            def show(now: int, total: int) -> None:
                nonlocal done
                del total
                bar.update(now - done)
                done = now

            self.roll_out(pool, actor, episodes, spec=actor.spec, slots=slots, progress=show)
