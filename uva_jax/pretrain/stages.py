"""The three stages of training a policy: the VAE, the latents of every frame, the policy on them.

Each stage resumes: VAE and policy by the states of their loops, encoding by its chunks. Several
policies can be trained on one VAE and its latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.formats import torch_file
from convert.from_torch import convert_checkpoint
from convert.partial import start_from
from convert.to_torch import export_policy, plain_cfg, torch_arrays
from uva_jax.data import source
from uva_jax.data.augment import CropAndBlur, mirror_pusht
from uva_jax.data.check import check_split
from uva_jax.data.replay_buffer import ReplayBuffer
from uva_jax.data.windows import WindowSpec
from uva_jax.models import policy_folder, surgery
from uva_jax.models.policy import Policy
from uva_jax.models.vae import VAE
from uva_jax.pretrain import joint, latents, vae
from uva_jax.pretrain.architecture import ModelOptions, fit_normalizer, model_config
from uva_jax.pretrain.windows import StateScale, Windows, readout_scale
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.runtime.settings import section
from uva_jax.storage.sample_store import SampleStore
from uva_jax.storage.site import Site
from uva_jax.train.loop import part

VAE_FILE = "vae.ckpt"
OpenData = Callable[..., source.WindowReader]  # (policy, spec=...)
_BLOCK = 512  # frames read at a time
_ANY_ACTION_DIM = 2  # of a policy whose VAE alone is used


@dataclass(frozen=True)
class Options:
    """The options of all three stages.

    Attributes:
      settings: `config.pretrain`.
      seed: of all draws and orders.
      mesh: (data, fsdp, tensor).
      dtype: of matrix products; None: float32.
    """

    settings: Any
    seed: int
    mesh: jax.sharding.Mesh
    dtype: Any


def starts(settings) -> dict[str, str]:
    """Returns the checkpoint that the policy starts from, by label."""
    return {"pretrain.mar": settings.mar} if settings.mar else {}


def vae_starts(settings) -> dict[str, str]:
    """Returns the checkpoint that the VAE starts from, by label.

    If only a policy's decoder is trained, it is that policy's checkpoint.
    """
    path = settings.vae or ("" if settings.steps else settings.mar)
    return {"pretrain.vae": path} if path else {}


def run_vae(
    open_data: OpenData,
    options: Options,
    folder: Path,
    metrics: MetricsWriter,
    *,
    is_primary: bool = True,
) -> dict:
    """Trains the VAE and writes folder/vae.ckpt, in the layout of LDM's and MAR's KL-VAE.

    Args:
      open_data: (policy, spec=what its windows hold) -> the reader of its data.
      options: see `Options`.
      folder: of the stage; also holds resumable states.
      metrics: writer of progress and messages.
      is_primary: this process writes the file.

    Returns:
      metrics that JSON can hold.

    Raises:
      UserError: the settings do not say where to start from, or the data do not fit.
    """
    settings = options.settings
    _check_starts(settings)
    if settings.steps:
        policy = _vae_alone(options)
        for path in vae_starts(settings).values():
            trained = vae.trained_arrays(settings.vae_training)
            metrics.say(_fill_vae(policy, Path(path).expanduser(), trained))
    else:
        policy, _ = convert_checkpoint(Path(settings.mar).expanduser())
    trained = policy.vae
    if settings.vae_training.steps or settings.vae_training.decoder_steps:
        trained = _train_vae(policy, _opened(open_data, policy, settings), options, folder, metrics)
    arrays = {f"vae/{k}": v for k, v in surgery.flatten(trained).items()}
    if is_primary:
        named = {k.removeprefix("vae_model."): v for k, v in torch_arrays(arrays).items()}
        torch_file.write(folder / VAE_FILE, {"state_dict": named})
    return {"parameters": sum(x.size for x in arrays.values())}


def run_encode(
    vae_folder: Path,
    open_data: OpenData,
    options: Options,
    folder: Path,
    metrics: MetricsWriter,
    *,
    is_primary: bool = True,
    barrier: Callable[[str], None] = lambda name: None,
) -> dict:
    """Encodes every frame into folder/main and, with a wrist camera, folder/wrist.

    Args:
      vae_folder: the folder of `run_vae`.
      open_data, options, folder, metrics: see `run_vae`.
      is_primary, barrier: see `Site`.

    Returns:
      metrics that JSON can hold.
    """
    policy = _vae_alone(options)
    _fill_vae(policy, vae_folder / VAE_FILE)
    reader = _opened(open_data, policy, options.settings)
    result = {}
    for name, key in _cameras(policy, reader.options).items():
        site = Site(folder / name, metrics, is_primary, barrier)
        copies = _copies(options, reader.options)
        cache = latents.encode_frames(site, policy, reader.buffer, key, copies)
        result[name] = {"frames": cache.num_samples, "bytes": cache.nbytes()}
    return result


def run_policy(
    vae_folder: Path,
    latent_folder: Path | None,
    open_data: OpenData,
    options: Options,
    folder: Path,
    metrics: MetricsWriter,
    *,
    is_primary: bool = True,
    score: Callable[[Policy], Mapping[str, float]] | None = None,
) -> dict:
    """Trains the policy and writes folder/policy and folder/policy.ckpt.

    Args:
      vae_folder, latent_folder: the folders of the other stages; None for the latents if only the
        decoder is trained.
      open_data, options, folder, metrics, is_primary: see `run_vae`.
      score: see `joint.pretrain`.

    Returns:
      metrics that JSON can hold.
    """
    settings, seed = options.settings, options.seed
    how = section(settings, joint.PretrainOptions)
    _check_starts(settings)
    if how.steps:
        policy, reader = _start(open_data, options, metrics)
    else:
        policy, _ = convert_checkpoint(Path(settings.mar).expanduser())
    _fill_vae(policy, vae_folder / VAE_FILE)
    trained = policy
    if how.steps:
        data, scale = reader.options, _readout_scale(settings, reader)
        caches = {
            name: latents.Latents.open(
                SampleStore.open(latent_folder / name), int(settings.memory_gb * 2**30)
            )
            for name in _cameras(policy, data)
        }
        windows, held_out = (
            Windows(
                *(reader.buffer, mask, policy, data, seed),
                state_key=settings.readout,
                text=reader.text,
                copies=_copies(options, data),
            )
            for mask in source.split(reader.buffer, data)
        )
        best = None
        if how.progress_share < 1:
            best = windows.best(how.progress_share, how.progress_steps, scale)
        trained = joint.pretrain(
            policy,
            caches["main"],
            windows,
            held_out,
            best=best,
            options=how,
            mesh=options.mesh,
            seed=seed,
            folder=folder / "states",
            metrics=metrics,
            wrist=caches.get("wrist"),
            state_scale=scale,
            score=score,
        )
    about = {"stage": "pretrain", "weights": "ema", "seed": seed, "steps": how.steps}
    records = None
    if settings.save_dtype == "bfloat16":
        trained, records = rounded(trained)
    policy_folder.save_policy(folder / "policy", trained, source=about, records=records)
    found = {}
    if is_primary:
        found = export_policy(folder / "policy", folder / "policy.ckpt")
        metrics.say(f"{folder / 'policy.ckpt'} ({found['bytes'] / 1e6:.1f} MB)")
    count = sum(x.size for x in jax.tree.leaves(nnx.state(trained, nnx.Param)))
    return {"parameters": count, "steps": how.steps, "bytes": found.get("bytes", 0)}


def _vae_alone(options: Options) -> Policy:
    """Returns a policy whose VAE has random arrays and whose other parts have none."""
    wanted = model_config(section(options.settings.model, ModelOptions), _ANY_ACTION_DIM)
    policy = surgery.abstract_policy(wanted, dtype=options.dtype)
    policy.vae = VAE(wanted.vae, dtype=options.dtype, rngs=nnx.Rngs(options.seed))
    return policy


def _fill_vae(policy: Policy, path: Path, trained: tuple[str, ...] = ()) -> str:
    """Loads a file's arrays into the policy's VAE; returns a sentence on what matched.

    Raises:
      UserError: the file lacks an array whose path does not begin with one of `trained`.
    """
    arrays = {f"vae/{k}": v for k, v in surgery.flatten(policy.vae).items()}
    arrays, said = start_from(arrays, path, "vae", trained=trained)
    policy.vae = surgery.replace(policy.vae, part(arrays, "vae"))
    return said


def _cameras(policy: Policy, data: source.DataOptions) -> dict[str, str]:
    """Returns the names of the cameras' arrays by camera."""
    return {"main": data.image_key} | ({"wrist": data.wrist_key} if policy.config.mar.wrist else {})


