"""The windows of training on cached latents: frame numbers, actions and states.

All windows are planned once, and a batch is a few array look-ups, so that no step waits for data.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from uva_jax.data.augment import mirror_pusht
from uva_jax.data.check import BufferView
from uva_jax.data.replay_buffer import ReplayBuffer
from uva_jax.data.windows import WindowSpec, buffer_rows, history_combinations, plan_strips
from uva_jax.models.policy import Policy
from uva_jax.pretrain.latents import Copies
from uva_jax.pretrain.progress import advantages, best_share
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections import DataOptions

_PUSHT_STATE = 5  # numbers of the state that `mirror_pusht` knows


class Windows:
    """Training windows of a recording: frame numbers in the latent cache, and actions.

    A window holds the history's frames up to the current step, the future's frames after it, and
    the actions from the current step on. Beyond an episode its first or last step is repeated.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        mask: np.ndarray,
        policy: Policy,
        data: DataOptions,
        seed: int,
        *,
        state_key: str = "",
        text: np.ndarray | None = None,
        copies: Copies | None = None,
    ):
        """Plans all windows of the episodes in `mask`.

        Args:
          buffer: the recording.
          mask: (episodes,) booleans.
          policy: whose windows they are.
          data: options of the data.
          seed: of the order and the mirroring.
          state_key: array of the readout head's states; "": none.
          text: (episodes, text_dim) language latents, for a policy that takes them.
          copies: the copies in the cache; by default the frames, and their mirror images if the
            data are mirrored.
        """
        spec = WindowSpec.of(policy.config)
        self._strips = plan_strips(
            buffer.episode_ends, mask, strip=1, stride=spec.stride, options=data, seed=seed
        )
        self._spec, self._n_steps = spec, buffer.n_steps
        self.copies = copies or Copies(mirror=bool(data.mirror))
        self._ends = buffer.episode_ends
        self._starts = np.append(0, buffer.episode_ends[:-1])
        self._actions = np.asarray(buffer.read(data.action_key), np.float32)
        self._states = np.asarray(buffer.read(state_key), np.float32) if state_key else None
        self._text = text
        self._robot = {k: np.asarray(buffer.read(k), np.float32) for k in spec.states}

    def __len__(self) -> int:
        return len(self._strips)

    def best(self, share: float, steps: int, scale: StateScale) -> Windows:
        """Returns the share of the windows that make the most progress over a number of steps.

        They need a `state_key`, whose states `scale` makes comparable; see `progress.advantages`.
        """
        strips = self._strips
        episodes = np.unique(strips.episode)
        rows = np.concatenate([np.arange(self._starts[e], self._ends[e]) for e in episodes])
        states = self._states[rows]
        mirrored = scale(mirror_pusht({"state": states})["state"]) if self.copies.mirror else None
        ends = np.cumsum(self._ends[episodes] - self._starts[episodes])
        gains = np.empty(self._n_steps, np.float32)
        gains[rows] = advantages(scale(states), ends, mirrored, steps=steps)
        found = copy.copy(self)
        current = self._starts[strips.episode] + strips.current[:, 0]
        found._strips = strips.at(best_share(gains[current], share))
        return found

    def read(
        self, windows: np.ndarray, views: np.ndarray | int = 0, past: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Reads a batch of windows; actions and states are in raw units.

        Args:
          windows: (b,) numbers of windows.
          views: (b,) the augmented view of each window's frames (0: the plain ones).
          past: (n_frames,) steps of the history's frames, at most 0; even ones by default.

        Returns:
          "frames" (b, 2 * n_frames), numbers in the cache; "action" (b, n, a); for a policy that
          takes them "past_action" (b, n, a), "text_latents" (b, text_dim), the robot's states by
          name (b, steps, k) and "<name>_next" (b, n, k) of the steps that follow; with a
          `state_key` "state" (b, k) of the current step.
        """
        spec, strips = self._spec, self._strips
        episode, mirror = strips.episode[windows], strips.mirror[windows]
        first, last = self._starts[episode][:, None], self._ends[episode][:, None] - 1
        current = strips.current[windows]
        offsets = spec.offsets(past)

        def rows(steps):
            return buffer_rows(first, last, current, steps)

        frames = rows(np.concatenate([offsets.frames, offsets.future_frames]))
        found = {"action": self._actions[rows(offsets.actions)]}
        if spec.past_actions:
            found["past_action"] = self._actions[rows(offsets.past_actions)]
        if self._robot:
            seen, following = rows(offsets.states), rows(offsets.future_states)
            for name, values in self._robot.items():
                found[name], found[f"{name}_next"] = values[seen], values[following]
        if self._text is not None:
            found["text_latents"] = self._text[episode]
        if self._states is not None:
            found["state"] = self._states[rows(0)[:, 0]]
        if mirror.any():
            found = mirror_pusht(found, mirror)
        copy = self.copies.number(views, mirror.astype(np.int64))
        return {"frames": frames + self._n_steps * copy[:, None], **found}


def past_choices(policy: Policy) -> np.ndarray:
    """Returns upstream's choices of the history's frames; each batch draws one.

    Returns:
      (816, 4) steps from -15 to 0, rising, with the current step last.

    Raises:
      UserError: the policy does not observe 4 of 16 steps.
    """
    choices = history_combinations() - 15
    if (policy.config.n_obs_steps, policy.config.mar.n_frames) != (16, choices.shape[1]):
        raise UserError(
            "config.pretrain.different_history_freq picks 4 of 16 past steps, but this policy "
            f"observes {policy.config.mar.n_frames} of {policy.config.n_obs_steps}: set it to False"
        )
    return choices


class StateScale(NamedTuple):
    """Scales states for a readout head: unit variance, and angles as cosine and sine."""

    mean: np.ndarray
    std: np.ndarray
    angles: tuple[int, ...]

    @classmethod
    def fit(cls, states: np.ndarray, angles: Sequence[int]) -> StateScale:
        """Fits states (n, k) whose columns `angles` are in radians.

        Raises:
          UserError: there is no such column.
        """
        if any(not 0 <= a < states.shape[1] for a in angles):
            raise UserError(
                f"config.pretrain.readout_angles is {tuple(angles)}, but the state has "
                f"{states.shape[1]} columns, counted from 0"
            )
        flat = _without_angles(np.asarray(states, np.float32), tuple(angles))
        return cls(flat.mean(0), np.maximum(flat.std(0), 1e-6), tuple(angles))

    def __call__(self, states: np.ndarray) -> np.ndarray:
        """Scales states (..., k) to (..., k + angles) float32."""
        flat = _without_angles(np.asarray(states, np.float32), self.angles)
        return ((flat - self.mean) / self.std).astype(np.float32)


def readout_scale(
    buffer: BufferView, key: str, angles: Sequence[int], *, mirrored: bool
) -> StateScale | None:
    """Checks the readout array, adds it to the buffer and fits its scale; None for key "".

    Raises:
      UserError: the array is missing, is not finite, lacks such angles, or cannot be mirrored.
    """
    if not key:
        return None
    if key not in buffer.keys:
        raise UserError(
            f"config.pretrain.readout is {key!r}, but the data holds {', '.join(buffer.keys)}: "
            "name one of them, or '' for no readout head"
        )
    buffer.add_numbers(key)
    if mirrored and (width := buffer.shape(key)[1]) != _PUSHT_STATE:
        raise UserError(
            f"config.data.mirror mirrors a state of {_PUSHT_STATE} numbers (agent, block, angle), "
            f"but config.pretrain.readout={key!r} has {width}: set one of them to ''"
        )
    buffer.check_finite(key)
    return StateScale.fit(buffer.read(key), angles)


def _without_angles(states: np.ndarray, angles: tuple[int, ...]) -> np.ndarray:
    plain = [i for i in range(states.shape[-1]) if i not in angles]
    turned = states[..., list(angles)]
    return np.concatenate([states[..., plain], np.cos(turned), np.sin(turned)], axis=-1)
