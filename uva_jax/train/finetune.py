"""Stage 2: the graft trained end to end on part of the data, behind a parameter mask.

One jitted step over a (data, fsdp, tensor) mesh, a pure function of (state, batch). Frozen
parameters are not in the state at all: they take no gradient, no optimiser state, no decay, and
stay as they are to the bit. When everything before the head is frozen, batches are cached tokens
and a step costs the head alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from uva_jax import parallel, policy_io
from uva_jax.data import source
from uva_jax.data.sequences import select_episodes
from uva_jax.errors import UserError
from uva_jax.graft.activations import ActivationCache
from uva_jax.models.layers import sub_key
from uva_jax.models.lora import PREFIX, init_lora, merge_lora
from uva_jax.models.policy import Policy
from uva_jax.train.checkpoint import Checkpoints
from uva_jax.train.optim import OptimOptions, carry_optimizer_state, ema_update, make_optimizer
from uva_jax.train.order import epoch_rows
from uva_jax.train.trainable import Phase, training_phases

Flat = dict[str, jax.Array]


@dataclass(frozen=True)
class FinetuneOptions:
    """`config.finetune`; see `configs/common.py` for each field."""

    steps: int
    batch: int
    lr: float
    warmup: int
    betas: tuple[float, float]
    weight_decay: float
    clip_norm: float
    accumulate: int
    data_fraction: float
    reuse_cache: bool
    freeze_encoder: bool
    freeze: tuple[str, ...]
    unfreeze_at: Mapping[str, tuple[str, ...]]
    dropout: bool
    noise_draws: int
    use_lora: bool
    lora_rank: int
    lora_targets: tuple[str, ...]
    gradient_checkpointing: bool
    ema: Mapping[str, float]
    checkpoint_every: int
    log_every: int


class TrainState(NamedTuple):
    """What a step changes: trainable parameters, their average, and the optimiser's state."""

    params: Flat
    ema: Flat
    moments: object


def loss_on_tokens(policy: Policy, batch: Mapping, key: jax.Array, options: FinetuneOptions):
    """Diffusion loss of the action head on cached tokens: "z" (b, s, c), "actions" (b, n, a)."""
    rows = policy.action_head.loss(
        batch["actions"], batch["z"].astype(jnp.float32), key=key, draws=options.noise_draws
    )
    return {k: jnp.mean(v) for k, v in rows.items()}


def loss_on_images(policy: Policy, batch: Mapping, key: jax.Array, options: FinetuneOptions):
    """The same from raw windows: an observation as `Policy.condition` takes it, and "action"."""
    cond, streams = policy.condition(batch, key=sub_key(key, 0))
    z = policy.video_tokens(
        jax.lax.stop_gradient(cond), streams, key=sub_key(key, 1) if options.dropout else None
    )
    actions = policy.normalize("action", batch["action"])
    rows = policy.action_head.loss(actions, z, key=sub_key(key, 2), draws=options.noise_draws)
    return {k: jnp.mean(v) for k, v in rows.items()}


