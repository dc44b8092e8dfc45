"""Where windows come from: the embedded demonstrations or a user's zarr, and which windows.

A window is named by its current step: the observation ends there and the action chunk begins
there. Strips are runs of windows one frame stride apart, so that neighbours share encoded frames.
What a window holds beside images and actions is decided by the policy (`WindowSpec`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uva_jax.data.augment import mirror_pusht
from uva_jax.data.language import task_latents
from uva_jax.data.pusht_demos import render_demos
from uva_jax.data.replay_buffer import ReplayBuffer, to_uint8
from uva_jax.data.sequences import validation_mask
from uva_jax.models.frames import frame_indices
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import PolicyConfig
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections import DataOptions


def cache_folder(options: DataOptions) -> Path:
    """Where rendered frames are kept: the option, $UVA_JAX_CACHE, or the user's cache folder."""
    chosen = options.cache or os.environ.get("UVA_JAX_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "uva_jax"


def open_buffer(options: DataOptions, required: Sequence[str], progress=None) -> ReplayBuffer:
    """Opens the data, rendering the embedded demonstrations on first use.

    Args:
      options: which data.
      required: the arrays that must be there.
      progress: called with (frames done, frames in all) while rendering.

    Raises:
      UserError: the buffer is missing, damaged, or lacks an array.
    """
    if options.embedded:
        if extra := sorted(set(required) - {"img", "action"}):
            raise UserError(
                f"this policy reads {', '.join(extra)}, which the embedded demonstrations do not "
                "have: give the data it was trained on with config.data.path"
            )
        count = options.max_episodes or None
        name = f"pusht_demos_{count or 'all'}.zarr"
        return render_demos(cache_folder(options) / name, max_episodes=count, progress=progress)
    return ReplayBuffer.open(options.path, required=required)


def split(buffer: ReplayBuffer, options: DataOptions) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) episode masks, upstream's split."""
    held_out = validation_mask(buffer.n_episodes, options.val_ratio, options.split_seed)
    return ~held_out, held_out


@dataclass(frozen=True)
class WindowSpec:
    """What a policy reads of a window.

    Attributes:
      n_frames, stride: frames of the observation and the steps between them.
      n_actions: actions to predict; `action_offset`: the first one's distance to the current step.
      states: arrays of the proprioceptive state, in order; `state_steps`: observed steps of it.
      past_actions: how many actions before the predicted ones are an input.
      wrist: a second camera is an input.
      text: a language vector is an input.
    """

    n_frames: int
    stride: int
    n_actions: int
    action_offset: int = 0
    states: tuple[str, ...] = ()
    state_steps: int = 0
    past_actions: int = 0
    wrist: bool = False
    text: bool = False

    @classmethod
    def of(cls, config: PolicyConfig) -> WindowSpec:
        """The windows of a policy's `predict_action`."""
        mar = config.mar
        picks = frame_indices(config.n_obs_steps, mar.n_frames)
        return cls(
            n_frames=mar.n_frames,
            stride=picks[1] - picks[0],
            n_actions=mar.n_actions,
            action_offset=0 if config.shift_action else 1,
            states=config.proprio_keys if mar.proprio_dim else (),
            state_steps=config.n_obs_steps if mar.proprio_dim else 0,
            past_actions=mar.n_actions if mar.history_action else 0,
            wrist=mar.proprio_image,
            text=mar.text_dim > 0,
        )

    @property
    def more_than_images(self) -> bool:
        """Whether an observation is more than one camera's images."""
        return bool(self.states or self.past_actions or self.wrist or self.text)


