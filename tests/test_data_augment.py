"""PushT's mirror agrees with the simulator and is its own inverse, in numpy and in jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uva_jax.data.augment import CropAndBlur, mirror_pusht
from uva_jax.envs.pusht import CANVAS, IMAGE_SIZE, PushT, initial_state
from uva_jax.runtime.errors import UserError

GOAL = np.array([256.0, 256.0, np.pi / 4])


@pytest.fixture(scope="module")
def scenes():
    """States (n, 5) and their renders (n, 96, 96, 3)."""
    env = PushT()
    states = np.stack([initial_state(seed) for seed in range(8)])
    return states, render(env, states)


def render(env, states):
    images = []
    for state in states:
        env.set_state(state)
        images.append(env.render())
    return np.stack(images)


def agent_centroids(images):
    """Returns the agent's centroids (n, 2), x, y in image pixels, found by its blue colour."""
    weight = np.maximum(images[..., 2].astype(float) - images[..., 0] - 60, 0)
    assert (weight.sum((1, 2)) > 500).all()
    y, x = np.indices(weight.shape[1:])
    return np.stack([(weight * a).sum((1, 2)) / weight.sum((1, 2)) for a in (x, y)], -1)


def test_a_mirrored_picture_is_the_picture_of_the_mirrored_state(scenes):
    states, images = scenes
    mirrored = mirror_pusht({"image": images, "state": states})
    rendered = render(PushT(), mirrored["state"])
    difference = np.abs(mirrored["image"].astype(float) - rendered).mean()
    assert difference < 1.5, difference
    # The same measure fails without mirroring, and if only the state is mirrored.
    assert np.abs(images.astype(float) - rendered).mean() > 3 * difference
    offset = agent_centroids(mirrored["image"]) - agent_centroids(rendered)
    assert np.abs(offset).max() < 0.5


def test_the_agent_moves_where_its_mirrored_position_says(scenes):
    states, images = scenes
    mirrored = mirror_pusht({"image": images, "agent_pos": states[:, :2]})
    seen = (agent_centroids(mirrored["image"]) + 0.5) * CANVAS / IMAGE_SIZE
    np.testing.assert_allclose(seen, mirrored["agent_pos"], atol=0.5 * CANVAS / IMAGE_SIZE)


def test_the_physics_is_mirrored_too():
    env, twin = PushT(), PushT()
    state = np.array([250.0, 380.0, 256.0, 256.0, 0.4])
    env.set_state(state)
    twin.set_state(mirror_pusht({"state": state})["state"])
    for action in np.linspace([250.0, 380.0], [290.0, 150.0], 12):  # up, into the block
        env.step(action)
        twin.step(mirror_pusht({"action": action})["action"])
    assert np.abs(env.state - state)[2:4].max() > 5  # it was pushed
    expected = mirror_pusht({"state": env.state})["state"]
    np.testing.assert_allclose(twin.state[:4], expected[:4], atol=0.5)
    np.testing.assert_allclose(twin.state[4], expected[4], atol=0.01)


def test_points_and_angles_map_as_documented():
    out = mirror_pusht(
        {
            "action": np.array([[10.0, 20.0]], np.float32),
            "agent_pos": np.array([0, 512], np.int16),
            "state": np.array([1.0, 2.0, 3.0, 4.0, 0.5]),
        }
    )
    np.testing.assert_array_equal(out["action"], [[492, 502]])
    np.testing.assert_array_equal(out["agent_pos"], [0, 512])
    np.testing.assert_allclose(out["state"], [510, 511, 508, 509, np.pi / 2 - 0.5])
    assert out["action"].dtype == np.float32 and out["agent_pos"].dtype == np.int16


def test_the_goal_is_its_own_mirror_image():
    state = np.concatenate([[100.0, 100.0], GOAL])
    np.testing.assert_allclose(mirror_pusht({"state": state})["state"][2:], GOAL)