def make_step(
    policy: Policy,
    loss: Callable,
    options: FinetuneOptions,
    mesh: Mesh,
    state_shardings,
) -> Callable:
    """The jitted train step: f(state, frozen, batch, step, key) -> state, scalars.

    Args:
      policy: gives the structure; its arrays are not used.
      loss: `loss_on_tokens` or `loss_on_images`.
      options: of the optimiser and the loss.
      mesh: the batch is split over its data axes.
      state_shardings: shardings of `TrainState`, which is donated.
    """
    optimizer = make_optimizer(optim_options(options))
    abstract = policy_io.abstract_policy(policy.config, dtype=policy.vae.quant_conv.dtype)
    abstract.mar.remat = options.gradient_checkpointing

    def step_fn(state: TrainState, frozen: Flat, batch, step, key):
        def objective(params):
            model = policy_io.replace(abstract, merge_lora(params | frozen))
            scalars = loss(model, batch, jax.random.fold_in(key, step), options)
            return scalars["loss"], scalars

        grads, scalars = jax.grad(objective, has_aux=True)(state.params)
        updates, moments = optimizer.update(grads, state.moments, state.params)
        params = jax.tree.map(lambda p, u: p + u, state.params, updates)
        # Averages move once per optimiser step, as the parameters do.
        average = ema_update(state.ema, params, step // options.accumulate, **options.ema)
        return TrainState(params, average, moments), scalars

    return jax.jit(
        step_fn,
        donate_argnums=0,
        out_shardings=(state_shardings, parallel.replicated(mesh)),
    )


def optim_options(options: FinetuneOptions) -> OptimOptions:
    """The optimiser's part of the options."""
    return OptimOptions(
        lr=options.lr,
        warmup_steps=options.warmup,
        total_steps=max(1, options.steps // options.accumulate),
        b1=options.betas[0],
        b2=options.betas[1],
        weight_decay=options.weight_decay,
        clip_norm=options.clip_norm or None,
        accumulate=options.accumulate,
    )


def plan_phases(arrays: Flat, options: FinetuneOptions) -> tuple[Phase, ...]:
    """Which parameters train from which step on; with LoRA, adapters in place of their targets."""
    freeze, unfreeze = list(options.freeze), dict(options.unfreeze_at)
    if any(path.startswith("proprio_head/") for path in arrays):
        freeze.append("proprio_head")  # Stage 2's loss is the action head's alone
    if options.use_lora:
        freeze += [
            path.removeprefix(PREFIX).removesuffix("/a")
            for path in arrays
            if path.startswith(PREFIX) and path.endswith("/a")
        ]
        unfreeze["0"] = (*unfreeze.get("0", ()), PREFIX.rstrip("/"))
    return training_phases(
        arrays,
        task_modes=("policy_model",),
        freeze_encoder=options.freeze_encoder,
        freeze=freeze,
        unfreeze_at=unfreeze,
    )


def trunk_is_frozen(phases: tuple[Phase, ...], options: FinetuneOptions) -> bool:
    """Whether nothing before the action head ever trains, so that its tokens can be cached."""
    trained = {path for phase in phases for path in phase.trainable}
    return not options.dropout and all(path.startswith("action_head/") for path in trained)


class Trainer:
    """The loop: phases, resumable states, and batches by step."""

    def __init__(self, policy: Policy, options: FinetuneOptions, mesh: Mesh, seed: int):
        self.policy, self.options, self.mesh = policy, options, mesh
        self.key = jax.random.key(seed)
        arrays = policy_io.flatten(policy)
        if options.use_lora:
            arrays |= init_lora(arrays, options.lora_targets, options.lora_rank, self.key)
        self.phases = plan_phases(arrays, options)
        self.shardings = parallel.shardings_for(arrays, mesh)
        self.arrays = parallel.on_mesh(arrays, self.shardings)

    def start(self, phase: Phase, before: TrainState | None = None) -> TrainState:
        """The state of a phase, carrying over what trained before."""
        params = {k: self.arrays[k] for k in phase.trainable}
        if before is not None:
            params |= before.params
        # Copies, because the step donates its state and the frozen arrays live on.
        params = {k: jnp.array(v, copy=True) for k, v in params.items()}
        optimizer = make_optimizer(optim_options(self.options))
        shardings = parallel.shardings_for(jax.eval_shape(optimizer.init, params), self.mesh)
        moments = jax.jit(optimizer.init, out_shardings=shardings)(params)
        average = {k: jnp.array(v, copy=True) for k, v in params.items()}
        if before is not None:
            moments = carry_optimizer_state(before.moments, moments)
            average |= before.ema
        return TrainState(params, average, moments)

    def run(
        self, loss: Callable, batches: Callable[[int, int], Iterator], *, folder, metrics
    ) -> Policy:
        """Trains to `options.steps` and returns the policy with averaged parameters.

        Args:
          loss: `loss_on_tokens` or `loss_on_images`.
          batches: (start, stop) -> the batches of those steps, as host arrays.
          folder: holds resumable states, by phase.
          metrics: a MetricsWriter.
        """
        total, state = self.options.steps, None
        with metrics.progress(total, unit="steps", desc="") as bar:
            for index, phase in enumerate(self.phases):
                stop = self.phases[index + 1].start if index + 1 < len(self.phases) else total
                state = self.start(phase, state)
                with Checkpoints(folder / f"phase{index}") as checkpoints:
                    step = phase.start
                    if (restored := checkpoints.restore(state)) is not None:
                        step, state = restored
                        if step < stop:
                            metrics.say(f"goes on at step {step} of {total}")
                    bar.update(step - phase.start)
                    steps = range(step, min(stop, total))
                    state = self._phase(loss, state, steps, batches, checkpoints, metrics, bar)
        return self.result(state)

    def _phase(self, loss, state, steps, batches, checkpoints, metrics, bar) -> TrainState:
        options, step, stop = self.options, steps.start, steps.stop
        shardings = jax.tree.map(lambda x: x.sharding, state)
        run_step = make_step(self.policy, loss, options, self.mesh, shardings)
        frozen = {k: v for k, v in self.arrays.items() if k not in state.params}
        recent = []
        for batch in batches(step, stop):
            batch = parallel.shard_batch(self.mesh, batch)
            state, scalars = run_step(state, frozen, batch, jnp.int32(step), self.key)
            recent.append(scalars)
            step += 1
            if step % options.log_every == 0 or step == stop:
                means = {k: float(np.mean([s[k] for s in recent])) for k in recent[0]}
                metrics.log(step, **means)
                bar.update(len(recent), loss=means["loss"])
                recent = []
            if step % options.checkpoint_every == 0 or step == stop:
                checkpoints.save(step, state)
        return state

    def result(self, state: TrainState) -> Policy:
        """The policy with the averaged parameters, adapters merged."""
        arrays = merge_lora(self.arrays | state.ema)
        return policy_io.replace(policy_io.abstract_policy(self.policy.config), arrays)


def token_batches(data: Mapping[str, np.ndarray], options: FinetuneOptions, seed: int):
    """Batches of cached samples by step; each process takes its slice of the global batch."""
    count = len(next(iter(data.values())))
    batch = min(options.batch, count)

    def batches(start: int, stop: int) -> Iterator:
        for step in range(start, stop):
            rows = _own(epoch_rows(seed, count, batch, step, step + 1)[0])
            yield {k: v[rows] for k, v in data.items()}

    return batches


def image_batches(
    reader: source.WindowReader, strips: source.Strips, options: FinetuneOptions, seed: int
):
    """Batches of windows by step, read from the replay buffer; `strips` are single windows."""
    batch = min(options.batch, len(strips))

    def batches(start: int, stop: int) -> Iterator:
        for step in range(start, stop):
            rows = _own(epoch_rows(seed, len(strips), batch, step, step + 1)[0])
            yield source.single_windows(reader.read(strips, rows))

    return batches


def _own(rows: np.ndarray) -> np.ndarray:
    return np.array_split(rows, jax.process_count())[jax.process_index()]


def cached_tokens(folder) -> dict[str, np.ndarray]:
    """The tokens and actions of an activation cache."""
    return ActivationCache.open(folder).load(["z", "actions"])


def chosen_episodes(buffer, data: source.DataOptions, options: FinetuneOptions, seed: int):
    """The training episodes that `data_fraction` picks, as a mask."""
    train, _ = source.split(buffer, data)
    return select_episodes(buffer.episode_ends, options.data_fraction, seed, mask=train)


def check_reuse(phases: tuple[Phase, ...], options: FinetuneOptions) -> None:
    """Raises UserError when cached tokens are asked for, but the trunk trains."""
    if options.reuse_cache and not trunk_is_frozen(phases, options):
        raise UserError(
            "config.finetune.reuse_cache takes tokens that capture has cached, but parameters "
            "before the head train too: set config.finetune.freeze=('mar',) and no dropout, or "
            "reuse_cache=False"
        )
