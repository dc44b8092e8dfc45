"""Renders the embedded demonstrations into a replay buffer.

The package contains initial states and actions; simulating every episode again, which is
deterministic, gives frames and states. Worker processes render and write separate chunks, and an
interrupted rendering resumes.
"""

import hashlib
import os
import warnings
from importlib import metadata, resources
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from uva_jax.data.replay_buffer import Progress, ReplayBuffer
from uva_jax.data.replay_writer import ReplayBufferWriter, own_attributes
from uva_jax.envs.pusht import IMAGE_SIZE, PushT
from uva_jax.envs.workers import WorkerProcess, usable_cores
from uva_jax.runtime.errors import UserError
from uva_jax.storage.atomic import remove_folder

_ARRAYS = {
    "img": ((IMAGE_SIZE, IMAGE_SIZE, 3), "uint8"),
    "state": ((5,), "float32"),
    "action": ((2,), "float32"),
}


class Demos(NamedTuple):
    """The embedded demonstrations; `sha256` is that of the whole file."""

    initial_state: np.ndarray  # (e, 5) float64: agent x, y, block x, y, angle
    action: np.ndarray  # (n, 2) float32: target positions in 0..512
    episode_ends: np.ndarray  # (e,) int64
    sha256: str


def load_demos(max_episodes: int | None = None) -> Demos:
    """Loads the first `max_episodes` embedded demonstrations, or all.

    Raises:
      UserError: there are fewer.
    """
    file = resources.files("uva_jax.assets") / "pusht_demos.npz"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with file.open("rb") as stream, np.load(stream) as arrays:
        ends = arrays["episode_ends"].astype(np.int64)
        if max_episodes is not None and not 1 <= max_episodes <= len(ends):
            raise UserError(
                f"{max_episodes} demonstrations were asked for; the number can be 1 to {len(ends)}"
            )
        ends = ends[:max_episodes]
        starts = arrays["initial_state"][: len(ends)]
        return Demos(starts, arrays["action"][: ends[-1]].astype(np.float32), ends, digest)


def render_demos(
    path: str | os.PathLike,
    *,
    max_episodes: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ReplayBuffer:
    """Renders the embedded demonstrations into a replay buffer, or opens the finished one.

    Step i holds the observation before action i: `img` uint8 (n, 96, 96, 3), `state` float32 (n, 5)
    as agent x, y, block x, y in pixels and block angle in radians, and `action` float32 (n, 2),
    target positions in 0..512.

    Args:
      path: the buffer's folder. A rendering of other demonstrations in it is replaced.
      max_episodes: episodes to render, from the first; all by default.
      workers: processes; by default one per usable core.
      progress: called with (frames done, total frames).

    Raises:
      UserError: the folder holds something else.
      WorkerError: a worker died.
    """
    path = Path(path)
    demos = load_demos(max_episodes)
    about = _about(demos)
    found = own_attributes(path)
    if found is not None and "demos" in found and any(found.get(k) != about[k] for k in about):
        remove_folder(path)
    writer = ReplayBufferWriter.create(path, _ARRAYS, demos.episode_ends, attributes=about)
    if writer.complete:
        return ReplayBuffer.open(path)
    units = writer.missing_units()
    done = writer.n_steps - sum(np.diff(writer.unit_range(u)).item() for u in units)
    target = f"{__name__}:RenderWorker"
    pool = [
        WorkerProcess(target, str(path), len(demos.episode_ends))
        for _ in range(min(workers or usable_cores(), len(units)))
    ]
    try:
        busy, failed = {}, 0
        queue = list(reversed(units))
        for worker in pool:
            worker.send("render", queue.pop())
            busy[worker.connection] = worker
        while busy:
            for connection in wait(list(busy)):
                worker = busy.pop(connection)
                frames, failures = worker.receive()
                done, failed = done + frames, failed + failures
                if progress is not None:
                    progress(done, writer.n_steps)
                if queue:
                    worker.send("render", queue.pop())
                    busy[connection] = worker
    finally:
        for worker in pool:
            worker.close()
    if failed:
        warnings.warn(
            f"{failed} of {len(demos.episode_ends)} demonstrations do not end in success here: "
            f"{about['versions']} simulates them differently from the versions that recorded them",
            stacklevel=2,
        )
    return writer.finish()


class RenderWorker:
    """Renders units of the replay buffer in a worker process."""

    def __init__(self, path: str, n_episodes: int):
        import cv2

        cv2.setNumThreads(1)  # the processes are the parallelism
        self._demos = load_demos(n_episodes)
        self._writer = ReplayBufferWriter.create(
            path, _ARRAYS, self._demos.episode_ends, attributes=_about(self._demos)
        )
        self._env = PushT()

    def render(self, unit: int) -> tuple[int, int]:
        """Renders and writes one unit.

        Returns:
          its number of frames, and the number of episodes that end in it without success.
        """
        start, stop = self._writer.unit_range(unit)
        frames = np.empty((stop - start, *_ARRAYS["img"][0]), np.uint8)
        states = np.empty((stop - start, 5), np.float32)
        ends, actions = self._demos.episode_ends, self._demos.action
        failures = 0
        episode = int(np.searchsorted(ends, start, side="right"))
        first = int(ends[episode - 1]) if episode else 0
        while first < stop:
            end = int(ends[episode])
            self._env.reset_to(self._demos.initial_state[episode])
            for step in range(first, min(end, stop)):
                if step >= start:  # the episode's steps before this unit are only simulated
                    frames[step - start] = self._env.render()
                    states[step - start] = self._env.state
                if step < end - 1:
                    self._env.advance(actions[step])
                else:
                    failures += not self._env.step(actions[step])[1]
            first, episode = end, episode + 1
        values = {"img": frames, "state": states, "action": actions[start:stop]}
        self._writer.write_unit(unit, values)
        return stop - start, failures


def _about(demos: Demos) -> dict:
    """Returns what a rendering depends on; the buffer's attributes record it."""
    versions = {name: metadata.version(name) for name in ("gym-pusht", "pymunk")}
    return {"demos": demos.sha256, "n_episodes": len(demos.episode_ends), "versions": versions}
