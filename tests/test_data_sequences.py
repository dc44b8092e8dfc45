"""Window arithmetic against upstream's own results (golden) and against a plain reading of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uva_jax.data.sequences import (
    action_window,
    create_indices,
    downsample_mask,
    history_combinations,
    select_episodes,
    select_frames,
    validation_mask,
    window_rows,
)
from uva_jax.runtime.errors import UserError

GOLDENS = Path(__file__).parent / "goldens"
FACTS = json.loads((GOLDENS / "data_path_slim.json").read_text())


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDENS / "data_path_slim.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize(
    ("name", "length", "before", "after"),
    [("h32_b1_a7", 32, 1, 7), ("h16_b0_a0", 16, 0, 0), ("h8_b1_a7", 8, 1, 7)],
)
def test_indices_equal_upstreams(golden, name, length, before, after):
    ends = golden["sampler/episode_ends"]
    found = create_indices(ends, length, pad_before=before, pad_after=after)
    np.testing.assert_array_equal(found, golden[f"sampler/{name}/indices"])


def test_masked_indices_equal_upstreams(golden):
    mask = ~golden["sampler/masked_val_mask"]
    ends = golden["sampler/episode_ends"]
    found = create_indices(ends, 32, episode_mask=mask, pad_before=1, pad_after=7)
    np.testing.assert_array_equal(found, golden["sampler/masked_indices"])


def test_padded_samples_equal_upstreams(golden):
    ends = golden["sampler/episode_ends"]
    rows = window_rows(create_indices(ends, 32, pad_before=1, pad_after=7), 32)
    steps = np.arange(ends[-1])
    action = np.stack([steps, steps / 2], axis=1).astype(np.float32)
    for picked in golden["sampler/picked"]:
        sample = f"sampler/sample{picked}"
        np.testing.assert_array_equal(action[rows[picked]], golden[f"{sample}/action"])
        image = (steps % 256).astype(np.uint8)[rows[picked]][:, None]
        np.testing.assert_array_equal(image, golden[f"{sample}/img"])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    window=st.integers(1, 9),
    before=st.integers(-1, 10),
    after=st.integers(-1, 10),
)
def test_indices_equal_a_plain_reading_of_the_rule(lengths, window, before, after):
    wanted, start = [], 0
    before_used, after_used = (min(max(p, 0), window - 1) for p in (before, after))
    for length in lengths:
        for offset in range(-before_used, length - window + after_used + 1):
            seen = [i for i in range(offset, offset + window) if 0 <= i < length]
            wanted.append(
                [start + seen[0], start + seen[-1] + 1, seen[0] - offset, seen[-1] + 1 - offset]
            )
        start += length
    ends = np.cumsum(lengths)
    if not wanted:
        with pytest.raises(UserError, match="no window"):
            create_indices(ends, window, pad_before=before, pad_after=after)
    else:
        found = create_indices(ends, window, pad_before=before, pad_after=after)
        np.testing.assert_array_equal(found, wanted)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=5), window=st.integers(2, 33))
def test_windows_never_leave_their_episode_and_only_repeat_its_ends(lengths, window):
    ends = np.cumsum(lengths)
    try:
        indices = create_indices(ends, window, pad_before=1, pad_after=7)
    except UserError:
        return
    rows = window_rows(indices, window)
    episode = np.searchsorted(ends, rows, side="right")
    assert (episode == episode[:, :1]).all()
    assert np.isin(np.diff(rows, axis=1), (0, 1)).all()
    inside = (np.arange(window) >= indices[:, 2:3]) & (np.arange(window) < indices[:, 3:4])
    assert (np.diff(rows, axis=1)[inside[:, 1:] & inside[:, :-1]] == 1).all()


def test_episodes_too_short_for_a_window_are_explained():
    with pytest.raises(UserError, match="the longest has 9 steps"):
        create_indices(np.array([5, 14]), 32, pad_before=1, pad_after=7)


@pytest.mark.parametrize("case", sorted(FACTS["val_mask"]))
def test_the_episode_split_equals_upstreams(case):
    wanted = FACTS["val_mask"][case]
    n, ratio, seed = (part[1:] for part in case.split("_"))
    held_out = validation_mask(int(n), float(ratio), int(seed))
    assert np.flatnonzero(held_out).tolist() == wanted["val"]
    kept = downsample_mask(~held_out, wanted["max_n"], int(seed))
    assert np.flatnonzero(kept).tolist() == wanted["train_downsampled"]


@pytest.mark.parametrize("case", sorted(FACTS["select_frames"]))
def test_frame_choices_equal_upstreams_or_are_refused_where_it_fails(case):
    wanted = FACTS["select_frames"][case]
    length, mode = case[1:].split("_")
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=f"window of {length} steps"):
            select_frames(int(length), train=mode == "train")
    else:
        assert select_frames(int(length), train=mode == "train").tolist() == wanted


@pytest.mark.parametrize("length", [0, 3, 7])
def test_windows_shorter_than_the_frames_are_refused(length):
    with pytest.raises(UserError, match="cannot be taken"):
        select_frames(length, train=True)


def test_history_spacings_equal_upstreams_table():
    wanted = FACTS["history_combinations"]
    found = history_combinations()
    assert len(found) == wanted["count"] == 816
    np.testing.assert_array_equal(found, wanted["all"])


@pytest.mark.parametrize("case", sorted(FACTS["trajectory_shapes"]))
def test_action_windows_equal_upstreams(golden, case):
    actions = golden[f"{case}/in"]
    shift, history = ("shift1" in case), ("hist1" in case)
    past, window = action_window(actions, actions.shape[1], shift, history)
    np.testing.assert_array_equal(window, golden[f"{case}/trajectory"])
    if f"{case}/history" in golden:
        np.testing.assert_array_equal(past, golden[f"{case}/history"])
    else:
        assert past is None


def test_a_fraction_picks_whole_episodes_and_smaller_ones_are_subsets():
    ends = np.cumsum(np.full(50, 10))
    tenth, half = (select_episodes(ends, f, seed=3) for f in (0.1, 0.5))
    assert tenth.sum() == 5 and half.sum() == 25 and not (tenth & ~half).any()
    assert (select_episodes(ends, 0.1, seed=3) == tenth).all()
    assert (select_episodes(ends, 0.1, seed=4) != tenth).any()
    assert select_episodes(ends, 0.001, seed=3).sum() == 1
    allowed = np.arange(50) % 2 == 0
    assert not (select_episodes(ends, 0.5, seed=3, mask=allowed) & ~allowed).any()


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01])
def test_an_impossible_fraction_is_refused(fraction):
    with pytest.raises(UserError, match="data_fraction"):
        select_episodes(np.array([5, 9]), fraction, seed=0)
