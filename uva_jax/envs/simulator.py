"""What a rollout needs of an environment, and the simulators that are known by name.

A simulator is a class that worker processes make, so its module must not import jax.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from uva_jax.runtime.errors import UserError
from uva_jax.runtime.plugins import named_class
from uva_jax.runtime.sections import SIMULATORS


class Simulator(Protocol):
    """One environment, in which one episode runs after another.

    It is made without arguments or, if `evaluate.simulator_files` is set, with that path.

    Attributes:
      observes: shape of each array that `observe` can return, by the name under which policies read
        it: pictures "image" and "wrist_image" (h, w, 3), uint8; states (k,) by their own names.
      action_dim: width of an action.
      tasks: sentences of all tasks, for policies that read language; empty if there are none.
      task: number of the current episode's task in `tasks`.
    """

    observes: Mapping[str, tuple[int, ...]]
    action_dim: int
    tasks: tuple[str, ...]
    task: int

    def reset(self, seed: int) -> None:
        """Starts the episode of a seed; the same seed starts the same episode."""
        ...

    def observe(self, names: Collection[str]) -> dict[str, np.ndarray]:
        """Returns the arrays of the current step with these names; only these are rendered."""
        ...

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        """Executes an action (action_dim,) in raw units.

        Returns:
          the reward in 0..1, whose maximum is the episode's score, and whether the task is solved,
          which ends the episode.
        """
        ...


@dataclass(frozen=True)
class SimulatorInfo:
    """What a simulator provides; see `Simulator`. `name` is that of the setting."""

    name: str
    observes: Mapping[str, tuple[int, ...]]
    action_dim: int
    tasks: tuple[str, ...]

    @classmethod
    def of(cls, name: str, simulator: Simulator) -> SimulatorInfo:
        """Reads the description of a simulator."""
        shapes = {k: tuple(shape) for k, shape in simulator.observes.items()}
        return cls(name, shapes, simulator.action_dim, tuple(simulator.tasks))

    def check(self, names: Collection[str], action_dim: int, policy: str) -> None:
        """Checks that a policy can act in this simulator.

        Args:
          names: the arrays that the policy reads; "text_latents" stands for a task's sentence.
          action_dim: width of its actions.
          policy: its name, for messages.

        Raises:
          UserError: the simulator lacks one of them, or its actions have another width.
        """
        provided = [*self.observes, *(["text_latents"] if self.tasks else [])]
        if missing := [name for name in names if name not in provided]:
            raise UserError(
                f"the simulator {self.name!r} lacks {', '.join(missing)}, which {policy} reads; it "
                f"provides {', '.join(provided)}: choose another simulator, or none ('')"
            )
        if action_dim != self.action_dim:
            raise UserError(
                f"the simulator {self.name!r} takes actions of {self.action_dim} numbers, but "
                f"those of {policy} have {action_dim}: choose another simulator, or none ('')"
            )


def make_simulator(name: str, files: str = "") -> Simulator:
    """Makes a simulator by its name or as "package.module:Class".

    Args:
      name: of the simulator.
      files: path that its class takes; "": none.

    Raises:
      UserError: there is no such simulator, it cannot be imported, or it is no simulator.
    """
    found = named_class("simulator", SIMULATORS.get(name, name))
    wanted = ("reset", "observe", "step")
    if found is None or not all(callable(getattr(found, m, None)) for m in wanted):
        raise UserError(
            f"the simulator {name!r} is not a class with the methods {', '.join(wanted)}: see "
            "uva_jax/envs/simulator.py"
        )
    simulator = found(files) if files else found()
    if missing := [a for a in ("observes", "action_dim", "tasks") if not hasattr(simulator, a)]:
        raise UserError(f"the simulator {name!r} has no attribute {', '.join(missing)}: add it")
    return simulator
