"""Small random policies of every variant that UVA trains, and a replay buffer for all of them.

The variants are those of the published checkpoints: language (libero10), language and state (umi),
wrist camera, state and past actions (toolhang). Only the widths are reduced.
"""

import dataclasses

import numpy as np
from conftest import CONFIG, HEAD

from uva_jax.data.replay_writer import write_replay_buffer
from uva_jax.models.policy_config import PolicyConfig

UMI_STATE = {
    "robot0_eef_pos": 3,
    "robot0_eef_rot_axis_angle": 6,
    "robot0_gripper_width": 1,
    "robot0_eef_rot_axis_angle_wrt_start": 6,
}
ROBOT_STATE = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}
TASKS = ("put the mug on the plate", "turn on the stove")


def _variant(task: str, *, mar: dict, **fields) -> PolicyConfig:
    head = dataclasses.replace(HEAD, channels=10)
    return dataclasses.replace(
        CONFIG,
        task=task,
        mar=dataclasses.replace(CONFIG.mar, action_dim=10, **mar),
        action_head=head,
        **fields,
    )


VARIANTS = {
    "libero10": _variant(
        "libero10",
        mar=dict(text_dim=12, text_tokens=4),
        normalizer_fields=(("action", 10),),
        language_model="clip",
    ),
    "umi": _variant(
        "umi",
        mar=dict(text_dim=12, text_tokens=4, proprio_dim=16),
        normalizer_type="none",
        normalizer_fields=(),
        proprio_keys=tuple(UMI_STATE),
        proprio_head=dataclasses.replace(HEAD, channels=16),
        shift_action=False,
        language_model="clip",
    ),
    "toolhang": _variant(
        "toolhang",
        mar=dict(proprio_dim=9, proprio_image=True, wrist=True, history_action=True),
        wrist_head=CONFIG.video_head,
        proprio_head=dataclasses.replace(HEAD, channels=9),
        normalizer_fields=(("action", 10), *ROBOT_STATE.items()),
        proprio_keys=tuple(ROBOT_STATE),
    ),
}

# All inputs together, which no published policy has.
VARIANTS["everything"] = dataclasses.replace(
    VARIANTS["toolhang"],
    task="everything",
    mar=dataclasses.replace(VARIANTS["toolhang"].mar, text_dim=12, text_tokens=4),
)


def recording(episode_ends=(40, 75, 100), size: int = 32) -> dict[str, np.ndarray]:
    """Returns the arrays of a replay buffer that all variants can read; values are random."""
    rng, n = np.random.default_rng(0), episode_ends[-1]
    arrays = {
        name: rng.integers(0, 256, (n, size, size, 3), np.uint8) for name in ("view", "wrist")
    }
    arrays["action"] = rng.uniform(-1, 1, (n, 10)).astype(np.float32)
    for name, width in (UMI_STATE | ROBOT_STATE).items():
        arrays[name] = rng.uniform(-1, 1, (n, width)).astype(np.float32)
    return arrays


def write_recording(folder, episode_ends=(40, 75, 100)):
    """Writes the replay buffer and the file of language latents; returns both paths."""
    ends = np.array(episode_ends)
    data, latents = folder / "recording.zarr", folder / "latents.npz"
    episode_task = np.arange(len(ends)) % len(TASKS)
    write_replay_buffer(data, recording(episode_ends), ends, tasks=TASKS, episode_task=episode_task)
    rng = np.random.default_rng(1)
    np.savez(latents, **{task: rng.normal(size=12).astype(np.float32) for task in TASKS})
    return data, latents
