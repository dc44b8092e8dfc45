"""The base class of diffusion heads: training loss and sampling, given a network.

Heads differ in their condition and their network; the MLP head is in `mlp_head.py`, the grafted one
in `grafted_head.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from uva_jax.models import diffusion

# Modulations are computed for as many steps at once as have so many rows: enough for a product at
# full speed, and few enough that a batch of observations takes no more memory than one.
_ROWS_AT_ONCE = 1024


def steps_at_once(rows: int) -> int:
    """Returns for how many sampling steps the modulations of so many rows are computed at once."""
    return max(1, _ROWS_AT_ONCE // rows)


class DiffusionHead(nnx.Module):
    """The base class of diffusion heads: training loss and sampling, given a network.

    A subclass has `condition(z)`, called once per observation; `modulations(t, condition)`, called
    for many steps at once; and `step(x, modulations, context)`.
    `config` has `channels, train_steps, sampling_steps, clip`.
    """

    shared_timestep = False  # one timestep for all rows of a sample, or one per row

    def context(self, condition: jax.Array):
        """Returns what every step reads of the condition beside the modulations."""
        del condition

    def denoise(self, x: jax.Array, t: jax.Array, condition: jax.Array) -> jax.Array:
        """Predicts eps and variance (b, rows, 2 channels).

        Args:
          x: (b, rows, channels) noisy rows.
          t: (b,) or, unless `shared_timestep`, (b, rows) original timesteps.
          condition: the result of `condition`.
        """
        return self.step(x, self.modulations(t, condition), self.context(condition))

    def loss(
        self,
        target: jax.Array,
        z: jax.Array,
        *,
        reference: tuple[DiffusionHead, jax.Array] | None = None,
        **options,
    ) -> dict[str, jax.Array]:
        """Computes `loss_given` from tokens z (b, tokens, z_channels) in place of the condition.

        `reference` is another head and its tokens (b, tokens, z_channels).
        """
        if reference is not None:
            other, tokens = reference
            reference = other, other.condition(tokens)
        return self.loss_given(target, self.condition(z), reference=reference, **options)

    def loss_given(
        self,
        target: jax.Array,
        condition: jax.Array,
        *,
        key: jax.Array | None = None,
        t: jax.Array | None = None,
        noise: jax.Array | None = None,
        draws: int = 1,
        x0_weight: float = 0.0,
        reference: tuple[DiffusionHead, jax.Array] | None = None,
    ) -> dict[str, jax.Array]:
        """Computes the diffusion loss per row.

        Args:
          target: (b, n, channels) in [-1, 1].
          condition: `condition(z)`.
          key: for draws that are not given.
          t: (b,) or (b, n) timesteps.
          noise: (b, n, channels).
          draws: pairs of timestep and noise for each sample; its condition is computed once. With
            more than one, `t`, `noise` and the result have a leading axis draws * b.
          x0_weight: if above 0, the largest weight of a timestep's squared error in "loss"; up to
            it, the weight makes the error of eps that of the predicted rows (x0).
          reference: another head with the same channels and train_steps, and its condition, to
            compare with on the same noise.

        Returns:
          {"mse", "vb", "loss"}, each (draws * b, n), and with a reference "distance", the mean
          squared error between the outputs of the two heads (eps and variance).
        """
        schedule = diffusion.make_schedule("", self.config.train_steps)

        def drawn(x):
            return jnp.concatenate([x] * draws) if draws > 1 else x

        target, condition = drawn(target), drawn(condition)
        if t is None:
            shape = target.shape[:1] if self.shared_timestep else target.shape[:2]
            t = jax.random.randint(jax.random.fold_in(key, 0), shape, 0, len(schedule))
        if noise is None:
            noise = jax.random.normal(jax.random.fold_in(key, 1), target.shape)
        x_t = diffusion.q_sample(schedule, target, t, noise)
        output = self.denoise(x_t, t, condition)
        found = self.errors(schedule, output, target, x_t, t, noise)
        if x0_weight:
            weight = jnp.minimum(diffusion.x0_factor(schedule, t), x0_weight)
            weight = weight if t.ndim == 2 else weight[:, None]
            found["loss"] = found["loss"] + (weight - 1) * found["mse"]
        if reference is not None:
            other, other_condition = reference
            expected = other.denoise(x_t, t, drawn(other_condition))
            found["distance"] = jnp.mean((output - expected) ** 2, axis=-1)
        return found

    def errors(self, schedule, output, target, x_t, t, noise) -> dict[str, jax.Array]:
        """Computes the loss of each row of an output; arguments of `diffusion.training_losses`."""
        return diffusion.training_losses(schedule, output, target, x_t, t, noise)

    def guided(self, x: jax.Array, modulations, context, cfg: float | jax.Array) -> jax.Array:
        """Does a `step` with guidance; x is taken from the first, conditional half of the batch.

        As in the original, eps is guided in both halves, and each half keeps its variance.
        """
        x = jnp.concatenate([x[: x.shape[0] // 2]] * 2, axis=0)
        eps, rest = jnp.split(self.step(x, modulations, context), 2, axis=-1)
        cond_eps, free_eps = jnp.split(eps, 2, axis=0)
        half = free_eps + cfg * (cond_eps - free_eps)
        return jnp.concatenate([jnp.concatenate([half, half], axis=0), rest], axis=-1)

    def sample(self, z: jax.Array, **options):
        """Samples rows given tokens.

        Args:
          z: (b, tokens, z_channels); with `guided` the first half of the batch is conditional,
            the second unconditional.
          options: of `sample_given`.

        Returns:
          see `sample_given`.
        """
        return self.sample_given(self.condition(z), **options)

    def sample_given(
        self,
        condition: jax.Array,
        *,
        key: jax.Array | None = None,
        noise: jax.Array | None = None,
        temperature: float = 1.0,
        cfg: float | jax.Array = 1.0,
        guided: bool = False,
        sampler: str = "ancestral",
        eta: float | None = None,
        sampling_steps: str | None = None,
        return_steps: bool = False,
    ):
        """Samples rows given `condition(z)`.

        Args:
          condition: of the tokens; with `guided` the second half of the batch is unconditional.
          key: for the noise, if it is not given.
          noise: (K + 1, b, n, channels) loop noise, b halved with `guided`.
          temperature: factor on each step's noise.
          cfg: guidance scale, used with `guided`.
          sampler: "ancestral", "ddim" or "dpm++".
          eta: a number chooses DDIM with so much noise.
          sampling_steps: respacing in place of the config's.
          return_steps: see `diffusion.sample_loop`.

        Returns:
          (b, n, channels); with `guided` both halves hold the guided result.
        """
        schedule = diffusion.make_schedule(sampling_steps or self.config.sampling_steps)
        context = self.context(condition)
        if noise is None:
            rows = (len(condition) // (2 if guided else 1), self.rows(condition))
            noise = jax.random.normal(key, (len(schedule) + 1, *rows, self.config.channels))
        if guided:
            noise = jnp.concatenate([noise, noise], axis=1)

        def prepare(t):
            return self.modulations(t[:, None, None], condition[None])

        def denoise(x, modulations):
            if guided:
                return self.guided(x, modulations, context, cfg)
            return self.step(x, modulations, context)

        return diffusion.sample_loop(
            schedule,
            denoise,
            noise,
            prepare=prepare,
            at_once=steps_at_once(noise.shape[1] * noise.shape[2]),
            temperature=temperature,
            clip=self.config.clip,
            sampler=sampler,
            eta=eta,
            return_steps=return_steps,
        )
