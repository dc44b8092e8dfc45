"""Acting with a policy for one step at a time.

`PolicyCall` acts on windows of observations that somebody else keeps, as the rollouts' processes
do. `Actor` keeps them itself: it is given every step's observation and returns every step's action.
This module does not import the policy's, which has an actor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np
from flax import nnx

from uva_jax.models.frames import frame_indices
from uva_jax.models.policy_call import PolicyCall, ahead_steps, cameras
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.respacing import SAMPLERS


class Actor:
    """A policy that is given every step's observation and returns every step's action.

        actor = uva_jax.load("embedded").actor(sampling_steps=10)
        action = actor({"image": image})

    It keeps the observations of the last `n_obs_steps` steps (before the start the first one is
    repeated), the actions of the last `n_actions`, and the encoded frames. It calls the policy when
    its `n_action_steps` actions are used up, and encodes the frames of the next call when they are
    observed. It acts in one environment, or in several at once if the arrays of the observation
    have a leading batch axis.
    """

    def __init__(
        self,
        policy: nnx.Module,
        *,
        sampling_steps: str | int = "",
        sampler: str = "ancestral",
        seed: int = 0,
    ):
        """Compiles nothing yet.

        Args:
          policy: a Policy.
          sampling_steps: diffusion steps of the action head, such as 10; "": the policy's own.
          sampler: "ancestral", "ddim" or "dpm++"; see `diffusion.sample_loop`.
          seed: of all noise.

        Raises:
          UserError: the policy has no action head, or there is no such sampler or number of steps.
        """
        if policy.action_head is None:
            raise UserError("this policy was trained only for video and has no action head to act")
        if sampler not in SAMPLERS:
            raise UserError(f"the sampler is {sampler!r}, but it can be {', '.join(SAMPLERS)}")
        self._config = policy.config
        self._call = PolicyCall(policy, str(sampling_steps), seed, sampler, encodes_ahead=True)
        self._ahead = ahead_steps(policy.config)
        self._calls = 0
        self.reset()

    def reset(self) -> None:
        """Starts an episode: forgets observations and actions. Its noise is not the last one's."""
        config = self._config
        self._seen: deque[dict[str, np.ndarray]] = deque(maxlen=config.n_obs_steps)
        self._done: deque[np.ndarray] = deque(maxlen=config.mar.n_actions)
        self._planned: deque[np.ndarray] = deque()

    def __call__(self, obs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the action (action_dim,) of this step in raw units.

        Args:
          obs: what is observed at this step: "image" (h, w, 3) uint8, or float in [0, 1], and what
            else the policy reads: "wrist_image" alike, "text_latents" (text_dim,), and the states
            in `config.proprio_keys` (k,). With a batch axis on all of them, the action has it too.

        Raises:
          UserError: an array is missing or does not fit the policy or the steps before.
        """
        single = np.ndim(obs.get("image")) == 3
        self._seen.append(self._checked(obs, single))
        if not self._planned:
            window = self._window()
            numbers = np.arange(len(window["image"]), dtype=np.int32)
            actions = self._call(window, numbers, self._calls)
            self._calls += 1
            self._planned.extend(np.moveaxis(actions, 1, 0))
        elif len(self._planned) in self._ahead:
            self._call.encode_ahead({name: self._seen[-1][name] for name in cameras(self._config)})
        action = self._planned.popleft()
        self._done.append(action)
        return action[0] if single else action

    def _window(self) -> dict[str, np.ndarray]:
        """Returns the observation (b, ...) as the policy reads it."""
        config = self._config
        history = [self._seen[0]] * (config.n_obs_steps - len(self._seen)) + list(self._seen)
        picks = frame_indices(config.n_obs_steps, config.mar.n_frames)
        found = {}
        for name, value in history[-1].items():
            if name == "text_latents":
                found[name] = value
            else:
                steps = picks if name in cameras(config) else range(config.n_obs_steps)
                found[name] = np.stack([history[i][name] for i in steps], axis=1)
        if config.mar.history_action:
            # NaN: no past actions yet. Without the array the first call would be another program.
            none = np.full((len(found["image"]), config.action_dim), np.nan, np.float32)
            done = list(self._done) or [none]
            missing = config.mar.n_actions - len(done)
            found["past_action"] = np.stack([done[0]] * missing + done, axis=1)
        return found

    def _checked(self, obs: Mapping[str, np.ndarray], single: bool) -> dict[str, np.ndarray]:
        """Returns the arrays that the policy reads, with a batch axis."""
        config, mar = self._config, self._config.mar
        states = config.proprio_keys if mar.proprio_dim else ()
        widths = dict(config.normalizer_fields)
        tails: dict[str, tuple] = {name: (None, None, 3) for name in cameras(config)}
        tails |= {"text_latents": (mar.text_dim,)} if mar.text_dim else {}
        tails |= {name: (widths.get(name),) for name in states}
        if missing := [name for name in tails if name not in obs]:
            raise UserError(
                f"the observation lacks {', '.join(missing)}, which this policy reads; it holds "
                f"{', '.join(obs) or 'nothing'}"
            )
        found = {}
        for name, tail in tails.items():
            array = np.asarray(obs[name])
            shape = array.shape if single else array.shape[1:]
            fits = len(shape) == len(tail) and all(
                got and wanted in (None, got) for got, wanted in zip(shape, tail, strict=True)
            )
            numbers = array.dtype == np.uint8 or array.dtype.kind == "f"
            if name not in cameras(config):
                numbers = array.dtype.kind in "fiu"
            if not fits or not numbers:
                said = " x ".join("any" if n is None else str(n) for n in tail)
                wanted = "uint8 or float in 0..1" if name in cameras(config) else "numbers"
                raise UserError(
                    f"{name} of the observation is {array.dtype} {array.shape}, but this policy "
                    f"reads {said} {wanted}, with or without a batch axis on all arrays"
                )
            if not np.isfinite(array).all():
                raise UserError(f"{name} of the observation has values that are not finite")
            array = array if array.dtype == np.uint8 else array.astype(np.float32)
            # A copy: an environment may draw its next image into the same memory.
            found[name] = np.array(array[None] if single else array)
            before = self._seen[-1][name] if self._seen else found[name]
            if found[name].shape != before.shape or found[name].dtype != before.dtype:
                raise UserError(
                    f"{name} of the observation is {array.dtype} {array.shape}, other than at the "
                    "step before: call actor.reset() when an episode starts"
                )
        if len({len(array) for array in found.values()}) > 1:
            raise UserError("the arrays of the observation have batch axes of different lengths")
        width = sum(found[name].shape[-1] for name in states)
        if width != mar.proprio_dim:
            raise UserError(
                f"the states of the observation ({', '.join(states)}) are {width} numbers wide, "
                f"but this policy reads {mar.proprio_dim}"
            )
        return found
