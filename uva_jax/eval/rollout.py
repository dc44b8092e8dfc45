"""UVA's evaluation in a simulator: a batched policy, and episodes in parallel processes.

The protocol is that of upstream's runners: the policy observes the last 16 steps (the first is
repeated before the start) and all of its 8 actions are executed before the next call. An episode
ends with success or after `max_steps`, also within a chunk of actions. Its score is the largest
reward.

There is a fixed number of slots, and a slot whose episode has ended gets the next seed. They are
divided in two halves: while the policy acts on one, the processes step the other. When the episodes
that are left fit one half, they go on in it.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from uva_jax.data.replay_buffer import Progress
from uva_jax.envs.episode import Job, Outcome, RolloutSpec, Turn
from uva_jax.envs.simulator import SimulatorInfo
from uva_jax.envs.workers import WorkerProcess, usable_cores
from uva_jax.models.frames import frame_indices
from uva_jax.models.policy_call import cameras
from uva_jax.models.policy_config import PolicyConfig
from uva_jax.runtime.sections import EvaluateOptions

SLOTS = EvaluateOptions.slots
_HALVED = 4  # slots from which on they are divided
EMPTY = -1  # seed_index of a slot without an episode
# predict(obs, seed_index, call_index, slots) -> actions; see `RolloutPool.run`
Predict = Callable[[Mapping[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Times(NamedTuple):
    """Wall time of rollouts in seconds: all, in `predict`, and waiting for the simulator."""

    total: float = 0.0
    policy: float = 0.0
    simulator: float = 0.0

    def plus(self, other: "Times") -> "Times":
        """Returns the sum of two times."""
        return Times(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class RolloutResult:
    """The episodes of a policy; arrays are in the order of the seeds."""

    seeds: np.ndarray  # (n,) int64
    scores: np.ndarray  # (n,) float64: largest reward, 0..1
    success: np.ndarray  # (n,) booleans: the task was solved
    steps: np.ndarray  # (n,) int64: actions executed
    times: Times
    videos: dict[int, np.ndarray] = field(default_factory=dict)  # seed -> uint8 (t, h, w, 3)


def spec_of(config: PolicyConfig, max_steps: int = 300) -> RolloutSpec:
    """Returns what a policy observes and executes in each call."""
    mar = config.mar
    states = config.proprio_keys if mar.proprio_dim else ()
    return RolloutSpec(
        names=(*cameras(config), *states, *(("text_latents",) if mar.text_dim else ())),
        n_obs_steps=config.n_obs_steps,
        frames=frame_indices(config.n_obs_steps, mar.n_frames),
        chunk=config.n_action_steps,
        past_actions=mar.n_actions if mar.history_action else 0,
        max_steps=max_steps,
    )


class _Half:
    """Half of the slots: what their episodes observe, in arrays of constant shape."""

    def __init__(self, slots: Sequence[int]):
        self.slots = np.array(slots, np.int32)
        self.jobs: list[Job | None] = [None] * len(slots)
        self.calls = np.zeros(len(slots), np.int32)
        self.moving = False  # its turn has been sent and not received
        self._obs: dict[str, np.ndarray] = {}

    @property
    def running(self) -> list[int]:
        """Rows with an episode."""
        return [row for row, job in enumerate(self.jobs) if job is not None]

    @property
    def obs(self) -> dict[str, np.ndarray]:
        # Copies, because jax may read a numpy array in place, and these are overwritten.
        return {name: x.copy() for name, x in self._obs.items()}

    @property
    def seed_index(self) -> np.ndarray:
        return np.array([EMPTY if job is None else job.number for job in self.jobs], np.int32)

    def adopt(self, other: "_Half") -> None:
        """Takes over the episodes of the other half, which all fit in empty rows."""
        empty = [row for row, job in enumerate(self.jobs) if job is None]
        for row, theirs in zip(empty[: len(other.running)], other.running, strict=True):
            self.slots[row], other.slots[theirs] = other.slots[theirs], self.slots[row]
            self.jobs[row], self.calls[row] = other.jobs[theirs], other.calls[theirs]
            for name, values in other._obs.items():
                self._obs.setdefault(name, np.zeros_like(values))[row] = values[theirs]

    def take(self, row: int, turn: Turn) -> None:
        """Writes the result of a slot's turn to its row."""
        self.calls[row] = 0 if turn.job else self.calls[row] + 1
        if turn.job or turn.ended:
            self.jobs[row] = turn.job
        for name, value in (turn.obs or {}).items():
            if name not in self._obs:
                self._obs[name] = np.zeros((len(self.slots), *value.shape), value.dtype)
            self._obs[name][row] = value
        if turn.obs is None:
            for values in self._obs.values():
                values[row] = 0


