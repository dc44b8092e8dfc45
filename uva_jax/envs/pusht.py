"""gym-pusht made to agree with UVA's evaluation protocol, one environment and many episodes.

Nothing here imports jax or flax: this module is loaded by worker processes, which should start in
a second and never touch an accelerator. The checked facts behind it: physics, reward, threshold
and pixels of gym-pusht equal UVA's own environment; only the seeding differs.
"""

import os

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # before pygame is imported: no display needed
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from gym_pusht.envs.pusht import PushTEnv  # noqa: E402

IMAGE_SIZE = 96
CANVAS = 512
SUCCESS_COVERAGE = 0.95
_COVERAGE_DIGITS = 9
# The byte order that lets the surface's buffer be read as B, G, R, unused.
_BGR_MASKS = (0xFF0000, 0xFF00, 0xFF)


def initial_state(seed: int) -> np.ndarray:
    """UVA's start for a seed: agent x, y, block x, y in pixels, angle in radians; float64 (5,)."""
    rng = np.random.RandomState(seed)
    agent = [rng.randint(50, 450), rng.randint(50, 450)]
    block = [rng.randint(100, 400), rng.randint(100, 400)]
    return np.array([*agent, *block, rng.randn() * 2 * np.pi - np.pi])


def random_goal(seed: int) -> np.ndarray:
    """A goal of PushT-M for a seed: x, y within 100 pixels of the centre, any angle; float64 (3,).

    Distributed as in UVA's environment with `fix_goal: false`, which draws it from unseeded noise.
    """
    rng = np.random.RandomState((seed, 1))
    return np.array([*rng.uniform(156, 356, 2), rng.uniform(0, 2 * np.pi)])


class _Simulator(PushTEnv):
    """gym-pusht whose coverage, a third of a step's time, is left out where nobody asks."""

    measure = True

    def _get_coverage(self):
        # The order in which pymunk hands out a body's shapes differs from run to run, and with it
        # the last bits of the overlap.
        return round(super()._get_coverage(), _COVERAGE_DIGITS) if self.measure else 0.0


class PushT:
    """The T-pushing task: 10 Hz, actions are target positions of the agent in 0..512.

    An episode is successful, and over, when the block covers more than 0.95 of the goal.
    """

    def __init__(self):
        self._env = _Simulator(obs_type="state", render_mode="rgb_array")

    def reset(self, seed: int, *, fix_goal: bool = True) -> None:
        """Starts UVA's episode of that seed (its `legacy_test: true`), or one with another goal."""
        self.reset_to(initial_state(seed))
        if not fix_goal:
            self._env.goal_pose = random_goal(seed)

    def reset_to(self, state: np.ndarray) -> None:
        """Starts an episode as a recording does: position before angle, then 0.01 s of physics.

        Setting the angle after the position shifts the block, so the state seen is not `state`.
        """
        self._env.reset(options={"reset_to_state": np.asarray(state, np.float64)})

    def set_state(self, state: np.ndarray) -> None:
        """Puts agent and block at rest exactly at `state` (5,), as `state` reports it.

        Velocities are no part of a state (to go on in the middle of an episode, replay it), nor
        are contacts, which the renderer marks by red dots: they come back with the first step.
        """
        env = self._env
        env._setup()  # without the physics step of a reset, whose contacts would be drawn
        env.block.angle = float(state[4])
        env.block.position = (float(state[2]), float(state[3]))
        env.agent.position = (float(state[0]), float(state[1]))
        for body in (env.agent, env.block):
            body.velocity = (0.0, 0.0)
            body.angular_velocity = 0.0
            env.space.reindex_shapes_for_body(body)  # otherwise renders show the old pose

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        """Runs 0.1 s towards the target `action` (2,).

        Returns:
          coverage of the goal in 0..1 and whether the episode is over (coverage > 0.95).
        """
        self._env.measure = True
        *_, info = self._env.step(np.asarray(action, np.float64))
        return float(info["coverage"]), bool(info["is_success"])

    def advance(self, action: np.ndarray) -> None:
        """`step` without measuring the coverage: the same motion in two thirds of the time."""
        self._env.measure = False
        self._env.step(np.asarray(action, np.float64))

    @property
    def state(self) -> np.ndarray:
        """Agent x, y, block x, y, angle in 0..2π; float64 (5,)."""
        return self._env.get_obs()

    @property
    def agent_position(self) -> np.ndarray:
        return np.array(self._env.agent.position)

    def render(self) -> np.ndarray:
        """The scene as uint8 (96, 96, 3), RGB: the pixels of gym-pusht's own observation.

        The surface's raw buffer goes through the resize as it is, which is three times faster
        than turning it into an RGB array first.
        """
        surface = self._env._draw()
        if surface.get_masks()[:3] != _BGR_MASKS or surface.get_pitch() != 4 * CANVAS:
            return self._env._get_img(surface, IMAGE_SIZE, IMAGE_SIZE)
        pixels = np.frombuffer(surface.get_buffer(), np.uint8).reshape(CANVAS, CANVAS, 4)
        small = cv2.resize(pixels, (IMAGE_SIZE, IMAGE_SIZE))
        return np.ascontiguousarray(small[..., 2::-1])


