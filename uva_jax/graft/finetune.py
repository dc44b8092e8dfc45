"""Stage 2: fine-tuning of the whole graft on part of the data, with a parameter mask.

Training has phases of one loop (`train.loop`) in which more and more parameters train. The loop's
state holds no frozen parameters: they have no gradient, optimiser state or weight decay and do not
change. If everything before the head is frozen, batches are cached tokens and a step runs only the
head; otherwise they are cached latents, because the VAE never trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from uva_jax.data import source
from uva_jax.data.episodes import select_episodes
from uva_jax.data.windows import Strips
from uva_jax.graft import fixed
from uva_jax.graft.held_out import errors_of
from uva_jax.models import surgery
from uva_jax.models.layers import sub_key
from uva_jax.models.lora import PREFIX, init_lora, merge_lora
from uva_jax.models.policy import Policy
from uva_jax.runtime import parallel
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections_graft import FinetuneOptions
from uva_jax.storage.sample_store import Rows, SampleStore
from uva_jax.train import loop
from uva_jax.train.best import Best, Keep
from uva_jax.train.loop import Flat, Loss, part
from uva_jax.train.order import epoch_rows
from uva_jax.train.trainable import Phase, training_phases

_TEACHER = "teacher"  # prefix of the teacher's parameters among the frozen ones


def loss_on_tokens(
    policy: Policy,
    batch: Mapping,
    key: jax.Array,
    options: FinetuneOptions,
    teacher: Policy | None = None,
) -> dict[str, jax.Array]:
    """Computes the action head's loss on cached tokens: "z" (b, s, c), "actions" (b, n, a).

    The arrays of `fixed.of_tokens` can replace "z".

    Returns:
      scalars: "mse" and "vb" of the diffusion loss; with a teacher "distance", the mean squared
      error between its output and the graft's; and "loss", the training loss.
    """
    condition, known = fixed.conditions(policy, teacher, batch)
    return _head_losses(policy, batch["actions"], condition, key, options, teacher, known)


def loss_on_images(
    policy: Policy,
    batch: Mapping,
    key: jax.Array,
    options: FinetuneOptions,
    teacher: Policy | None = None,
) -> dict[str, jax.Array]:
    """Computes the same from windows: an observation for `Policy.condition`, and "action".

    The observation holds images, or latents of `capture.latent_strips` in their place.
    """
    cond, streams = policy.condition(batch, key=sub_key(key, 0))
    cond = jax.lax.stop_gradient(cond)
    z = policy.video_tokens(cond, streams, key=sub_key(key, 1) if options.dropout else None)
    condition, known = policy.action_head.condition(z), None
    if teacher is not None:
        known = teacher.action_head.condition(teacher.video_tokens(cond, streams, key=None))
    actions = policy.normalize("action", batch["action"])
    return _head_losses(policy, actions, condition, sub_key(key, 2), options, teacher, known)


def _head_losses(policy, actions, condition, key, options, teacher, known) -> dict[str, jax.Array]:
    reference = None if teacher is None else (teacher.action_head, known)
    rows = policy.action_head.loss_given(
        actions,
        condition,
        key=key,
        draws=options.noise_draws,
        x0_weight=options.x0_weight,
        reference=reference,
    )
    means = {k: jnp.mean(v) for k, v in rows.items()}
    if teacher is not None:
        means["loss"] += options.teacher_weight * means["distance"]
    return means


def graft_loss(
    policy: Policy, loss: Callable, options: FinetuneOptions, teacher: Policy | None = None
) -> Loss:
    """Returns the loss of a batch for `loop.run_loop`, with adapters merged into their targets.

    Args:
      policy: gives the structure; its arrays are not used.
      loss: `loss_on_tokens` or `loss_on_images`.
      options: of the loss.
      teacher: gives the teacher's structure, if the loss compares with it; the frozen arrays then
        include `teacher_arrays`.
    """
    abstract = surgery.abstract_policy(
        policy.config, dtype=policy.dtype, remat=options.gradient_checkpointing
    )
    if teacher is not None:
        reference = surgery.abstract_policy(teacher.config, dtype=teacher.dtype)

    def objective(params: Flat, frozen: Flat, batch, key, step):
        del step
        arrays, held = _policy_arrays(params, frozen), None
        if teacher is not None:
            known = part(frozen, _TEACHER)
            rest = {k: v for k, v in arrays.items() if not k.startswith("action_head/")}
            held = surgery.replace(reference, rest | known)
        with jax.default_matmul_precision(options.matmul_precision):
            scalars = loss(surgery.replace(abstract, arrays), batch, key, options, held)
        return scalars["loss"], scalars

    return objective


def _policy_arrays(params: Flat, frozen: Flat) -> Flat:
    """Returns the graft's arrays, with adapters merged, from its trained and its frozen ones."""
    own = {k: v for k, v in frozen.items() if not k.startswith(f"{_TEACHER}/")}
    return merge_lora(params | own)


