"""Windows as the policy is shown them: equal to what upstream made of the same windows."""

import json
import random
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from uva_jax.data.observations import IMAGES, split_window, window_picks
from uva_jax.data.sequences import history_combinations
from uva_jax.runtime.errors import UserError

GOLDENS = Path(__file__).parent / "goldens"
FACTS = json.loads((GOLDENS / "windows_slim.json").read_text())
CASES = sorted(FACTS["none_outputs"])


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDENS / "windows_slim.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def drawn_history(seed):
    """The row that Python's random.choice takes from upstream's list."""
    return random.Random(seed).choice(history_combinations().tolist())


def split_case(golden, case):
    """What `split_window` makes of a recorded window, and the picks it was given."""
    inputs = f"{case}/in/"
    obs = {k.removeprefix(inputs): v for k, v in golden.items() if k.startswith(inputs)}
    indices, train = obs.pop("img_indices", None), "_train" in case
    if indices is not None:
        picks = indices[..., 0].astype(int)
    else:
        dhf = train and case.endswith("_dhf")
        history = drawn_history(FACTS["py_seed_for_dhf"]) if dhf else None
        picks = window_picks(obs["image"].shape[1], train=train, history=history)
    at_frames = case.endswith("_dhf") or indices is not None
    return split_window(obs, train=train, picks=picks, states_at_frames=at_frames), picks


def scaled(images):
    """Recorded pixels: channels before time, in [-1, 1]."""
    return np.swapaxes(images * np.float32(255) / np.float32(127.5) - 1, 1, 2)


def test_every_task_is_recorded():
    assert {case.split("/")[1].split("_")[0] for case in CASES} == {"pusht", "toolhang", "umi"}


@pytest.mark.parametrize("case", CASES)
def test_the_frames_shown_equal_upstreams(golden, case):
    (history, future), picks = split_case(golden, case)
    np.testing.assert_array_equal(picks, golden[f"{case}/out/indices"])
    frames = [part["image"] for part in (history, future) if part]
    assert all(part.shape[1] == 4 for part in frames)
    found = scaled(np.concatenate(frames, axis=1))
    np.testing.assert_allclose(found, golden[f"{case}/out/x"], atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_states_and_wrist_images_equal_upstreams(golden, case):
    (history, future), _ = split_case(golden, case)
    found = {}
    for prefix, suffix, part in (("", "", history), ("pred_", "_pred", future)):
        for name, value in part.items():
            if name == "wrist_image":
                found[f"{prefix}second_image"] = scaled(value)
            elif name not in IMAGES:
                found[("state" if name == "agent_pos" else name) + suffix] = value
    outputs = f"{case}/out/prop/"
    wanted = {k.removeprefix(outputs): v for k, v in golden.items() if k.startswith(outputs)}
    assert set(found) == set(wanted)
    assert not set(found) & set(FACTS["none_outputs"][case])
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6)


@pytest.mark.parametrize("entry", FACTS["select_frames_different_history_freq"])
def test_randomly_spaced_history_equals_upstreams(entry):
    picks = window_picks(32, train=True, history=drawn_history(entry["py_seed"]))
    assert picks.tolist() == entry["indices"]


def window(steps, image_steps=None):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (2, image_steps or steps, 2, 2, 3), np.uint8),
        "state": rng.normal(size=(2, steps, 3)).astype(np.float32),
    }


def test_jax_arrays_are_split_like_numpy_arrays():
    picks = np.sort(np.random.default_rng(1).integers(0, 16, (2, 8)), axis=1)
    options = {"train": True, "picks": picks, "states_at_frames": True}
    plain = split_window(window(32), **options)
    traced = split_window({k: jnp.asarray(v) for k, v in window(32).items()}, **options)
    for want, got in zip(plain, traced, strict=True):
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])


def test_frames_that_are_chosen_already_are_not_chosen_again():
    obs = window(32, image_steps=8)
    history, future = split_window(obs, train=True)
    np.testing.assert_array_equal(history["image"], obs["image"][:, :4])
    np.testing.assert_array_equal(future["image"], obs["image"][:, 4:])


def test_fields_of_different_lengths_are_refused():
    with pytest.raises(UserError, match="hold 32 steps each .* but image holds 16"):
        split_window(window(32, image_steps=16), train=True)


def test_a_window_that_upstream_cannot_handle_is_refused():
    with pytest.raises(UserError, match="cannot be taken from a window of 24 steps"):
        split_window(window(24), train=True)


@pytest.mark.parametrize("history", [[0, 1, 15], [0, 1, 2, 16], [-1, 0, 1, 15]])
def test_history_outside_the_past_is_refused(history):
    with pytest.raises(ValueError, match="4 positions in 0..15"):
        window_picks(32, train=True, history=history)