class RolloutPool:
    """Worker processes that run episodes, for several policies; a context manager.

    Attributes:
      simulator: what the simulator provides.
      settings: the simulator's name and files, as JSON values.
    """

    def __init__(self, workers: int | None = None, *, simulator: str = "pusht", files: str = ""):
        """Starts the processes.

        Args:
          workers: number of processes; by default one per core that this process may use.
          simulator: its name, or "package.module:Class".
          files: path that the simulator reads; "": none.

        Raises:
          UserError: the simulator cannot be made.
        """
        if workers is not None and workers < 1:
            raise ValueError(f"a rollout pool needs at least one worker, got {workers}")
        self.settings = {"simulator": simulator, "simulator_files": files}
        target, count = "uva_jax.envs.episode:EpisodeWorker", workers or usable_cores()
        self._workers = [WorkerProcess(target, simulator, files) for _ in range(count)]
        try:
            self.simulator: SimulatorInfo = self._all("describe")[0]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RolloutPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.close()
        self._workers = []

    def run(
        self,
        predict: Predict,
        seeds: Sequence[int],
        *,
        numbers: Sequence[int] | None = None,
        spec: RolloutSpec | None = None,
        slots: int | None = None,
        record_seeds: Sequence[int] = (),
        ended: Callable[[Outcome, Times], None] | None = None,
        progress: Progress | None = None,
    ) -> RolloutResult:
        """Rolls out one policy on all seeds.

        Args:
          predict: called as `predict(obs, seed_index, call_index, slots)`. `obs` holds what `spec`
            names, as `Episode.observe` returns it, with a leading axis of n rows. `seed_index`
            int32 (n,) numbers the episodes (-1: the row is empty) and `call_index` int32 (n,) the
            calls in each, to derive noise from. `slots` int32 (n,) are the rows' slots, in which
            an episode stays. It returns actions (n, chunk, action_dim) in raw units.
          seeds: of the episodes.
          numbers: number of each episode's noise; by default the index of its seed.
          spec: what the policy observes, and the length of episodes.
          slots: episodes that run at a time, half of which are the policy's batch; by default the
            smaller of SLOTS and the number of seeds.
          record_seeds: seeds that are rendered at every step and returned as videos.
          ended: called with every finished episode, in the order in which they end, and the time
            until then.
          progress: called in every turn with (episodes that have ended, number of seeds).

        Raises:
          ValueError: actions have a wrong shape or are not finite, or an episode is given twice.
          WorkerError: a worker died. After an error the pool is closed.
        """
        keys = list(zip(seeds, numbers, strict=True)) if numbers is not None else list(seeds)
        if not keys or len(set(keys)) != len(keys):
            raise ValueError("rollouts need at least one seed, each at most once")
        numbers, record = range(len(seeds)) if numbers is None else numbers, set(record_seeds)
        jobs = [Job(int(s), int(i), s in record) for s, i in zip(seeds, numbers, strict=True)]
        if not self._workers:
            raise ValueError("this rollout pool is closed")
        try:
            slots = slots or min(SLOTS, len(jobs))
            return self._run(predict, jobs, spec or RolloutSpec(), slots, ended, progress)
        except BaseException:
            self.close()  # results may still arrive, so these workers cannot be used again
            raise

    def _run(self, predict, jobs, spec, slots, ended, progress) -> RolloutResult:
        begun, policy_seconds, simulator_seconds = time.perf_counter(), 0.0, 0.0
        self._all("begin", spec)
        count = 2 if slots >= _HALVED else 1
        size = -(-slots // count)  # slots of a half
        halves = [_Half(range(i * size, (i + 1) * size)) for i in range(count)]
        waiting, found = deque(jobs), {}

        def times() -> Times:
            return Times(time.perf_counter() - begun, policy_seconds, simulator_seconds)

        def finish(half: _Half) -> None:
            """Receives a half's turn."""
            nonlocal simulator_seconds
            before, outcomes, unused = time.perf_counter(), [], []
            for worker, rows in self._shares(half):
                turns, left = worker.receive()
                unused += left
                for row, turn in zip(rows, turns, strict=True):
                    half.take(row, turn)
                    if turn.ended:
                        outcomes.append(turn.ended)
            waiting.extendleft(reversed(unused))
            half.moving = False
            simulator_seconds += time.perf_counter() - before
            for outcome in outcomes:
                found[outcome.seed, outcome.number] = outcome
                if ended is not None:
                    ended(outcome, times())
            if progress is not None:
                progress(len(found), len(jobs))

        def in_use() -> int:
            return sum(len(half.running) for half in halves)

        for half in halves:
            self._send(half, None, waiting)
        turns = itertools.cycle(halves)
        while len(found) < len(jobs):
            half = next(turns)
            if half.moving:
                finish(half)
            if len(halves) == 2 and not waiting and in_use() <= size:
                (other,) = (x for x in halves if x is not half)
                if other.moving:
                    finish(other)
                if not waiting and in_use() <= size:  # its turn may have begun episodes
                    half.adopt(other)
                    halves, turns = [half], itertools.repeat(half)
            if not (half.running or waiting):
                continue
            actions = None
            if half.running:
                before = time.perf_counter()
                actions = predict(half.obs, half.seed_index, half.calls.copy(), half.slots.copy())
                policy_seconds += time.perf_counter() - before
                actions = self._checked(actions, half, spec)
            self._send(half, actions, waiting)
        outcomes = [found[seed, number] for seed, number, _ in jobs]
        return RolloutResult(
            seeds=np.array([o.seed for o in outcomes]),
            scores=np.array([o.score for o in outcomes]),
            success=np.array([o.success for o in outcomes]),
            steps=np.array([o.steps for o in outcomes]),
            times=times(),
            videos={o.seed: o.video for o in outcomes if o.video is not None},
        )

    def _shares(self, half: _Half) -> list[tuple[WorkerProcess, list[int]]]:
        """Returns the rows of each worker; a slot stays with its worker."""
        owner = half.slots % len(self._workers)
        shares = [(w, np.flatnonzero(owner == i).tolist()) for i, w in enumerate(self._workers)]
        return [(worker, rows) for worker, rows in shares if rows]

    def _send(self, half: _Half, actions: np.ndarray | None, waiting: deque[Job]) -> None:
        """Starts a turn of a half's slots; each worker gets as many waiting jobs as it may need."""
        for worker, rows in self._shares(half):
            empty = sum(half.jobs[row] is None for row in rows)
            # The other shares may need jobs too.
            wanted = min(len(rows), empty + max(2, len(waiting) // 4), len(waiting))
            spare = [waiting.popleft() for _ in range(wanted)]
            slots = half.slots[rows].tolist()
            worker.send("play", slots, None if actions is None else actions[rows], spare)
        half.moving = True

    def _checked(self, actions: np.ndarray, half: _Half, spec: RolloutSpec) -> np.ndarray:
        actions = np.asarray(actions, np.float64)
        wanted = (len(half.slots), spec.chunk, self.simulator.action_dim)
        if actions.shape != wanted:
            raise ValueError(
                f"the policy returned actions of shape {actions.shape} instead of {wanted}"
            )
        bad = ~np.isfinite(actions).all(axis=(1, 2)) & (half.seed_index != EMPTY)
        if bad.any():
            call = half.calls[np.flatnonzero(bad)[0]]
            raise ValueError(f"the policy returned actions that are not finite (call {call})")
        return actions

    def _all(self, method: str, *args) -> list:
        for worker in self._workers:
            worker.send(method, *args)
        return [worker.receive() for worker in self._workers]
