"""Where windows come from: the embedded demonstrations or a user's zarr, as policies read them.

Which steps a window holds is said in `windows.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from uva_jax.data import check
from uva_jax.data.augment import mirror_pusht
from uva_jax.data.episodes import validation_mask
from uva_jax.data.language import task_latents
from uva_jax.data.pusht_demos import render_demos
from uva_jax.data.replay_buffer import ReplayBuffer
from uva_jax.data.windows import Strips, WindowSpec, buffer_rows
from uva_jax.models.policy import Policy
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


class WindowReader:
    """Reads strips of windows as a policy takes them, from arrays that hold just that.

    Attributes:
      buffer: the recording, in the form that policies take.
      spec: what a window holds.
      stride: steps of the recording between neighbouring frames, and windows of a strip.
    """

    pace = 1  # steps of the recording a step of a window

    @classmethod
    def arrays(cls, spec: WindowSpec, options: DataOptions) -> tuple[str, ...]:
        """The replay buffer's arrays that are read; errors as in `frames`."""
        return (*cls.frames(spec, options), *cls.numbers(spec, options))

    @classmethod
    def frames(cls, spec: WindowSpec, options: DataOptions) -> tuple[str, ...]:
        """Those of them that hold images.

        Raises:
          UserError: the policy has a wrist camera and `config.data.wrist_key` is empty.
        """
        if spec.wrist and not options.wrist_key:
            raise UserError(
                "this policy sees a wrist camera: name its array with config.data.wrist_key"
            )
        return (options.image_key, options.wrist_key) if spec.wrist else (options.image_key,)

    @classmethod
    def numbers(cls, spec: WindowSpec, options: DataOptions) -> dict[str, int | None]:
        """The others of them, and how wide each has to be (None: see `widths`)."""
        return dict.fromkeys((options.action_key, *spec.states))

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
          UserError: the data lacks what the policy reads, has it in a form or width that does not
            fit, holds numbers that are not finite, or cannot be mirrored.
        """
        self.buffer, self.options = check.BufferView(buffer), options
        self.spec = spec = spec or WindowSpec.of(policy.config)
        self.stride = spec.stride * self.pace
        if options.mirror and spec.more_than_images:
            raise UserError(
                f"config.data.mirror={options.mirror!r} mirrors images and actions, but this "
                "policy reads more than those: set it to ''"
            )
        numbers = self.numbers(spec, options)
        for name in self.frames(spec, options):
            self.buffer.add_frames(name)
        for name, width in numbers.items():
            self.buffer.add_numbers(name, width)
        check.check_widths(spec, self.widths(), str(buffer.path))
        check.check_mirror(self.buffer, options)
        for name in numbers:
            self.buffer.check_finite(name)
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
            """Buffer rows of steps of the episodes."""
            axes = (slice(None), *[None] * (relative.ndim - 1))
            return buffer_rows(starts[axes], ends[axes] - 1, relative, 0)

        offsets = spec.offsets()
        # Window k of a strip sees frames k ... k + n_frames - 1.
        early = current[:, :1] + self.pace * offsets.frames[:-1]
        frames = steps(np.concatenate([early, current + self.pace * offsets.frames[-1]], axis=1))
        wanted = {options.image_key: frames}
        if spec.wrist:
            wanted[options.wrist_key] = frames
        parts = (offsets.actions, offsets.past_actions, offsets.states)
        # All steps between, because a layout may relate them to the current one.
        span = np.arange(min(0, *map(np.min, filter(len, parts))), offsets.actions[-1] + 1)
        taken = steps(current[..., None] + self.pace * span)
        names = self.numbers(spec, options)
        read = self.buffer.read_rows(wanted | dict.fromkeys(names, taken))
        found = {"image": read[options.image_key]}
        if spec.wrist:
            found["wrist_image"] = read[options.wrist_key]
        actions, states = self.values({name: read[name] for name in names}, -span[0])
        found["action"] = actions[:, :, offsets.actions - span[0]]
        if spec.past_actions:
            found["past_action"] = actions[:, :, offsets.past_actions - span[0]]
        observed = offsets.states - span[0]
        found |= {name: states[name][:, :, observed] for name in spec.states}
        if options.mirror == "pusht":
            found = mirror_pusht(found, strips.mirror[rows])
        if self.text is not None:
            found["text_latents"] = np.repeat(self.text[episode][:, None], current.shape[1], axis=1)
        return found

    def widths(self) -> dict[str, tuple[str, int]]:
        """What `values` gives: for "action" and every state, whence it comes, and its width."""
        arrays = {"action": self.options.action_key} | {name: name for name in self.spec.states}
        return {k: (f"data/{name}", self.buffer.shape(name)[1]) for k, name in arrays.items()}

    def values(
        self, read: Mapping[str, np.ndarray], current: int
    ) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
        """Actions and states, float32, of windows of arrays (b, strip, t, k) as they are stored.

        Args:
          read: the arrays of `numbers` by name.
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