class _Episode:
    """One environment under UVA's multi-step protocol: history in, chunks of actions out."""

    def __init__(
        self, seed: int, record: bool, n_obs_steps: int, chunk: int, frames: tuple, fix_goal: bool
    ):
        self.env = PushT()
        self.env.reset(seed, fix_goal=fix_goal)
        self.best_coverage = 0.0
        self.reward = 0.0
        self.done = False
        self.positions = [self.env.agent_position]
        self._n_obs_steps = n_obs_steps
        self._frame_indices = np.array(frames)
        self._record = record
        self._chunk = chunk
        # The steps a chunk apart at which some later observation will want the picture.
        self._phases = {(i - n_obs_steps + 1) % chunk for i in frames}
        self._pictures = {0: self.env.render()}

    def run(self, actions: np.ndarray, max_steps: int) -> None:
        for action in actions:
            coverage, success = self.env.step(action)
            self.positions.append(self.env.agent_position)
            step = len(self.positions) - 1
            self.best_coverage = max(self.best_coverage, coverage)
            self.reward = max(self.reward, min(coverage / SUCCESS_COVERAGE, 1.0))
            self.done = success or step >= max_steps
            wanted = not self.done and step % self._chunk in self._phases
            if wanted or self._record:
                self._pictures[step] = self.env.render()
            if self.done:
                return

    def observe(self) -> tuple[np.ndarray, np.ndarray]:
        """Pictures uint8 (f, 96, 96, 3) and agent positions float32 (n_obs_steps, 2).

        Before the start the first observation is repeated.
        """
        now = len(self.positions) - 1
        steps = np.maximum(now - self._n_obs_steps + 1 + np.arange(self._n_obs_steps), 0)
        pictures = [self._pictures[i] for i in steps[self._frame_indices].tolist()]
        positions = [self.positions[i] for i in steps.tolist()]
        return np.stack(pictures), np.array(positions, np.float32)

    def video(self) -> np.ndarray | None:
        return np.stack(list(self._pictures.values())) if self._record else None


class RolloutWorker:
    """Steps several episodes; lives in a worker process, driven by `eval.rollout`."""

    def __init__(self, fix_goal: bool = True):
        cv2.setNumThreads(1)  # the processes are the parallelism
        self._fix_goal = fix_goal
        self._episodes: list[_Episode] = []

    def start(self, seeds, records, n_obs_steps, chunk, frames):
        self._episodes = [
            _Episode(seed, record, n_obs_steps, chunk, frames, self._fix_goal)
            for seed, record in zip(seeds, records, strict=True)
        ]
        return self._observe(range(len(seeds)))

    def step(self, actions: np.ndarray, max_steps: int):
        """Runs a chunk (n, chunk, 2) in every unfinished episode."""
        running = [i for i, episode in enumerate(self._episodes) if not episode.done]
        for i in running:
            self._episodes[i].run(actions[i], max_steps)
        return self._observe([i for i in running if not self._episodes[i].done])

    def results(self):
        """For every episode: score, best coverage, steps and the video or None."""
        episodes, self._episodes = self._episodes, []
        return [(e.reward, e.best_coverage, len(e.positions) - 1, e.video()) for e in episodes]

    def _observe(self, running):
        observed = [self._episodes[i].observe() for i in running]
        return list(running), [o[0] for o in observed], [o[1] for o in observed]