def _copies(options: Options, data: source.DataOptions) -> latents.Copies:
    augment = options.settings.augment
    change = CropAndBlur(augment.crop, augment.blur)
    return latents.Copies(bool(data.mirror), augment.views, change, options.seed)


def _opened(open_data: OpenData, policy: Policy, settings) -> source.WindowReader:
    # The policy is not built yet, so the recording decides the widths.
    reader = open_data(policy, spec=WindowSpec.of(policy.config).without_widths())
    if reader.options.layout:
        raise UserError(
            f"config.data.layout is {reader.options.layout!r}, but training a policy supports only "
            "images and actions as they are stored: set it to ''"
        )
    if settings.steps:  # the policy's training evaluates on held-out windows
        check_split(reader.buffer, reader.options)
    return reader


def _start(
    open_data: OpenData, options: Options, metrics: MetricsWriter
) -> tuple[Policy, source.WindowReader]:
    """Returns the initial policy, without its VAE, and the reader of its data."""
    settings = options.settings
    model = section(settings.model, ModelOptions)
    shapeless = surgery.abstract_policy(model_config(model, _ANY_ACTION_DIM))
    reader = _opened(open_data, shapeless, settings)
    buffer, data = reader.buffer, reader.options
    action_dim, *widths = (buffer.shape(k)[-1] for k in (data.action_key, *model.states))
    widths = dict(zip(model.states, widths, strict=True))
    wanted = model_config(model, action_dim, widths, spaced=settings.different_history_freq)
    policy = Policy(wanted, dtype=options.dtype, rngs=nnx.Rngs(options.seed))
    policy = fit_normalizer(policy, buffer, data)
    for path in starts(settings).values():
        arrays, said = start_from(surgery.flatten(policy), Path(path).expanduser(), "mar")
        policy = surgery.replace(policy, arrays)
        metrics.say(said)
    return policy, reader