@dataclass(frozen=True)
class Strips:
    """Strips of windows.

    `current` (n, strip) are steps within the episode; `episode` and `mirror` are (n,).
    """

    episode: np.ndarray
    current: np.ndarray
    mirror: np.ndarray

    def __len__(self) -> int:
        return len(self.episode)

    def first(self, count: int) -> Strips:
        """The first `count` strips, or all if there are fewer."""
        return Strips(self.episode[:count], self.current[:count], self.mirror[:count])


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
    """All strips of the chosen episodes in a seeded order, or the first `count` of them.

    Args:
      episode_ends: (e,) cumulative lengths.
      mask: (e,) episodes to use.
      strip: windows a strip.
      stride: steps between neighbouring windows, which is the frame stride of the observation.
      options: horizon and padding; with a mirror, every strip also comes mirrored.
      seed: of the order.
      count: how many strips; they repeat in a new order when there are fewer.

    Every window of every chosen episode is in at least one strip.

    Raises:
      UserError: no episode is long enough for a window.
    """
    lengths = np.diff(episode_ends, prepend=0)
    # The last current step of a window: upstream's windows may pass the end by `pad_after` steps.
    last = lengths - (options.horizon // 2 + 1 - options.pad_after)
    episodes, starts = [], []
    for episode in np.flatnonzero(mask & (last >= 0)):
        for phase in range(min(stride, last[episode] + 1)):
            first = np.arange(phase, last[episode] + 1, stride * strip)
            # The last strip is moved back so that it ends with the phase's last window.
            final = first[-1] + (last[episode] - first[-1]) // stride * stride
            first = np.minimum(first, final - stride * (strip - 1))
            starts.append(first)
            episodes.append(np.full(len(first), episode))
    if not episodes:
        raise UserError(
            f"no episode has the {options.horizon // 2 + 1 - options.pad_after} steps that one "
            f"window needs (the longest has {int(lengths[mask].max(initial=0))}); "
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
    # A start before the episode means a copy of its first window.
    current = np.maximum(start[order][:, None] + stride * np.arange(strip), 0)
    return Strips(episode[order], current, mirror[order])


class WindowReader:
    """Reads strips of windows as a policy takes them, from arrays that hold just that.

    Attributes:
      spec: what a window holds.
      stride: steps of the recording between neighbouring frames, and windows of a strip.
    """

    pace = 1  # steps of the recording a step of a window

    @classmethod
    def arrays(cls, spec: WindowSpec, options: DataOptions) -> tuple[str, ...]:
        """The replay buffer's arrays that are read.

        Raises:
          UserError: the policy has a wrist camera and `config.data.wrist_key` is empty.
        """
        if spec.wrist and not options.wrist_key:
            raise UserError(
                "this policy sees a wrist camera: name its array with config.data.wrist_key"
            )
        wrist = (options.wrist_key,) if spec.wrist else ()
        return (options.image_key, *wrist, *cls.value_arrays(spec, options))

    @classmethod
    def value_arrays(cls, spec: WindowSpec, options: DataOptions) -> tuple[str, ...]:
        """Those of them that hold no images."""
        return (options.action_key, *spec.states)

    def __init__(
        self,
        buffer: ReplayBuffer,
        options: DataOptions,
        policy: Policy,
        spec: WindowSpec | None = None,
    ):
        """Looks up the language vector of every episode, if the policy takes one.

        Args:
          buffer: holds `arrays`.
          options: how it is read.
          policy: gives the language vectors.
          spec: what a window holds; None: what the policy's `predict_action` reads.

        Raises:
          UserError: the data lacks what the policy reads, or cannot be mirrored.
        """
        self.buffer, self.options = buffer, options
        self.spec = spec = spec or WindowSpec.of(policy.config)
        self.stride = spec.stride * self.pace
        if options.mirror and spec.more_than_images:
            raise UserError(
                f"config.data.mirror={options.mirror!r} mirrors images and actions, but this "
                "policy reads more than those: set it to ''"
            )
        self.text = None
        if self.spec.text:
            if not buffer.tasks:
                raise UserError(
                    f"{options.path} says of no episode which task it shows, and this policy is "
                    "told its task in language: import the data anew (see the README)"
                )
            latents = task_latents(
                buffer.tasks, policy=policy, path=options.language, vocabulary=options.vocabulary
            )
            self.text = latents[buffer.episode_task]

    def read(self, strips: Strips, rows: np.ndarray) -> Mapping[str, np.ndarray]:
        """Reads the strips of those rows.

        Returns:
          "image" (b, strip + n_frames - 1, h, w, 3) uint8, where window k of a strip looks at
          frames k ... k + n_frames - 1, and "action" (b, strip, n_actions, a) float32, in raw
          units; as the policy takes them "wrist_image" like "image", every state
          (b, strip, state_steps, k), "past_action" (b, strip, n_actions, a), and "text_latents"
          (b, strip, text_dim).
        """
        spec, options, episode = self.spec, self.options, strips.episode[rows]
        starts = np.append(0, self.buffer.episode_ends[:-1])[episode]
        ends = self.buffer.episode_ends[episode]
        current = strips.current[rows]

        def steps(relative: np.ndarray) -> np.ndarray:
            """Buffer rows of steps of the episodes; beyond an end, the end is repeated."""
            axes = (slice(None), *[None] * (relative.ndim - 1))
            return np.clip(starts[axes] + relative, starts[axes], ends[axes] - 1)

        early = current[:, :1] - self.stride * np.arange(spec.n_frames - 1, 0, -1)
        frames = steps(np.concatenate([early, current], axis=1))
        wanted = {options.image_key: frames}
        if spec.wrist:
            wanted[options.wrist_key] = frames
        past = max(0, spec.past_actions - spec.action_offset, spec.state_steps - 1)
        window = np.arange(-past, spec.n_actions + spec.action_offset)
        taken = steps(current[..., None] + self.pace * window)
        names = self.value_arrays(spec, options)
        read = self.buffer.read_rows(wanted | dict.fromkeys(names, taken))
        found = {"image": _as_uint8(read[options.image_key], options.image_key)}
        if spec.wrist:
            found["wrist_image"] = _as_uint8(read[options.wrist_key], options.wrist_key)
        actions, states = self.values({name: read[name] for name in names}, past)
        first = past + spec.action_offset
        found["action"] = actions[:, :, first : first + spec.n_actions]
        if spec.past_actions:
            found["past_action"] = actions[:, :, first - spec.past_actions : first]
        observed = slice(past + 1 - spec.state_steps, past + 1)
        found |= {name: states[name][:, :, observed] for name in spec.states}
        if options.mirror == "pusht":
            found = mirror_pusht(found, strips.mirror[rows])
        if self.text is not None:
            found["text_latents"] = np.repeat(self.text[episode][:, None], current.shape[1], axis=1)
        return found

    def values(
        self, read: Mapping[str, np.ndarray], current: int
    ) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
        """Actions and states, float32, of windows of arrays (b, strip, t, k) as they are stored.

        Args:
          read: the `value_arrays` by name.
          current: the place of the current step in a window.

        Returns:
          actions (b, strip, t, a) and the states by name, (b, strip, t, k).
        """
        values = {name: np.asarray(value, np.float32) for name, value in read.items()}
        return values[self.options.action_key], values


def single_windows(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Strips of one window without the axis for it: an observation, and "action" (b, n, a)."""
    # Images have no such axis: a strip of one window is its n_frames frames.
    return {k: v if k in ("image", "wrist_image") else v[:, 0] for k, v in batch.items()}


def _as_uint8(images: np.ndarray, key: str) -> np.ndarray:
    return images if images.dtype == np.uint8 else to_uint8(images, key)
