"""Joint training of video and actions on cached latents, by UVA's recipe.

Each batch has one task mode, drawn at random, as upstream. The transformer runs once per window and
its heads train on several noise draws. The input of a step depends only on (seed, step).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from uva_jax.models import surgery
from uva_jax.models.layers import linear, sub_key
from uva_jax.models.losses import ACTION_MODES, VIDEO_MODES, latent_loss
from uva_jax.models.policy import Policy
from uva_jax.pretrain import latents
from uva_jax.pretrain.windows import Windows, past_choices
from uva_jax.runtime import parallel
from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.runtime.sections_training import PretrainOptions
from uva_jax.train.loop import Flat, part, run_loop, start_state
from uva_jax.train.order import epoch_rows
from uva_jax.train.trainable import training_phases

_READOUT = "readout"  # parameters that are dropped after training
_JUDGE_BATCH = 64
_LOSSES = ("video_loss", "act_loss")


def task_modes(shares: Mapping[str, float], options: PretrainOptions, seed: int):
    """Returns the names of all modes, and a function from a step to the number of its mode."""
    names = sorted(set(shares) | ({"video_model"} if options.video_steps else set()))
    chosen, cumulative = sorted(shares), np.cumsum([shares[m] for m in sorted(shares)])

    def mode(step: int) -> int:
        if step < options.video_steps:
            return names.index("video_model")
        draw = np.random.default_rng((seed, 1, step)).random()
        place = min(int(np.searchsorted(cumulative, draw, side="right")), len(chosen) - 1)
        return names.index(chosen[place])

    return names, mode


class Readout(nnx.Module):
    """A readout head: predicts the current state from every action step's condition."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.fc = linear(inputs, outputs, rngs=rngs)

    def __call__(self, conditions: jax.Array) -> jax.Array:
        """Maps conditions (b, n, c) to states (b, n, outputs)."""
        return self.fc(conditions)


def pretrain_loss(
    policy: Policy,
    options: PretrainOptions,
    modes: Sequence[str],
    *,
    state_size: int = 0,
    train: bool = True,
) -> Callable:
    """Returns the loss of a batch for `run_loop`.

    The batch holds "mean", "logvar" (b, 2 * n_frames, h', w', z); "action" (b, n, a) in raw units;
    "mode" (b,), one index into `modes` repeated b times; the other inputs of `Policy.streams`; with
    a wrist camera "wrist_mean" and "wrist_logvar"; with predicted states "<state>_next" (b, n, k);
    with `state_size` "state" (b, state_size) of roughly unit variance.

    Args:
      policy: gives the structure; its arrays are not used.
      options: noise draws and loss weights.
      modes: the task modes by number.
      state_size: width of the state that the readout head predicts; 0: no readout head.
      train: apply dropout.
    """
    abstract = surgery.abstract_policy(
        policy.config, dtype=policy.dtype, remat=options.gradient_checkpointing
    )
    n_frames = policy.config.mar.n_frames
    width = policy.config.action_head.z_channels
    readout = nnx.eval_shape(lambda: Readout(width, max(state_size, 1), rngs=nnx.Rngs(0)))

    def loss(params, frozen, batch, key, step):
        own = {k: v for k, v in params.items() if not k.startswith(f"{_READOUT}/")}
        model = surgery.replace(abstract, own | frozen)
        found = latents.sample(model, batch, sub_key(key, 0))
        cond, target = found[:, :n_frames], found[:, n_frames:]
        actions = model.normalize("action", batch["action"])
        more, wrist_cond = {}, None
        if model.config.mar.proprio_image:
            wrist = {k: batch[f"wrist_{k}"] for k in ("mean", "logvar")}
            wrist = latents.sample(model, wrist, sub_key(key, 2))
            wrist_cond, more["wrist_target"] = wrist[:, :n_frames], wrist[:, n_frames:]
        if model.proprio_head is not None:
            names = model.config.proprio_keys
            parts = [model.normalize(k, batch[f"{k}_next"]) for k in names]
            more["proprio_target"] = jnp.concatenate(parts, axis=-1)
        more["streams"] = model.streams(batch, wrist_cond)

        def in_mode(name):
            total, parts = latent_loss(
                model,
                target,
                cond,
                actions,
                task_mode=name,
                key=sub_key(key, 1),
                train=train,
                noise_draws=options.noise_draws,
                **more,
            )
            nothing = jnp.full((), jnp.nan)  # losses that a mode lacks are left out of means
            scalars = {
                "video_loss": parts["video_loss"] if name in VIDEO_MODES else nothing,
                "act_loss": parts["act_loss"] if name in ACTION_MODES else nothing,
            }
            if "prop_loss" in parts:
                scalars["prop_loss"] = parts["prop_loss"]
            if state_size:
                scalars["readout"] = nothing
            if state_size and name in ACTION_MODES:
                reader = surgery.replace(readout, part(params, _READOUT))
                guess = reader(model.action_head.aggregate(parts["z"]))
                scalars["readout"] = read = jnp.mean((guess - batch["state"][:, None]) ** 2)
                # The weight falls to a tenth over the run, as the learning rate falls.
                total = total + options.readout_weight * (1 - 0.9 * step / options.steps) * read
            return scalars | {"loss": total}

        with jax.default_matmul_precision(options.matmul_precision):
            if len(modes) == 1:
                scalars = in_mode(modes[0])
            else:
                branches = [lambda name=name: in_mode(name) for name in modes]
                scalars = jax.lax.switch(batch["mode"][0], branches)
        return scalars["loss"], scalars

    return loss


