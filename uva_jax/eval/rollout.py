"""UVA's PushT evaluation: batched policy, environments in parallel processes, paired statistics.

The protocol (upstream's PushT runner): the policy sees the last 16 observations, the first one
repeated before the start, and its 8 actions are executed before it is asked again. An episode ends
at success or after 300 steps, in the middle of a chunk if need be, and its score is the largest
reward on the way, the reward being the goal's coverage over 0.95, at most 1.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from uva_jax.data.replay_buffer import Progress
from uva_jax.envs.pusht import IMAGE_SIZE, SUCCESS_COVERAGE
from uva_jax.envs.workers import WorkerProcess, usable_cores

# predict(obs, seed_index, call_index) -> actions, see `RolloutPool.run`
Predict = Callable[[Mapping[str, np.ndarray], np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class RolloutResult:
    """One policy's episodes; arrays are in the order of the seeds."""

    seeds: np.ndarray  # (n,) int64
    scores: np.ndarray  # (n,) float64: largest reward, 0..1
    coverage: np.ndarray  # (n,) float64: largest coverage, 0..1
    steps: np.ndarray  # (n,) int64: actions executed
    seconds: float  # wall time of the whole run
    policy_seconds: float  # the share of it spent in `predict`
    videos: dict[int, np.ndarray] = field(default_factory=dict)  # seed -> uint8 (t, 96, 96, 3)

    @property
    def mean(self) -> float:
        """UVA's `test_mean_score`."""
        return float(self.scores.mean())

    @property
    def success(self) -> np.ndarray:
        """(n,) bool: the full score was reached, that is, a coverage of at least 0.95."""
        return (self.scores >= 1.0) & (self.coverage >= SUCCESS_COVERAGE)


class Interval(NamedTuple):
    """A mean and its 95 % bootstrap confidence interval."""

    mean: float
    low: float
    high: float


class RolloutPool:
    """Worker processes that step environments; use as a context manager, for many policies."""

    def __init__(self, workers: int | None = None, *, fix_goal: bool = True):
        """Starts the processes: `workers`, or one for each core that this process may use.

        With `fix_goal=False` every seed has a goal of its own, as in PushT-M.
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
        """Rolls one policy out on every seed at once.

        Args:
          predict: called as `predict(obs, seed_index, call_index)`. `obs` holds `image` uint8
            (n, f, 96, 96, 3) and `agent_pos` float32 (n, n_obs_steps, 2), pixels of a 512 canvas;
            `seed_index` int32 (n,) numbers the seeds and `call_index` the calls, to derive noise
            from. It returns target positions in 0..512, (n, n_action_steps, 2). The batch never
            changes shape: episodes that are over keep their last observation.
          max_steps: length limit; the last chunk is cut there.
          frame_indices: the observations, of the n_obs_steps, whose picture the policy looks at;
            the others are not rendered.
          record_seeds: seeds that are rendered at every step and returned as videos.
          progress: called after every chunk with (steps so far, max_steps).

        Raises ValueError for actions of a wrong shape or not finite, WorkerError when a worker
        dies. After an error the pool is closed.
        """
        started = time.perf_counter()
        if not len(seeds) or len(set(seeds)) != len(seeds):
            raise ValueError("rollouts need at least one seed, each at most once")
        if not self._workers:
            raise ValueError("this rollout pool is closed")
        if not set(frame_indices) <= set(range(n_obs_steps)):
            raise ValueError(f"frame_indices {tuple(frame_indices)} leave 0..{n_obs_steps - 1}")
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
            self.close()  # answers may be under way: these workers cannot be asked again
            raise

    def _run(self, predict, seeds, max_steps, protocol, record, progress, started):
        n_obs_steps, chunk, frames = protocol
        n = len(seeds)
        # Dealt round-robin, so that long episodes spread over the workers.
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
            # Copies: jax may read a numpy array in place, and these are overwritten.
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
    """`RolloutPool.run` in a pool of its own; `protocol` are that method's further arguments."""
    with RolloutPool(min(workers or usable_cores(), max(len(seeds), 1))) as pool:
        return pool.run(predict, seeds, **protocol)


def bootstrap_ci(values: np.ndarray, seed: int, n: int = 10_000) -> Interval:
    """The mean of `values` (k,) with its 95 % percentile bootstrap interval of `n` resamples."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"expected a non-empty row of values, got shape {values.shape}")
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, values.size, (n, values.size))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(a: np.ndarray, b: np.ndarray, seed: int = 0) -> Interval:
    """The mean of a - b over the same seeds in the same order, with its 95 % interval."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired values must correspond, got shapes {a.shape} and {b.shape}")
    return bootstrap_ci(a - b, seed)
