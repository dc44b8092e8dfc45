"""Windows of a recording with their future, on which predicted video is judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from uva_jax.data import source
from uva_jax.data.windows import Strips, WindowSpec
from uva_jax.models.policy_config import PolicyConfig

Window = Mapping[str, np.ndarray]


def spec_of(config: PolicyConfig) -> WindowSpec:
    """Returns what to read for a policy: its inputs, and every camera whose future it predicts."""
    spec = WindowSpec.of(config)
    return dataclasses.replace(spec, wrist=spec.wrist or config.mar.wrist)


def held_out(
    reader: source.WindowReader, count: int, seed: int, way_out: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses windows of held-out episodes, in a seeded order.

    Args:
      reader: of the recording.
      count: number of windows.
      seed: of the order.
      way_out: what the user may do if no episode is held out.

    Returns:
      arrays (count,), or fewer if there are not so many, of episodes and of current steps in them.

    Raises:
      UserError: no episode is held out; the message ends with `way_out`.
    """
    strips = reader.held_out(seed=seed, way_out=way_out).first(count)
    return strips.episode, strips.current[:, 0]


def read_windows(
    reader: source.WindowReader, episode: np.ndarray, step: np.ndarray
) -> list[Window]:
    """Reads windows with their future, as strips up to the window that ends with the future.

    Args:
      reader: of the recording.
      episode: (n,) of each window.
      step: (n,) its current step in the episode.

    Returns:
      n mappings: images (n_frames, h, w, 3) and "future_<image>" of the same shape, and the other
      arrays as `WindowReader.read` returns them.
    """
    n_frames = reader.spec.n_frames
    current = step[:, None] + reader.stride * np.arange(n_frames + 1)
    strips = Strips(episode, current, np.zeros(len(episode), bool))
    windows: dict[str, np.ndarray] = {}
    for name, values in reader.read(strips, np.arange(len(episode))).items():
        if name.endswith("image"):
            windows[name], windows[f"future_{name}"] = values[:, :n_frames], values[:, n_frames:]
        else:
            windows[name] = values[:, 0]
    return [{k: v[i] for k, v in windows.items()} for i in range(len(episode))]
