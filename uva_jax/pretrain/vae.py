"""Training of a KL-VAE on a recording's frames, with a loss that emphasises rare pixels.

An object of a few pixels hardly changes a plain mean over pixels, so a VAE drops it, and no policy
on its latents can see it. Each pixel is therefore weighted by the rarity of its difference from the
median frame: a static background has weight 1, rare pixels up to `focus`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh

from uva_jax.models import surgery
from uva_jax.models.layers import linear
from uva_jax.models.policy_config import VAEConfig
from uva_jax.models.vae import VAE
from uva_jax.runtime import parallel
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.runtime.sections_training import VAEOptions
from uva_jax.train.loop import part, run_loop, start_state

_LEVELS = 9  # quantisation levels of a channel's difference from the median frame
_SAMPLE = 512  # frames from which the median and the frequencies are computed
_BLOCK = 1024  # frames processed at a time
_DECODER = ("vae/decoder/", "vae/post_quant_conv/")
_READOUT = "readout"  # prefix of parameters that are dropped after training


class PixelWeights:
    """The loss weight of each pixel, computed from the frequencies of pixel values.

    Attributes:
      median: (h, w, 3) the median frame, in [-1, 1].
      table: weight of each quantised difference from it; the mean over the frames is 1.
    """

    def __init__(self, frames: np.ndarray, focus: float):
        """Computes weights from frames (n, h, w, 3) in [-1, 1].

        `focus` limits the weight of a pixel relative to the background.
        """
        self.median = jnp.asarray(np.median(frames, axis=0), jnp.float32)
        bins = np.asarray(self._bins(jnp.asarray(frames)))
        share = np.bincount(bins.reshape(-1), minlength=_LEVELS**3) / bins.size
        weights = np.minimum(share.max() / np.maximum(share, 1e-9), focus)
        self.table = jnp.asarray(weights / np.sum(weights * share), jnp.float32)

    def _bins(self, frames: jax.Array) -> jax.Array:
        scaled = (frames - self.median) * ((_LEVELS - 1) / 4) + (_LEVELS - 1) / 2
        levels = jnp.round(scaled).astype(jnp.int32)
        return (levels[..., 0] * _LEVELS + levels[..., 1]) * _LEVELS + levels[..., 2]

    def __call__(self, frames: jax.Array) -> jax.Array:
        """Returns weights (n, h, w) of frames (n, h, w, 3) in [-1, 1]."""
        return self.table[self._bins(frames)]


def rarity(frames: np.ndarray) -> np.ndarray:
    """Computes the rarity of each frame: the mean of -log p over its values.

    p is the share of frames with the same value (of 9 levels) in the same channel of the same
    pixel. A VAE decodes rare frames worst.

    Args:
      frames: (n, h, w, 3) uint8.

    Returns:
      (n,) float64, in nats.
    """
    flat = frames.reshape(len(frames), -1)
    level = np.round(np.arange(256) * ((_LEVELS - 1) / 255)).astype(np.uint8)
    blocks = range(0, len(flat), _BLOCK)
    counts = np.zeros((_LEVELS, flat.shape[1]), np.int64)
    for at in blocks:
        levels = level[flat[at : at + _BLOCK]]
        counts += np.stack([np.count_nonzero(levels == k, axis=0) for k in range(_LEVELS)])
    surprise = -np.log(np.maximum(counts, 1) / len(flat))
    place = np.arange(flat.shape[1])
    found = [surprise[level[flat[at : at + _BLOCK]], place].mean(axis=1) for at in blocks]
    return np.concatenate(found)


def weighted_errors(
    frames: jax.Array, decoded: jax.Array, weights: jax.Array
) -> dict[str, jax.Array]:
    """Returns weighted mean errors: "l1", "l2" and "edge", the L1 of differences of neighbours.

    Args:
      frames, decoded: (n, h, w, 3).
      weights: (n, h, w).
    """
    error, w = decoded - frames, weights[..., None]
    rows = jnp.abs(error[:, 1:] - error[:, :-1]) * jnp.maximum(w[:, 1:], w[:, :-1])
    columns = jnp.abs(error[:, :, 1:] - error[:, :, :-1]) * jnp.maximum(w[:, :, 1:], w[:, :, :-1])
    return {
        "l1": jnp.mean(jnp.abs(error) * w),
        "l2": jnp.mean(error**2 * w),
        "edge": jnp.mean(rows) + jnp.mean(columns),
    }


class StateReadout(nnx.Module):
    """A readout head: predicts the state linearly from latents, in training only.

    It makes the encoder represent the state in a form that a policy can use directly.
    """

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.fc = linear(inputs, outputs, rngs=rngs)

    def __call__(self, latents: jax.Array) -> jax.Array:
        """Maps latents (n, h', w', z) to states (n, outputs)."""
        return self.fc(rearrange(latents, "n h w c -> n (h w c)"))


def _abstract(config: VAEConfig, dtype=None) -> VAE:
    return nnx.eval_shape(lambda: VAE(config, dtype=dtype, rngs=nnx.Rngs(0)))


def vae_loss(
    config: VAEConfig,
    options: VAEOptions,
    weights: PixelWeights,
    *,
    state_size: int = 0,
    size: int,
    dtype=None,
) -> Callable:
    """Returns the loss of a batch for `run_loop`.

    The batch holds "frames" (b, h, w, 3) uint8 and, with `state_size`, "state" (b, state_size)
    float32. Parameters of the readout head are those under "readout/". Decoding costs most, so with
    a readout head only one frame in `decode_every` is decoded.
    """
    every = options.decode_every if state_size else 1

    def some(x):
        # Strided, so that every device keeps its own frames.
        return x.reshape(len(x) // every, every, *x.shape[1:])[:, 0]

    vae = _abstract(config, dtype)
    cells = (size // config.stride) ** 2 * config.z_channels
    readout = nnx.eval_shape(lambda: StateReadout(cells, max(state_size, 1), rngs=nnx.Rngs(0)))

    def loss(params, frozen, batch, key, step):
        del step
        model = surgery.replace(vae, part(params | frozen, "vae"))
        frames = batch["frames"].astype(jnp.float32) / 127.5 - 1.0
        mean, logvar = model.encode(frames)
        scaled = model.sample(mean, logvar, jax.random.normal(key, mean.shape))
        shown = some(frames)
        decoded = model.decode(some(scaled)).astype(jnp.float32)
        scalars = weighted_errors(shown, decoded, weights(shown))
        # LDM sums over a frame's latents; dividing by its number of values matches the mean above.
        kl = 0.5 * jnp.sum(mean**2 + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3))
        scalars["kl"] = jnp.mean(kl)
        total = scalars["l1"] + scalars["l2"] + options.kl_weight * scalars["kl"]
        total += options.edge_weight * scalars["edge"]
        if state_size:
            reader = surgery.replace(readout, part(params, _READOUT))
            # L1, because its gradient does not vanish with small errors.
            scalars["readout"] = jnp.mean(jnp.abs(reader(scaled) - batch["state"]))
            total += options.readout_weight * scalars["readout"]
        return total, scalars | {"loss": total}

    return loss


def trained_arrays(options) -> tuple[str, ...]:
    """Returns the path prefixes of the arrays that training with these `VAEOptions` changes."""
    return ("vae/",) if options.steps else _DECODER if options.decoder_steps else ()


def train_vae(
    vae: VAE,
    frames: np.ndarray,
    states: np.ndarray | None,
    *,
    prepare: Callable[[dict, np.ndarray], dict],
    options: VAEOptions,
    mesh: Mesh,
    seed: int,
    folder: Path,
    metrics: MetricsWriter,
    dtype=None,
) -> VAE:
    """Trains the VAE, scales the latents to unit variance, and then trains the decoder further.

    The first part (`options.steps`) mostly trains the latents; the second (`options.decoder_steps`)
    trains the decoder on every frame with the latents fixed. Either part may have no steps.

    Args:
      vae: the initial VAE; its config is kept.
      frames: (n, size, size, 3) uint8.
      states: (n, k) targets of the readout head, or None.
      prepare: (batch {"image", and "state" with states}, booleans (b,): mirror it?) -> the batch
        that is trained on, with states of roughly unit variance.
      options: of the loss and the loop.
      mesh, seed, folder, metrics: see `run_loop`.
      dtype: of matrix products.

    Returns:
      the VAE with averaged parameters.

    Raises:
      UserError: there are fewer frames than a batch takes.
    """
    if len(frames) < options.batch:
        raise UserError(
            f"the VAE trains on batches of {options.batch} frames, but there are only "
            f"{len(frames)}: lower config.pretrain.vae_training.batch"
        )
    size, width = frames.shape[1], 0
    if states is not None:
        one = {"image": frames[:1], "state": states[:1]}
        width = prepare(one, np.zeros(1, bool))["state"].shape[1]
    sample = frames[np.random.default_rng(seed).permutation(len(frames))[:_SAMPLE]]
    weights = PixelWeights(sample.astype(np.float32) / 127.5 - 1.0, options.focus)

    # Computed once for both parts.
    rare = rarity(frames) if options.rarity or options.decoder_rarity else None

    def drawn_by(power: float) -> np.ndarray | None:
        if not power:
            return None
        # Equal frames have rarity 0 and are drawn uniformly.
        odds = (rare + 1e-6) ** power
        return odds / odds.sum()

    def batches(step: int, odds: np.ndarray | None) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((seed, step))
        rows = rng.choice(len(frames), size=options.batch, p=odds)
        mirrored = rng.random(options.batch)
        own = np.array_split(np.arange(options.batch), jax.process_count())[jax.process_index()]
        rows = rows[own]
        batch = {"image": frames[rows]} | ({"state": states[rows]} if width else {})
        batch = prepare(batch, mirrored[own] < 0.5)
        return {"frames": batch.pop("image"), **batch}

    def fit(params, frozen, batches, options, state_size, seed, folder, desc) -> VAE:
        state = run_loop(
            vae_loss(vae.config, options, weights, state_size=state_size, size=size, dtype=dtype),
            start_state(params, options, mesh),
            frozen,
            batches,
            options=options,
            mesh=mesh,
            seed=seed,
            folder=folder,
            metrics=metrics,
            desc=desc,
        )
        average = frozen | parallel.on_host(state.ema)
        return surgery.replace(_abstract(vae.config), part(average, "vae"))

    def arrays() -> dict[str, jax.Array]:
        return {f"vae/{k}": v for k, v in surgery.flatten(vae).items()}

    if options.steps:
        params = arrays()
        if width:
            cells = (size // vae.config.stride) ** 2 * vae.config.z_channels
            reader = StateReadout(cells, width, rngs=nnx.Rngs(seed + 1))
            params |= {f"{_READOUT}/{k}": v for k, v in surgery.flatten(reader).items()}
        odds = drawn_by(options.rarity)
        vae = fit(params, {}, lambda step: batches(step, odds), options, width, seed, folder, "vae")
        vae = scaled_to_unit(vae, sample, jax.random.key(seed))
    if steps := options.decoder_steps:
        decoder = {k: v for k, v in arrays().items() if k.startswith(_DECODER)}
        odds = drawn_by(options.decoder_rarity)
        vae = fit(
            decoder,
            {k: v for k, v in arrays().items() if k not in decoder},
            lambda step: {"frames": batches(step, odds)["frames"]},
            dataclasses.replace(options, steps=steps, warmup=min(options.warmup, steps // 10)),
            0,
            seed + 1,
            folder.with_name(f"{folder.name}_decoder"),
            "decoder",
        )
    return vae


def scaled_to_unit(vae: VAE, frames: np.ndarray, key: jax.Array) -> VAE:
    """Returns the VAE with latents scaled to unit variance over frames (n, h, w, 3) uint8.

    The factor goes into the two 1x1 convolutions, so that decoded frames do not change.
    """
    graph, state = nnx.split(vae)

    @jax.jit
    def latents(state, frames, key):
        model = nnx.merge(graph, state)
        mean, logvar = model.encode(frames.astype(jnp.float32) / 127.5 - 1.0)
        return model.sample(mean, logvar, jax.random.normal(key, mean.shape))

    parts = np.array_split(frames, max(1, len(frames) // 32))
    found = [np.asarray(latents(state, x, jax.random.fold_in(key, i))) for i, x in enumerate(parts)]
    factor = 1.0 / float(np.std(np.concatenate(found)))
    arrays, z = surgery.flatten(vae), vae.config.z_channels
    into, out = "quant_conv", "post_quant_conv/kernel"
    gain = jnp.where(jnp.arange(2 * z) < z, factor, 1.0)
    arrays[f"{into}/kernel"] = arrays[f"{into}/kernel"] * gain
    arrays[f"{into}/bias"] = arrays[f"{into}/bias"] * gain + jnp.where(
        jnp.arange(2 * z) < z, 0.0, 2 * math.log(factor)
    )
    arrays[out] = arrays[out] / factor
    return surgery.replace(_abstract(vae.config), arrays)
