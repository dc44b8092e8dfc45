"""Which frames of a window a UVA policy looks at: one rule for acting, training and loading."""

from __future__ import annotations

from uva_jax.runtime.errors import UserError


def frame_indices(n_steps: int, n_frames: int = 4, *, train: bool = False) -> tuple[int, ...]:
    """The positions of a window whose frames the model sees.

    In training 2 * n_frames of them, the first half history and the second half target; otherwise
    n_frames of history. The stride is n_steps // count and the first position n_frames - 1,
    whatever the stride: 32 steps of training give (3, 7, ..., 31), 16 of acting (3, 7, 11, 15).

    Raises:
      UserError: a length for which upstream fails with an IndexError (24, 33, ...), or at which its
        stride gives another number of frames than the model takes.
    """
    count = 2 * n_frames if train else n_frames
    stride = n_steps // count
    picks = tuple(range(n_frames - 1, n_steps + n_frames - 1, stride)) if stride else ()
    if len(picks) != count or picks[-1] >= n_steps:
        raise UserError(
            f"{count} frames cannot be taken from a window of {n_steps} steps: with UVA's stride "
            f"of {stride} they would be steps {list(picks)}; use {4 * count} steps."
        )
    return picks
