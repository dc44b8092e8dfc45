"""Where windows come from: the embedded demonstrations or a user's zarr, and which windows.

A window is named by its current step: the observation ends there and the action chunk begins
there. Strips are runs of windows one frame stride apart, so that neighbours share encoded frames.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uva_jax.data.augment import mirror_pusht
from uva_jax.data.pusht_demos import render_demos
from uva_jax.data.replay_buffer import ReplayBuffer, to_uint8
from uva_jax.data.sequences import validation_mask
from uva_jax.errors import UserError


@dataclass(frozen=True)
class DataOptions:
    """`config.data`; see `configs/common.py` for each field."""

    path: str
    max_episodes: int
    cache: str
    image_key: str
    action_key: str
    horizon: int
    pad_after: int
    val_ratio: float
    split_seed: int
    mirror: str


def cache_folder(options: DataOptions) -> Path:
    """Where rendered frames are kept: the option, $UVA_JAX_CACHE, or the user's cache folder."""
    chosen = options.cache or os.environ.get("UVA_JAX_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "uva_jax"


def open_buffer(options: DataOptions, progress=None) -> ReplayBuffer:
    """Opens the data, rendering the embedded demonstrations on first use.

    Args:
      options: which data.
      progress: called with (frames done, frames in all) while rendering.

    Raises:
      UserError: the buffer is missing, damaged, or lacks the image or action array.
    """
    if options.path == "embedded":
        count = options.max_episodes or None
        name = f"pusht_demos_{count or 'all'}.zarr"
        return render_demos(cache_folder(options) / name, max_episodes=count, progress=progress)
    return ReplayBuffer.open(options.path, required=(options.image_key, options.action_key))


def split(buffer: ReplayBuffer, options: DataOptions) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) episode masks, upstream's split."""
    held_out = validation_mask(buffer.n_episodes, options.val_ratio, options.split_seed)
    return ~held_out, held_out


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

    The first and the last window of an episode are always in; with strips longer than one, up to
    a strip's worth of windows before the last may be in none.

    Raises:
      UserError: no episode is long enough for a window.
    """
    lengths = np.diff(episode_ends, prepend=0)
    # The last current step of a window: upstream's windows may pass the end by `pad_after` steps.
    last = lengths - (options.horizon // 2 + 1 - options.pad_after)
    episodes, starts = [], []
    for episode in np.flatnonzero(mask & (last >= 0)):
        for phase in range(stride):
            first = np.arange(phase, last[episode] + 1, stride * strip)
            # The last strip of an episode is moved back so that it ends with the last window.
            first = np.minimum(first, last[episode] - stride * (strip - 1))
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


def read_strips(
    buffer: ReplayBuffer,
    strips: Strips,
    rows: np.ndarray,
    *,
    options: DataOptions,
    n_frames: int,
    stride: int,
    n_actions: int,
) -> Mapping[str, np.ndarray]:
    """Reads strips.

    Returns:
      "image" (b, strip + n_frames - 1, h, w, 3) uint8, where window k of a strip looks at frames
      k ... k + n_frames - 1, and "action" (b, strip, n_actions, a) float32, in raw units.
    """
    starts = np.append(0, buffer.episode_ends[:-1])[strips.episode[rows]][:, None]
    ends = buffer.episode_ends[strips.episode[rows]][:, None]
    current = strips.current[rows]
    early = current[:, :1] - stride * np.arange(n_frames - 1, 0, -1)
    frames = starts + np.maximum(np.concatenate([early, current], axis=1), 0)
    actions = starts[..., None] + current[..., None] + np.arange(n_actions)
    actions = np.minimum(actions, ends[..., None] - 1)
    read = buffer.read_rows({options.image_key: frames, options.action_key: actions})
    image = np.asarray(read[options.image_key])
    found = {
        "image": image if image.dtype == np.uint8 else to_uint8(image, options.image_key),
        "action": np.asarray(read[options.action_key], np.float32),
    }
    return mirror_pusht(found, strips.mirror[rows]) if options.mirror == "pusht" else found
