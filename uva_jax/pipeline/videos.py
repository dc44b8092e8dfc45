"""The part of the evaluation that judges the policies' predicted video."""

from __future__ import annotations

from collections.abc import Mapping

from convert.i3d import load_i3d
from uva_jax.eval import fvd
from uva_jax.eval.recorded import spec_of
from uva_jax.models.policy import Policy
from uva_jax.pipeline.engine import Context
from uva_jax.pipeline.inputs import open_data


def judge_videos(context: Context, policies: Mapping[str, Policy]) -> dict[str, dict]:
    """Returns the results of `fvd.judge`, or none if the settings or the teacher have no video."""
    options, metrics = context.config.evaluate, context.metrics
    if not options.fvd_weights:
        return {}
    if policies["teacher"].video_head is None:
        metrics.say("config.evaluate.fvd_weights is set, but this policy predicts no video")
        return {}
    return fvd.judge(
        policies,
        lambda policy: open_data(context, policy, spec=spec_of(policy.config), mirror=""),
        load_i3d(options.fvd_weights),
        fvd.VideoOptions(options.fvd_videos, options.fvd_sampling_steps, seed=options.noise_seed),
        folder=context.folder / "fvd",
        origin={},
        say=metrics.say,
        progress=lambda name: metrics.late_progress("windows", desc=f"video of {name}"),
    )
