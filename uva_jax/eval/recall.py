"""Films of chosen episodes: those in which two policies differ most.

Which these are is known only after all rollouts, and filming all of them would cost minutes. So the
actions of the rollouts are kept, and the chosen episodes are played again with them, for which the
simulator alone has to run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from uva_jax.eval import video
from uva_jax.eval.acting import LocalPolicy
from uva_jax.eval.rollout import EMPTY, RolloutPool
from uva_jax.eval.scores import noise_number

_STILLS = 4  # frames of an episode that are printed


class Recalled:
    """A policy whose actions are kept, so that it is not called twice for the same step.

    After a run that was killed and resumed some actions are missing; then the policy is called.

    Attributes:
      spec: what the policy observes and executes in each call.
    """

    def __init__(self, actor: LocalPolicy):
        self.spec, self._actor = actor.spec, actor
        self._actions: dict[tuple[int, int], np.ndarray] = {}

    def __call__(
        self,
        obs: Mapping[str, np.ndarray],
        seed_index: np.ndarray,
        call_index: np.ndarray,
        slots: np.ndarray,
    ) -> np.ndarray:
        """Returns actions; see `RolloutPool.run`."""
        keys = list(zip(seed_index.tolist(), call_index.tolist(), strict=True))
        taken = [row for row, (seed, _) in enumerate(keys) if seed != EMPTY]
        if taken and all(keys[row] in self._actions for row in taken):
            found = np.zeros((len(keys), *self._actions[keys[taken[0]]].shape))
            for row in taken:
                found[row] = self._actions[keys[row]]
            return found
        found = np.asarray(self._actor(obs, seed_index, call_index, slots), np.float64)
        self._actions |= {keys[row]: found[row].copy() for row in taken}
        return found


def most_different(first: Sequence[float], second: Sequence[float], count: int) -> list[int]:
    """Returns the indices of the `count` largest differences; of equal ones, the first."""
    gaps = np.abs(np.subtract(first, second))
    return np.argsort(-gaps, kind="stable")[:count].tolist()


def film(
    pool: RolloutPool,
    actors: Mapping[str, Recalled],
    seeds: Sequence[int],
    chosen: Sequence[int],
    *,
    slots: int,
    folder: Path,
) -> None:
    """Writes `seed_<seed>.mp4` with the policies side by side, unless all are there.

    Beside each, `seed_<seed>.png` shows some of its frames, for paper.

    Args:
      pool: of the simulator.
      actors: by name, in the order in which they are shown.
      seeds: of all rollouts.
      chosen: indices of the episodes in `seeds`.
      slots: of the rollouts, so that a policy that has to be called gives the same actions.
      folder: of the videos.
    """
    paths = {seeds[i]: folder / f"seed_{seeds[i]}.mp4" for i in chosen}
    if all(path.exists() for path in paths.values()):
        return
    clips = [
        pool.run(
            actor,
            list(paths),
            numbers=[noise_number(seed) for seed in paths],
            spec=actor.spec,
            slots=min(slots, len(seeds)),
            record_seeds=list(paths),
        ).videos
        for actor in actors.values()
    ]
    for seed, path in paths.items():
        tiled = video.tile([found[seed] for found in clips], labels=list(actors), scale=2)
        shown = np.linspace(0, len(tiled) - 1, _STILLS).round().astype(int)
        video.write_strip(path.with_suffix(".png"), tiled[shown])
        video.write_mp4(path, tiled)
