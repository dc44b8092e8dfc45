"""The pretrain stage: from a recording to a policy, by way of a VAE and its cached latents.

Kept out of `stages.py` because no default run needs it. Every part resumes: the VAE and the policy
by their loops' states, the encoding by its chunks; `start/` marks that the VAE is done.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import torch_file
from convert.from_torch import convert_checkpoint
from convert.partial import start_from
from convert.to_torch import export_policy, plain_cfg, torch_arrays
from uva_jax import policy_io
from uva_jax.config import section
from uva_jax.data import normalizer, source
from uva_jax.data.augment import CropAndBlur, mirror_pusht
from uva_jax.data.replay_buffer import ReplayBuffer, to_uint8
from uva_jax.errors import UserError
from uva_jax.graft.record import Site
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import MARConfig, MLPHeadConfig, PolicyConfig, VAEConfig
from uva_jax.pipeline import Context
from uva_jax.train import latents, pretrain, vae
from uva_jax.train.windows import StateScale, Windows

_BLOCK = 512  # frames read at a time


@dataclass(frozen=True)
class ModelOptions:
    """`config.pretrain.model`; see `configs/common.py` for each field."""

    task: str
    image_size: int
    vae_width: int
    vae_multipliers: tuple[int, ...]
    width: int
    depth: int
    heads: int
    dropout: float
    video_head: tuple[int, int]
    action_head: tuple[int, int]
    n_action_steps: int
    text_dim: int
    past_actions: bool
    states: tuple[str, ...]
    predict_states: bool
    wrist: bool

    def __post_init__(self):
        if self.wrist and not self.states:
            raise UserError(
                "config.pretrain.model.wrist needs states beside it (config.pretrain.model.states):"
                " the original reads a wrist camera together with the robot's state"
            )


def model_config(
    options: ModelOptions,
    action_dim: int,
    state_dims: Mapping[str, int] | None = None,
    *,
    spaced: bool = False,
) -> PolicyConfig:
    """The architecture of a policy that is trained from nothing.

    Args:
      options: sizes and inputs.
      action_dim: width of an action.
      state_dims: widths of `options.states` (by default 1 each).
      spaced: the past is spaced at random while training (`different_history_freq`).

    Raises:
      UserError: the image size does not give whole latent cells that conv_fc can pool.
    """
    widths = {name: (state_dims or {}).get(name, 1) for name in options.states}
    state_dim = sum(widths.values())
    levels = len(options.vae_multipliers)
    vae_config = VAEConfig(options.vae_width, options.vae_multipliers, attn_levels=(levels - 1,))
    side, rest = divmod(options.image_size, vae_config.stride)
    if rest or side % 4:
        raise UserError(
            f"config.pretrain.model.image_size is {options.image_size}, but with {levels} levels "
            f"of the VAE it has to be a multiple of {4 * vae_config.stride}"
        )
    grid, width = (side, side), options.width

    def head(channels, size, **more):
        return MLPHeadConfig(channels, width, size[0], size[1], grid=grid, **more)

    return PolicyConfig(
        task=options.task,
        image_size=options.image_size,
        vae=vae_config,
        mar=MARConfig(
            encoder_embed_dim=width,
            encoder_depth=options.depth,
            encoder_num_heads=options.heads,
            decoder_embed_dim=width,
            decoder_depth=options.depth,
            decoder_num_heads=options.heads,
            grid=grid,
            token_dim=vae_config.z_channels,
            action_dim=action_dim,
            attn_dropout=options.dropout,
            proj_dropout=options.dropout,
            text_dim=options.text_dim,
            history_action=options.past_actions,
            proprio_dim=state_dim,
            **({"proprio_steps": MARConfig.n_frames} if spaced else {}),
            proprio_image=options.wrist,
            wrist=options.wrist,
        ),
        video_head=head(vae_config.z_channels, options.video_head, clip=False),
        wrist_head=head(vae_config.z_channels, options.video_head, clip=False)
        if options.wrist
        else None,
        action_head=head(action_dim, options.action_head, aggregator="conv_fc"),
        proprio_head=head(state_dim, options.action_head, aggregator="conv_fc")
        if state_dim and options.predict_states
        else None,
        normalizer_fields=(("action", action_dim), *widths.items()),
        proprio_keys=tuple(widths),
        different_history_freq=spaced,
        n_action_steps=options.n_action_steps,
        language_model="clip" if options.text_dim else None,
    )


def starts(config) -> dict[str, str]:
    """The checkpoints to start from, by label."""
    return {f"pretrain.{k}": config.pretrain[k] for k in ("mar", "vae") if config.pretrain[k]}


def run(
    context: Context,
    open_data: Callable[[Policy], source.WindowReader],
    *,
    mesh,
    dtype,
    score: Callable[[Policy], Mapping[str, float]] | None = None,
) -> dict:
    """The stage: pretrain/policy and pretrain/policy.ckpt.

    Args:
      context: of the stage.
      open_data: a policy -> the reader of its data.
      mesh: (data, fsdp, tensor).
      dtype: of matrix products.
      score: see `pretrain.pretrain`.
    """
    config, folder, seed = context.config, context.folder, context.config.seed
    options = section(config.pretrain, pretrain.PretrainOptions)
    start = folder / "start"
    if (start / "policy.json").exists():
        policy = policy_io.load_policy(start, dtype=dtype)
        reader = _opened(open_data, policy)
    else:
        policy, reader = _start(context, open_data, mesh, dtype)
        policy_io.save_policy(start, policy, source={"stage": "pretrain", "part": "start"})
        policy = policy_io.load_policy(start, dtype=dtype)
    trained = policy
    if options.steps:
        trained = _train_policy(context, policy, reader, options, mesh, score)
    about = {"stage": "pretrain", "weights": "ema", "seed": seed, "steps": options.steps}
    records = None
    if config.pretrain.save_dtype == "bfloat16":
        trained, records = rounded(trained)
    policy_io.save_policy(folder / "policy", trained, source=about, records=records)
    found = {}
    if context.is_primary:
        found = export_policy(folder / "policy", folder / "policy.ckpt")
        shutil.rmtree(start)
        context.metrics.say(f"{folder / 'policy.ckpt'} ({found['bytes'] / 1e6:.1f} MB)")
    count = sum(x.size for x in jax.tree.leaves(nnx.state(trained, nnx.Param)))
    return {"parameters": count, "steps": options.steps, "bytes": found.get("bytes", 0)}


def _train_policy(context: Context, policy: Policy, reader, options, mesh, score) -> Policy:
    """The policy with its transformer and heads trained on the cached latents of all frames."""
    config, folder, seed = context.config, context.folder, context.config.seed
    buffer, data = reader.buffer, reader.options
    augment = config.pretrain.augment
    copies = latents.Copies(
        bool(data.mirror), augment.views, CropAndBlur(augment.crop, augment.blur), seed
    )

    def encoded(name: str, image_key: str) -> latents.Latents:
        site = Site(folder / name, context.metrics, context.is_primary, context.barrier)
        cache = latents.encode_frames(site, policy, buffer, image_key, copies)
        return latents.Latents.open(cache, int(config.pretrain.memory_gb * 2**30))

    moments = encoded("latents", data.image_key)
    wrist = encoded("latents_wrist", data.wrist_key) if policy.config.mar.wrist else None
    key = config.pretrain.readout
    train, held_out = source.split(buffer, data)
    return pretrain.pretrain(
        policy,
        moments,
        *(
            Windows(
                *(buffer, mask, policy, data, seed),
                state_key=key,
                text=reader.text,
                copies=copies,
            )
            for mask in (train, held_out)
        ),
        options=options,
        mesh=mesh,
        seed=seed,
        folder=folder / "states",
        metrics=context.metrics,
        wrist=wrist,
        state_scale=_state_scale(config.pretrain, buffer),
        score=score,
        score_every=config.pretrain.score.every,
    )


def _opened(open_data, policy: Policy) -> source.WindowReader:
    reader = open_data(policy)
    if reader.options.layout:
        raise UserError(
            f"config.data.layout is {reader.options.layout!r}, whose windows are more than images "
            "and actions as they are stored: training knows those alone"
        )
    return reader


def _start(context: Context, open_data, mesh, dtype):
    """The policy that training begins with, its VAE trained; the reader of its data."""
    config, settings = context.config, context.config.pretrain
    _check_starts(settings)
    if not settings.steps:
        policy, _ = convert_checkpoint(Path(settings.mar).expanduser())
        reader = _opened(open_data, policy)
        buffer, data = reader.buffer, reader.options
        policy.vae = _train_vae(context, policy, buffer, data, mesh, dtype)
        return policy, reader
    model = section(settings.model, ModelOptions)
    spaced = settings.different_history_freq
    probe = policy_io.abstract_policy(model_config(model, 2))
    reader = _opened(open_data, probe)
    buffer, data = reader.buffer, reader.options
    action_dim, *widths = (buffer.shape(k)[-1] for k in (data.action_key, *model.states))
    widths = dict(zip(model.states, widths, strict=True))
    wanted = model_config(model, action_dim, widths, spaced=spaced)
    policy = Policy(wanted, dtype=dtype, rngs=nnx.Rngs(config.seed))
    policy = fit_normalizer(policy, buffer, data)
    for kind in ("mar", "vae"):
        if settings[kind]:
            policy, said = start_from(policy, Path(settings[kind]).expanduser(), kind)
            context.metrics.say(said)
    if settings.vae_training.steps or settings.vae_training.decoder_steps:
        policy.vae = _train_vae(context, policy, buffer, data, mesh, dtype)
    return policy, reader


def _check_starts(settings) -> None:
    if not settings.steps:
        decoder = settings.vae_training.decoder_steps and not settings.vae_training.steps
        if not decoder or not settings.mar or settings.vae not in ("", settings.mar):
            raise UserError(
                "config.pretrain.steps=0 trains the decoder of a whole policy alone: give that "
                "policy as config.pretrain.mar, no other one as pretrain.vae, "
                "pretrain.vae_training.steps=0 and pretrain.vae_training.decoder_steps"
            )
        return
    missing = [kind for kind in ("mar", "vae") if not settings[kind]]
    if missing and not settings.from_scratch:
        raise UserError(
            f"config.pretrain.{missing[0]} names no checkpoint to start from: give one, or set "
            "config.pretrain.from_scratch=True to start from random weights"
        )
    if "vae" in missing and not settings.vae_training.steps:
        raise UserError(
            "config.pretrain.vae names no checkpoint and config.pretrain.vae_training.steps is 0: "
            "latents of an untrained VAE say nothing; train it or give one"
        )


def _state_scale(settings, buffer: ReplayBuffer) -> StateScale | None:
    if not settings.readout:
        return None
    if settings.readout not in buffer.keys:
        raise UserError(
            f"config.pretrain.readout is {settings.readout!r}, but the data holds "
            f"{', '.join(buffer.keys)}: name one of them, or '' for no read-out"
        )
    return StateScale.fit(buffer.read(settings.readout), settings.readout_angles)


def _train_vae(context: Context, policy: Policy, buffer, data: source.DataOptions, mesh, dtype):
    """The policy's VAE, trained on frames of the training episodes."""
    config, settings = context.config, context.config.pretrain
    options = section(settings.vae_training, vae.VAEOptions)
    train, _ = source.split(buffer, data)
    owner = np.repeat(np.arange(buffer.n_episodes), np.diff(buffer.episode_ends, prepend=0))
    rows = np.random.default_rng(config.seed).permutation(np.flatnonzero(train[owner]))
    cameras = (data.image_key, data.wrist_key)[: 1 + policy.config.mar.wrist]
    rows = np.sort(rows[: options.frames // len(cameras)])
    frames = np.concatenate([resized_frames(policy, buffer, key, rows) for key in cameras])
    scale = _state_scale(settings, buffer)
    states = np.tile(buffer.read(settings.readout)[rows], (len(cameras), 1)) if scale else None

    def prepare(batch: dict, where: np.ndarray) -> dict:
        batch = mirror_pusht(batch, where) if data.mirror else batch
        return batch | ({"state": scale(batch["state"])} if scale else {})

    return vae.train_vae(
        policy.vae,
        frames,
        states,
        prepare=prepare,
        options=options,
        mesh=mesh,
        seed=config.seed,
        folder=context.folder / "vae_states",
        metrics=context.metrics,
        dtype=dtype,
    )


def resized_frames(policy: Policy, buffer: ReplayBuffer, key: str, rows: np.ndarray) -> np.ndarray:
    """Frames (n, size, size, 3) uint8 of a buffer's steps, resized as the policy resizes them."""
    resize = jax.jit(lambda x: jnp.round((policy.preprocess(x) + 1.0) * 127.5).astype(jnp.uint8))
    size = policy.config.image_size
    found = np.empty((len(rows), size, size, 3), np.uint8)
    for at in range(0, len(rows), _BLOCK):
        # The last block is filled up, so that one program does for all.
        some = np.resize(rows[at : at + _BLOCK], _BLOCK)
        frames = to_uint8(buffer.read_rows({key: some})[key], key)
        found[at : at + _BLOCK] = np.asarray(resize(frames))[: len(rows) - at]
    return found


def fit_normalizer(policy: Policy, buffer: ReplayBuffer, data: source.DataOptions) -> Policy:
    """The policy with its normaliser fitted to the data (and to the actions' mirror image)."""
    arrays = policy_io.flatten(policy)
    for name, _ in policy.config.normalizer_fields:
        values = buffer.read(data.action_key if name == "action" else name)
        values = np.asarray(values, np.float32)
        if data.mirror:  # of images and actions alone
            values = np.concatenate([values, mirror_pusht({"action": values})["action"]])
        for stat, value in policy_io.flat(normalizer.fit_field(values)).items():
            arrays[f"normalizer/{name}/{stat}"] = jnp.asarray(value)
    return policy_io.replace(policy, arrays)


def rounded(policy: Policy) -> tuple[Policy, bytes]:
    """The policy with parameters rounded to bfloat16, and records that let an export store them
    so, in half the bytes."""
    arrays = {
        k: v if k.startswith("normalizer/") else v.astype(jnp.bfloat16).astype(v.dtype)
        for k, v in policy_io.flatten(policy).items()
    }
    policy = policy_io.replace(policy_io.abstract_policy(policy.config), arrays)
    tensors = {name: ("bfloat16", tuple(x.shape)) for name, x in torch_arrays(arrays).items()}
    cfg = torch_file.records_from_dict(plain_cfg(policy.config))
    return policy, torch_file.dump_records({"cfg": cfg, "pickles": {}, "tensors": tensors})
