"""The rule that gives the steps of a window, for acting, training and evaluation.

A window is identified by its current step, where the observation ends and the actions begin. Its
steps are offsets from that step (`WindowSpec.offsets`); beyond an episode its first or last step is
repeated (`buffer_rows`). A strip is a run of windows one frame stride apart, which share encoded
frames. The results equal those of upstream's sampler and data utilities (`sampler.py`,
`data_utils.py` of UVA), of which the golden fixtures hold examples.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import NamedTuple

import numpy as np

from uva_jax.models.frames import frame_indices
from uva_jax.models.policy_config import PolicyConfig
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections import DataOptions


class Offsets(NamedTuple):
    """Steps of a window relative to its current step, int64.

    `frames` and `future_frames` are (n_frames,), `actions` and `future_states` (n_actions,),
    `past_actions` (past_actions,) and observed `states` (state_steps,). With one history per
    window, `frames` and `states` are (b, n_frames).
    """

    frames: np.ndarray
    future_frames: np.ndarray
    actions: np.ndarray
    past_actions: np.ndarray
    states: np.ndarray
    future_states: np.ndarray


@dataclass(frozen=True)
class WindowSpec:
    """The parts of a window that a policy reads.

    Attributes:
      n_frames: frames of the observation.
      n_obs_steps: steps of the observation, from which the frames are selected.
      n_actions: actions to predict.
      action_offset: steps from the current step to the first action.
      states: arrays of the proprioceptive state, in order.
      state_steps: observed steps of the state.
      action_dim: width of an action; None: any.
      state_dim: width of all states together; None: any.
      state_dims: (name, width) of the states whose own width is known.
      past_actions: number of actions before the predicted ones that are an input.
      wrist: a second camera is an input.
      text: a language latent is an input.
    """

    n_frames: int
    n_obs_steps: int
    n_actions: int
    action_offset: int = 0
    states: tuple[str, ...] = ()
    state_steps: int = 0
    action_dim: int | None = None
    state_dim: int | None = None
    state_dims: tuple[tuple[str, int], ...] = ()
    past_actions: int = 0
    wrist: bool = False
    text: bool = False

    @classmethod
    def of(cls, config: PolicyConfig) -> WindowSpec:
        """Returns the windows of a policy's `predict_action`."""
        mar = config.mar
        states = config.proprio_keys if mar.proprio_dim else ()
        normalized = config.normalizer_fields if config.normalizer_type != "none" else ()
        return cls(
            n_frames=mar.n_frames,
            n_obs_steps=config.n_obs_steps,
            n_actions=mar.n_actions,
            action_offset=0 if config.shift_action else 1,
            states=states,
            state_steps=config.n_obs_steps if states else 0,
            action_dim=config.action_dim if config.action_head else None,
            state_dim=mar.proprio_dim,
            state_dims=tuple((name, width) for name, width in normalized if name in states),
            past_actions=mar.n_actions if mar.history_action else 0,
            wrist=mar.proprio_image,
            text=mar.text_dim > 0,
        )

    def without_widths(self) -> WindowSpec:
        """Returns the spec for actions and states of any width, for a policy not yet built."""
        return dataclasses.replace(self, action_dim=None, state_dim=None, state_dims=())

    @property
    def stride(self) -> int:
        """Steps between neighbouring frames.

        Raises:
          UserError: UVA's rule does not select n_frames from n_obs_steps.
        """
        picks = frame_indices(self.n_obs_steps, self.n_frames)
        return picks[1] - picks[0]

    @property
    def more_than_images(self) -> bool:
        """Whether an observation has more than one camera's images."""
        return bool(self.states or self.past_actions or self.wrist or self.text)

    def offsets(self, history: np.ndarray | None = None) -> Offsets:
        """Returns the window's steps relative to its current step.

        Args:
          history: (n_frames,) or (b, n_frames) steps of the observed frames, at most 0, in place of
            the even ones; states are then observed only at these (`different_history_freq`).

        Raises:
          UserError: UVA's rule does not select n_frames from n_obs_steps.
          ValueError: `history` is not n_frames steps of the observation.
        """
        current = self.n_obs_steps - 1  # its index in the observation
        frames = np.array(frame_indices(self.n_obs_steps, self.n_frames)) - current
        following = frames[-1] + self.stride * np.arange(1, self.n_frames + 1)
        states = np.arange(1 - self.state_steps, 1)
        if history is not None:
            frames = np.asarray(history, np.int64)
            if frames.shape[-1] != self.n_frames or frames.max() > 0 or frames.min() < -current:
                raise ValueError(
                    f"the history should be {self.n_frames} steps in {-current}..0, but is "
                    f"{frames.tolist()}"
                )
            states = frames if self.state_steps else states
        first = self.action_offset
        return Offsets(
            frames=frames,
            future_frames=following,
            actions=first + np.arange(self.n_actions),
            past_actions=first - np.arange(self.past_actions, 0, -1),
            states=states,
            future_states=np.arange(1, self.n_actions + 1),
        )


