"""The window rule of every run against upstream's own results (golden)."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.checks.fixtures_data import action_rows, read_window, sampler_indices, whole_window
from uva_jax.data.episodes import select_episodes, validation_mask
from uva_jax.data.windows import WindowSpec, buffer_rows, history_combinations, plan_strips
from uva_jax.models.frames import frame_indices
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections import DataOptions

GOLDENS = Path(__file__).parent / "goldens"
FACTS = json.loads((GOLDENS / "data_path_slim.json").read_text())
WINDOW_FACTS = json.loads((GOLDENS / "windows_slim.json").read_text())
CASES = sorted(WINDOW_FACTS["none_outputs"])


def arrays(name):
    with np.load(GOLDENS / name) as file:
        return dict(file)


@pytest.fixture(scope="module")
def golden():
    return arrays("data_path_slim.npz") | arrays("windows_slim.npz")


# ---- planning windows ----


@pytest.mark.parametrize(
    ("name", "length", "before", "after"), [("h32_b1_a7", 32, 1, 7), ("h16_b0_a0", 16, 0, 0)]
)
def test_the_planned_windows_are_upstreams(golden, name, length, before, after):
    ends = golden["sampler/episode_ends"]
    found = sampler_indices(ends, length, pad_before=before, pad_after=after)
    np.testing.assert_array_equal(found, golden[f"sampler/{name}/indices"])


def test_masked_episodes_leave_upstreams_windows(golden):
    mask = ~golden["sampler/masked_val_mask"]
    ends = golden["sampler/episode_ends"]
    found = sampler_indices(ends, 32, pad_before=1, pad_after=7, mask=mask)
    np.testing.assert_array_equal(found, golden["sampler/masked_indices"])


def test_padded_samples_equal_upstreams(golden):
    ends = golden["sampler/episode_ends"]
    steps = np.arange(ends[-1])
    action = np.stack([steps, steps / 2], axis=1).astype(np.float32)
    for picked in golden["sampler/picked"]:
        first, _, padded, _ = golden["sampler/h32_b1_a7/indices"][picked]
        episode = np.searchsorted(ends, first, side="right")
        start = np.append(0, ends)[episode]
        current = first - start - padded + 15
        rows = buffer_rows(start, ends[episode] - 1, current, np.arange(-15, 17))
        np.testing.assert_array_equal(action[rows], golden[f"sampler/sample{picked}/action"])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    strip=st.integers(1, 5),
    stride=st.integers(1, 5),
)
def test_every_step_up_to_the_last_is_a_current_one(lengths, strip, stride):
    ends, mask = np.cumsum(lengths), np.ones(len(lengths), bool)
    wanted = {(e, c) for e, n in enumerate(lengths) for c in range(n - 9)}
    plan = {"strip": strip, "stride": stride, "options": DataOptions(), "seed": 0}
    if not wanted:
        with pytest.raises(UserError, match="no episode has"):
            plan_strips(ends, mask, **plan)
        return
    strips = plan_strips(ends, mask, **plan)
    found = {(e, c) for e, row in zip(strips.episode, strips.current, strict=True) for c in row}
    assert found == wanted


@pytest.mark.parametrize("case", sorted(FACTS["val_mask"]))
def test_the_episode_split_equals_upstreams(case):
    n, ratio, seed = (part[1:] for part in case.split("_"))
    held_out = validation_mask(int(n), float(ratio), int(seed))
    assert np.flatnonzero(held_out).tolist() == FACTS["val_mask"][case]["val"]


# ---- steps of a window ----


@pytest.mark.parametrize("case", sorted(FACTS["select_frames"]))
def test_frame_choices_equal_upstreams_or_are_refused_where_it_fails(case):
    wanted = FACTS["select_frames"][case]
    length, mode = case[1:].split("_")
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=f"window of {length} steps"):
            frame_indices(int(length), train=mode == "train")
    else:
        rows = whole_window(int(length), train=mode == "train")
        parts = ("frames", "future_frames") if mode == "train" else ("frames",)
        assert np.concatenate([rows[part] for part in parts]).tolist() == wanted


@pytest.mark.parametrize("length", [0, 3, 7])
def test_windows_shorter_than_the_frames_are_refused(length):
    with pytest.raises(UserError, match="cannot be selected"):
        WindowSpec(n_frames=4, n_obs_steps=length, n_actions=16).offsets()


def test_history_spacings_equal_upstreams_table():
    wanted = FACTS["history_combinations"]
    found = history_combinations()
    assert len(found) == wanted["count"] == 816
    np.testing.assert_array_equal(found, wanted["all"])


@pytest.mark.parametrize("entry", WINDOW_FACTS["select_frames_different_history_freq"])
def test_randomly_spaced_history_equals_upstreams(entry):
    drawn = random.Random(entry["py_seed"]).choice(history_combinations().tolist())
    rows = whole_window(32, history=drawn)
    assert [*rows["frames"], *rows["future_frames"]] == entry["indices"]


@pytest.mark.parametrize("history", [[0, 1, -15], [0, -1, -2, 1], [-16, -1, -1, 0]])
def test_a_history_outside_the_observation_is_refused(history):
    spec = WindowSpec(n_frames=4, n_obs_steps=16, n_actions=16)
    with pytest.raises(ValueError, match="4 steps in -15..0"):
        spec.offsets(np.array(history))


@pytest.mark.parametrize("case", sorted(FACTS["trajectory_shapes"]))
def test_action_windows_equal_upstreams(golden, case):
    actions = golden[f"{case}/in"]
    past, window = action_rows(actions.shape[1], shift="shift1" in case, history="hist1" in case)
    np.testing.assert_array_equal(actions[:, window], golden[f"{case}/trajectory"])
    if f"{case}/history" in golden:
        np.testing.assert_array_equal(actions[:, past], golden[f"{case}/history"])


# ---- whole windows, as upstream's policies received them ----


def read_case(golden, case):
    inputs = f"{case}/in/"
    obs = {k.removeprefix(inputs): v for k, v in golden.items() if k.startswith(inputs)}
    train, spaced = "_train" in case, case.endswith("_dhf")
    drawn = None
    if train and spaced:
        seed = WINDOW_FACTS["py_seed_for_dhf"]
        drawn = np.array(random.Random(seed).choice(history_combinations().tolist()))
    return read_window(obs, train=train, spaced=spaced, drawn=drawn)


def scaled(images):
    """Returns recorded pixels with channels before time, in [-1, 1]."""
    return np.swapaxes(images * np.float32(255) / np.float32(127.5) - 1, 1, 2)


def test_every_task_is_recorded():
    assert {case.split("/")[1].split("_")[0] for case in CASES} == {"pusht", "toolhang", "umi"}


@pytest.mark.parametrize("case", CASES)
def test_the_frames_shown_equal_upstreams(golden, case):
    read, picks = read_case(golden, case)
    np.testing.assert_array_equal(picks, golden[f"{case}/out/indices"])
    frames = [read[name] for name in ("image", "image/future") if name in read]
    assert all(part.shape[1] == 4 for part in frames)
    found = scaled(np.concatenate(frames, axis=1))
    np.testing.assert_allclose(found, golden[f"{case}/out/x"], atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_states_and_wrist_images_equal_upstreams(golden, case):
    found = {}
    for key, value in read_case(golden, case)[0].items():
        name, _, future = key.partition("/")
        if name == "wrist_image":
            found["pred_second_image" if future else "second_image"] = scaled(value)
        elif name != "image":
            found[("state" if name == "agent_pos" else name) + ("_pred" * bool(future))] = value
    outputs = f"{case}/out/prop/"
    wanted = {k.removeprefix(outputs): v for k, v in golden.items() if k.startswith(outputs)}
    assert set(found) == set(wanted)
    assert not set(found) & set(WINDOW_FACTS["none_outputs"][case])
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6)


# ---- training episodes ----


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
