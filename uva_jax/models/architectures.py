"""Architectures of published checkpoints by file name, for work that comes before the download."""

from __future__ import annotations

from uva_jax.models.policy_config import MLPHeadConfig, PolicyConfig

ARCHITECTURES = {
    "pusht": PolicyConfig(
        video_head=MLPHeadConfig(channels=16, z_channels=768, width=1024, depth=6, clip=False),
        action_head=MLPHeadConfig(
            channels=2, z_channels=768, width=1024, depth=6, aggregator="conv_fc"
        ),
        normalizer_fields=(("action", 2), ("agent_pos", 2), ("image", 1)),
    )
}
