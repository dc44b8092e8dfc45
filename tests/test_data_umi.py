"""UMI windows: the current relative pose is the identity, and absolute poses can be recovered."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from uva_jax.data.umi import absolute_poses, relative_window
from uva_jax.envs.rotations import axis_angle_to_matrix, matrix_to_rotation_6d, pose_matrix

IDENTITY_6D = [1, 0, 0, 0, 1, 0]
HORIZON, PAST = 32, 15  # length of a window, and index of its current step


@pytest.fixture
def recording():
    """Two windows of absolute poses, and the start pose of each demonstration."""
    rng = np.random.default_rng(0)
    return {
        "position": rng.normal(size=(2, HORIZON, 3)),
        "axis_angle": rng.normal(size=(2, HORIZON, 3)),
        "width": rng.uniform(0, 0.08, (2, HORIZON, 1)),
        "start_pose": rng.normal(size=(2, 6)),
    }


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-3, 1.0, np.pi, 6.0])
def test_rotation_vectors_turn_as_scipys_do(size):
    vectors = np.random.default_rng(1).normal(size=(20, 3))
    vectors *= size / np.linalg.norm(vectors, axis=1, keepdims=True)
    wanted = Rotation.from_rotvec(vectors).as_matrix()
    np.testing.assert_allclose(axis_angle_to_matrix(vectors), wanted, atol=1e-12)


def test_the_current_pose_is_the_identity(recording):
    window = relative_window(**recording, current=PAST)
    np.testing.assert_allclose(window["robot0_eef_pos"][:, PAST], 0, atol=1e-6)
    rotation = window["robot0_eef_rot_axis_angle"][:, PAST]
    np.testing.assert_allclose(rotation, [IDENTITY_6D] * 2, atol=1e-6)
    np.testing.assert_allclose(window["action"][:, PAST, 3:9], [IDENTITY_6D] * 2, atol=1e-6)


def test_actions_are_the_poses_and_the_grippers_width(recording):
    window = relative_window(**recording, current=PAST)
    names = ("robot0_eef_pos", "robot0_eef_rot_axis_angle", "robot0_gripper_width")
    joined = np.concatenate([window[name] for name in names], axis=-1)
    np.testing.assert_array_equal(window["action"], joined)
    np.testing.assert_array_equal(window["action"][..., 9:], recording["width"].astype(np.float32))


def test_actions_lead_back_to_the_absolute_poses(recording):
    actions = relative_window(**recording, current=PAST)["action"]
    now = [recording[name][:, PAST] for name in ("position", "axis_angle")]
    found = absolute_poses(actions, np.concatenate(now, axis=-1))
    wanted = pose_matrix(recording["position"], axis_angle_to_matrix(recording["axis_angle"]))
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_where_the_world_is_does_not_matter(recording):
    """The policy's inputs must not depend on the world frame, which a moved camera changes."""
    turn = Rotation.from_rotvec([0.3, -1.0, 0.5])

    def moved(positions, vectors):
        rotated = (turn * Rotation.from_rotvec(vectors.reshape(-1, 3))).as_rotvec()
        return turn.apply(positions.reshape(-1, 3)) + [1, 2, 3], rotated

    position, axis_angle = moved(recording["position"], recording["axis_angle"])
    start = np.concatenate(
        moved(recording["start_pose"][:, :3], recording["start_pose"][:, 3:]), axis=1
    )
    shape = recording["position"].shape
    other = relative_window(
        position.reshape(shape),
        axis_angle.reshape(shape),
        recording["width"],
        start,
        current=PAST,
    )
    for name, value in relative_window(**recording, current=PAST).items():
        np.testing.assert_allclose(other[name], value, atol=2e-6)


def test_the_rotation_since_the_start_is_the_identity_at_the_start(recording):
    now = np.concatenate([recording["position"], recording["axis_angle"]], axis=-1)[:, 4]
    found = relative_window(**{**recording, "start_pose": now}, current=PAST)
    since = found["robot0_eef_rot_axis_angle_wrt_start"]
    np.testing.assert_allclose(since[:, 4], [IDENTITY_6D] * 2, atol=1e-6)


def test_noise_blurs_only_the_rotation_since_the_start(recording):
    plain = relative_window(**recording, current=PAST)
    blurred = relative_window(**recording, current=PAST, rng=np.random.default_rng(3))
    again = relative_window(**recording, current=PAST, rng=np.random.default_rng(3))
    for name in plain:
        np.testing.assert_array_equal(blurred[name], again[name])
        same = np.array_equal(blurred[name], plain[name])
        assert same == (name != "robot0_eef_rot_axis_angle_wrt_start")


def test_rotation_6d_is_the_first_two_rows():
    matrix = np.arange(9).reshape(3, 3)
    assert matrix_to_rotation_6d(matrix).tolist() == [0, 1, 2, 3, 4, 5]