def pretrain_losses(policy: Policy, options: PretrainOptions, modes: Sequence[str]) -> dict:
    """Returns `pretrain_loss` of each single mode, without dropout, for validation."""
    return {name: pretrain_loss(policy, options, (name,), train=False) for name in modes}


def pretrain(
    policy: Policy,
    moments: latents.Latents,
    windows: Windows,
    held_out: Windows,
    *,
    best: Windows | None = None,
    options: PretrainOptions,
    mesh: Mesh,
    seed: int,
    folder: Path,
    metrics: MetricsWriter,
    wrist: latents.Latents | None = None,
    state_scale: Callable[[np.ndarray], np.ndarray] | None = None,
    score: Callable[[Policy], Mapping[str, float]] | None = None,
) -> Policy:
    """Trains everything but the VAE; returns the policy with averaged parameters.

    Args:
      policy: the initial policy.
      moments: latents of every frame.
      windows, held_out: training and validation windows.
      best: the training windows after `options.progress_start` of the steps; None: `windows`.
      options: of modes, losses and the loop.
      mesh, seed, folder, metrics: see `run_loop`.
      wrist: latents of the wrist camera, if the policy has one.
      state_scale: raw states (b, k) -> targets of the readout head; None: no readout head.
      score: a policy with averaged parameters -> scalars to log; called every
        `options.score.every` steps and at the end.
    """
    fewest = len(windows if best is None else best)
    batch_size = min(options.batch, fewest // options.accumulate * options.accumulate)
    selected_from = options.steps if best is None else int(options.progress_start * options.steps)
    if best is not None:
        metrics.say(
            f"from step {selected_from} on, training uses the {len(best)} windows that make the "
            "most progress"
        )
    shares = options.shares(policy.config.task_modes)
    modes, mode_at = task_modes(shares, options, seed)
    metrics.say(
        f"{len(windows)} windows, {len(held_out)} held out; "
        + ", ".join(f"{m} {100 * s:.0f}%" for m, s in shares.items())
    )

    pasts = past_choices(policy) if options.different_history_freq else None

    def read(source: Windows, rows: np.ndarray, mode: int, **how) -> dict[str, np.ndarray]:
        batch = source.read(rows, **how)
        frames = batch.pop("frames")
        batch |= moments.read(frames)
        if wrist is not None:
            batch |= {f"wrist_{k}": v for k, v in wrist.read(frames).items()}
        if state_scale is not None:
            batch["state"] = state_scale(batch["state"])
        return batch | {"mode": np.full(len(rows), mode, np.int32)}

    def batches(step: int) -> dict[str, np.ndarray]:
        used, first = windows, 0
        if step >= selected_from:
            used, first = best, selected_from
        rows = epoch_rows(seed, len(used), batch_size, step - first, step - first + 1)[0]
        rng = np.random.default_rng((seed, 2, step))
        views = rng.integers(windows.copies.views + 1, size=len(rows))
        past = None if pasts is None else pasts[rng.integers(len(pasts))]
        own = np.array_split(np.arange(len(rows)), jax.process_count())[jax.process_index()]
        return read(used, rows[own], mode_at(step), views=views[own], past=past)

    arrays = surgery.flatten(policy)
    (phase,) = training_phases(arrays, task_modes=modes)
    params = {k: arrays[k] for k in phase.trainable}
    frozen = {k: v for k, v in arrays.items() if k not in params}
    frozen = parallel.on_mesh(frozen, parallel.shardings_for(frozen, mesh))
    width = 0 if state_scale is None else read(windows, np.arange(1), 0)["state"].shape[1]
    if width:
        reader = Readout(policy.config.action_head.z_channels, width, rngs=nnx.Rngs(seed + 1))
        params |= {f"{_READOUT}/{k}": v for k, v in surgery.flatten(reader).items()}

    def whole(average: Mapping[str, np.ndarray]) -> Policy:
        own = {k: jnp.asarray(v) for k, v in average.items() if k in arrays}
        return surgery.replace(surgery.abstract_policy(policy.config), arrays | own)

    losses = _judge(
        pretrain_losses(policy, options, modes),
        frozen,
        lambda rows: read(held_out, rows, 0),
        min(options.judge_windows, len(held_out)),
        mesh,
    )

    def judge(average: Flat, step: int) -> dict[str, float]:
        found = losses(average)
        if score is not None and (step % options.score.every == 0 or step == options.steps):
            found |= score(whole(parallel.on_host(average)))
        return found

    state = run_loop(
        pretrain_loss(policy, options, modes, state_size=width),
        start_state(params, options, mesh),
        frozen,
        batches,
        options=options,
        mesh=mesh,
        seed=seed,
        folder=folder,
        metrics=metrics,
        desc="policy",
        judge=judge,
    )
    return whole(parallel.on_host(state.ema))


def _judge(losses: Mapping[str, Callable], frozen: Flat, read, count: int, mesh) -> Callable:
    """Returns a function from averaged parameters to losses by mode.

    They are those of the first `count` held-out windows, always with the same noise.
    """

    @jax.jit
    def judged(params, frozen, batch, key):
        found = {
            name: loss(params, frozen, batch, key, jnp.int32(0))[1] for name, loss in losses.items()
        }
        return {f"held_out/{m}/{k}": v[k] for m, v in found.items() for k in _LOSSES}

    def judge(params: Flat) -> dict[str, float]:
        # Every process reads all windows and computes the same numbers; one process logs them.
        params = {k: v for k, v in params.items() if not k.startswith(f"{_READOUT}/")}
        whole = parallel.replicated(mesh)
        sums: dict[str, list[float]] = {}
        for start in range(0, count, _JUDGE_BATCH):
            batch = read(np.arange(start, min(start + _JUDGE_BATCH, count)))
            batch = parallel.on_mesh(batch, dict.fromkeys(batch, whole))
            for k, v in judged(params, frozen, batch, jax.random.key(start)).items():
                sums.setdefault(k, []).append(float(v))
        return {k: float(np.mean(v)) for k, v in sums.items() if np.isfinite(v).all()}

    return judge
