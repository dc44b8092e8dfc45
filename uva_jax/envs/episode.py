"""Episodes under UVA's multi-step protocol, and the worker process that runs several of them.

A policy observes the last `n_obs_steps` steps (the first is repeated before the start), and all
`chunk` actions that it returns are executed before the next call. The module does not import jax;
see `workers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from uva_jax.envs.simulator import Simulator, SimulatorInfo, make_simulator

PICTURES = ("image", "wrist_image")


@dataclass(frozen=True)
class RolloutSpec:
    """What a policy observes and executes in each call, and the length of episodes.

    Attributes:
      names: the arrays that it reads, by the simulator's names.
      n_obs_steps: observed steps of states.
      frames: indices of those steps whose pictures are observed.
      chunk: actions executed per call.
      past_actions: number of executed actions that it reads as "past_action".
      max_steps: limit of an episode's length; the last chunk is cut there.
    """

    names: tuple[str, ...] = ("image",)
    n_obs_steps: int = 16
    frames: tuple[int, ...] = (3, 7, 11, 15)
    chunk: int = 8
    past_actions: int = 0
    max_steps: int = 300

    def __post_init__(self):
        if not set(self.frames) <= set(range(self.n_obs_steps)):
            raise ValueError(f"frames {self.frames} exceed 0..{self.n_obs_steps - 1}")


class Job(NamedTuple):
    """An episode to run: its seed, the number of its noise, and whether it is recorded."""

    seed: int
    number: int
    record: bool = False


class Outcome(NamedTuple):
    """A finished episode; the video is uint8 (steps + 1, h, w, 3) or None."""

    seed: int
    number: int
    score: float
    success: bool
    steps: int
    video: np.ndarray | None = None


class Turn(NamedTuple):
    """What happened in one slot during one turn.

    Attributes:
      ended: the episode that ended, or None.
      job: the episode that began, or None.
      obs: the observation that the policy's next call needs; None: the slot is empty.
    """

    ended: Outcome | None
    job: Job | None
    obs: dict[str, np.ndarray] | None


class Episode:
    """A running episode: the simulator, the history of observations and the score."""

    def __init__(self, simulator: Simulator, job: Job, spec: RolloutSpec):
        self.job, self._simulator, self._spec = job, simulator, spec
        self._score, self._success = 0.0, False
        self._pictures = [name for name in spec.names if name in PICTURES]
        self._states = [name for name in spec.names if name not in (*PICTURES, "text_latents")]
        # Steps modulo the chunk whose pictures a later observation includes.
        self._phases = {(i - spec.n_obs_steps + 1) % spec.chunk for i in spec.frames}
        simulator.reset(job.seed)
        self._step = 0
        self._actions: list[np.ndarray] = []
        self._seen: dict[int, dict] = {}
        self._film: list[np.ndarray] = []
        self._look(pictures=True)

    def run(self, actions: np.ndarray) -> bool:
        """Executes actions (chunk, action_dim); returns whether the episode is over."""
        for action in actions:
            reward, self._success = self._simulator.step(action)
            self._actions.append(np.array(action, np.float32))
            self._step += 1
            self._score = max(self._score, float(reward))
            over = self._success or self._step >= self._spec.max_steps
            self._look(pictures=not over and self._step % self._spec.chunk in self._phases)
            if over:
                return True
        return False

    def observe(self) -> dict[str, np.ndarray]:
        """Returns what the policy reads.

        Pictures are (f, h, w, 3) uint8, states (n_obs_steps, k) float32, "past_action"
        (past_actions, a) float32, which is NaN before the first action, and "task" the number of
        the task's sentence.
        """
        spec, now = self._spec, self._step
        steps = np.maximum(now - spec.n_obs_steps + 1 + np.arange(spec.n_obs_steps), 0).tolist()
        found = {
            name: np.stack([self._seen[steps[i]][name] for i in spec.frames])
            for name in self._pictures
        }
        for name in self._states:
            found[name] = np.array([self._seen[i][name] for i in steps], np.float32)
        if spec.past_actions:
            found["past_action"] = self._past_actions()
        found["task"] = np.int32(getattr(self._simulator, "task", 0))
        for old in [step for step in self._seen if 0 < step < steps[0]]:
            del self._seen[old]
        return found

    def outcome(self) -> Outcome:
        """Returns the result of the finished episode."""
        video = np.stack(self._film) if self.job.record else None
        seed, number, _ = self.job
        return Outcome(seed, number, self._score, bool(self._success), self._step, video)

    def _look(self, pictures: bool) -> None:
        names = [*self._states, *(self._pictures if pictures else ())]
        filmed = ["image"] if self.job.record and "image" not in names else []
        seen = self._simulator.observe([*names, *filmed]) if names or filmed else {}
        if self.job.record:
            self._film.append(seen["image"])
        self._seen[self._step] = {name: seen[name] for name in names}

    def _past_actions(self) -> np.ndarray:
        count, width = self._spec.past_actions, self._simulator.action_dim
        if not self._actions:
            return np.full((count, width), np.nan, np.float32)
        known = self._actions[-count:]
        return np.stack([known[0]] * (count - len(known)) + known)


class EpisodeWorker:
    """Runs the episodes of several slots in a worker process; `eval.rollout` calls its methods."""

    def __init__(self, name: str, files: str = ""):
        self._name, self._files = name, files
        self._spare = [make_simulator(name, files)]
        self._slots: dict[int, Episode | None] = {}
        self._simulators: dict[int, Simulator] = {}

    def describe(self) -> SimulatorInfo:
        """Returns what the simulator provides."""
        known = [*self._spare, *self._simulators.values()]
        return SimulatorInfo.of(self._name, known[0])

    def begin(self, spec: RolloutSpec) -> bool:
        """Forgets all episodes; those that follow are run by `spec`. Returns True when done."""
        self._spec, self._slots = spec, {}
        return True

    def play(
        self, slots: Sequence[int], actions: np.ndarray | None, jobs: Sequence[Job]
    ) -> tuple[list[Turn], Sequence[Job]]:
        """Executes a chunk of actions in each slot's episode and fills the empty slots.

        Args:
          slots: numbers of the slots.
          actions: (n, chunk, action_dim) of these slots; None: no episode runs in them yet.
          jobs: episodes that may start in slots that are empty or whose episode ends now.

        Returns:
          a turn for each slot, and the jobs that did not start.
        """
        turns, waiting = [], list(jobs)
        for row, slot in enumerate(slots):
            episode, ended = self._slots.get(slot), None
            if episode is not None and episode.run(actions[row]):
                ended, episode = episode.outcome(), None
            job = None
            if episode is None and waiting:
                job = waiting.pop(0)
                episode = Episode(self._simulator_of(slot), job, self._spec)
            self._slots[slot] = episode
            turns.append(Turn(ended, job, episode and episode.observe()))
        return turns, waiting

    def _simulator_of(self, slot: int) -> Simulator:
        if slot not in self._simulators:
            spare = self._spare.pop() if self._spare else None
            self._simulators[slot] = spare or make_simulator(self._name, self._files)
        return self._simulators[slot]
