"""Which steps make a training window: upstream's indices, paddings, splits and frame choices.

Everything is index arithmetic on numpy arrays; nothing here reads data. The results equal those of
upstream's sampler and data utilities, of which the golden fixtures hold examples.
"""

from itertools import combinations_with_replacement

import numpy as np

from uva_jax.models.frames import frame_indices
from uva_jax.runtime.errors import UserError


def create_indices(
    episode_ends: np.ndarray,
    sequence_length: int,
    *,
    episode_mask: np.ndarray | None = None,
    pad_before: int = 0,
    pad_after: int = 0,
) -> np.ndarray:
    """All windows of `sequence_length` steps, episode by episode.

    Args:
      episode_ends: (e,) cumulative lengths.
      episode_mask: (e,) bool, the episodes to use; all by default.
      pad_before, pad_after: by how many steps a window may begin before, or end after, its episode.

    Returns:
      int64 (n, 4): first and end step in the buffer, first and end position in the window.

    Raises UserError when not a single window fits.
    """
    ends = np.asarray(episode_ends, np.int64)
    starts = np.concatenate(([0], ends[:-1]))
    mask = np.ones(len(ends), bool) if episode_mask is None else np.asarray(episode_mask, bool)
    if mask.shape != ends.shape:
        raise ValueError(f"episode_mask has shape {mask.shape}, but there are {len(ends)} episodes")
    if sequence_length < 1:
        raise ValueError(f"a window needs at least one step, got {sequence_length}")
    before = min(max(pad_before, 0), sequence_length - 1)
    after = min(max(pad_after, 0), sequence_length - 1)
    lengths = (ends - starts)[mask]
    counts = np.maximum(lengths - sequence_length + after + before + 1, 0)
    if not counts.sum():
        raise UserError(
            f"no window of {sequence_length} steps fits: {mask.sum()} of {len(ends)} episodes are "
            f"used, the longest has {lengths.max(initial=0)} steps and windows may run over an "
            f"end by {before} before and {after} after"
        )
    first = np.repeat(starts[mask], counts)
    length = np.repeat(lengths, counts)
    # Each window's start relative to its episode, from -before upwards.
    offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) - before
    begin = np.maximum(offset, 0)
    end = np.minimum(offset + sequence_length, length)
    return np.stack([first + begin, first + end, begin - offset, end - offset], axis=1)


def window_rows(indices: np.ndarray, sequence_length: int) -> np.ndarray:
    """The buffer's step for every position of windows (n, 4) as int64 (n, sequence_length).

    Positions before or after the episode repeat its first or last step, as upstream pads.
    """
    indices = np.asarray(indices, np.int64)
    first = indices[:, 0] - indices[:, 2]
    rows = first[:, None] + np.arange(sequence_length)
    return np.clip(rows, indices[:, :1], indices[:, 1:2] - 1)


def validation_mask(n_episodes: int, ratio: float, seed: int = 0) -> np.ndarray:
    """Upstream's held-out episodes as bool (n_episodes,): at least one, never all; none at 0."""
    mask = np.zeros(n_episodes, bool)
    if ratio <= 0:
        return mask
    count = min(max(1, round(n_episodes * ratio)), n_episodes - 1)
    mask[np.random.default_rng(seed).choice(n_episodes, size=count, replace=False)] = True
    return mask


def downsample_mask(mask: np.ndarray, max_n: int | None, seed: int = 0) -> np.ndarray:
    """Upstream's choice of at most `max_n` of the episodes in `mask`, bool (e,)."""
    mask = np.asarray(mask, bool)
    if max_n is None or mask.sum() <= max_n:
        return mask
    kept = np.random.default_rng(seed).choice(int(mask.sum()), size=int(max_n), replace=False)
    result = np.zeros_like(mask)
    result[np.flatnonzero(mask)[kept]] = True
    return result


def select_episodes(
    episode_ends: np.ndarray, fraction: float, seed: int, *, mask: np.ndarray | None = None
) -> np.ndarray:
    """Picks a `fraction` of whole episodes (of those in `mask`), at least one; bool (e,).

    With the same seed a smaller fraction is a subset of a larger one, so data-efficiency curves
    compare nested data.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"data_fraction must be above 0 and at most 1, got {fraction}")
    n = len(episode_ends)
    candidates = np.arange(n) if mask is None else np.flatnonzero(mask)
    if not len(candidates):
        raise UserError(f"data_fraction picks from none of the {n} episodes")
    order = np.random.default_rng(seed).permutation(candidates)
    result = np.zeros(n, bool)
    result[order[: max(1, round(fraction * len(candidates)))]] = True
    return result


def select_frames(num_steps: int, *, n_frames: int = 4, train: bool) -> np.ndarray:
    """`models.frames.frame_indices` as an int64 array, to index and to gather with."""
    return np.array(frame_indices(num_steps, n_frames, train=train))


def history_combinations() -> np.ndarray:
    """The 816 choices for random history spacing, (816, 4): rising steps of 0..15, 15 last."""
    heads = list(combinations_with_replacement(range(16), 3))
    return np.array([(*head, 15) for head in heads])


def action_window(nactions, T: int, shift: bool, history: bool):  # noqa: N803 (upstream's name)
    """Splits actions (b, T, a) into (history or None, the window that the model predicts).

    With `shift` the window starts at the current step, T // 2 - 1, and leaves out the last action;
    without, it is the second half. With `history` the horizon is one longer (33): the history is
    the first 16 actions and the window the 16 after, one later when not shifted; a horizon of 32
    then gives upstream's 15-step window. Works on numpy and jax arrays.
    """
    if nactions.shape[1] != T or T < 4:
        raise ValueError(f"expected actions of {T} steps, at least 4, got {nactions.shape}")
    half = T // 2
    if shift and history:
        return nactions[:, :half], nactions[:, half:-1]
    if shift:
        return None, nactions[:, half - 1 : -1]
    if history:
        nactions = nactions[:, 1:]
    half = -(-nactions.shape[1] // 2)  # of an odd length the first part takes the extra step
    return nactions[:, :half], nactions[:, half:]
