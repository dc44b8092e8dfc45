"""UVA's PushT evaluation: a batched policy, environments in parallel processes.

The protocol is that of upstream's PushT runner: the policy observes the last 16 steps (the first is
repeated before the start) and all of its 8 actions are executed before the next call. An episode
ends with success or after 300 steps, also within a chunk of actions. Its score is the largest
reward, which is the goal's coverage over 0.95, at most 1.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from uva_jax.data.replay_buffer import Progress
from uva_jax.envs.pusht import IMAGE_SIZE, SUCCESS_COVERAGE
from uva_jax.envs.workers import WorkerProcess, usable_cores

# predict(obs, seed_index, call_index) -> actions; see `RolloutPool.run`
Predict = Callable[[Mapping[str, np.ndarray], np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class RolloutResult:
    """The episodes of a policy; arrays are in the order of the seeds."""

    seeds: np.ndarray  # (n,) int64
    scores: np.ndarray  # (n,) float64: largest reward, 0..1
    coverage: np.ndarray  # (n,) float64: largest coverage, 0..1
    steps: np.ndarray  # (n,) int64: actions executed
    seconds: float  # wall time of the whole run
    policy_seconds: float  # of these, the time in `predict`
    videos: dict[int, np.ndarray] = field(default_factory=dict)  # seed -> uint8 (t, 96, 96, 3)

    @property
    def mean(self) -> float:
        """UVA's `test_mean_score`."""
        return float(self.scores.mean())

    @property
    def success(self) -> np.ndarray:
        """(n,) booleans: the full score was reached, that is, a coverage of at least 0.95."""
        return (self.scores >= 1.0) & (self.coverage >= SUCCESS_COVERAGE)


class RolloutPool:
    """Worker processes that run environments, for several policies; a context manager."""

    def __init__(self, workers: int | None = None, *, fix_goal: bool = True):
        """Starts the processes.

        Args:
          workers: number of processes; by default one per core that this process may use.
          fix_goal: False: every seed has another goal, as in PushT-M.
        """
        if workers is not None and workers < 1:
            raise ValueError(f"a rollout pool needs at least one worker, got {workers}")
        target = "uva_jax.envs.pusht:RolloutWorker"
        self._workers = [WorkerProcess(target, fix_goal) for _ in range(workers or usable_cores())]

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
        max_steps: int = 300,
        n_obs_steps: int = 16,
        n_action_steps: int = 8,
        frame_indices: Sequence[int] = (3, 7, 11, 15),
        record_seeds: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> RolloutResult:
        """Rolls out one policy on all seeds in parallel.

        Args:
          predict: called as `predict(obs, seed_index, call_index)`. `obs` holds `image` uint8
            (n, f, 96, 96, 3) and `agent_pos` float32 (n, n_obs_steps, 2), in pixels of the 512
            canvas; `seed_index` int32 (n,) and `call_index` number seeds and calls, to derive noise
            from. It returns target positions in 0..512, (n, n_action_steps, 2). The shape of the
            batch is constant: finished episodes keep their last observation.
          seeds: of the episodes.
          max_steps: limit of an episode's length; the last chunk is truncated there.
          n_obs_steps: steps of the observation.
          n_action_steps: actions per call.
          frame_indices: indices of the observed steps whose pictures are rendered.
          record_seeds: seeds that are rendered at every step and returned as videos.
          progress: called after every chunk with (steps so far, max_steps).

        Raises:
          ValueError: actions have a wrong shape or are not finite.
          WorkerError: a worker died. After an error the pool is closed.
        """
        started = time.perf_counter()
        if not len(seeds) or len(set(seeds)) != len(seeds):
            raise ValueError("rollouts need at least one seed, each at most once")
        if not self._workers:
            raise ValueError("this rollout pool is closed")
        if not set(frame_indices) <= set(range(n_obs_steps)):
            raise ValueError(f"frame_indices {tuple(frame_indices)} exceed 0..{n_obs_steps - 1}")
        try:
            return self._run(
                predict,
                [int(seed) for seed in seeds],
                max_steps,
                (n_obs_steps, n_action_steps, tuple(frame_indices)),
                set(record_seeds),
                progress,
                started,
            )
        except BaseException:
            self.close()  # results may still arrive, so these workers cannot be used again
            raise

    def _run(self, predict, seeds, max_steps, protocol, record, progress, started):
        n_obs_steps, chunk, frames = protocol
        n = len(seeds)
        # Seeds are assigned round-robin, so that long episodes spread over the workers.
        shares = [list(range(n))[w :: len(self._workers)] for w in range(len(self._workers))]
        images = np.empty((n, len(frames), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        positions = np.empty((n, n_obs_steps, 2), np.float32)

        def collect() -> int:
            active = 0
            for worker, share in zip(self._workers, shares, strict=True):
                running, new_images, new_positions = worker.receive()
                active += len(running)
                for i, image, position in zip(running, new_images, new_positions, strict=True):
                    images[share[i]] = image
                    positions[share[i]] = position
            return active

        for worker, share in zip(self._workers, shares, strict=True):
            mine = [seeds[i] for i in share]
            worker.send("start", mine, [s in record for s in mine], *protocol)
        active = collect()
        call, policy_seconds = 0, 0.0
        while active:
            before = time.perf_counter()
            # Copies, because jax may read a numpy array in place, and these are overwritten.
            obs = {"image": images.copy(), "agent_pos": positions.copy()}
            actions = np.asarray(predict(obs, np.arange(n, dtype=np.int32), call), np.float64)
            policy_seconds += time.perf_counter() - before
            if actions.shape != (n, chunk, 2):
                raise ValueError(
                    f"the policy returned actions of shape {actions.shape} instead of "
                    f"{(n, chunk, 2)}"
                )
            if not np.isfinite(actions).all():
                raise ValueError(f"the policy returned actions that are not finite (call {call})")
            for worker, share in zip(self._workers, shares, strict=True):
                worker.send("step", actions[share], max_steps)
            active = collect()
            call += 1
            if progress is not None:
                progress(min(call * chunk, max_steps) if active else max_steps, max_steps)
        results = [None] * n
        for worker in self._workers:
            worker.send("results")
        for worker, share in zip(self._workers, shares, strict=True):
            for i, result in zip(share, worker.receive(), strict=True):
                results[i] = result
        scores, coverage, steps, videos = zip(*results, strict=True)
        return RolloutResult(
            seeds=np.array(seeds),
            scores=np.array(scores),
            coverage=np.array(coverage),
            steps=np.array(steps),
            seconds=time.perf_counter() - started,
            policy_seconds=policy_seconds,
            videos={s: v for s, v in zip(seeds, videos, strict=True) if v is not None},
        )


def run_rollouts(
    predict: Predict, seeds: Sequence[int], *, workers: int | None = None, **protocol
) -> RolloutResult:
    """Calls `RolloutPool.run` in a new pool; `protocol` are that method's further arguments."""
    with RolloutPool(min(workers or usable_cores(), max(len(seeds), 1))) as pool:
        return pool.run(predict, seeds, **protocol)
