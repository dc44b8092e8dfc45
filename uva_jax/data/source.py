"""Reads windows for policies from the embedded demonstrations or a user's zarr.

`windows.py` has the rule that gives the steps of a window.
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
from uva_jax.data.windows import Strips, WindowSpec, buffer_rows, plan_strips
from uva_jax.models.policy import Policy
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections import DataOptions


def cache_folder(options: DataOptions) -> Path:
    """Returns the folder of rendered frames: the option, $UVA_JAX_CACHE, or the user's cache."""
    chosen = options.cache or os.environ.get("UVA_JAX_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "uva_jax"


def open_buffer(options: DataOptions, required: Sequence[str], progress=None) -> ReplayBuffer:
    """Opens the data, rendering the embedded demonstrations on first use.

    Args:
      options: of the data.
      required: the arrays that will be read.
      progress: called with (frames done, total frames) while rendering.

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
    """Returns masks (episodes,) of training and held-out episodes, by upstream's split."""
    held_out = validation_mask(buffer.n_episodes, options.val_ratio, options.split_seed)
    return ~held_out, held_out


class WindowReader:
    """Reads strips of windows from arrays that hold the policy's inputs.

    Attributes:
      buffer: the recording, in the form that policies take.
      spec: the content of a window.
      stride: steps of the recording between neighbouring frames, and between windows of a strip.
    """

    downsample = 1  # steps of the recording per step of a window

    @classmethod
    def arrays(cls, spec: WindowSpec, options: DataOptions) -> tuple[str, ...]:
        """Returns the names of the arrays that are read; errors as in `frames`."""
        return (*cls.frames(spec, options), *cls.numbers(spec, options))

    @classmethod
    def frames(cls, spec: WindowSpec, options: DataOptions) -> tuple[str, ...]:
        """Returns the names of the arrays of images.

        Raises:
          UserError: the policy has a wrist camera and `config.data.wrist_key` is empty.
        """
        if spec.wrist and not options.wrist_key:
            raise UserError(
                "this policy observes a wrist camera: name its array with config.data.wrist_key"
            )
        return (options.image_key, options.wrist_key) if spec.wrist else (options.image_key,)

    @classmethod
    def numbers(cls, spec: WindowSpec, options: DataOptions) -> dict[str, int | None]:
        """Returns the names of the other arrays and their required widths (None: see `widths`)."""
        return dict.fromkeys((options.action_key, *spec.states))

    def __init__(
        self,
        buffer: ReplayBuffer,
        options: DataOptions,
        policy: Policy,
        spec: WindowSpec | None = None,
    ):
        """Checks the arrays and computes the language latents, if the policy takes them.

        Args:
          buffer: holds `arrays`.
          options: of the data.
          policy: gives the language latents.
          spec: the content of a window; None: the inputs of the policy's `predict_action`.

        Raises:
          UserError: the data lack an input of the policy, have it in a wrong form or width, hold
            numbers that are not finite, or cannot be mirrored.
        """
        self.buffer, self.options = check.BufferView(buffer), options
        self.spec = spec = spec or WindowSpec.of(policy.config)
        self.stride = spec.stride * self.downsample
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
                    f"{options.path} does not say the task of its episodes, but this policy is "
                    "conditioned on language: import the data again (see the README)"
                )
            latents = task_latents(
                buffer.tasks, policy=policy, path=options.language, vocabulary=options.vocabulary
            )
            self.text = latents[buffer.episode_task]

    def strips(
        self, mask: np.ndarray, *, strip: int, seed: int, count: int | None = None
    ) -> Strips:
        """Plans strips of the episodes of `mask` (e,); arguments and errors of `plan_strips`."""
        return plan_strips(
            self.buffer.episode_ends,
            mask,
            strip=strip,
            stride=self.stride,
            options=self.options,
            seed=seed,
            count=count,
        )

    def held_out(self, *, seed: int, count: int | None = None, way_out: str = "") -> Strips:
        """Plans windows of the held-out episodes, each as a strip of its own.

        Args:
          seed, count: see `plan_strips`.
          way_out: a further remedy, appended to the error.

        Raises:
          UserError: no episode is held out.
        """
        check.check_split(self.buffer, self.options, way_out)
        _, mask = split(self.buffer, self.options)
        return self.strips(mask, strip=1, seed=seed, count=count)

    def read(self, strips: Strips, rows: np.ndarray) -> Mapping[str, np.ndarray]:
        """Reads strips.

        Args:
          strips: the planned strips.
          rows: (b,) indices of the strips to read.

        Returns:
          "image" (b, strip + n_frames - 1, h, w, 3) uint8, of which window k of a strip has frames
          k..k + n_frames - 1, and "action" (b, strip, n_actions, a) float32 in raw units; if the
          policy takes them "wrist_image" like "image", every state (b, strip, state_steps, k),
          "past_action" (b, strip, n_actions, a), and "text_latents" (b, strip, text_dim).
        """
        spec, options, episode = self.spec, self.options, strips.episode[rows]
        starts = np.append(0, self.buffer.episode_ends[:-1])[episode]
        ends = self.buffer.episode_ends[episode]
        current = strips.current[rows]

        def steps(relative: np.ndarray) -> np.ndarray:
            """Returns the buffer's rows of steps relative to the episodes' starts."""
            axes = (slice(None), *[None] * (relative.ndim - 1))
            return buffer_rows(starts[axes], ends[axes] - 1, relative, 0)

        offsets = spec.offsets()
        # Window k of a strip has frames k..k + n_frames - 1.
        early = current[:, :1] + self.downsample * offsets.frames[:-1]
        frames = steps(
            np.concatenate([early, current + self.downsample * offsets.frames[-1]], axis=1)
        )
        wanted = {options.image_key: frames}
        if spec.wrist:
            wanted[options.wrist_key] = frames
        parts = (offsets.actions, offsets.past_actions, offsets.states)
        # All steps in between are read, because a layout may relate them to the current one.
        span = np.arange(min(0, *map(np.min, filter(len, parts))), offsets.actions[-1] + 1)
        taken = steps(current[..., None] + self.downsample * span)
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
        """Returns for "action" and every state of `values` its array and its width."""
        arrays = {"action": self.options.action_key} | {name: name for name in self.spec.states}
        return {k: (f"data/{name}", self.buffer.shape(name)[1]) for k, name in arrays.items()}

    def values(
        self, read: Mapping[str, np.ndarray], current: int
    ) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
        """Converts windows of stored arrays to actions and states, float32.

        Args:
          read: the arrays of `numbers` by name, (b, strip, t, k).
          current: index of the current step in a window.

        Returns:
          actions (b, strip, t, a) and the states by name, (b, strip, t, k).
        """
        values = {name: np.asarray(value, np.float32) for name, value in read.items()}
        return values[self.options.action_key], values


def single_windows(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Removes the strip axis from strips of one window: an observation, and "action" (b, n, a)."""
    # Images have no such axis: a strip of one window has n_frames frames.
    return {k: v if k in ("image", "wrist_image") else v[:, 0] for k, v in batch.items()}
