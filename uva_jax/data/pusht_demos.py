"""The embedded demonstrations: start states and actions, rendered into a replay buffer.

The package ships what cannot be recomputed; frames and states come from re-simulating every
episode, which is deterministic. Rendering runs in worker processes, each writing its own chunks,
and resumes where it was interrupted.
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
    """What is embedded; `sha256` is that of the whole file, whatever part of it is used."""

    initial_state: np.ndarray  # (e, 5) float64: agent x, y, block x, y, angle
    action: np.ndarray  # (n, 2) float32: target positions in 0..512
    episode_ends: np.ndarray  # (e,) int64
    sha256: str


def load_demos(max_episodes: int | None = None) -> Demos:
    """The first `max_episodes` embedded demonstrations, or all.

    Raises UserError for more than there are.
    """
    file = resources.files("uva_jax.assets") / "pusht_demos.npz"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with file.open("rb") as stream, np.load(stream) as arrays:
        ends = arrays["episode_ends"].astype(np.int64)
        if max_episodes is not None and not 1 <= max_episodes <= len(ends):
            raise UserError(
                f"{max_episodes} demonstrations were asked for, but 1 to {len(ends)} are embedded"
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
    """Renders the embedded demonstrations into a replay buffer at `path`, or opens it if done.

    Step i holds what is seen BEFORE action i: `img` uint8 (n, 96, 96, 3), `state` float32 (n, 5)
    as agent x, y, block x, y, angle, and `action` float32 (n, 2), targets in 0..512.

    Args:
      max_episodes: render the first so many only; all by default. A rendering of another number
        of episodes, or of other demonstrations, that is found at `path` is replaced.
      workers: processes; by default one a usable core.
      progress: called with (frames done, frames in all).

    Raises UserError when something else is at `path`, WorkerError when a worker dies.
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
            f"{about['versions']} simulates them differently than the versions that recorded them",
            stacklevel=2,
        )
    return writer.finish()


class RenderWorker:
    """Renders units of the replay buffer; lives in a worker process."""

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
          its number of frames, and how many episodes that end in it do not end in success.
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
                if step >= start:  # the episode's steps before this unit are only lived through
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
    """What a rendering depends on; kept in the buffer's attributes and compared."""
    versions = {name: metadata.version(name) for name in ("gym-pusht", "pymunk")}
    return {"demos": demos.sha256, "n_episodes": len(demos.episode_ends), "versions": versions}
