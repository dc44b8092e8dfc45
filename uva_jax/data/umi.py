"""Windows of UMI's recordings, with poses relative to the hand's current pose.

The recordings hold absolute poses at the camera's rate and no actions. A window has every third
step, poses are expressed in the hand's current frame, and actions are these poses and the gripper's
width. Upstream: `umi_lazy_dataset.py`, with its default settings.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from uva_jax.data.source import DataOptions, WindowReader
from uva_jax.data.windows import WindowSpec
from uva_jax.envs.rotations import axis_angle_to_matrix, pose_from_9d, pose_matrix, pose_to_9d

STRIDE = 3  # steps of the recording (59.94 Hz) per step of a window
_POSE = {"robot0_eef_pos": 3, "robot0_eef_rot_axis_angle": 3, "robot0_gripper_width": 1}
# Widths of a window's actions and states; a rotation is six numbers.
_GIVEN = {
    **{"action": 10, "robot0_eef_pos": 3, "robot0_eef_rot_axis_angle": 6},
    **{"robot0_gripper_width": 1, "robot0_eef_rot_axis_angle_wrt_start": 6},
}
START_NOISE = 0.05  # radians; upstream perturbs the start's rotation against memorisation


class UmiReader(WindowReader):
    """Reads UMI's recordings (`config.data.layout="umi"`), which hold absolute poses."""

    downsample = STRIDE

    @classmethod
    def numbers(cls, spec: WindowSpec, options: DataOptions) -> dict[str, int | None]:
        return _POSE | {"robot0_demo_start_pose": 6}

    def widths(self) -> dict[str, tuple[str, int]]:
        return {k: (f"{k} of config.data.layout='umi'", width) for k, width in _GIVEN.items()}

    def values(
        self, read: Mapping[str, np.ndarray], current: int
    ) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
        start = read["robot0_demo_start_pose"][..., current, :]
        found = relative_window(*(read[name] for name in _POSE), start, current=current)
        return found["action"], found


def relative_window(
    position: np.ndarray,
    axis_angle: np.ndarray,
    width: np.ndarray,
    start_pose: np.ndarray,
    *,
    current: int,
    rng: np.random.Generator | None = None,
) -> dict[str, np.ndarray]:
    """Converts a window of absolute poses to the policy's relative states and actions.

    Args:
      position: (..., t, 3) of the hand, in metres.
      axis_angle: (..., t, 3) rotation vector of the hand, in radians.
      width: (..., t, 1) of the gripper, in metres.
      start_pose: (..., 6) position and rotation vector at the start of the demonstration.
      current: index of the current step in the window.
      rng: for upstream's noise on the start's rotation in training; None: no noise.

    Returns:
      float32 arrays under upstream's names: "robot0_eef_pos" (..., t, 3) and
      "robot0_eef_rot_axis_angle" (..., t, 6), a rotation_6d in spite of its name, relative to the
      current pose; "robot0_gripper_width" (..., t, 1);
      "robot0_eef_rot_axis_angle_wrt_start" (..., t, 6); and "action" (..., t, 10).
    """
    poses = pose_matrix(position, axis_angle_to_matrix(axis_angle))
    relative = pose_to_9d(np.linalg.inv(poses[..., current, None, :, :]) @ poses)
    turn = np.asarray(start_pose, np.float64)[..., 3:]
    if rng is not None:
        turn = turn + rng.normal(scale=START_NOISE, size=turn.shape)
    start = pose_matrix(start_pose[..., :3], axis_angle_to_matrix(turn))
    from_start = pose_to_9d(np.linalg.inv(start[..., None, :, :]) @ poses)
    found = {
        "robot0_eef_pos": relative[..., :3],
        "robot0_eef_rot_axis_angle": relative[..., 3:],
        "robot0_gripper_width": width,
        "robot0_eef_rot_axis_angle_wrt_start": from_start[..., 3:],
        "action": np.concatenate([relative, width], axis=-1),
    }
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


def absolute_poses(actions: np.ndarray, current_pose: np.ndarray) -> np.ndarray:
    """Converts actions relative to a pose to absolute poses (..., n, 4, 4), float64.

    Args:
      actions: (..., n, 10) position, `rotation_6d` and gripper width.
      current_pose: (..., 6) position and rotation vector.
    """
    turn = axis_angle_to_matrix(current_pose[..., 3:])
    base = pose_matrix(current_pose[..., :3], turn)
    return base[..., None, :, :] @ pose_from_9d(actions[..., :9])
