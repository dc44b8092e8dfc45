"""Rotations and poses of robots in UVA's representation, with pytorch3d's conventions, in numpy.

A pose of 9 numbers is a position and the first two rows of the rotation matrix (`rotation_6d`).
"""

from __future__ import annotations

import numpy as np
from einops import rearrange
from scipy.spatial.transform import Rotation


def axis_angle_to_matrix(vector: np.ndarray) -> np.ndarray:
    """Converts rotation vectors (..., 3), in radians, to matrices (..., 3, 3), float64."""
    vector = np.asarray(vector, np.float64)
    matrices = Rotation.from_rotvec(vector.reshape(-1, 3)).as_matrix()
    return matrices.reshape(*vector.shape, 3)


def matrix_to_rotation_6d(matrix: np.ndarray) -> np.ndarray:
    """Converts rotation matrices (..., 3, 3) to their first two rows (..., 6)."""
    return rearrange(matrix[..., :2, :], "... i j -> ... (i j)")


def rotation_6d_to_matrix(rows: np.ndarray) -> np.ndarray:
    """Converts two rows (..., 6) to rotation matrices (..., 3, 3), float64, by Gram-Schmidt."""
    first, second = np.split(np.asarray(rows, np.float64), 2, axis=-1)
    first = first / np.linalg.norm(first, axis=-1, keepdims=True)
    second = second - (first * second).sum(axis=-1, keepdims=True) * first
    second = second / np.linalg.norm(second, axis=-1, keepdims=True)
    return np.stack([first, second, np.cross(first, second)], axis=-2)


def pose_matrix(position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Combines positions (..., 3) and rotations (..., 3, 3) to poses (..., 4, 4), float64."""
    result = np.zeros((*np.shape(position)[:-1], 4, 4))
    result[..., :3, :3], result[..., :3, 3], result[..., 3, 3] = rotation, position, 1
    return result


def pose_to_9d(pose: np.ndarray) -> np.ndarray:
    """Converts poses (..., 4, 4) to position and `rotation_6d` (..., 9)."""
    return np.concatenate([pose[..., :3, 3], matrix_to_rotation_6d(pose[..., :3, :3])], axis=-1)


def pose_from_9d(values: np.ndarray) -> np.ndarray:
    """Converts position and `rotation_6d` (..., 9) to poses (..., 4, 4)."""
    return pose_matrix(values[..., :3], rotation_6d_to_matrix(values[..., 3:]))


def actions_to_10d(actions: np.ndarray) -> np.ndarray:
    """Converts position, rotation vector, gripper (..., 7) to (..., 10) float32.

    The result holds position, `rotation_6d` and gripper.
    """
    rotation = matrix_to_rotation_6d(axis_angle_to_matrix(actions[..., 3:6]))
    parts = [actions[..., :3], rotation, actions[..., 6:]]
    return np.concatenate(parts, axis=-1).astype(np.float32)


def actions_from_10d(actions: np.ndarray) -> np.ndarray:
    """Converts actions of one or two arms back, (..., 10) or (..., 20) to (..., 7) or (..., 14).

    The inverse of `actions_to_10d`: position, rotation vector and gripper of each arm.
    """
    arms = rearrange(np.asarray(actions, np.float64), "... (arm k) -> ... arm k", k=10)
    matrices = rotation_6d_to_matrix(arms[..., 3:9])
    vectors = Rotation.from_matrix(matrices.reshape(-1, 3, 3)).as_rotvec()
    parts = [arms[..., :3], vectors.reshape(*arms.shape[:-1], 3), arms[..., 9:]]
    return rearrange(np.concatenate(parts, axis=-1), "... arm k -> ... (arm k)")
