"""gym-pusht under UVA's evaluation protocol.

Physics, reward, success threshold and pixels of gym-pusht equal UVA's own environment; only the
seeding differs, so it is done here. The module does not import jax, because worker processes load
it: they should start within a second and not use an accelerator.
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
# Masks of a surface whose buffer holds the bytes B, G, R, unused.
_BGR_MASKS = (0xFF0000, 0xFF00, 0xFF)


def initial_state(seed: int) -> np.ndarray:
    """Returns UVA's initial state for a seed, float64 (5,).

    It holds agent x, y and block x, y in pixels and the block's angle in radians.
    """
    rng = np.random.RandomState(seed)
    agent = [rng.randint(50, 450), rng.randint(50, 450)]
    block = [rng.randint(100, 400), rng.randint(100, 400)]
    return np.array([*agent, *block, rng.randn() * 2 * np.pi - np.pi])


def random_goal(seed: int) -> np.ndarray:
    """Returns a goal of PushT-M for a seed, float64 (3,): x, y in pixels and angle in radians.

    x and y are within 100 pixels of the centre. The distribution is that of UVA's environment with
    `fix_goal: false`, which does not seed the goal.
    """
    rng = np.random.RandomState((seed, 1))
    return np.array([*rng.uniform(156, 356, 2), rng.uniform(0, 2 * np.pi)])


class _Simulator(PushTEnv):
    """gym-pusht that can skip the coverage, which takes a third of a step's time."""

    measure = True

    def _get_coverage(self):
        # pymunk's order of a body's shapes differs between runs, which changes the last bits of
        # the overlap.
        return round(super()._get_coverage(), _COVERAGE_DIGITS) if self.measure else 0.0


class PushT:
    """The T-pushing task at 10 Hz; actions are target positions of the agent in pixels, 0..512.

    An episode ends with success when the block covers more than 0.95 of the goal.
    """

    def __init__(self):
        self._env = _Simulator(obs_type="state", render_mode="rgb_array")

    def reset(self, seed: int, *, fix_goal: bool = True) -> None:
        """Starts UVA's episode of a seed (`legacy_test: true`), or one with a random goal."""
        self.reset_to(initial_state(seed))
        if not fix_goal:
            self._env.goal_pose = random_goal(seed)

    def reset_to(self, state: np.ndarray) -> None:
        """Starts an episode at `state` (5,) as recordings do.

        Like UVA it sets the position before the angle, which shifts the block, and then runs 0.01 s
        of physics, so the observed state differs from `state`.
        """
        self._env.reset(options={"reset_to_state": np.asarray(state, np.float64)})

    def set_state(self, state: np.ndarray) -> None:
        """Puts agent and block at rest exactly at `state` (5,), as the property `state` reports it.

        Velocities are not part of a state: to continue an episode, replay it. Contacts, which are
        rendered as red dots, are not part of it either and return with the first step.
        """
        env = self._env
        env._setup()  # a reset would run a physics step, whose contacts would be drawn
        env.block.angle = float(state[4])
        env.block.position = (float(state[2]), float(state[3]))
        env.agent.position = (float(state[0]), float(state[1]))
        for body in (env.agent, env.block):
            body.velocity = (0.0, 0.0)
            body.angular_velocity = 0.0
            env.space.reindex_shapes_for_body(body)  # otherwise rendering shows the old pose

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        """Simulates 0.1 s towards the target `action` (2,), in pixels.

        Returns:
          the coverage of the goal in 0..1 and whether it exceeds 0.95, which ends the episode.
        """
        self._env.measure = True
        *_, info = self._env.step(np.asarray(action, np.float64))
        return float(info["coverage"]), bool(info["is_success"])

    def advance(self, action: np.ndarray) -> None:
        """Simulates like `step` without the coverage, in two thirds of the time."""
        self._env.measure = False
        self._env.step(np.asarray(action, np.float64))

    @property
    def state(self) -> np.ndarray:
        """Agent x, y and block x, y in pixels, block angle in 0..2π; float64 (5,)."""
        return self._env.get_obs()

    @property
    def agent_position(self) -> np.ndarray:
        """Agent x, y in pixels; float64 (2,)."""
        return np.array(self._env.agent.position)

    def render(self) -> np.ndarray:
        """Renders the scene as RGB, uint8 (96, 96, 3), equal to gym-pusht's own observation.

        The surface's raw buffer is resized before it becomes RGB, which is three times faster.
        """
        surface = self._env._draw()
        if surface.get_masks()[:3] != _BGR_MASKS or surface.get_pitch() != 4 * CANVAS:
            return self._env._get_img(surface, IMAGE_SIZE, IMAGE_SIZE)
        pixels = np.frombuffer(surface.get_buffer(), np.uint8).reshape(CANVAS, CANVAS, 4)
        small = cv2.resize(pixels, (IMAGE_SIZE, IMAGE_SIZE))
        return np.ascontiguousarray(small[..., 2::-1])


class _Episode:
    """One environment under UVA's multi-step protocol: observation history, chunks of actions."""

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
        # Steps modulo the chunk whose pictures a later observation includes.
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
        """Returns pictures uint8 (f, 96, 96, 3) and agent positions float32 (n_obs_steps, 2).

        The first observation is repeated for steps before the start.
        """
        now = len(self.positions) - 1
        steps = np.maximum(now - self._n_obs_steps + 1 + np.arange(self._n_obs_steps), 0)
        pictures = [self._pictures[i] for i in steps[self._frame_indices].tolist()]
        positions = [self.positions[i] for i in steps.tolist()]
        return np.stack(pictures), np.array(positions, np.float32)

    def video(self) -> np.ndarray | None:
        return np.stack(list(self._pictures.values())) if self._record else None


class RolloutWorker:
    """Runs several episodes in a worker process; `eval.rollout` calls its methods."""

    def __init__(self, fix_goal: bool = True):
        cv2.setNumThreads(1)  # the processes are the parallelism
        self._fix_goal = fix_goal
        self._episodes: list[_Episode] = []

    def start(self, seeds, records, n_obs_steps, chunk, frames):
        """Starts one episode per seed and observes all of them; see `step` for the result.

        Args:
          seeds: of the episodes.
          records: for each episode whether it is recorded as video.
          n_obs_steps: steps of the observation history.
          chunk: actions per call of `step`.
          frames: indices of the history whose pictures are observed.
        """
        self._episodes = [
            _Episode(seed, record, n_obs_steps, chunk, frames, self._fix_goal)
            for seed, record in zip(seeds, records, strict=True)
        ]
        return self._observe(range(len(seeds)))

    def step(self, actions: np.ndarray, max_steps: int):
        """Runs a chunk of actions (n, chunk, 2), in pixels, in every unfinished episode.

        Returns:
          the indices of unfinished episodes, and lists of their pictures uint8 (f, 96, 96, 3) and
          agent positions float32 (n_obs_steps, 2).
        """
        running = [i for i, episode in enumerate(self._episodes) if not episode.done]
        for i in running:
            self._episodes[i].run(actions[i], max_steps)
        return self._observe([i for i in running if not self._episodes[i].done])

    def results(self):
        """Returns for every episode (score in 0..1, best coverage, steps, video or None)."""
        episodes, self._episodes = self._episodes, []
        return [(e.reward, e.best_coverage, len(e.positions) - 1, e.video()) for e in episodes]

    def _observe(self, running):
        observed = [self._episodes[i].observe() for i in running]
        return list(running), [o[0] for o in observed], [o[1] for o in observed]
