"""From a raw window of a recording to what a policy is shown of it, and what it is to predict.

Upstream decides this by task name; here the fields that are there decide. Works on numpy and jax
arrays alike and reads no data. Values stay raw: `Policy` scales pixels and normalizes states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from uva_jax.models.frames import frame_indices
from uva_jax.runtime.errors import UserError

IMAGES = ("image", "wrist_image")


def window_picks(
    n_steps: int, *, n_frames: int = 4, train: bool, history: Sequence[int] | None = None
) -> np.ndarray:
    """The positions of a window whose frames the model sees, as an int64 array.

    Args:
      n_steps: steps of the window.
      n_frames: frames of history, and again of future in training.
      train: the window also holds the future.
      history: (n_frames,) positions of the history in place of the even ones, for policies of
        `different_history_freq`: in training upstream draws one row of
        `sequences.history_combinations` a batch.

    Raises:
      UserError: a length that UVA's rule cannot handle.
      ValueError: `history` is not n_frames positions of the first half.
    """
    picks = np.array(frame_indices(n_steps, n_frames, train=train))
    if history is None:
        return picks
    history = np.asarray(history, np.int64)
    past = n_steps // 2 if train else n_steps
    if history.shape != (n_frames,) or history.min() < 0 or history.max() >= past:
        raise ValueError(
            f"history should be {n_frames} positions in 0..{past - 1}, but is {history.tolist()}"
        )
    return np.concatenate([history, picks[n_frames:]])


def split_window(
    obs: Mapping[str, np.ndarray],
    *,
    train: bool,
    n_frames: int = 4,
    picks: np.ndarray | None = None,
    states_at_frames: bool = False,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What the policy is shown of a window, and what it may have to predict.

    Args:
      obs: "image" (b, T, h, w, 3), "wrist_image" alike where there is one, and states (b, T, k).
        Images may also be the frames already chosen (2 * n_frames in training, else n_frames);
        then `picks` says which those are.
      train: the second half of the window is future; otherwise all of it is history.
      n_frames: frames of history.
      picks: from `window_picks` (p,), or a row a sample (b, p), as data sets give them that choose
        frames themselves; by default the even ones.
      states_at_frames: show the states of the chosen frames only, as policies of
        `different_history_freq` (`MARConfig.proprio_steps` is n_frames) take them.

    Returns:
      (history, future) with the keys of `obs`: images of n_frames each, states (b, T / 2, k) each.
      Outside training the history holds all T states, and the future is empty.

    Raises:
      UserError: the window's length does not fit UVA's rule, or images are of another length than
        the states.
    """
    count = 2 * n_frames if train else n_frames
    lengths = {name: value.shape[1] for name, value in obs.items()}
    n_steps = max(lengths.values())
    for name, length in lengths.items():
        if length != n_steps and not (name in IMAGES and length == count):
            raise UserError(
                f"the fields of a window should hold {n_steps} steps each (images may hold the "
                f"{count} frames chosen), but {name} holds {length}"
            )
    if picks is None and (states_at_frames or any(lengths.get(n, count) != count for n in IMAGES)):
        picks = window_picks(n_steps, n_frames=n_frames, train=train)
    history, future = {}, {}
    for name, value in obs.items():
        if name in IMAGES:
            frames = value if lengths[name] == count else _gather(value, picks)
            history[name], rest = frames[:, :n_frames], frames[:, n_frames:]
        else:
            past = n_steps // 2 if train else n_steps
            history[name], rest = value[:, :past], value[:, past:]
            if states_at_frames:
                history[name] = _gather(history[name], picks[..., :n_frames])
        if train:
            future[name] = rest
    return history, future


def _gather(values, picks: np.ndarray):
    """Positions (p,) of every sample, or (b, p) of each its own, of values (b, T, ...)."""
    if picks.ndim == 1:
        return values[:, picks]
    return values[np.arange(len(picks))[:, None], picks]