def buffer_rows(first, last, current, offsets) -> np.ndarray:
    """Returns the rows of a recording that windows read; the arguments broadcast.

    Beyond an episode its first or last step is repeated.

    Args:
      first, last: rows of the first and the last step of each window's episode.
      current: current step, counted from the start of the episode.
      offsets: steps relative to it.
    """
    return np.clip(first + current + offsets, first, last)


def history_combinations() -> np.ndarray:
    """Returns all choices of random history spacing, (816, 4): rising steps of 0..15, 15 last."""
    heads = list(combinations_with_replacement(range(16), 3))
    return np.array([(*head, 15) for head in heads])


def steps_of_a_window(options: DataOptions) -> int:
    """Counts the steps that an episode needs for one window."""
    return options.horizon // 2 + 1 - options.pad_after


def last_current_steps(lengths: np.ndarray, options: DataOptions) -> np.ndarray:
    """Returns the last possible current step of episodes, given their lengths; negative: none.

    Upstream's windows of `horizon` steps, centred on the current step, may exceed the episode's end
    by `pad_after` steps. They may begin anywhere before its start, so that every earlier step is a
    current step, as in rollouts.
    """
    return lengths - steps_of_a_window(options)


@dataclass(frozen=True)
class Strips:
    """Strips of windows.

    `current` (n, strip) are current steps, counted from the episode's start; `episode` (n,) are
    episode numbers and `mirror` (n,) says which strips are mirrored.
    """

    episode: np.ndarray
    current: np.ndarray
    mirror: np.ndarray

    def __len__(self) -> int:
        return len(self.episode)

    def first(self, count: int) -> Strips:
        """Returns the first `count` strips, or all if there are fewer."""
        return self.at(slice(count))

    def at(self, index) -> Strips:
        """Returns the strips at an index of the first axis: a slice, numbers or booleans."""
        return Strips(self.episode[index], self.current[index], self.mirror[index])


def plan_strips(
    episode_ends: np.ndarray,
    mask: np.ndarray,
    *,
    strip: int,
    stride: int,
    options: DataOptions,
    seed: int,
    count: int | None = None,
) -> Strips:
    """Returns strips of the chosen episodes in a seeded order.

    Every window of every chosen episode is in at least one strip.

    Args:
      episode_ends: (e,) cumulative lengths.
      mask: (e,) episodes to use.
      strip: windows per strip.
      stride: steps between neighbouring windows, the frame stride of the observation.
      options: horizon and padding; with a mirror, every strip also occurs mirrored.
      seed: of the order.
      count: number of strips, repeated in a new order if there are fewer; None: all once.

    Raises:
      UserError: no episode is long enough for a window.
    """
    lengths = np.diff(episode_ends, prepend=0)
    last = last_current_steps(lengths, options)
    episodes, starts = [], []
    for episode in np.flatnonzero(mask & (last >= 0)):
        for phase in range(min(stride, last[episode] + 1)):
            first = np.arange(phase, last[episode] + 1, stride * strip)
            # The last strip is shifted back so that it ends with the last window of the phase.
            final = first[-1] + (last[episode] - first[-1]) // stride * stride
            first = np.minimum(first, final - stride * (strip - 1))
            starts.append(first)
            episodes.append(np.full(len(first), episode))
    if not episodes:
        raise UserError(
            f"no episode has the {steps_of_a_window(options)} steps that one window needs (the "
            f"longest of the {int(mask.sum())} chosen has {int(lengths[mask].max(initial=0))}); "
            "lower config.data.horizon or raise config.data.pad_after"
        )
    episode, start = np.concatenate(episodes), np.concatenate(starts)
    mirror = np.zeros(len(episode), bool)
    if options.mirror:
        episode, start = np.tile(episode, 2), np.tile(start, 2)
        mirror = np.repeat([False, True], len(mirror))
    count = len(episode) if count is None else count
    rng = np.random.default_rng(seed)
    rounds = -(-count // len(episode))
    order = np.concatenate([rng.permutation(len(episode)) for _ in range(rounds)])[:count]
    # A current step before the episode's start is replaced by its first.
    current = np.maximum(start[order][:, None] + stride * np.arange(strip), 0)
    return Strips(episode[order], current, mirror[order])
