"""The stages that train a policy: vae, encode, pretrain. They run only on request."""

from __future__ import annotations

import functools

from uva_jax.eval import training
from uva_jax.models import policy_folder
from uva_jax.pipeline.engine import Context, Stage
from uva_jax.pipeline.inputs import compute_dtype, mesh_of, open_data, recording, training_data
from uva_jax.pretrain import stages
from uva_jax.runtime.settings import section


def _options(config) -> stages.Options:
    return stages.Options(config.pretrain, config.seed, mesh_of(config), compute_dtype(config))


def run_vae(context: Context) -> dict:
    """Trains a VAE on the recording's frames and writes vae/vae.ckpt."""
    return stages.run_vae(
        functools.partial(open_data, context),
        _options(context.config),
        context.folder,
        context.metrics,
        is_primary=context.is_primary,
    )


def run_encode(context: Context) -> dict:
    """Encodes all frames into latents/main and, with a wrist camera, latents/wrist."""
    return stages.run_encode(
        context.inputs["vae"],
        functools.partial(open_data, context),
        _options(context.config),
        context.folder,
        context.metrics,
        is_primary=context.is_primary,
        barrier=context.barrier,
    )


def run_pretrain(context: Context) -> dict:
    """Trains a policy; writes pretrain/policy, pretrain/policy.ckpt and pretrain/report.html."""
    config, folder = context.config, context.folder
    options = section(config.pretrain.score, training.ScoreOptions)
    with training.scorer(options, context.metrics.say) as score:
        result = stages.run_policy(
            context.inputs["vae"],
            context.inputs.get("encode"),
            functools.partial(open_data, context),
            _options(config),
            folder,
            context.metrics,
            is_primary=context.is_primary,
            score=score,
        )
    if context.is_primary:
        architecture, _ = policy_folder.read_description(folder / "policy")
        path = training.write_training_report(context.workdir, config, architecture.task)
        context.metrics.say(f"report: {path}")
    return result


# The settings that select the frames and their size.
_FRAMES = (
    *("seed", "precision", "data.path", "data.max_episodes", "data.mirror", "data.image_key"),
    *("data.wrist_key", "pretrain.model.image_size", "pretrain.model.wrist"),
)
TRAINING_STAGES = (
    Stage(
        "vae",
        run_vae,
        needs=(),
        config_keys=(
            *_FRAMES,
            "data.val_ratio",
            "data.split_seed",
            "pretrain.model.vae_width",
            "pretrain.model.vae_multipliers",
            "pretrain.vae_training",
            "pretrain.readout",
            "pretrain.readout_angles",
        ),
        folder="vae",
        describe="trains a KL-VAE on the recording's frames",
        fingerprint=lambda config: recording(config) | stages.vae_starts(config.pretrain),
        on_request=True,
    ),
    Stage(
        "encode",
        run_encode,
        needs=("vae",),
        config_keys=(*_FRAMES, "pretrain.augment"),
        folder="latents",
        describe="encodes every frame",
        fingerprint=recording,
        on_request=True,
    ),
    Stage(
        "pretrain",
        run_pretrain,
        needs=("vae", "encode"),
        config_keys=("seed", "precision", "data", "pretrain"),
        folder="pretrain",
        describe="trains a policy on the latents",
        fingerprint=lambda config: training_data(config) | stages.starts(config.pretrain),
        on_request=True,
    ),
)