def teacher_arrays(arrays: Flat, phases: Sequence[Phase]) -> Flat:
    """Returns the teacher's arrays (or shapes) that the graft does not share.

    They are those of its head and of everything that trains in any phase.
    """
    trained = {path for phase in phases for path in phase.trainable}
    trained |= {k.removeprefix(PREFIX).removesuffix("/a") for k in trained if k.startswith(PREFIX)}
    return {
        f"{_TEACHER}/{k}": v
        for k, v in arrays.items()
        if k.startswith("action_head/") or k in trained
    }


def plan_phases(arrays: Flat, options: FinetuneOptions) -> tuple[Phase, ...]:
    """Returns the phases of training; with LoRA, adapters train in place of their targets."""
    freeze, unfreeze = list(options.freeze), dict(options.unfreeze_at)
    if any(path.startswith("proprio_head/") for path in arrays):
        freeze.append("proprio_head")  # Stage 2 has only the action head's loss
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


class Trainer:
    """A graft's parameters on the mesh, and the phases in which they train.

    Attributes:
      phases: which parameters train from which step on.
      tokens: batches hold cached tokens, because nothing before the head trains; else windows.
      source: what batches hold, in words.
      loss: of such a batch, for `loop.run_loop`.
    """

    def __init__(
        self,
        policy: Policy,
        options: FinetuneOptions,
        mesh: Mesh,
        seed: int,
        teacher: Policy | None = None,
    ):
        """Prepares training; policies without arrays are enough for `lower`.

        Args:
          policy: the assembled graft.
          options: of the training.
          mesh: (data, fsdp, tensor).
          seed: of all draws.
          teacher: for the distance to the teacher's output (`FinetuneOptions.teacher_weight`).

        Raises:
          UserError: `reuse_cache` is set, but parameters before the head train.
        """
        self.policy, self.options, self.mesh, self.seed = policy, options, mesh, seed
        abstract = surgery.is_abstract(policy)
        read, place = surgery.flatten, parallel.on_mesh
        if abstract:
            read, place = surgery.shapes, parallel.shapes_on_mesh
        arrays, held = read(policy), {}
        if options.use_lora:

            def adapters(arrays):
                key = jax.random.key(seed)
                return init_lora(arrays, options.lora_targets, options.lora_rank, key)

            arrays |= jax.eval_shape(adapters, arrays) if abstract else adapters(arrays)
        self.phases = plan_phases(arrays, options)
        self.tokens = fixed.trunk_is_frozen(self.phases, options)
        self.source = "cached tokens" if self.tokens else "frames"
        if options.cache_latents and not self.tokens:
            self.source = "cached latents"
        if self.source == "frames":
            # XLA's CPU backend makes the VAE's convolutions a hundred times slower inside a loop.
            self.options = dataclasses.replace(options, steps_per_call=1)
        check_reuse(self.phases, options)
        self.arrays = place(arrays, parallel.shardings_for(arrays, mesh))
        if teacher is not None:
            held = teacher_arrays(read(teacher), self.phases)
        self.held = place(held, parallel.shardings_for(held, mesh))
        self._structure = surgery.abstract_policy(policy.config, dtype=policy.dtype)
        loss = loss_on_tokens if self.tokens else loss_on_images
        self.loss = graft_loss(policy, loss, options, teacher)

    def parts(self, phase: Phase) -> tuple[Flat, Flat]:
        """Returns the arrays that train in a phase, and the other arrays that the loss uses."""
        params = {k: self.arrays[k] for k in phase.trainable}
        return params, {k: v for k, v in self.arrays.items() if k not in params} | self.held

    def lower(self, phase: Phase, batch: Mapping) -> jax.stages.Lowered:
        """Lowers one step of a phase, as `run` compiles it, from the shapes of a whole batch."""
        return loop.lower_step(
            self.loss,
            *self.parts(phase),
            batch,
            options=self.options,
            mesh=self.mesh,
            keep=self.options.keep_best,
        )

    def run(
        self,
        batches: Callable[[int], Mapping],
        *,
        folder: Path,
        metrics,
        held_out: Mapping[str, np.ndarray] | None = None,
    ) -> tuple[Policy, Best | None]:
        """Trains to `options.steps` and returns the policy with averaged parameters.

        With `options.interpolation` below 1, the checks judge and the result has parameters
        between those before training and the averaged ones.

        Args:
          batches: step -> this process's share of its batch, as host arrays.
          folder: holds resumable states, by phase.
          metrics: writer of progress and messages.
          held_out: windows for `held_out.errors_of`; the policy is then the one of the check with
            the smallest errors (see `best.better`), without them that of the last step.

        Returns:
          the policy, and with `held_out` the result of the checks.

        Raises:
          UserError: training diverged.
        """
        total, state, errors = self.options.steps, None, None
        every = self.options.check_every or -(-total // 10)
        before = {}
        if self.options.interpolation < 1:
            before = {k: self.arrays[k] for phase in self.phases for k in phase.trainable}
        if held_out is not None:
            errors = errors_of(self._build, held_out, self.mesh, self.seed)
            count = len(next(iter(held_out.values())))
        stops = [*(phase.start for phase in self.phases[1:]), total]
        for index, (phase, stop) in enumerate(zip(self.phases, stops, strict=True)):
            params, frozen = self.parts(phase)
            state = loop.run_loop(
                self.loss,
                loop.start_state(params, self.options, self.mesh, state),
                frozen,
                batches,
                options=self.options,
                mesh=self.mesh,
                seed=self.seed,
                folder=folder / f"phase{index}",
                metrics=metrics,
                steps=range(phase.start, min(stop, total)),
                keep=errors and Keep(partial(errors, frozen, before), count, every),
            )
        found = state.ema if state.best is None else state.best.params
        arrays = self._result({}, self.arrays, self.arrays | found)
        return surgery.replace(surgery.abstract_policy(self.policy.config), arrays), state.best

    def _build(self, frozen: Flat, before: Flat, params: Flat) -> Policy:
        return surgery.replace(self._structure, self._result(frozen, before, params))

    def _result(self, frozen: Flat, before: Flat, params: Flat) -> Flat:
        """Returns the policy's arrays, given trained parameters before and after training."""
        found, share = _policy_arrays(params, frozen), self.options.interpolation
        if share == 1.0:
            return found
        start = _policy_arrays({}, frozen | params | before)
        return {k: start[k] + share * (x - start[k]) for k, x in found.items()}


def token_batches(data: Mapping[str, np.ndarray | Rows], options: FinetuneOptions, seed: int):
    """Returns step -> this process's share of the batch of cached samples.

    Raises:
      UserError: there are too few samples for a batch.
    """
    rows_of = _batch_rows(len(next(iter(data.values()))), options, seed)

    def batches(step: int) -> dict[str, np.ndarray]:
        rows = rows_of(step)
        return {k: v[rows] for k, v in data.items()}

    return batches


def image_batches(reader: source.WindowReader, strips: Strips, options: FinetuneOptions, seed: int):
    """Returns step -> this process's share of the batch of windows.

    Args:
      reader: reads the windows.
      strips: of one window each.
      options: of the training.
      seed: of the order.

    Raises:
      UserError: there are too few windows for a batch.
    """
    rows_of = _batch_rows(len(strips), options, seed)
    return lambda step: source.single_windows(reader.read(strips, rows_of(step)))


def _batch_rows(count: int, options: FinetuneOptions, seed: int) -> Callable[[int], np.ndarray]:
    parts = options.accumulate
    batch = min(options.batch, count // parts * parts)
    if not batch:
        raise UserError(
            f"there are {count} windows, too few for a batch of config.finetune.accumulate="
            f"{parts} parts: raise config.finetune.data_fraction or lower accumulate"
        )

    def rows(step: int) -> np.ndarray:
        chosen = epoch_rows(seed, count, batch, step, step + 1)[0]
        return np.array_split(chosen, jax.process_count())[jax.process_index()]

    return rows


def cached_tokens(folder: Path) -> Mapping[str, np.ndarray | Rows]:
    """Returns the tokens and actions of an activation cache; large ones stay on disk."""
    return SampleStore.open(folder).arrays(["z", "actions"])


def chosen_episodes(buffer, data: source.DataOptions, options: FinetuneOptions, seed: int):
    """Returns the mask of the training episodes that `data_fraction` selects."""
    train, _ = source.split(buffer, data)
    return select_episodes(buffer.episode_ends, options.data_fraction, seed, mask=train)


def check_reuse(phases: tuple[Phase, ...], options: FinetuneOptions) -> None:
    """Raises UserError if `reuse_cache` is set, but parameters before the head train."""
    if options.reuse_cache and not fixed.trunk_is_frozen(phases, options):
        raise UserError(
            "config.finetune.reuse_cache trains on tokens that capture has cached, but parameters "
            "before the head train too: set config.finetune.freeze=('mar',) and dropout=False, or "
            "reuse_cache=False"
        )
