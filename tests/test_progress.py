"""Selection of windows by progress: quick detours and slow ones from the same states."""

import numpy as np
import pytest

from uva_jax.pretrain.progress import advantages, best_share


def walks(delays, length=40, seed=0):
    """Episodes along a line from `length` to 0; episode i waits for delays[i] steps at 20."""
    rng = np.random.default_rng(seed)
    episodes = []
    for delay in delays:
        places = np.arange(length, -1, -1.0)
        places = np.insert(places, np.flatnonzero(places == 20)[0], np.full(delay, 20.0))
        episodes.append(places + 0.01 * rng.normal(size=len(places)))
    ends = np.cumsum([len(x) for x in episodes])
    return np.concatenate(episodes)[:, None], ends


def test_windows_that_wait_have_less_progress_than_windows_that_do_not():
    delays = [0, 30] * 40
    states, ends = walks(delays)
    gains = advantages(states, ends, None, steps=8)
    assert gains.dtype == np.float32 and gains.shape == (len(states),)
    starts = np.append(0, ends[:-1])
    before = [gains[s + 12] for s in starts]  # 8 steps before the place of the delay
    quick, slow = before[0::2], before[1::2]
    assert abs(np.mean(before)) < 2
    at_it = [gains[s + 20] for s in starts]
    assert np.mean(at_it[0::2]) > 5 > -2 > np.mean(at_it[1::2])
    assert np.std(quick) < 4 and np.std(slow) < 4
    # Where all episodes do the same, none is better.
    after = [gains[e - 15] for e in ends]
    np.testing.assert_allclose(after, 0, atol=1.5)


def test_the_remaining_steps_count_at_an_episodes_end():
    states, ends = walks([0] * 30)
    gains = advantages(states, ends, None, steps=1000)
    np.testing.assert_allclose(gains, 0, atol=3)  # V(s_t) - (steps that are left)


def test_mirror_images_of_other_episodes_are_neighbours():
    states, ends = walks([0, 30] * 40)
    sides = np.repeat([1.0, -1.0] * 40, np.diff(ends, prepend=0))[:, None]
    # Quick episodes are on one side and slow ones on the other: only the mirror compares them.
    sided = np.concatenate([states, 100 * sides], axis=1)
    mirrored = np.concatenate([states, -100 * sides], axis=1)
    alone, both = (advantages(sided, ends, x, steps=8) for x in (None, mirrored))
    quick = np.append(0, ends[:-1])[0::2] + 20
    assert np.abs(alone[quick]).max() < 3 < 5 < both[quick].min()


def test_a_single_episode_has_no_other_to_compare_with():
    states, ends = walks([3])
    np.testing.assert_allclose(advantages(states, ends, None, steps=8), 0)


@pytest.mark.parametrize(("share", "kept"), [(0.5, [1, 3]), (0.25, [3]), (0.01, [3])])
def test_the_best_share_has_the_largest_values(share, kept):
    assert np.flatnonzero(best_share(np.array([0.0, 2.0, 1.0, 5.0]), share)).tolist() == kept
