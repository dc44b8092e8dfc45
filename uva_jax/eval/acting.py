"""A policy of this process as the `predict` function of a rollout pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from uva_jax.envs.simulator import SimulatorInfo
from uva_jax.eval.rollout import spec_of
from uva_jax.models.policy import Policy
from uva_jax.models.policy_call import PolicyCall
from uva_jax.models.policy_config import steps_of
from uva_jax.runtime.errors import UserError
from uva_jax.storage.identity import hash_arrays

# language(sentences, policy=policy) -> latents (n, text_dim); see `data.language.task_latents`
Language = Callable[..., np.ndarray]


class LocalPolicy:
    """A policy that acts in a simulator.

    Attributes:
      spec: what it observes and executes in each call.
      settings: what its scores depend on besides its arrays and the simulator, as JSON values.
    """

    def __init__(
        self,
        name: str,
        policy: Policy,
        simulator: SimulatorInfo,
        *,
        sampling_steps: str = "",
        sampler: str = "ancestral",
        noise_seed: int = 0,
        max_steps: int = 300,
        language: Language | None = None,
    ):
        """Compiles nothing yet.

        Args:
          name: of the policy, for messages.
          policy: the policy.
          simulator: in which it acts.
          sampling_steps, sampler, noise_seed: see `PolicyCall`.
          max_steps: limit of an episode's length.
          language: gives the latents of the simulator's tasks, if the policy reads them.

        Raises:
          UserError: the policy cannot act in this simulator.
        """
        if policy.action_head is None:
            raise UserError(f"{name} was trained only for video and has no action head to act")
        self.spec = spec_of(policy.config, max_steps)
        simulator.check(self.spec.names, policy.config.action_dim, name)
        self._latents = None
        if "text_latents" in self.spec.names:
            if language is None:
                raise UserError(f"{name} reads language, for which no latents are given")
            self._latents = language(simulator.tasks, policy=policy)
        self._call = PolicyCall(policy, sampling_steps, noise_seed, sampler)
        self.settings = {
            "precision": jnp.dtype(policy.dtype or jnp.float32).name,
            "sampling_steps": steps_of(policy.config.action_head, sampling_steps),
            "sampler": sampler,
            "noise_seed": noise_seed,
            "max_steps": max_steps,
        }
        if self._latents is not None:
            self.settings["latents"] = hash_arrays({"": self._latents})

    def __call__(
        self,
        obs: Mapping[str, np.ndarray],
        seed_index: np.ndarray,
        call_index: np.ndarray,
        slots: np.ndarray,
    ) -> np.ndarray:
        """Returns actions; see `RolloutPool.run`."""
        if self._latents is not None:
            obs = {**obs, "text_latents": self._latents[obs["task"]]}
        return self._call(obs, seed_index, call_index, slots)
