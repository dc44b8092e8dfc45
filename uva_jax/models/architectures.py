"""Architectures of published checkpoints by file name.

`plan` uses them before a checkpoint is downloaded, and `convert --like` for checkpoints without a
configuration. They follow UVA's own configurations; tests compare them with the state dicts that
UVA's code builds.
"""

from __future__ import annotations

import dataclasses

from uva_jax.models.policy_config import (
    MARConfig,
    MLPHeadConfig,
    PolicyConfig,
    TextTowerConfig,
)

_VIDEO = MLPHeadConfig(channels=16, z_channels=768, width=1024, depth=6, clip=False)


def _rows(channels: int) -> MLPHeadConfig:
    """Returns the head that denoises rows of `channels` numbers: actions or states."""
    return MLPHeadConfig(channels, z_channels=768, width=1024, depth=6, aggregator="conv_fc")


_PUSHT = PolicyConfig(
    video_head=_VIDEO,
    action_head=_rows(2),
    normalizer_fields=(("action", 2), ("agent_pos", 2), ("image", 1)),
)

ARCHITECTURES = {
    "pusht": _PUSHT,
    "pusht_multitask": dataclasses.replace(_PUSHT, task="pusht_multitask"),
    "libero10": PolicyConfig(
        task="libero10",
        mar=MARConfig(action_dim=10, text_dim=512),
        video_head=_VIDEO,
        action_head=_rows(10),
        normalizer_fields=(("action", 10), ("agentview_rgb", 1)),
        language_model="clip",
        text_tower=TextTowerConfig(),
    ),
    "umi_multitask": PolicyConfig(
        task="umi",
        mar=MARConfig(action_dim=10, text_dim=512, proprio_dim=16, proprio_steps=4),
        video_head=_VIDEO,
        action_head=_rows(10),
        proprio_head=_rows(6),
        normalizer_type="none",
        proprio_keys=(
            "robot0_eef_pos",
            "robot0_eef_rot_axis_angle",
            "robot0_gripper_width",
            "robot0_eef_rot_axis_angle_wrt_start",
        ),
        shift_action=False,
        different_history_freq=True,
        language_model="clip",
        task_modes=("policy_model", "full_dynamic_model"),
    ),
}
