"""gym-pusht under UVA's evaluation protocol.

Physics, reward, success threshold and pixels of gym-pusht equal UVA's own environment; only the
seeding differs, so it is done here. The module does not import jax, because worker processes load
it: they should start within a second and not use an accelerator.
"""

import os
from collections.abc import Collection
from typing import ClassVar

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


class PushTTask:
    """PushT as a `Simulator`: the reward is the goal's coverage over 0.95, at most 1."""

    observes: ClassVar = {"image": (IMAGE_SIZE, IMAGE_SIZE, 3), "agent_pos": (2,)}
    action_dim = 2
    tasks = ()
    task = 0
    fix_goal = True

    def reset(self, seed: int) -> None:
        """Starts UVA's episode of a seed."""
        cv2.setNumThreads(1)  # the processes are the parallelism
        self._env = PushT()
        self._env.reset(seed, fix_goal=self.fix_goal)

    def observe(self, names: Collection[str]) -> dict[str, np.ndarray]:
        """Returns "image" and "agent_pos", which is in pixels of the 512 canvas."""
        read = {"image": self._env.render, "agent_pos": lambda: self._env.agent_position}
        return {name: read[name]() for name in names}

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        """Moves towards the target `action` (2,), in pixels; see `Simulator.step`."""
        coverage, success = self._env.step(action)
        return min(coverage / SUCCESS_COVERAGE, 1.0), success


class PushTMultitask(PushTTask):
    """PushT-M: every seed has another goal."""

    fix_goal = False