def _check_starts(settings) -> None:
    if not settings.steps:
        decoder = settings.vae_training.decoder_steps and not settings.vae_training.steps
        if not decoder or not settings.mar or settings.vae not in ("", settings.mar):
            raise UserError(
                "config.pretrain.steps=0 trains only the decoder of a whole policy: set "
                "config.pretrain.mar to that policy, config.pretrain.vae to '', "
                "config.pretrain.vae_training.steps to 0 and "
                "config.pretrain.vae_training.decoder_steps to a number above 0"
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
            "config.pretrain.vae names no checkpoint and config.pretrain.vae_training.steps is 0, "
            "but latents of an untrained VAE are useless: train it or give one"
        )


def _readout_scale(settings, reader: source.WindowReader) -> StateScale | None:
    mirrored = bool(reader.options.mirror)
    return readout_scale(
        reader.buffer, settings.readout, settings.readout_angles, mirrored=mirrored
    )


def _train_vae(
    policy: Policy,
    reader: source.WindowReader,
    options: Options,
    folder: Path,
    metrics: MetricsWriter,
) -> VAE:
    """Returns the policy's VAE, trained on frames of the training episodes."""
    settings, seed = options.settings, options.seed
    buffer, data = reader.buffer, reader.options
    how = section(settings.vae_training, vae.VAEOptions)
    scale = _readout_scale(settings, reader)
    train, _ = source.split(buffer, data)
    owner = np.repeat(np.arange(buffer.n_episodes), np.diff(buffer.episode_ends, prepend=0))
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(train[owner]))
    cameras = tuple(_cameras(policy, data).values())
    rows = np.sort(rows[: how.frames // len(cameras)])
    frames = np.concatenate([resized_frames(policy, buffer, key, rows) for key in cameras])
    states = np.tile(buffer.read(settings.readout)[rows], (len(cameras), 1)) if scale else None

    def prepare(batch: dict, where: np.ndarray) -> dict:
        batch = mirror_pusht(batch, where) if data.mirror else batch
        return batch | ({"state": scale(batch["state"])} if scale else {})

    return vae.train_vae(
        policy.vae,
        frames,
        states,
        prepare=prepare,
        options=how,
        mesh=options.mesh,
        seed=seed,
        folder=folder / "states",
        metrics=metrics,
        dtype=options.dtype,
    )


def resized_frames(policy: Policy, buffer: ReplayBuffer, key: str, rows: np.ndarray) -> np.ndarray:
    """Reads frames of steps `rows` (n,), at the policy's size: (n, size, size, 3) uint8."""
    resize = jax.jit(lambda x: jnp.round((policy.preprocess(x) + 1.0) * 127.5).astype(jnp.uint8))
    size = policy.config.image_size
    found = np.empty((len(rows), size, size, 3), np.uint8)
    for at in range(0, len(rows), _BLOCK):
        # The last block is padded, so that all blocks share one compiled program.
        some = np.resize(rows[at : at + _BLOCK], _BLOCK)
        frames = buffer.read_rows({key: some})[key]
        found[at : at + _BLOCK] = np.asarray(resize(frames))[: len(rows) - at]
    return found


def rounded(policy: Policy) -> tuple[Policy, bytes]:
    """Returns the policy with parameters rounded to bfloat16, and records for an export that
    stores them as bfloat16."""
    arrays = {
        k: v if k.startswith("normalizer/") else v.astype(jnp.bfloat16).astype(v.dtype)
        for k, v in surgery.flatten(policy).items()
    }
    policy = surgery.replace(surgery.abstract_policy(policy.config), arrays)
    tensors = {name: ("bfloat16", tuple(x.shape)) for name, x in torch_arrays(arrays).items()}
    cfg = torch_file.records_from_dict(plain_cfg(policy.config))
    return policy, torch_file.dump_records({"cfg": cfg, "pickles": {}, "tensors": tensors})
