"""The rule by which a UVA policy selects frames of a window, in acting, training and loading."""

from __future__ import annotations

from uva_jax.runtime.errors import UserError


def frame_indices(n_steps: int, n_frames: int = 4, *, train: bool = False) -> tuple[int, ...]:
    """Returns the positions of the frames that the model uses.

    In training they are 2 * n_frames, half history and half target; otherwise n_frames of history.
    The stride is n_steps // count and the first position always n_frames - 1: 32 steps of training
    give (3, 7, ..., 31), 16 of acting (3, 7, 11, 15).

    Args:
      n_steps: length of the window.
      n_frames: frames of the history.
      train: also select the target's frames.

    Raises:
      UserError: upstream's rule fails for this length (24, 33, ...) or selects another number of
        frames.
    """
    count = 2 * n_frames if train else n_frames
    stride = n_steps // count
    picks = tuple(range(n_frames - 1, n_steps + n_frames - 1, stride)) if stride else ()
    if len(picks) != count or picks[-1] >= n_steps:
        raise UserError(
            f"{count} frames cannot be selected from a window of {n_steps} steps: UVA's stride of "
            f"{stride} gives steps {list(picks)}; use {4 * count} steps"
        )
    return picks