def test_mirroring_twice_changes_nothing():
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (2, 4, 96, 96, 3), np.uint8),
        "action": rng.integers(0, 513, (2, 16, 2)).astype(np.float32),
        "agent_pos": (rng.integers(0, 512 * 2**14, (2, 4, 2)) / 2**14).astype(np.float32),
    }
    twice = mirror_pusht(mirror_pusht(batch))
    for name, value in batch.items():
        np.testing.assert_array_equal(twice[name], value)
        assert not np.array_equal(mirror_pusht(batch)[name], value)
    state = np.concatenate([rng.uniform(0, 512, (5, 4)), rng.uniform(0, 2 * np.pi, (5, 1))], -1)
    back = mirror_pusht(mirror_pusht({"state": state}))["state"]
    np.testing.assert_allclose(back, state, atol=1e-12)


def test_jax_under_jit_gives_what_numpy_gives(scenes):
    states, images = scenes
    batch = {"image": images, "state": states.astype(np.float32), "action": states[:, None, :2]}
    batch["action"] = batch["action"].astype(np.float32)
    where = np.arange(len(states)) % 2 == 0
    ours = mirror_pusht(batch, where)
    theirs = jax.jit(mirror_pusht)(jax.tree.map(jnp.asarray, batch), jnp.asarray(where))
    for name, value in ours.items():
        assert theirs[name].dtype == value.dtype
        np.testing.assert_allclose(theirs[name], value, rtol=1e-6)


def test_only_the_chosen_samples_are_mirrored(scenes):
    states, images = scenes
    batch, where = {"image": images, "state": states}, np.arange(len(states)) < 3
    some, whole = mirror_pusht(batch, where), mirror_pusht(batch)
    for name in batch:
        np.testing.assert_array_equal(some[name][:3], whole[name][:3])
        np.testing.assert_array_equal(some[name][3:], batch[name][3:])


@pytest.mark.parametrize(
    ("name", "shape"),
    [("latent", (4, 16)), ("image", (4, 96, 64, 3)), ("action", (4, 7)), ("state", (4, 2))],
)
def test_what_has_no_mirror_image_is_refused(name, shape):
    with pytest.raises(ValueError, match=f"{name}.* cannot be mirrored"):
        mirror_pusht({name: np.zeros(shape)})


# ---- crops and blurs ----


def _window(seed=0, n=4):
    frame = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), np.uint8)
    return np.stack([frame] * n)


def test_all_frames_of_a_window_are_cropped_and_blurred_alike():
    for seed in range(8):
        found = CropAndBlur()(_window(), np.random.default_rng(seed))
        assert found.shape == (4, 96, 96, 3) and found.dtype == np.uint8
        np.testing.assert_array_equal(found, np.stack([found[0]] * 4))


def test_a_quarter_of_the_windows_and_those_blurred_by_nearly_nothing_stay():
    window = _window(n=1)
    kept = [
        np.array_equal(CropAndBlur()(window, np.random.default_rng(seed)), window)
        for seed in range(400)
    ]
    assert np.mean(kept) == pytest.approx(0.3, abs=0.1)


def test_a_crop_is_a_part_of_the_frame_at_its_old_size():
    ramp = np.broadcast_to(np.linspace(0, 250, 96)[:, None, None], (96, 96, 3))
    ramp = np.round(ramp).astype(np.uint8)[None]
    spans = set()
    for seed in range(40):
        found = CropAndBlur(blur=0.1)(ramp, np.random.default_rng(seed))[0, :, 0, 0].astype(int)
        span = (found[-2] - found[1]) / (250 * 93 / 95)
        spans.add(min((1.0, 0.95), key=lambda s: abs(s - span)))
        assert span == pytest.approx(1.0, abs=0.01) or span == pytest.approx(0.95, abs=0.01)
    assert spans == {1.0, 0.95}


@pytest.mark.parametrize("wrong", [{"crop": 0.0}, {"crop": 1.5}, {"blur": 0.0}])
def test_a_crop_or_blur_that_cannot_be_is_an_error(wrong):
    with pytest.raises(UserError):
        CropAndBlur(**wrong)
