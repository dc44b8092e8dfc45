"""Simulators on a line, for tests of rollouts; small, because worker processes import them."""

import numpy as np

TASKS = ("go left", "go right")


class Walker:
    """Solved after as many steps as the seed says."""

    observes = {"image": (8, 8, 3)}
    action_dim = 1
    tasks = ()

    def reset(self, seed):
        self.left = seed

    def observe(self, names):
        return {name: np.full((8, 8, 3), self.left, np.uint8) for name in names}

    def step(self, action):
        self.left -= 1
        return 0.5, self.left == 0


class LeftOrRight:
    """A simulator as a user brings it: reach the goal of the seed on a line."""

    observes = {"image": (8, 8, 3), "position": (1,)}
    action_dim = 1
    tasks = TASKS

    def reset(self, seed):
        self.task = seed % 2
        self.position, self.goal = 0.0, -3.0 if self.task == 0 else 3.0

    def observe(self, names):
        picture = np.full((8, 8, 3), 100 + int(self.position), np.uint8)
        found = {"image": picture, "position": np.array([self.position])}
        return {name: found[name] for name in names}

    def step(self, action):
        self.position += float(action[0])
        return max(0.0, 1 - abs(self.goal - self.position) / 3), self.position == self.goal


class Reacher:
    """A simulator of microseconds: reach a goal on a line, which the picture shows."""

    observes = {"image": (8, 8, 3), "position": (1,)}
    action_dim = 1
    tasks = ("reach the goal",)

    def reset(self, seed):
        self.position, self.goal = 0.0, 2.0 + seed % 5

    def observe(self, names):
        picture = np.full((8, 8, 3), int(self.goal), np.uint8)
        return {n: {"image": picture, "position": np.array([self.position])}[n] for n in names}

    def step(self, action):
        self.position += float(action[0])
        away = abs(self.goal - self.position)
        return max(0.0, 1 - away / self.goal), away < 0.1
